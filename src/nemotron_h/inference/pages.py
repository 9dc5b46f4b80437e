"""Pages of keys and values: their numbers, and how many hold each. One that nobody holds is free."""

from collections.abc import Sequence

from nemotron_h.errors import CapacityError


class Pages:
    """So many pages, none held yet."""

    def __init__(self, count: int) -> None:
        self.free = list(range(count))[::-1]
        self.holders = [0] * count

    def take(self, count: int) -> list[int]:
        """Free pages, held once from now on."""
        if count > len(self.free):
            raise CapacityError(f"pages: {count} are needed; {len(self.free)} of {len(self.holders)} are free")
        taken = [self.free.pop() for _ in range(count)]
        for page in taken:
            self.holders[page] = 1
        return taken

    def share(self, pages: Sequence[int]) -> None:
        """One more holds each of these."""
        for page in pages:
            assert self.holders[page], page
            self.holders[page] += 1

    def give(self, pages: Sequence[int]) -> list[int]:
        """One less holds each of these; those that are free now."""
        freed = []
        for page in pages:
            assert self.holders[page], page
            self.holders[page] -= 1
            if not self.holders[page]:
                freed.append(page)
        self.free += freed
        return freed
