"""A conversation that is held: its tokens, and the snapshots on their way, which stay until it is closed.

    session = engine.session(answer)            # or of ids
    session.save("talk.session")                # later, in another process: engine.restore("talk.session")
    engine.add(session.request(max_tokens=64))  # goes on, and reads nothing again

The snapshots lie in the tree of `prefix.py`, for everybody who begins with the same tokens; a session only holds them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemotron_h.config.sampling import Sampling
from nemotron_h.config.settings import from_mapping, to_mapping
from nemotron_h.errors import RequestError
from nemotron_h.inference import session_file
from nemotron_h.inference.memory import Memory
from nemotron_h.inference.prefix import Kind, Snapshot
from nemotron_h.inference.request import PRIVATE, Request, private_salt
from nemotron_h.model import fingerprint
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.text.tokenizer import Tokenizer

INEXACT = "inexact "  # in salts that only one restored session has
MOST = 4  # snapshots that a session holds beside the first: where its last turns ended and parted


class Sessions:
    """Makes sessions out of what an engine remembers, and out of files."""

    def __init__(self, memory: Memory, model: Hybrid, tokenizer: Tokenizer | None, *, exact: bool) -> None:
        """exact: one arithmetic holds here."""
        self.memory, self.model, self.tokenizer, self.exact = memory, model, tokenizer, exact
        self._versions = fingerprint.Versions(model)
        self._prints: dict[str, Any] = {}
        self._prints_of: fingerprint.Versions | None = None

    def held(
        self,
        ids: Sequence[int],
        *,
        salt: str,
        prompt_tokens: int | None = None,
        sampling: Sampling | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> "Session":
        """Of these ids, as far as they are known. prompt_tokens: of them; None: all."""
        way = self.memory.prefixes.along(np.array(ids, dtype=np.int64), salt)
        if self.exact:  # not those on the way through a long prompt, nor where its reading was stopped
            way = [one for one in way if one is way[-1] or (one.answers and one.kind is not Kind.TAIL)]
        return Session(
            sessions=self,
            ids=[int(token) for token in ids],
            prompt_tokens=len(ids) if prompt_tokens is None else prompt_tokens,
            sampling=sampling,
            salt=salt,
            extra=extra or {},
            held=[*way[:-MOST][:1], *way[-MOST:]],
        )

    def write(self, session: "Session", path: Path) -> None:
        header = session_file.Header(
            snapshots=[(snapshot.node.end, snapshot.kind) for snapshot in session.snapshots],
            prompt_tokens=session.prompt_tokens,
            sampling=to_mapping(session.sampling) if session.sampling is not None else None,
            model=self.prints,
            arithmetic=self.arithmetic,
            inexact=not session.exact,
            extra=dict(session.extra),
        )
        ids = torch.tensor(session.ids, dtype=torch.int64)
        session_file.write(path, header, {"ids": ids} | self.memory.saved(session.snapshots))

    def restored(self, path: Path, *, salt: str, inexact: bool) -> "Session":
        header, tensors = session_file.read(path)
        if not session_file.check_agrees(path, header, self.prints, self.arithmetic, inexact=inexact):
            salt = private_salt(INEXACT)
        ids = tensors["ids"]
        places = [(place, Kind(kind)) for place, kind in header.snapshots]
        self.memory.load(ids.numpy(), salt, places, tensors)
        sampling = None if header.sampling is None else from_mapping(Sampling, header.sampling)
        return self.held(
            ids.tolist(), salt=salt, prompt_tokens=header.prompt_tokens, sampling=sampling, extra=header.extra
        )

    @property
    def arithmetic(self) -> dict[str, Any]:
        """What a session must agree in, or be marked."""
        return {**fingerprint.arithmetic(self.model), "holds": self.exact}

    @property
    def present(self) -> bool:
        """Are the weights those that were when this was made? Else its snapshots are of no use."""
        return self._versions.hold

    @property
    def prints(self) -> dict[str, Any]:
        """Fingerprints that a session must agree in. The first time with these weights, a pass over all of them."""
        if self._prints_of is None or not self._prints_of.hold:
            self._prints_of, self._prints = (
                fingerprint.Versions(self.model),
                {
                    "shape": fingerprint.shape(self.model.config),
                    "weights": fingerprint.weights(self.model),
                    "precision": self.model.precision,
                    "keys_values": fingerprint.keys_values(self.model),
                    "tokenizer": self.tokenizer.digest if self.tokenizer is not None else None,
                },
            )
        return self._prints


@dataclass(eq=False, kw_only=True)
class Session:
    """Tokens, and what is known of them."""

    sessions: Sessions
    ids: list[int]
    prompt_tokens: int  # of them; those after were drawn
    sampling: Sampling | None  # how, where an answer is under way
    salt: str
    extra: Mapping[str, Any]  # the caller's own plain values
    held: list[Snapshot]  # on the way, the deepest last
    open: bool = True

    def __post_init__(self) -> None:
        for snapshot in self.held:
            snapshot.pins += 1

    @property
    def snapshots(self) -> list[Snapshot]:
        """Those that are there: all that are held, unless the weights have changed, or an audit failed."""
        return [snapshot for snapshot in self.held if snapshot.kept] if self.sessions.present else []

    @property
    def exact(self) -> bool:
        """Else it was computed by another arithmetic, and nobody else reuses it."""
        return not self.salt.startswith(f"{PRIVATE}{INEXACT}")

    @property
    def places(self) -> list[int]:
        """Positions that an answer can begin at without reading anything."""
        return [snapshot.node.end for snapshot in self.snapshots if snapshot.answers]

    def request(self, **options: Any) -> Request:
        """A request that goes on from here; where an answer was under way, with its next draw. options: fields of
        Request, such as max_tokens, ends, stop and logprobs, which a session does not hold."""
        given = {"sampling": self.sampling} if self.sampling is not None else {}
        prompt, generated = self.ids[: self.prompt_tokens], self.ids[self.prompt_tokens :]
        return Request(**{"ids": prompt, "generated": generated, "cache_salt": self.salt, **given, **options})

    def save(self, path: str | Path) -> None:
        """Write it to a file, whole or not at all. Raises: CapacityError where the disk is too small."""
        self._check_open()
        self.sessions.write(self, Path(path))

    def fork(self) -> "Session":
        """Another one that holds the same."""
        self._check_open()
        return Session(
            sessions=self.sessions,
            ids=list(self.ids),
            prompt_tokens=self.prompt_tokens,
            sampling=self.sampling,
            salt=self.salt,
            extra=self.extra,
            held=list(self.held),
        )

    def rewind(self, position: int) -> None:
        """Go back to one of `places`; what came after is let go. Raises: RequestError where it is none of them."""
        self._check_open()
        if position not in self.places:
            known = ", ".join(map(str, self.places)) or "none"
            raise RequestError(f"position: must be a place with a snapshot; got {position}; there are {known}")
        for snapshot in self.held:
            snapshot.pins -= snapshot.node.end > position
        self.held = [snapshot for snapshot in self.held if snapshot.node.end <= position]
        self.ids = self.ids[:position]
        self.prompt_tokens = min(self.prompt_tokens, position)

    def close(self) -> None:
        """Hold nothing any more: its snapshots stay as long as they are worth it."""
        if self.open:
            for snapshot in self.held:
                snapshot.pins -= 1
        self.open = False

    def _check_open(self) -> None:
        if not self.open:
            raise RequestError("session: must be open; it was closed; make another of its ids")
