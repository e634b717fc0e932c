"""`tabom quickstart`: the whole path on the shipped model, from its first answers to a table of what training did.

A small study (`tabom.lab.study`): one learning rate, eight attempts a prompt, two seeds.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from tabom.lab import experiment
from tabom.lab.experiment import SHIPPED, base_path
from tabom.lab.report import draw_entropy_by_step, means_and_errors, print_table, print_verdicts
from tabom.lab.study import BASE, StudyConfig, grid, study, trajectories_of
from tabom.lab.study_report import Result, draw_paths, groups_of
from tabom.models.loading import load
from tabom.sampling.collect import read_lines

METHODS = ("NELBO, truth of all prompts", "NELBO", "window", "TABOM", "TABOM, whole path")


@dataclass
class QuickstartConfig:
    """Sizes of the quickstart; the defaults take some five minutes of CPU, on two cores under three."""

    output_dir: str = field(default="runs/quickstart", metadata={"help": "Where everything is written."})
    model: str = field(default=SHIPPED, metadata={"help": "The base: a folder, or the model of the package."})
    num_prompts: int = field(default=2000, metadata={"help": "Prompts answered to collect trajectories."})
    attempts: int = field(default=8, metadata={"help": "Attempts a prompt; the first right one is kept."})
    num_problems: int = field(default=400, metadata={"help": "Held-out problems of the weak task."})
    num_other_problems: int = field(default=60, metadata={"help": "Held-out problems of each other task."})
    num_pass_problems: int = field(default=80, metadata={"help": "Held-out problems sampled 16 times for pass@k."})
    max_steps: int = field(default=300, metadata={"help": "Training steps of each method."})
    batch_size: int = field(default=32, metadata={"help": "Trajectories a training step."})
    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate of each method."})
    seeds: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "Of prompts, cuts and batches."})
    processes: int = field(default=2, metadata={"help": "Training runs at a time, one thread each."})


def quickstart(config: QuickstartConfig) -> dict[str, list[Result]]:
    """Collects trajectories, post-trains five ways from each seed, measures every model and reports.

    Returns:
        method -> the results of its seeds.
    """
    console = Console()
    output = Path(config.output_dir)
    for old in (output / "results.jsonl", *output.glob("trajectories/*.jsonl")):
        old.unlink(missing_ok=True)
    console.rule("1. Collect: right answers are kept with their decoding order")
    show_collecting(config, console)
    console.rule(f"2. Post-train and measure: {len(METHODS)} methods, each from the base, same number of steps")
    path = study(as_study(config))
    console.rule("3. What it did")
    return report(config, read_lines(path), console)


def report(config: QuickstartConfig, results: list[Result], console: Console) -> dict[str, list[Result]]:
    """The table, the sentences, the pictures and results.json."""
    output = Path(config.output_dir)
    found = {method: [r for r in results if r["run"]["method"] == method] for method in (BASE, *METHODS)}
    found = {method: sorted(runs, key=lambda run: run["run"]["seed"]) for method, runs in found.items()}
    print_table(console, found)
    print_verdicts(console, found)
    draw_paths(results, groups_of(results)[0], output / "accuracy_retention.png")
    draw_entropy_by_step(found, output / "entropy_by_step.png")
    document = {"config": asdict(config), "inputs": inputs(config), "measures": means_and_errors(found)}
    (output / "results.json").write_text(json.dumps(document, indent=2) + "\n")
    console.print(f"Everything is in {output}: results.json, two pictures, the trajectories, the models")
    return found


def inputs(config: QuickstartConfig) -> dict[str, Any]:
    """What the figures depend on beside the config, in JSON: the base's weights, and the settings of the methods."""
    weights = (Path(base_path(config.model)) / "model.safetensors").read_bytes()
    methods = {name: experiment.METHODS[name]._asdict() for name in METHODS}
    return {"base": f"sha256 {hashlib.sha256(weights).hexdigest()}", "methods": methods}


def as_study(config: QuickstartConfig) -> StudyConfig:
    """The quickstart as a grid."""
    shared: dict[str, Any] = {name: getattr(config, name) for name in ("output_dir", "num_prompts", "num_problems")}
    shared |= {name: getattr(config, name) for name in ("num_other_problems", "num_pass_problems", "seeds")}
    return StudyConfig(
        **shared,
        bases=[config.model],
        methods=list(METHODS),
        learning_rates=[config.learning_rate],
        attempts=[config.attempts],
        max_steps=config.max_steps,
        path_steps=[config.max_steps // 2],
        batch_size=config.batch_size,
        num_path_problems=min(25, config.num_other_problems),
        num_adaptive_problems=0,
        processes=config.processes,
        save_models=True,
    )


def show_collecting(config: QuickstartConfig, console: Console) -> None:
    """Collects for every seed and shows one trajectory."""
    base = load(base_path(config.model))
    for run in grid(as_study(config)):
        if run.method == METHODS[-1]:
            kept = trajectories_of(run, "train", Path(config.output_dir), base)
            console.print(
                f"{len(kept)} of {run.num_prompts} {run.task} prompts were answered rightly in {run.attempts} "
                f"attempts; e.g. {kept[0].prompt}{kept[0].response} in the order {kept[0].decoding_order}"
            )
