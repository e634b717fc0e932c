"""`tabom quickstart`: the whole path on the shipped model, from its first answers to a table of what training did.

A small study (`tabom.lab.study`): one learning rate, eight attempts a prompt, two seeds.
"""

import json
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from transformers.utils import logging

from tabom.lab.experiment import SHIPPED, base_path
from tabom.lab.report import draw_entropy_by_step, means_and_errors, print_table, print_verdicts
from tabom.lab.study import BASE, Run, StudyConfig, grid, results_of, trajectories_of
from tabom.lab.study_report import Result, draw_paths, groups_of
from tabom.models.loading import load

METHODS = ("NELBO, truth of all prompts", "NELBO", "window", "TABOM", "TABOM, whole path")


@dataclass
class QuickstartConfig:
    """Sizes of the quickstart; the defaults take less than three minutes on two CPU cores."""

    output_dir: str = field(default="runs/quickstart", metadata={"help": "Where everything is written."})
    model: str = field(default=SHIPPED, metadata={"help": "The base: a folder, or the model of the package."})
    num_prompts: int = field(default=2000, metadata={"help": "Prompts answered to collect trajectories."})
    attempts: int = field(default=8, metadata={"help": "Attempts a prompt; the first right one is kept."})
    num_problems: int = field(default=400, metadata={"help": "Held-out problems of the weak task."})
    num_other_problems: int = field(default=60, metadata={"help": "Held-out problems of each other task."})
    num_pass_problems: int = field(default=80, metadata={"help": "Held-out problems sampled 16 times for pass@k."})
    max_steps: int = field(default=300, metadata={"help": "Training steps of each method."})
    batch_size: int = field(default=64, metadata={"help": "Trajectories a training step."})
    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate of each method."})
    seeds: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "Of prompts, cuts and batches."})
    processes: int = field(default=2, metadata={"help": "Training runs at a time, one thread each."})


def quickstart(config: QuickstartConfig) -> dict[str, list[Result]]:
    """Collects trajectories, post-trains five ways from each seed, measures every model and reports.

    Returns:
        method -> the results of its seeds.
    """
    logging.disable_progress_bar()
    console = Console()
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    runs = list(grid(as_study(config)))

    console.rule("1. Collect: right answers are kept with their decoding order")
    collect(config, runs, output, console)

    console.rule(f"2. Post-train and measure: {len(METHODS)} methods, each from the base, same number of steps")
    results: dict[str, list[Result]] = defaultdict(list)
    with Progress(console=console) as progress:
        bar = progress.add_task("training", total=len(runs))
        for result in results_of(runs, output, config.processes, save_models=True):
            results[result["run"]["method"]].append(result)
            progress.advance(bar)
    results = {method: sorted(results[method], key=lambda r: r["run"]["seed"]) for method in (BASE, *METHODS)}

    console.rule("3. What it did")
    print_table(console, results)
    print_verdicts(console, results)
    every = [result for found in results.values() for result in found]
    draw_paths(every, groups_of(every)[0], output / "accuracy_retention.png")
    draw_entropy_by_step(results, output / "entropy_by_step.png")
    document = {"config": asdict(config), "measures": means_and_errors(results)}
    (output / "results.json").write_text(json.dumps(document, indent=2) + "\n")
    console.print(f"Everything is in {output}: results.json, two pictures, the trajectories, the models")
    return results


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
        path_steps=[config.max_steps // 4, config.max_steps // 2],
        batch_size=config.batch_size,
        num_path_problems=min(25, config.num_other_problems),
        num_adaptive_problems=0,
    )


def collect(config: QuickstartConfig, runs: list[Run], output: Path, console: Console) -> None:
    """Collects for every seed, afresh, and shows one trajectory."""
    base = load(base_path(config.model))
    for old in (output / "trajectories").glob("*.jsonl"):
        old.unlink()
    for seed in config.seeds:
        run = next(run for run in runs if run.seed == seed and run.method != BASE)
        kept = trajectories_of(run, "train", output, base)
        console.print(
            f"{len(kept)} of {config.num_prompts} {run.task} prompts were answered rightly in {config.attempts} "
            f"attempts; e.g. {kept[0].prompt}{kept[0].response} in the order {kept[0].decoding_order}"
        )
