"""`tabom lab study`: objectives x learning rates x attempts x seeds x tasks x bases, one line of JSON a run.

Every finished run is a line of `results.jsonl`, so a killed study loses the runs in flight and a restart repeats
nothing; another grid with the same output adds to it. The runs are computed with one thread each.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers.utils import logging

from tabom.data.json_files import appending, drop_torn_line, finished_lines
from tabom.data.prompts import PromptSet
from tabom.data.trajectories import Trajectory, read_trajectories
from tabom.evaluation.metrics import entropy_by_step
from tabom.evaluation.replay import order_accuracy, replayed_tds
from tabom.evaluation.responses import accuracy, complete, grade
from tabom.lab.config import METHODS, PASS_SAMPLES, StudyConfig
from tabom.lab.experiment import (
    WEAK_TASKS,
    forward_passes,
    ground_truth,
    other_tasks,
    post_train,
    right_answers,
    slowest_right,
)
from tabom.models.diffusion_model import DiffusionModel
from tabom.models.loading import load
from tabom.models.writing import naming_full_disk
from tabom.sampling.collect import to_trajectory
from tabom.sampling.completions import cost_of
from tabom.sampling.config import SamplerConfig

BASE = "base"
"""The method name of a run without training."""
TOKENS_PER_STEP = (1, 2, 4)
ADAPTIVE = (
    *(("threshold", probability) for probability in (0.5, 0.7, 0.9, 0.98)),
    *(("entropy_bound", nats) for nats in (0.5, 0.1, 0.02)),
)


@dataclass(frozen=True)
class Run:
    """One point of the grid with all that its result depends on; the fields are those of `StudyConfig`."""

    base: str
    task: str
    method: str
    learning_rate: float
    attempts: int
    seed: int
    max_steps: int
    path_steps: tuple[int, ...]
    batch_size: int
    num_prompts: int
    num_problems: int
    num_path_problems: int
    num_other_problems: int
    num_pass_problems: int
    num_adaptive_problems: int
    num_replayed: int


SIZES = tuple(each.name for each in fields(Run))[6:]
"""Names of the fields that are equal in all runs of a grid, which are all after the seed."""


def grid(config: StudyConfig) -> Iterator[Run]:
    """The runs in order: the bases, then all methods of one seed, so that an unfinished study compares all methods."""
    sizes = {name: getattr(config, name) for name in SIZES} | {"path_steps": tuple(config.path_steps)}
    for base, task in product(config.model, config.task):
        yield Run(**sizes, base=base, task=task, method=BASE, learning_rate=0.0, attempts=0, seed=0)
    for base, task, attempts, seed, learning_rate, method in product(
        config.model, config.task, config.attempts, config.seeds, config.learning_rates, config.methods
    ):
        point = {"method": method, "learning_rate": learning_rate, "attempts": attempts, "seed": seed}
        yield Run(**sizes, base=base, task=task, **point)


def study(config: StudyConfig) -> Path:
    """Makes the runs of the grid that `results.jsonl` does not hold yet, and returns its path."""
    logging.disable_progress_bar()
    console = Console()
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    path = output / "results.jsonl"
    path.touch()
    drop_torn_line(path)
    finished = {json.dumps(record["run"]) for record in finished_lines(path)}
    runs = [run for run in grid(config) if json.dumps(asdict(run)) not in finished]
    with appending(path) as append:
        for count, result in enumerate(results_of(runs, output, config.processes, config.save_models), start=1):
            append([result])
            console.print(f"{count} of {len(runs)}: {describe_result(result)}", highlight=False, soft_wrap=True)
    return path


def results_of(runs: list[Run], output: Path, processes: int, save_models: bool = False) -> Iterator[dict[str, Any]]:
    """Yields results in the order they finish."""
    if processes == 1:
        torch.set_num_threads(1)
        yield from (result_of(run, output, save_models) for run in runs)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for future in as_completed([pool.submit(result_of, run, output, save_models) for run in runs]):
            yield future.result()


def result_of(run: Run, output: Path, save_models: bool = False) -> dict[str, Any]:
    """Trains and measures: `run`, `kept` (trajectories), `path` (steps -> accuracies) and the measures at the end."""
    logging.disable_progress_bar()
    base = load(run.base)
    held_out = trajectories_of(run, "test", output, base)[: run.num_replayed]
    if run.method == BASE:
        return {"run": asdict(run), **measure(run, base, held_out)}
    path: dict[int, dict[str, str]] = {}

    def after_step(step: int, model: DiffusionModel) -> None:
        if step in run.path_steps:
            model.model.eval()  # until the trainer's next step
            path[step] = {"1 a step": weak_task(run, model)} | other_tasks_of(run, model, run.num_path_problems)

    method = METHODS[run.method]
    if method.on_truth:
        data = truth_of(run, base)
    else:
        data = slowest_right({pace: trajectories_of(run, "train", output, base, pace) for pace in method.paces})
    with tempfile.TemporaryDirectory() as work:  # nothing is kept of it, and runs at the same time need their own
        model = post_train(
            run.base,
            method,
            data,
            Path(work),
            max_steps=run.max_steps,
            batch_size=run.batch_size,
            learning_rate=run.learning_rate,
            seed=run.seed,
            after_step=after_step,
        )
    if save_models:
        folder = output / "models" / f"{run.method}, seed {run.seed}".replace(", ", "-").replace(" ", "-")
        with naming_full_disk(folder):
            model.model.save_pretrained(folder)
            model.tokenizer.save_pretrained(folder)
    return {"run": asdict(run), "kept": len(data), "path": path, **measure(run, model, held_out)}


def truth_of(run: Run, base: DiffusionModel) -> list[Trajectory]:
    """The right answers to all prompts of the run."""
    return ground_truth(base, WEAK_TASKS[run.task].prompt_set(run.num_prompts, "train", run.seed))


def trajectories_of(run: Run, split: str, output: Path, base: DiffusionModel, pace: int = 1) -> list[Trajectory]:
    """The base's right responses, collected once and stored; held-out ones are greedy, with seed 0.

    Args:
        pace: tokens a step.
    """
    if split == "test":
        run = replace(run, seed=0, attempts=1, num_prompts=run.num_problems)
    numbers = f"{run.num_prompts}-{run.attempts}-{run.seed}-{pace}"
    name = f"{Path(run.base).name}-{run.task}-{split}-{numbers}.jsonl"
    path = output / "trajectories" / name
    if not path.exists():
        task = WEAK_TASKS[run.task]
        prompts = task.prompt_set(run.num_prompts, split, run.seed)
        found = right_answers(base, prompts, task.response_length, run.attempts, seed=1000 * run.seed, pace=pace)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{name}.{os.getpid()}")
        unfinished.unlink(missing_ok=True)
        with appending(unfinished) as append:
            append(trajectory.to_record() for trajectory in found)
        unfinished.replace(path)
    return read_trajectories(path, base.tokenizer, base.model.config.vocab_size)[0]


def weak_task(run: Run, model: DiffusionModel) -> str:
    """Decodes one token a step; returns a digit for each problem, 1 = right."""
    task = WEAK_TASKS[run.task]
    prompts = task.prompt_set(run.num_problems, "test", 0)
    return digits(accuracy(model, prompts, SamplerConfig(max_new_tokens=task.response_length)))


def other_tasks_of(run: Run, model: DiffusionModel, num_problems: int) -> dict[str, str]:
    """The same for each other task."""
    right = {}
    for task in other_tasks(WEAK_TASKS[run.task]):
        prompts = task.prompt_set(num_problems, "test", 0)
        right[task.name] = digits(accuracy(model, prompts, SamplerConfig(max_new_tokens=task.response_length)))
    return right


def measure(run: Run, model: DiffusionModel, held_out: list[Trajectory]) -> dict[str, Any]:
    """All measures of one model: a digit for each problem if the score is 0 or 1, otherwise a number."""
    task = WEAK_TASKS[run.task]
    prompts = task.prompt_set(run.num_problems, "test", 0)
    sampler = SamplerConfig(max_new_tokens=task.response_length)
    completions = {k: complete(model, prompts, replace(sampler, tokens_per_step=k)) for k in TOKENS_PER_STEP}
    own = [to_trajectory(model, prompts, i, each, "") for i, each in enumerate(completions[1][: run.num_replayed])]
    return {
        "right": {f"{k} a step": digits(grade(model, prompts, each)) for k, each in completions.items()}
        | other_tasks_of(run, model, run.num_other_problems),
        "block_size": model.block_size,
        "positions": {f"{k} a step": round(cost_of(each).positions_per_token, 4) for k, each in completions.items()},
        "right_samples": right_samples(model, prompts.first(run.num_pass_problems), replace(sampler, temperature=1.0)),
        "pair_order": np.round(order_accuracy(model, held_out), 4).tolist(),
        "entropy_by_step": entropy_by_step(
            [each.decoding_order for each in completions[1]], [each.entropy for each in completions[1]]
        ).tolist(),
        "tds": np.round(replayed_tds(model, own), 5).tolist(),
        "adaptive": [
            adaptive(model, prompts.first(run.num_adaptive_problems), sampler, *each)
            for each in ADAPTIVE
            if run.num_adaptive_problems
        ],
    }


def right_samples(model: DiffusionModel, prompts: PromptSet, sampler: SamplerConfig) -> list[int]:
    """How many of 16 samples are right, for each problem."""
    samples = [accuracy(model, prompts, replace(sampler, seed=sampler.seed + i)) for i in range(PASS_SAMPLES)]
    return np.sum(samples, axis=0).astype(int).tolist()


def adaptive(
    model: DiffusionModel, prompts: PromptSet, sampler: SamplerConfig, policy: str, bound: float
) -> dict[str, Any]:
    """Accuracy and mean forward passes per response of a policy that determines its own pace."""
    completions = complete(model, prompts, replace(sampler, policy=policy, **{policy: bound}))
    right = float(grade(model, prompts, completions).mean())
    passes = round(float(forward_passes(completions).mean()), 4)
    return {"policy": policy, "bound": bound, "accuracy": right, "forward_passes": passes}


def digits(right: np.ndarray) -> str:
    """Scores as one digit for each problem, such as `0110`."""
    return "".join(str(int(each)) for each in right)


def describe_result(result: dict[str, Any]) -> str:
    """One line for the terminal."""
    run = result["run"]
    right = 100 * np.mean([int(digit) for digit in result["right"]["1 a step"]])
    return (
        f"{run['base']}, {run['task']}, {run['method']}, LR {run['learning_rate']:g}, {run['attempts']} attempts, "
        f"seed {run['seed']}: {right:.1f} % at one token a step"
    )
