"""One experiment of the lab: a base's own right answers, a model post-trained on them, and what it can do then."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback, set_seed

from tabom.data.prompts import PromptSet
from tabom.data.trajectories import Trajectory
from tabom.evaluation.responses import complete
from tabom.lab.config import WEAK_TASK_NAMES, Method
from tabom.lab.tasks import Addition, Reversing, Sorting, Subtraction, Sudoku, Task
from tabom.models.diffusion_model import DiffusionModel
from tabom.models.loading import load
from tabom.sampling.collect import to_trajectory
from tabom.sampling.completions import Completion
from tabom.sampling.config import SamplerConfig
from tabom.training.config import TabomConfig
from tabom.training.examples import TrajectoryDataset
from tabom.training.objectives import Example
from tabom.training.trainer import TabomTrainer
from tabom.training.windows import example_rng

WEAK_TASKS: dict[str, Task] = dict(zip(WEAK_TASK_NAMES, (Subtraction(), Sudoku(givens=4)), strict=True))
"""What the base does badly, the sudoku at several tokens a step, and post-training is to improve."""
STRONG_TASKS: tuple[Task, ...] = (Addition(), Sorting(), Reversing(), Sudoku(givens=6))
"""What it does well, and post-training is not to harm."""


def other_tasks(weak: Task) -> list[Task]:
    """The strong tasks, without the one of the same name as the weak task."""
    return [task for task in STRONG_TASKS if task.name != weak.name]


def right_answers(
    base: DiffusionModel, prompts: PromptSet, length: int, attempts: int = 1, seed: int = 0, pace: int = 1
) -> list[Trajectory]:
    """The base's right responses, at most one for each prompt, decoded lowest entropy first.

    Args:
        length: of the responses, tokens.
        attempts: 1: the greedy response. More: as many samples at temperature 1 with seeds seed, seed + 1, ..., of
            which the first right one is kept.
        pace: tokens a step.
    """
    waiting = list(range(len(prompts.prompts)))
    found: dict[int, Trajectory] = {}
    for attempt in range(attempts):
        sampler = SamplerConfig(
            max_new_tokens=length, temperature=float(attempts > 1), seed=seed + attempt, tokens_per_step=pace
        )
        asked = replace(prompts, prompts=[prompts.prompts[i] for i in waiting])
        for index, completion in zip(waiting, complete(base, asked, sampler), strict=True):
            trajectory = to_trajectory(base, prompts, index, completion, sampler.policy)
            if prompts.is_correct(index, trajectory.response):
                found[index] = trajectory
        waiting = [index for index in waiting if index not in found]
    return [found[index] for index in sorted(found)]


def slowest_right(at_paces: Mapping[int, Sequence[Trajectory]]) -> list[Trajectory]:
    """For each prompt that was answered right at one of the paces, the response at the slowest of these.

    Args:
        at_paces: the right responses by tokens a step.
    """
    found: dict[str, Trajectory] = {}
    for pace in sorted(at_paces):
        for trajectory in at_paces[pace]:
            found.setdefault(str(trajectory.prompt), trajectory)
    return list(found.values())


def ground_truth(base: DiffusionModel, prompts: PromptSet) -> list[Trajectory]:
    """Trajectories of the right answers to all prompts, decoded left to right."""
    trajectories = []
    for prompt, response in zip(prompts.prompts, prompts.answers, strict=True):
        token_ids = base.tokenizer(response, add_special_tokens=False).input_ids
        trajectories.append(Trajectory(prompt, response, token_ids, list(range(len(token_ids)))))
    return trajectories


class ShuffledPairs(Dataset):
    """The same examples with shuffled steps of the ranked tokens, a control for the ranking."""

    def __init__(self, dataset: TrajectoryDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Example:
        example = self.dataset[key]
        steps = example.target.steps.copy()
        ranked = steps >= 0
        steps[ranked] = example_rng(self.dataset.seed + 1, *key).permutation(steps[ranked])
        return example._replace(target=example.target._replace(steps=steps))

    def has_targets(self) -> bool:
        """Unchanged, because shuffling keeps all labels."""
        return self.dataset.has_targets()


class AfterStep(TrainerCallback):
    """Calls a function with the number of steps taken after each step."""

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
    warmup_steps: int = 20,
    after_step: Callable[[int, DiffusionModel], None] = lambda step, model: None,
) -> DiffusionModel:
    """Trains a fresh copy of the base, with a cosine schedule after the warm-up.

    Args:
        after_step: is given the number of steps taken and the model.
    """
    set_seed(seed)
    diffusion_model = load(base)
    arguments = TabomConfig(
        output_dir=str(folder),
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=warmup_steps,
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
        model=diffusion_model.model,
        args=arguments,
        train_dataset=data,
        processing_class=diffusion_model.tokenizer,
        callbacks=[AfterStep(lambda step: after_step(step, diffusion_model))],
    )
    if method.shuffles_pairs:
        trainer.train_dataset = ShuffledPairs(trainer.train_dataset)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    diffusion_model.model.eval()
    return diffusion_model


def forward_passes(completions: Sequence[Completion]) -> np.ndarray:
    """Forward passes that each answer took: its steps."""
    return np.array([max(completion.decoding_order) + 1 for completion in completions])
