"""Learning in rounds against one collect, at equal positions computed, on the models of the lab.

    python -m benchmarks.rounds [--base shipped] [--seeds 0 1 2]

Every method decodes as many responses, and trains on as many examples: one collect and TABOM, rounds of TABOM (expert
iteration), rounds of policy, and rounds of policy with the ranking. A run that the JSON has already is not made again.
Writes benchmarks/results/rounds-cpu.json.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PrinterCallback

from benchmarks.tools.measure import RESULTS, environment, result_name, write_json
from tabom.data.prompts import PromptSet
from tabom.evaluation.metrics import estimate, pass_at_k
from tabom.evaluation.responses import accuracy
from tabom.lab.config import PAPER
from tabom.lab.experiment import WEAK_TASKS, other_tasks
from tabom.models.diffusion_model import DiffusionModel
from tabom.models.loading import load
from tabom.rounds.config import ImproveConfig
from tabom.rounds.improve import Improvement
from tabom.sampling.config import SamplerConfig
from tabom.training.config import TabomConfig
from tabom.training.trainer import TabomTrainer

CPU = torch.device("cpu")
TASKS = {"shipped": "subtraction", "shipped-block": "sudoku"}
"""What each base learns; the block-causal one cannot subtract."""

ROUNDS, SAMPLES, EXAMPLES = 6, 8, 5120
PROMPTS = {"shipped": 300, "shipped-block": 100}
"""Rounds; and of each round the responses to each prompt, the examples that are trained on, and the prompts."""

PROBLEMS, OTHER_PROBLEMS, PASS_PROBLEMS, PASS_SAMPLES, BASE_SAMPLES = 300, 100, 100, 16, 64
"""Held-out problems; and the responses to each for pass@16, and with which a problem counts as never solved."""

FIRST_SEED = 10**6
"""Of the samples that are measured; those of the rounds are far below it."""

TABOM = PAPER | {"per_device_train_batch_size": 64}
POLICY = {"objective": "policy", "per_device_train_batch_size": 256, "learning_rate": 1e-4}


class Method(NamedTuple):
    """The number of rounds that share the responses and examples, and settings of the trainer."""

    rounds: int
    settings: dict[str, Any]


# The learning rates are the better ones of 1e-4, 2e-4 (TABOM in rounds) and 1e-4, 3e-4 (policy), at another seed.
METHODS = {
    "one collect and TABOM": Method(1, TABOM),
    "rounds of TABOM": Method(ROUNDS, TABOM | {"learning_rate": 1e-4}),
    "rounds of policy": Method(ROUNDS, POLICY),
    "rounds of policy, ranked": Method(ROUNDS, POLICY | {"rank_weight": 0.1}),
}


def improved(base: str, method: Method, seed: int, folder: Path) -> DiffusionModel:
    """The base after all rounds of a method."""
    task, model = WEAK_TASKS[TASKS[base]], load(base)
    share = ROUNDS // method.rounds
    settings = {"learning_rate": 2e-4, "max_steps": share * EXAMPLES // method.settings["per_device_train_batch_size"]}
    args = TabomConfig(
        str(folder),
        lr_scheduler_type="cosine",
        warmup_steps=5,
        weight_decay=0.01,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        logging_steps=5,
        use_cpu=True,
        seed=seed,
        **settings | method.settings,
    )
    trainer = TabomTrainer(model.model, args, processing_class=model.tokenizer)
    trainer.remove_callback(PrinterCallback)
    prompts = task.prompt_set(ROUNDS * PROMPTS[base], "train", seed)
    config = ImproveConfig(rounds=method.rounds, samples_per_prompt=SAMPLES, prompts_per_round=share * PROMPTS[base])
    sampler = SamplerConfig(max_new_tokens=task.response_length, temperature=1.0, seed=1000 * seed)
    Improvement(trainer, prompts, config, sampler).run()
    model.model.eval()
    return model


def right_of(
    model: DiffusionModel, prompts: PromptSet, sampler: SamplerConfig, samples: int, seed: int = FIRST_SEED
) -> np.ndarray:
    """How many of so many samples, with seeds from `seed` on, are right, for each problem."""
    return sum(accuracy(model, prompts, replace(sampler, seed=seed + i)) for i in range(samples)).astype(int)


def measured(base: str, model: DiffusionModel, unsolved: Sequence[int]) -> dict[str, Any]:
    """Accuracy at one and at four tokens a step, pass@16, other tasks, and pass@16 of what the base never solved."""
    task = WEAK_TASKS[TASKS[base]]
    held_out = task.prompt_set(PROBLEMS, "test", 0)
    greedy = SamplerConfig(max_new_tokens=task.response_length)
    sampled = replace(greedy, temperature=1.0)
    others = [
        accuracy(
            model, each.prompt_set(OTHER_PROBLEMS, "test", 0), replace(greedy, max_new_tokens=each.response_length)
        )
        for each in other_tasks(task)
    ]
    right = right_of(model, held_out.first(PASS_PROBLEMS), sampled, PASS_SAMPLES)
    return {
        "one a step": float(accuracy(model, held_out, greedy).mean()),
        "four a step": float(accuracy(model, held_out, replace(greedy, tokens_per_step=4)).mean()),
        "pass@1": float(right.mean() / PASS_SAMPLES),
        "pass@16": estimate(pass_at_k(right, PASS_SAMPLES, PASS_SAMPLES)).mean,
        "other tasks": float(np.concatenate(others).mean()),
        "never solved": pass_of_unsolved(base, model, unsolved, PASS_SAMPLES, FIRST_SEED) if unsolved else None,
    }


def pass_of_unsolved(base: str, model: DiffusionModel, unsolved: Sequence[int], samples: int, seed: int) -> float:
    """Pass@16 of the problems that the base never solved, estimated from so many samples."""
    task = WEAK_TASKS[TASKS[base]]
    prompts = task.prompt_set(PROBLEMS, "test", 0).without(set(range(PROBLEMS)) - set(unsolved))
    right = right_of(model, prompts, SamplerConfig(max_new_tokens=task.response_length, temperature=1.0), samples, seed)
    return estimate(pass_at_k(right, samples, PASS_SAMPLES)).mean


def unsolved_by(base: str, model: DiffusionModel) -> list[int]:
    """The held-out problems that the base solves in none of 64 attempts."""
    task = WEAK_TASKS[TASKS[base]]
    sampler = SamplerConfig(max_new_tokens=task.response_length, temperature=1.0)
    right = right_of(model, task.prompt_set(PROBLEMS, "test", 0), sampler, BASE_SAMPLES)
    return np.flatnonzero(right == 0).tolist()


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Markdown: the mean over the seeds in percent, and its standard error."""
    names = [name for name in runs[0]["measured"] if runs[0]["measured"][name] is not None]
    lines = [f"| {' | '.join([runs[0]['base'], *names])} |", f"| --- |{' --- |' * len(names)}"]
    for method in dict.fromkeys(run["method"] for run in runs):
        found = [run["measured"] for run in runs if run["method"] == method]
        cells = [percent([each[name] for each in found]) for name in names]
        lines.append(f"| {' | '.join([method, *cells])} |")
    return "\n".join(lines)


