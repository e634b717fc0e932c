"""Python threads that each run PyTorch operations of their own, on one core.

A PyTorch operation that all cores share ends at a barrier, where each core waits for the slowest. If other processes
use the cores too, that wait lasts for milliseconds, and the closed forms have ten operations a chunk. Threads with
chunks of their own wait for each other once, at the end. PyTorch releases Python's global lock (GIL) during an
operation.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import Any, TypeVar

import torch

T = TypeVar("T")

MAX_THREADS = 8
"""The most Python threads; more of them would wait for the GIL. With more cores, each thread uses several."""


def thread_count() -> int:
    """How many threads `in_threads` has: `torch.get_num_threads()`, but at most MAX_THREADS."""
    return min(torch.get_num_threads(), MAX_THREADS)


def in_threads(work: Callable[[Any], T], shares: Sequence[Any]) -> list[T]:
    """[work(share) for share in shares], each in a thread of its own; PyTorch's threads are divided among them.

    A single share is computed by the caller's thread. Autograd does not record the work.

    Raises:
        Exception: the error of the first share that failed, after all shares have ended.
    """
    if len(shares) == 1:
        return [work(shares[0])]
    is_inference = torch.is_inference_mode_enabled()

    def task(share: Any) -> T:
        with torch.inference_mode(is_inference), torch.no_grad():  # both modes belong to a thread
            return work(share)

    threads = pool(os.getpid(), torch.get_num_threads())
    tasks = [threads.submit(task, share) for share in shares]
    wait(tasks)
    return [task.result() for task in tasks]


@cache
def pool(process: int, cores: int) -> ThreadPoolExecutor:
    """The threads of a process, which together use `cores` cores. A fork has none of its parent's threads."""
    count = min(cores, MAX_THREADS)
    all_begun = threading.Barrier(count + 1)

    def begin() -> None:
        torch.get_num_threads()  # otherwise a thread's first operation resets the number below
        torch.set_num_threads(cores // count)
        all_begun.wait()

    threads = ThreadPoolExecutor(count, "tabom_kernels", begin)
    for _ in range(count):
        threads.submit(int)  # starts a thread, because none is idle yet
    all_begun.wait()
    torch.set_num_threads(cores)  # the number belongs to a thread, and new threads inherit it
    return threads
