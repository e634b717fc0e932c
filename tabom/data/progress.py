"""Progress of long work: a bar in a terminal, and a line every half minute elsewhere, such as in a log file."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import Progress

LINE_SECONDS = 30.0
"""Between two lines."""


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """Shows progress on stderr. Yields a function that takes how much of `total` is done, and the new title."""
    if sys.stderr.isatty():
        with Progress(console=Console(stderr=True)) as bars:
            bar = bars.add_task(title, total=total)
            yield lambda done, title: bars.update(bar, completed=done, description=title)
    else:
        yield Lines(total).show


class Lines:
    """Prints a line on stderr when `LINE_SECONDS` have passed since the last one or the start."""

    def __init__(self, total: int, begun_with: int = 0) -> None:
        self.total, self.begun_with = total, begun_with
        self.begun = self.printed = time.monotonic()

    def show(self, done: int, title: str) -> None:
        """Prints what is done, the time it took, and the time left at this rate, if it is time."""
        now = time.monotonic()
        if now - self.printed < LINE_SECONDS:
            return
        self.printed = now
        taken = now - self.begun
        made = done - self.begun_with
        left = f", {clock(taken * (self.total - done) / made)} left" if made else ""
        line = f"{title}: {done} of {self.total} ({done / self.total:.0%}) after {clock(taken)}{left}"
        print(line, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """`0:03:20`."""
    return str(timedelta(seconds=round(seconds)))
