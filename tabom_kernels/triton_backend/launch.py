"""Launch parameters: one table, no autotuning, so that a result never depends on a timing.

The vocabulary is cut into chunks of 16 KiB whatever the number of rows: a few rows fill the GPU like many do, and
the statistics of a row are bitwise the same in every batch.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
import triton

CHUNK_BYTES = 16384
CHUNK_WARPS = 4
"""A thread holds 64 logits in bf16 and has its eight 128-bit loads in flight at once."""

CHUNK_LANES = 32 * CHUNK_WARPS
"""Threads of a chunk, and at least as many as the logits that each of them holds."""

MERGE_WARPS = 1
"""The partial results of a row are at most a few hundred."""

DRAW_WARPS = 4
"""A draw needs noise for each segment of the vocabulary, about a thousand, and for the columns of one."""

FILTER_BITS = 4
FILTER_WAYS = 2**FILTER_BITS
"""Thresholds that a pass of the search for top-k or top-p tries at once."""

FILTER_WARPS = 8
"""Of such a pass, which holds each logit and its weight."""

PAIR_BLOCK = 256
PAIR_WARPS = 1
"""Rows that one row is paired with at a time."""

PAIR_TILES = 4
LONG = 4096
"""From so many rows on, a sequence may be long, and that many programs share the partners of each row."""

SUM_BLOCK = 1024
SUM_SEQUENCES = 16
SUM_WARPS = 4
"""Of the one program that sums over all rows: so many at a time, of at most so many sequences."""


def options(warps: int) -> dict[str, int | bool]:
    """What every launch says beside its arguments.

    Multiplications and additions are fused, which newer versions of Triton no longer do by themselves.
    """
    return {"num_warps": warps, "enable_fp_fusion": True}


power_of_2 = cache(triton.next_power_of_2)
"""The next one; Triton's own takes microseconds, to be callable from kernels too."""


def chunk_columns(columns: int, itemsize: int) -> int:
    """Columns of a chunk of a vocabulary of `columns` logits of `itemsize` bytes: a power of 2, at least 8."""
    return min(CHUNK_BYTES // itemsize, max(8, power_of_2(columns)))


def pair_tiles(rows: int) -> int:
    """Programs that share a row's partners in a batch of so many rows."""
    return PAIR_TILES if rows >= LONG else 1


def alignment(start: int, row_stride: int, itemsize: int) -> int:
    """Elements that every row's start is a multiple of: those of 16 bytes, or 1.

    Triton sees for itself whether a pointer is divisible by 16, but a row stride only in elements, not in bytes.
    """
    elements = 16 // itemsize
    return elements if start % 16 == 0 and row_stride % elements == 0 else 1


def setting(value: float | torch.Tensor | None) -> float | torch.Tensor | None:
    """What a kernel is given for a setting: a number that the host knows, or the place of one that it does not.

    Of whole numbers Triton would compile some anew.
    """
    if isinstance(value, torch.Tensor):
        return value.item() if value.is_cpu else value
    return None if value is None else float(value)


def on_its_device(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Launches on the GPU of the first argument, which need not be the current one."""

    @wraps(launcher)
    def launch(first: torch.Tensor, *arguments: Any) -> Any:
        with torch.cuda.device_of(first):
            return launcher(first, *arguments)

    return launch
