"""Shows the progress bars of transformers only for long waits."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging

BAR_DELAY_SECONDS = 5.0
"""How long a wait must last before its bar appears."""


@contextmanager
def bars_of_long_waits() -> Iterator[None]:
    """Within this context, bars such as "Loading weights" and "Writing model shards" appear after `BAR_DELAY_SECONDS`.

    A small model is read in a moment and needs no bar; a large one takes minutes. Download bars come from the hub's
    client and are not affected.
    """
    before = logging.set_tqdm_hook(
        lambda factory, args, kwargs: factory(*args, **{"delay": BAR_DELAY_SECONDS, **kwargs})
    )
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)
