"""A lock that the processes of one job hold together, so that no other job writes to the same output."""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol


class Processes(Protocol):
    """The interface of a job's processes that a lock needs; `tabom.sampling.ranks.Ranks` implements it."""

    rank: int
    size: int

    def signal(self, key: str) -> None:
        """Counts towards what `wait_for(key)` waits for."""

    def wait_for(self, key: str, signals: int) -> None:
        """Blocks until so many processes have called `signal(key)`."""


@contextmanager
def locked(
    path: Path, processes: Processes, name: str, remedy: str, prepare: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Holds a lock in all processes of a job; it ends with the last of them, also if they are killed.

    Args:
        path: file to lock; its folder is made.
        name: what the error calls the output.
        remedy: what a user can do instead of waiting for the other job.
        prepare: called in the first process before any other goes on.

    Raises:
        ValueError: another job holds the lock.
    """

    def take(kind: int, lock: BinaryIO) -> None:
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{name}: another job is writing to it; wait for it, or {remedy}") from error

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as lock:
        if processes.rank == 0:
            take(fcntl.LOCK_EX, lock)
            prepare()
            take(fcntl.LOCK_SH, lock)  # shared by the processes of this job
            processes.signal("locked")
        else:
            processes.wait_for("locked", 1)
            take(fcntl.LOCK_SH, lock)
        yield
