"""What a pretrained base and a task of it are."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tabom.data.prompts import PromptSet


class Task(NamedTuple):
    """Prompts with their answers, apart for training and for testing, and the settings of the sampler."""

    train: PromptSet
    test: PromptSet
    sampler: dict[str, int | bool]  # fields of `SamplerConfig`


class Base(NamedTuple):
    """A model, its tasks by name, and the sizes and costs of a run.

    The seconds are those of one core and serve for an estimate, until the runs have their own.
    """

    prepare: Callable[[Path], None]  # writes a folder that `tabom.load` opens
    tasks: Callable[[], dict[str, Task]]
    max_steps: int
    batch_size: int
    learning_rate: float
    seconds_to_prepare: int
    seconds_to_collect: int  # at all paces
    seconds_of_run: int  # training and measures
