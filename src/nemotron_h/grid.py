"""The absolute grid: where every sequence is cut for arithmetic, counted from its own first token.

One arithmetic rests on it: a token's numbers come from products whose shapes and order follow from the token's place
on this grid, never from how its prompt was cut or who else is in the call.
"""

CHUNK = 64  # tokens of the scan: the recurrent state is stored at its multiples
BLOCK = 256  # keys of one attention product, a multiple of CHUNK
PIECE = 64  # rows of one task of attention: it divides BLOCK, so that a piece lies in one block
# At other counts than multiples of these, CPU kernels take other paths through a matrix product, with other bits:
ROWS = 4  # its rows
DEPTH = 8  # the channels that it sums over (seen in float32 on three threads and more)
AHEAD = 15  # tokens that may be read before it is known that they come, and taken back


def round_up(count: int, multiple: int) -> int:
    """The least multiple that is not under count."""
    return -(-count // multiple) * multiple
