"""Threads that each run PyTorch ops of their own, on one core.

An op that all cores share ends at a barrier, where each waits for the slowest. If other processes use the cores too, a
wait lasts until the scheduler lets that one run, milliseconds, and the closed forms have ten ops a chunk. Threads that
share nothing meet once, at the end; PyTorch's ops release the GIL.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import Any, TypeVar

import torch

T = TypeVar("T")

MOST = 8
"""Threads of Python: more of them would wait for the GIL. On more cores than that, each has several for its ops."""


def thread_count() -> int:
    """How many shares of work `in_threads` takes on: `torch.get_num_threads()`, up to 8."""
    return min(torch.get_num_threads(), MOST)


def in_threads(work: Callable[[Any], T], shares: Sequence[Any]) -> list[T]:
    """[work(share) for share in shares], each in a thread of its own, with the caller's PyTorch threads shared out.

    One share is worked on by the caller itself. Autograd does not see what is done.

    Raises:
        Exception: what the first share that fails has raised, once all have ended.
    """
    if len(shares) == 1:
        return [work(shares[0])]
    is_inference = torch.is_inference_mode_enabled()

    def task(share: Any) -> T:
        with torch.inference_mode(is_inference), torch.no_grad():  # both are a thread's own
            return work(share)

    threads = pool(os.getpid(), torch.get_num_threads())
    tasks = [threads.submit(task, share) for share in shares]
    wait(tasks)
    return [task.result() for task in tasks]


@cache
def pool(process: int, cores: int) -> ThreadPoolExecutor:
    """The threads of a process, as they do not live on in its forks, that together use so many cores."""
    count = min(cores, MOST)
    all_begun = threading.Barrier(count + 1)

    def begin() -> None:
        torch.get_num_threads()  # a thread's first op, else, would set it to the caller's
        torch.set_num_threads(cores // count)
        all_begun.wait()

    threads = ThreadPoolExecutor(count, "tabom_kernels", begin)
    for _ in range(count):
        threads.submit(int)  # starts a thread, as none is idle yet
    all_begun.wait()
    torch.set_num_threads(cores)  # it is each thread's own, and that of threads yet to come
    return threads
