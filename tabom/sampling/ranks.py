"""The processes of one job that answer a prompt set together: each takes the next attempt that nobody has."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count

from rich.progress import Progress
from torch.distributed import HashStore, PrefixStore, Store, rendezvous

LOOK_SECONDS = 0.2

_jobs = count()


class Ranks:
    """This process among those that torchrun or accelerate started, and what they tell each other.

    They meet in the key-value store of their launcher and share nothing else: a process that is slow holds up no other,
    and what was taken and not finished is free again when the launcher starts anew. Every process makes its `Ranks` in
    the same order as the others.

    Raises:
        ValueError: WORLD_SIZE says that there are others, and MASTER_ADDR or MASTER_PORT does not say where.
    """

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        store: Store = next(rendezvous("env://"))[0] if self.size > 1 else HashStore()
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)  # a launcher may keep its store when it starts anew
        self.store = PrefixStore(f"tabom/{start}/{next(_jobs)}", store)

    @property
    def is_first(self) -> bool:
        """Whether this process does what only one may do."""
        return self.rank == 0

    def say(self, word: str) -> None:
        """Lets those go on that wait to hear this word from this process."""
        self.store.set(f"{word}/{self.rank}", "")

    def hear(self, word: str, *speakers: int) -> None:
        """Waits until these ranks, by default all, have said the word."""
        self.store.wait([f"{word}/{rank}" for rank in speakers or range(self.size)])

    def add(self, name: str, amount: int) -> int:
        """Adds to a number that all share; returns what it is now."""
        return self.store.add(name, amount)

    def count(self, verdicts: Iterable[bool | None]) -> Counter[bool | None]:
        """Adds verdicts to those of all; returns how many of each there are now."""
        here = Counter(verdicts)
        return Counter({each: self.add(f"correct={each}", here[each]) for each in (True, False, None)})

    def take(self, total: int) -> Iterator[int]:
        """Numbers below `total`, each to that process alone which asks for it first."""
        while (number := self.add("taken", 1) - 1) < total:
            yield number

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Callable[[int, str], None]]:
        """A bar of what all have finished, on the first process, which waits at the end until that is all.

        Gives a function that counts what this process has finished, and retitles the bar.
        """
        with Progress(disable=not self.is_first) as progress:
            bar = progress.add_task(title, total=total)

            def advance(finished: int, title: str) -> None:
                progress.update(bar, completed=self.add("finished", finished), description=title)

            yield advance
            while self.is_first and (finished := self.add("finished", 0)) < total:
                progress.update(bar, completed=finished)
                time.sleep(LOOK_SECONDS)
