"""One experiment of the lab: a base's own right answers, a model post-trained on them, and what it can do then."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback, set_seed

from tabom.data.prompts import PromptSet
from tabom.data.trajectories import Trajectory
from tabom.evaluation.answers import answer
from tabom.lab.model import BASE_PATH
from tabom.lab.tasks import Addition, Reversing, Sorting, Subtraction, Sudoku, Task
from tabom.models.diffusion_model import DiffusionModel
from tabom.models.loading import load
from tabom.sampling.collect import to_trajectory
from tabom.sampling.sampler import Completion, SamplerConfig
from tabom.training.collator import Example, TrajectoryDataset
from tabom.training.config import TabomConfig
from tabom.training.trainer import TabomTrainer
from tabom.training.windows import example_rng

SHIPPED = "shipped"
WEAK_TASKS: dict[str, Task] = {"subtraction": Subtraction(), "sudoku": Sudoku(givens=4)}
"""What the base does badly, the sudoku at several tokens a step, and post-training is to improve."""
STRONG_TASKS: tuple[Task, ...] = (Addition(), Sorting(), Reversing(), Sudoku(givens=6))
"""What it does well, and post-training is not to harm."""


class Method(NamedTuple):
    """An objective as the trainer takes it."""

    settings: dict[str, Any]  # fields of `TabomConfig`
    shuffles_pairs: bool = False
    on_truth: bool = False  # the right answers to all prompts, instead of the base's own


def both_windows(size: int | str) -> dict[str, Any]:
    """M = W = `size`."""
    return {"supervised_window": size, "rank_window": size}


METHODS = {
    "NELBO, truth of all prompts": Method({"objective": "nelbo"}, on_truth=True),
    "NELBO": Method({"objective": "nelbo"}),
    "NELBO, exact weights": Method({"objective": "nelbo_exact"}),
    "NELBO with ranking": Method({"objective": "nelbo", "rank_weight": 1.0}),
    "window": Method({"objective": "window", **both_windows(2)}),
    "TABOM as released": Method({"objective": "tabom", "skip_last_step": True, **both_windows(2)}),
    "TABOM": Method({"objective": "tabom", **both_windows(2)}),
    "whole path": Method({"objective": "window", **both_windows("all")}),
    "TABOM, whole path": Method({"objective": "tabom", **both_windows("all")}),
    "whole path, pairs shuffled": Method({"objective": "tabom", **both_windows("all")}, shuffles_pairs=True),
}


def other_tasks(weak: Task) -> list[Task]:
    """The strong tasks, but for the weak one's own kind."""
    return [task for task in STRONG_TASKS if task.name != weak.name]


def base_path(base: str) -> str | Path:
    """Where a base is: the model that ships with the package, or a folder."""
    return BASE_PATH if base == SHIPPED else base


def right_answers(
    base: DiffusionModel, prompts: PromptSet, length: int, attempts: int = 1, seed: int = 0
) -> list[Trajectory]:
    """The base's right answers, one a prompt, one token a step, lowest entropy first.

    Args:
        length: of the answers, tokens.
        attempts: 1: the greedy answer. More: as many samples at temperature 1 with seeds seed, seed + 1, ..., of which
            the first right one is kept.
    """
    waiting = list(range(len(prompts.prompts)))
    found: dict[int, Trajectory] = {}
    for attempt in range(attempts):
        sampler = SamplerConfig(max_new_tokens=length, temperature=float(attempts > 1), seed=seed + attempt)
        asked = replace(prompts, prompts=[prompts.prompts[i] for i in waiting])
        for index, completion in zip(waiting, answer(base, asked, sampler), strict=True):
            trajectory = to_trajectory(base, prompts, index, completion, sampler.policy)
            if prompts.is_correct(index, trajectory.response):
                found[index] = trajectory
        waiting = [index for index in waiting if index not in found]
    return [found[index] for index in sorted(found)]


def ground_truth(base: DiffusionModel, prompts: PromptSet) -> list[Trajectory]:
    """The right answers to all prompts, also to those that the base answered wrongly; they decode left to right."""
    trajectories = []
    for prompt, response in zip(prompts.prompts, prompts.answers, strict=True):
        token_ids = base.tokenizer(response, add_special_tokens=False).input_ids
        trajectories.append(Trajectory(prompt, response, token_ids, list(range(len(token_ids)))))
    return trajectories


class ShuffledPairs(Dataset):
    """The same examples with the steps of the ranked tokens in random order: what a ranking does without the order."""

    def __init__(self, dataset: TrajectoryDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Example:
        prompt, response, target = self.dataset[key]
        steps = target.steps.copy()
        ranked = steps >= 0
        steps[ranked] = example_rng(self.dataset.seed + 1, *key).permutation(steps[ranked])
        return prompt, response, target._replace(steps=steps)

    def asks_anything(self) -> bool:
        """As before: no token loses its label."""
        return self.dataset.asks_anything()


class AfterStep(TrainerCallback):
    """Calls back with the number of steps taken, after every one."""

    def __init__(self, call: Callable[[int], None]) -> None:
        self.call = call

    def on_step_end(self, args: object, state: Any, control: object, **kwargs: object) -> None:
        self.call(state.global_step)


def post_train(
    base: str,
    method: Method,
    data: Sequence[Trajectory],
    folder: Path,
    *,
    max_steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    after_step: Callable[[int, DiffusionModel], None] = lambda step, model: None,
) -> DiffusionModel:
    """Trains a fresh copy of the base; hinge of margin 0.1 nats, cosine schedule after 20 steps of warm-up.

    Args:
        after_step: is given the number of steps taken and the model.
    """
    set_seed(seed)
    family = load(base_path(base))
    arguments = TabomConfig(
        output_dir=str(folder),
        form="hinge",
        margin=0.1,
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        weight_decay=0.01,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,  # large enough for the tiny model, and the same figures on every machine
        seed=seed,
        **method.settings,
    )
    trainer = TabomTrainer(
        model=family.model,
        args=arguments,
        train_dataset=data,
        processing_class=family.tokenizer,
        callbacks=[AfterStep(lambda step: after_step(step, family))],
    )
    if method.shuffles_pairs:
        trainer.train_dataset = ShuffledPairs(trainer.train_dataset)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    family.model.eval()
    return family


def forward_passes(completions: Sequence[Completion]) -> np.ndarray:
    """Forward passes that each answer took: its steps."""
    return np.array([max(completion.decoding_order) + 1 for completion in completions])
