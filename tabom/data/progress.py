"""Progress of long work: a bar in a terminal, and a line every half minute elsewhere, such as in a log file."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Event, Thread

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
        with Lines() as lines:
            lines.begin(title, total)
            yield lines.update


class Lines:
    """Prints a line on stderr every `LINE_SECONDS`, from `begin` to the end of the context.

    A thread prints them, because a step of a large model may take longer than that.
    """

    def __init__(self) -> None:
        self.ended = Event()

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()

    def begin(self, title: str, total: int, done: int = 0) -> None:
        """Begins with work of which a part is done already."""
        self.title, self.total, self.done, self.done_before = title, total, done, done
        self.begun = time.monotonic()
        Thread(target=self.print_lines, daemon=True).start()

    def update(self, done: int, title: str) -> None:
        """Notes how much is done, and the title of the next lines."""
        self.done, self.title = done, title

    def print_lines(self) -> None:
        """Prints until the end."""
        while not self.ended.wait(LINE_SECONDS):
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """What is done, the time that it took, and the time that is left at this rate."""
        done, made = self.done, self.done - self.done_before
        taken = time.monotonic() - self.begun
        left = f", {clock(taken * (self.total - done) / made)} left" if made else ""
        return f"{self.title}: {done} of {self.total} ({done / self.total:.0%}) after {clock(taken)}{left}"


def clock(seconds: float) -> str:
    """`0:03:20`."""
    return str(timedelta(seconds=round(seconds)))
