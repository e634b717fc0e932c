"""SIGTERM, which a cluster sends before it takes a machine, ends a command with status 143 and loses no finished work.

SIGKILL follows after a grace period, under torchrun of 30 seconds.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType


class Terminated(SystemExit):
    """Ends the process with status 143 (128 + SIGTERM).

    Args:
        message: what was finished, and what is left.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(128 + signal.SIGTERM)
        self.message = message


class Termination:
    """SIGTERM in this process: it raises `Terminated` at once, or is only noted while work is finished."""

    is_requested = False

    def raised(self) -> AbstractContextManager[None]:
        """Lets SIGTERM raise `Terminated` in the main thread."""
        return self.handled(at_once=True)

    def deferred(self) -> AbstractContextManager[None]:
        """Lets the first SIGTERM only set `is_requested`; a second one raises `Terminated`."""
        return self.handled(at_once=False)

    @contextmanager
    def handled(self, at_once: bool) -> Iterator[None]:
        """Handles SIGTERM in this process, not in its forks: a pool ends its processes by SIGTERM.

        Without effect outside the main thread, where Python handles no signals.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        owner = os.getpid()

        def handle(number: int, frame: FrameType | None) -> None:
            if os.getpid() != owner:
                os._exit(128 + number)
            if at_once or self.is_requested:
                raise Terminated
            self.is_requested = True

        before = signal.signal(signal.SIGTERM, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


termination = Termination()
"""That of this process."""
