"""Limits the time and memory of code that comes with a file, such as a chat template."""

import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

CHECK_SECONDS = 0.02
"""Seconds between two checks. A chat template usually finishes long before the first one."""


@contextmanager
def limited(what: str, seconds: float, size: int) -> Iterator[None]:
    """Ends a piece of Python that runs longer than `seconds` or raises the process's peak of memory by more than `size`
    bytes.

    On Linux and macOS a timer interrupts the code every `CHECK_SECONDS` seconds to check both limits. Python handles a
    signal between two of its own instructions, so a single call into C is not interrupted: the memory that it took
    is noticed after it returns, and memory that the system cannot give raises a MemoryError. Signals reach the main
    thread only; in any other thread nothing is limited.

    Raises:
        ValueError: a limit was reached; names `what`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    started = time.monotonic()
    peak_before = peak_memory()

    def check(*_: object) -> None:
        if peak_memory() - peak_before > size:
            stop(f"{what} takes more than {size >> 20} MiB")
        if time.monotonic() - started > seconds:
            stop(f"{what} takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, check)
    signal.setitimer(signal.ITIMER_REAL, CHECK_SECONDS, CHECK_SECONDS)
    try:
        yield
    except MemoryError as error:
        raise ValueError(f"{what} takes more memory than there is") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def stop(problem: str) -> NoReturn:
    """Stops the timer, so that it does not interrupt the cleaning up, and raises a ValueError."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    raise ValueError(problem)


def peak_memory() -> int:
    """The most memory that this process has held so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
