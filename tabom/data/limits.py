"""Limits on what runs on behalf of a file from elsewhere."""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PAGE = resource.getpagesize()


@contextmanager
def limited(what: str, seconds: float, size: int) -> Iterator[None]:
    """Ends what takes longer than `seconds`, or more than `size` bytes on top of what the process has.

    Signals reach the main thread only; in another one nothing is limited. The memory is limited where /proc tells how
    much the process has.

    Raises:
        ValueError: a limit was reached; names `what`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")
    if statm.exists():
        resource.setrlimit(resource.RLIMIT_AS, (int(statm.read_text().split()[0]) * PAGE + size, hard))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except TimeoutError as error:
        raise ValueError(f"{what} takes more than {seconds} s") from error
    except MemoryError as error:
        raise ValueError(f"{what} takes more than {size >> 20} MiB") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def stop(*_: object) -> None:
    """Handler of the alarm."""
    raise TimeoutError
