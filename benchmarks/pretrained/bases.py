"""What a pretrained base and a task of it are."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tabom.data.prompts import PromptSet


class Task(NamedTuple):
    """Prompts with their answers, apart for training and for testing, the settings of the sampler, and the costs.

    The seconds are those of one core and serve for an estimate, until the runs have their own.
    """

    train: PromptSet
    test: PromptSet
    sampler: dict[str, int | bool]  # fields of `SamplerConfig`
    seconds_to_collect: int  # at all paces
    seconds_of_run: int  # training and measures


class Base(NamedTuple):
    """A model, its tasks by name, and the sizes of a training."""

    prepare: Callable[[Path], None]  # writes a folder that `tabom.load` opens
    tasks: Callable[[], dict[str, Task]]
    max_steps: int
    warmup_steps: int
    batch_size: int
    learning_rate: float
    seconds_to_prepare: int  # of one core
