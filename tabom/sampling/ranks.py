"""The processes of one job, which share a prompt set: each takes the next attempt that no other has taken."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count

from torch.distributed import HashStore, PrefixStore, Store, rendezvous

from tabom.data.progress import progress

POLL_SECONDS = 0.2
"""Between two updates of the progress bar while the first process waits for the others."""

_jobs = count()


class Ranks:
    """This process's rank among the processes that torchrun or accelerate started, and their shared counters.

    The processes share only the launcher's key-value store, so a slow process does not delay the others, and attempts
    that were taken but not finished are free again after the launcher restarts. Every process must create its `Ranks`
    objects in the same order.

    Raises:
        ValueError: WORLD_SIZE is above 1, and MASTER_ADDR or MASTER_PORT is not set.
    """

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        store: Store = next(rendezvous("env://"))[0] if self.size > 1 else HashStore()
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)  # a launcher may keep its store across restarts
        self.store = PrefixStore(f"tabom/{start}/{next(_jobs)}", store)

    @property
    def is_first(self) -> bool:
        """Whether this process does the work that exactly one process has to do."""
        return self.rank == 0

    def signal(self, key: str) -> None:
        """Releases the ranks that are blocked in `wait_for(key)` on this one."""
        self.store.set(f"{key}/{self.rank}", "")

    def wait_for(self, key: str, *ranks: int) -> None:
        """Blocks until these ranks, by default all, have called `signal(key)`."""
        self.store.wait([f"{key}/{rank}" for rank in ranks or range(self.size)])

    def add(self, name: str, amount: int) -> int:
        """Adds to a counter that all processes share and returns its new value."""
        return self.store.add(name, amount)

    def count(self, verdicts: Iterable[bool | None]) -> Counter[bool | None]:
        """Adds verdicts to the shared counters and returns how many of each kind all processes have now."""
        here = Counter(verdicts)
        return Counter({each: self.add(f"correct={each}", here[each]) for each in (True, False, None)})

    def take(self, total: int) -> Iterator[int]:
        """Yields numbers below `total`; each number goes to exactly one process, the first that asks for it."""
        while (number := self.add("taken", 1) - 1) < total:
            yield number

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Callable[[int, str], None]]:
        """Shows, on the first process, how much all processes have finished.

        Yields a function that adds to the finished work of this process and sets the title that is shown. At the end
        the first process waits until all work is finished.
        """
        if not self.is_first:
            yield lambda finished, title: self.add("finished", finished)
            return
        with progress(title, total) as show:
            shown = title

            def advance(finished: int, title: str) -> None:
                nonlocal shown
                shown = title
                show(self.add("finished", finished), shown)

            yield advance
            while (finished := self.add("finished", 0)) < total:
                show(finished, shown)
                time.sleep(POLL_SECONDS)
