"""Work on (N, V) logits a chunk of rows at a time, so that its fp32 buffers stay in the processor's cache.

On a CPU with several cores every thread takes the next chunk as soon as it has finished one. A problem that fits in one
chunk is one call without any of this.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from tabom_kernels.backends.reference import working_dtype
from tabom_kernels.backends.torch.threads import in_threads, thread_count

T = TypeVar("T")

CHUNK_ELEMENTS = 2**19
"""Elements of a chunk for each core. Two fp32 buffers take 4 MiB, which fits in a cache; in smaller chunks the threads
wait for Python's global lock as long as they compute."""


def map_row_chunks(work: Callable[..., T], buffers: int, logits: Tensor, *others: Tensor | None) -> list[T]:
    """[work(*tensors, *memory) for consecutive slices of the rows of the tensors], in the order of the rows.

    The tensors are (N, V) logits and others of N rows, or None. `memory` is `buffers` tensors like the slice of the
    logits, in the working dtype. They are allocated once for every thread, because fresh memory costs more than the
    arithmetic.
    """
    count, columns = logits.shape
    dtype = working_dtype(logits.dtype)
    if logits.numel() <= CHUNK_ELEMENTS // 2:
        return [work(logits, *others, *(torch.empty_like(logits, dtype=dtype) for _ in range(buffers)))]
    threads = threads_for(logits.device, logits.numel(), count)
    size = max(1, min(round(chunk_elements(logits.device, threads) / columns), -(-count // threads)))

    def allocate() -> list[Tensor]:
        return [logits.new_empty((min(size, count), columns), dtype=dtype) for _ in range(buffers)]

    starts = iter(range(0, count, size))
    results: dict[int, T] = {}

    def take_chunks(memory: list[Tensor]) -> None:
        for start in starts:
            rows = slice(start, min(start + size, count))
            parts = [None if x is None else x[rows] for x in (logits, *others)]
            results[start] = work(*parts, *(buffer[: rows.stop - start] for buffer in memory))

    in_threads(take_chunks, [allocate() for _ in range(threads)])
    return [results[start] for start in sorted(results)]


def pair_chunks(padded: Tensor) -> list[list[slice]]:
    """Slices of the first row index of (B, T, T) pairs, one list for each thread."""
    rows = padded.shape[1]
    threads = threads_for(padded.device, padded.numel() * rows, rows)
    size = max(1, chunk_elements(padded.device, threads) // max(padded.numel(), 1))
    bounds = [rows * i // threads for i in range(threads + 1)]
    return [
        [slice(start, min(start + size, end)) for start in range(begin, end, size)] for begin, end in pairwise(bounds)
    ]


def threads_for(device: torch.device, elements: int, rows: int) -> int:
    """How many threads take chunks of their own: one off the CPU, and one for little work.

    Waking the threads takes 150 µs, as long as the operations on 2^17 elements do.
    """
    is_much = device.type == "cpu" and elements > CHUNK_ELEMENTS // 2 and rows >= thread_count()
    return thread_count() if is_much else 1


def chunk_elements(device: torch.device, threads: int) -> int:
    """Elements of a chunk: what suits the caches of a CPU's cores, and 64 MiB of fp32 on another device."""
    return CHUNK_ELEMENTS * (torch.get_num_threads() // threads) if device.type == "cpu" else 2**24
