"""Ends a worker process whose launcher has died."""

import os
import signal
import sys
import threading
import time

CHECK_SECONDS = 10


def end_with_parent(interval: float = CHECK_SECONDS) -> None:
    """Ends this process soon after the one that started it has died, even while it waits for another rank.

    torchrun ends its workers when it is told to end, but not when it is killed; they would hold their GPUs and wait
    for each other for ever.

    Args:
        interval: seconds between two checks.
    """
    threading.Thread(target=watch, args=(os.getppid(), interval), daemon=True, name="end_with_parent").start()


def watch(parent: int, interval: float) -> None:
    """Waits until the parent process has died, then kills this process; never returns."""
    while os.getppid() == parent:
        time.sleep(interval)
    print(f"tabom: the launcher (process {parent}) has died: ending", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)  # a rank that waits in a collective handles no other signal