def percent(values: Sequence[float]) -> str:
    """A mean over seeds in percent, with its standard error if there are several."""
    mean = f"{100 * np.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ±{100 * np.std(values, ddof=1) / len(values) ** 0.5:.1f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the missing runs, prints the table and writes the JSON after every run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", choices=TASKS, default="shipped")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args(arguments)
    path = RESULTS / f"{result_name('rounds', CPU)}.json"
    result = json.loads(path.read_text()) if path.exists() else environment(CPU) | {"unsolved": {}, "runs": []}

    base, model = options.base, load(options.base)
    if base not in result["unsolved"]:
        result["unsolved"][base] = unsolved_by(base, model)
    unsolved, runs = result["unsolved"][base], result["runs"]
    done = {(run["base"], run["method"], run["seed"]) for run in runs}
    if (base, "base", 0) not in done:
        figures = measured(base, model, unsolved)
        if unsolved:  # not by the samples that it failed with
            fresh = FIRST_SEED + BASE_SAMPLES
            figures["never solved"] = pass_of_unsolved(base, model, unsolved, BASE_SAMPLES, fresh)
        runs.append({"base": base, "method": "base", "seed": 0, "measured": figures})
        write_json(result_name("rounds", CPU), result)
    for seed in options.seeds:
        for name, method in METHODS.items():
            if (base, name, seed) in done:
                continue
            with tempfile.TemporaryDirectory() as folder:
                trained = improved(base, method, seed, Path(folder))
            runs.append({"base": base, "method": name, "seed": seed, "measured": measured(base, trained, unsolved)})
            print(runs[-1], flush=True)
            write_json(result_name("rounds", CPU), result)
    print(table([run for run in runs if run["base"] == base]))


if __name__ == "__main__":
    main()
