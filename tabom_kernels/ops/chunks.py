"""Plans the chunks of rows whose logits are in memory at once."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor


class Chunk(NamedTuple):
    """Consecutive sequences, and their rows."""

    sequences: slice
    rows: slice


def plan_chunks(
    cu_seqlens: Tensor | None, rows: int, max_rows: int, lengths: Sequence[int] | None = None
) -> Iterator[Chunk]:
    """Chunks of consecutive sequences, or of any rows if `cu_seqlens` is None, with about equal numbers of rows.

    A chunk has at most `max_rows` rows, unless one sequence alone has more. Without `lengths` the offsets are read on
    the host, which waits for the device; a batch that is one chunk needs neither.
    """
    if cu_seqlens is None:
        yield from (Chunk(slice(0, 0), part) for part in even_slices(slice(0, rows), max_rows))
        return
    if rows <= max_rows:
        yield Chunk(slice(0, cu_seqlens.shape[0] - 1), slice(0, rows))
        return
    offsets = cu_seqlens.tolist() if lengths is None else [0, *accumulate(lengths)]
    first = 0
    while first < len(offsets) - 1:
        start, left = offsets[first], rows - offsets[first]
        share = left / max(1, ceil_div(left, max_rows))
        last = first + 1
        # Take one more sequence while it fits and brings the chunk nearer to its share, or while it has no rows.
        while last < len(offsets) - 1 and (
            offsets[last + 1] == offsets[last]
            or (offsets[last + 1] - start <= max_rows and (offsets[last] + offsets[last + 1]) / 2 - start <= share)
        ):
            last += 1
        yield Chunk(slice(first, last), slice(start, offsets[last]))
        first = last


def even_slices(whole: slice, max_size: int) -> list[slice]:
    """About equal parts of a range, of at most `max_size` each; an empty range is one part."""
    size = whole.stop - whole.start
    share = max(1, ceil_div(size, max(1, ceil_div(size, max_size))))
    return [
        slice(start, min(start + share, whole.stop))
        for start in range(whole.start, max(whole.stop, whole.start + 1), share)
    ]


def take_rows(values: Tensor, rows: slice) -> Tensor:
    """values[rows]; all rows are the tensor itself, because on a small problem a view costs as much as arithmetic."""
    return values if rows == slice(0, values.shape[0]) else values[rows]


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
