"""`tabom quickstart`: the whole path on the shipped model, from its first answers to a table of what training did.

A small study (`tabom.lab.study`): one learning rate, eight attempts a prompt, one seed.
"""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from tabom.data.json_files import finished_lines, write_json
from tabom.lab.config import DEFAULT, PACES, QuickstartConfig, StudyConfig
from tabom.lab.config import METHODS as SETTINGS
from tabom.lab.report import draw_accuracy_by_pace, draw_entropy_by_step, means_and_errors, print_table, print_verdicts
from tabom.lab.study import BASE, grid, study, trajectories_of
from tabom.lab.study_report import Result
from tabom.models.loading import load, path_of

METHODS = ("NELBO, exact weights", DEFAULT, "TABOM, parallel")


def quickstart(config: QuickstartConfig) -> dict[str, list[Result]]:
    """Collects trajectories, post-trains three ways from each seed, measures every model and reports.

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
    return report(config, list(finished_lines(path)), console)


def report(config: QuickstartConfig, results: list[Result], console: Console) -> dict[str, list[Result]]:
    """Writes the table, the sentences, the pictures and results.json."""
    output = Path(config.output_dir)
    found = {method: [r for r in results if r["run"]["method"] == method] for method in (BASE, *METHODS)}
    found = {method: sorted(runs, key=lambda run: run["run"]["seed"]) for method, runs in found.items()}
    print_table(console, found)
    print_verdicts(console, found)
    draw_accuracy_by_pace(found, output / "accuracy_by_pace.png")
    draw_entropy_by_step(found, output / "entropy_by_step.png")
    document = {"config": asdict(config), "inputs": inputs(config), "measures": means_and_errors(found)}
    write_json(output / "results.json", document)
    console.print(f"Everything is in {output}: results.json, two pictures, the trajectories, the models")
    return found


def inputs(config: QuickstartConfig) -> dict[str, Any]:
    """All that the figures depend on besides the config: the base's weights and the settings of the methods."""
    weights = (Path(path_of(config.model)) / "model.safetensors").read_bytes()
    methods = {name: SETTINGS[name]._asdict() | {"paces": list(SETTINGS[name].paces)} for name in METHODS}
    return {"base": f"sha256 {hashlib.sha256(weights).hexdigest()}", "methods": methods}


def as_study(config: QuickstartConfig) -> StudyConfig:
    """The quickstart as a grid."""
    shared: dict[str, Any] = {name: getattr(config, name) for name in ("output_dir", "num_prompts", "num_problems")}
    shared |= {name: getattr(config, name) for name in ("num_other_problems", "num_pass_problems", "seeds")}
    return StudyConfig(
        **shared,
        model=[config.model],
        methods=list(METHODS),
        learning_rates=[config.learning_rate],
        attempts=[config.attempts],
        max_steps=config.max_steps,
        path_steps=[],
        batch_size=config.batch_size,
        num_adaptive_problems=0,
        processes=config.processes,
        save_models=True,
    )


def show_collecting(config: QuickstartConfig, console: Console) -> None:
    """Collects for every seed and shows one trajectory of each pace."""
    base = load(config.model)
    for run in grid(as_study(config)):
        if run.method == METHODS[-1]:
            for pace in PACES:
                kept = trajectories_of(run, "train", Path(config.output_dir), base, pace)
                console.print(
                    f"{len(kept)} of {run.num_prompts} {run.task} prompts were answered rightly in {run.attempts} "
                    f"attempts at {pace} tokens a step; e.g. {kept[0].prompt}{kept[0].response}, tokens unmasked at "
                    f"the steps {kept[0].decoding_order}",
                    highlight=False,
                )
