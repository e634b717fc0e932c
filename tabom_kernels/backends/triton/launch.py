"""Launch parameters, in one table and without autotuning, so that a result never depends on a timing.

The vocabulary is cut into chunks of 16 KiB, whatever the number of rows is. So a few rows fill the GPU as well as many,
and the statistics of a row are bitwise the same in every batch. Only the alignment of the rows to 16 bytes changes
them, by rounding.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
import triton

CHUNK_BYTES = 16384
CHUNK_WARPS = 4
"""Warps of a chunk. A thread holds 64 logits in bf16, and its eight 128-bit loads are in flight at once."""

CHUNK_LANES = 32 * CHUNK_WARPS
"""Threads of a chunk. They are at least as many as the logits that each of them holds, because `load_lane` spreads the
logits of one thread over all threads."""

MERGE_WARPS = 1
"""Warps that merge the partial results of a row, which are at most a few hundred."""

DRAW_WARPS = 4
"""Warps of a draw, which needs noise for each segment of the vocabulary, about a thousand, and for one segment."""

FILTER_BITS = 4
FILTER_WAYS = 2**FILTER_BITS
"""Thresholds that each pass of the search for top-k or top-p tries."""

FILTER_WARPS = 8
"""Warps of such a pass, which holds each logit and its weight."""

PAIR_BLOCK = 256
PAIR_WARPS = 1
"""The number of rows that a program compares its row with at a time."""

PAIR_TILES = 4
LONG_BATCH = 4096
"""In a batch of at least LONG_BATCH rows a sequence may be long, so PAIR_TILES programs share the partners of a row."""


def options(warps: int) -> dict[str, int | bool]:
    """The options of every launch.

    Multiplications and additions are fused, which newer versions of Triton no longer do by default.
    """
    return {"num_warps": warps, "enable_fp_fusion": True}


power_of_2 = cache(triton.next_power_of_2)
"""The next power of 2. Triton's function takes microseconds on the host, because kernels can call it too."""


def chunk_columns(columns: int, itemsize: int) -> int:
    """Columns of a chunk of a vocabulary of `columns` logits of `itemsize` bytes: a power of 2, at least 8."""
    return min(CHUNK_BYTES // itemsize, max(8, power_of_2(columns)))


def pair_tiles(rows: int) -> int:
    """How many programs share the partners of a row, in a batch of so many rows."""
    return PAIR_TILES if rows >= LONG_BATCH else 1


def alignment(logits: torch.Tensor) -> int:
    """The number of elements in 16 bytes if every row of (N, V) is contiguous from a multiple of 16 bytes on, else 1.

    Triton finds out whether a pointer is divisible by 16, but of a row stride it knows the elements and not the bytes.
    """
    elements = 16 // logits.itemsize
    row_stride, column_stride = logits.stride()
    is_aligned = logits.data_ptr() % 16 == 0 and row_stride % elements == 0
    return elements if is_aligned and column_stride == 1 else 1


def on_its_device(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a launcher use the GPU of its first argument, which need not be the current GPU."""

    @wraps(launcher)
    def launch(first: torch.Tensor, *arguments: Any) -> Any:
        with torch.cuda.device_of(first):
            return launcher(first, *arguments)

    return launch
