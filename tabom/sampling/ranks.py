"""The processes of one job, which share a prompt set: each takes the next attempt that no other has taken."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch.distributed import HashStore, Store

from tabom.data.progress import progress
from tabom.sampling.peers import POLL_SECONDS, peers
from tabom.sampling.termination import Terminated, termination

PROGRESS_SECONDS = 0.2
"""Between two updates of the progress bar while the first process waits for the others."""


class Ranks:
    """This process's rank among those of its job, and counters that they share.

    The processes share only a key-value store, so a slow process does not delay the others, and attempts that were
    taken but not finished are free again in the next job.

    Args:
        store: empty at the beginning of the job.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Store | None = None) -> None:
        self.rank, self.size, self.store = rank, size, store or HashStore()

    @property
    def is_first(self) -> bool:
        """Whether this process does the work that exactly one process has to do."""
        return self.rank == 0

    def signal(self, key: str) -> None:
        """Counts towards what `wait_for(key)` waits for."""
        self.add(key, 1)

    def wait_for(self, key: str, signals: int) -> None:
        """Blocks until so many processes have called `signal(key)`."""
        while self.add(key, 0) < signals:
            time.sleep(POLL_SECONDS)

    def add(self, name: str, amount: int) -> int:
        """Adds to a counter that all processes share and returns its new value."""
        return self.store.add(name, amount)

    def count(self, verdicts: Iterable[bool | None]) -> Counter[bool | None]:
        """Adds verdicts to the shared counters and returns how many of each kind all processes have now."""
        here = Counter(verdicts)
        return Counter({each: self.add(f"correct={each}", here[each]) for each in (True, False, None)})

    def take(self, total: int) -> Iterator[int]:
        """Yields numbers below `total`; each number goes to exactly one process, the first that asks for it.

        Ends early at SIGTERM.
        """
        while not termination.is_requested and (number := self.add("taken", 1) - 1) < total:
            yield number

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Callable[[int, str], None]]:
        """Shows, on the first process, how much all processes have finished.

        Yields a function that adds to the finished work of this process and sets the title that is shown. At the end
        the first process waits until all work is finished.

        Raises:
            Terminated: SIGTERM came in the first process and work is left; says how much.
        """
        if not self.is_first:
            with termination.deferred():
                yield lambda finished, title: self.add("finished", finished)
            return
        with progress(title, total) as show:
            shown = title

            def advance(finished: int, title: str) -> None:
                nonlocal shown
                shown = title
                show(self.add("finished", finished), shown)

            with termination.deferred():
                yield advance
            while (finished := self.add("finished", 0)) < total:
                if termination.is_requested:
                    raise Terminated(f"{total - finished} of {total} answers are left")
                show(finished, shown)
                time.sleep(PROGRESS_SECONDS)


@contextmanager
def joined(peer_timeout: float) -> Iterator[Ranks]:
    """The processes that torchrun or accelerate started, joined for one job; this process alone without them.

    Args:
        peer_timeout: seconds after which a process of which there is no sign of life ends the others, see `Peers`.

    Raises:
        Terminated: SIGTERM came while this process shared the work.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Ranks()
        return
    here = peers(peer_timeout)
    with here.jobs_store() as store:
        yield Ranks(here.rank, here.size, store)
    if termination.is_requested:  # the others go on with the work that this process left
        raise Terminated
