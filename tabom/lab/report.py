"""The table, the sentences and a picture of the quickstart."""

from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tabom.evaluation.pictures import BASE as BASE_LOOK
from tabom.evaluation.pictures import legend_below, picture
from tabom.lab.config import DEFAULT
from tabom.lab.study import BASE, TOKENS_PER_STEP
from tabom.lab.study_report import Result, error, looks_of, scores

Results = dict[str, list[Result]]
"""Maps a method to the results of its seeds; the base has one result."""

PASS_AT = (1, 2, 4, 8, 16)

ROWS = {
    "1 a step": "subtraction",
    "2 a step": "  2 tokens a step",
    "4 a step": "  4 tokens a step",
    **{f"pass@{k}": f"  pass@{k}" for k in PASS_AT},
    "other tasks": "other tasks",
    **{task: f"  {task}" for task in ("addition", "sorting", "reversing", "sudoku")},
    "pair order": "pair order",
    "TDS": "TDS",
}

MEASURES = {
    "1 a step": "accuracy on the weak task",
    "2 a step": "accuracy at 2 tokens a step",
    "4 a step": "accuracy at 4 tokens a step",
    "pass@16": "pass@16",
    "other tasks": "accuracy on the other tasks",
    "pair order": "pair order",
    "TDS": "TDS",
}
"""The measures that the sentences mention, and their names there."""


def mean_and_error(by_seed: np.ndarray) -> tuple[float, float]:
    """The mean of (seeds, problems) scores, and its standard error over seeds and problems together."""
    over_problems = error(by_seed.mean(0))
    over_seeds = error(by_seed.mean(1)) if len(by_seed) > 1 else 0.0
    return float(by_seed.mean()), float(np.hypot(over_problems, over_seeds))


def by_seed(runs: list[Result], measure: str) -> np.ndarray:
    """(seeds, problems) scores."""
    return np.array([scores(run, measure) for run in runs])


def with_error(mean: float, error: float) -> str:
    """`61.2 ±2.1`."""
    return f"{mean:.1f} ±{error:.1f}"


def means_and_errors(results: Results) -> dict[str, dict[str, list[float]]]:
    """Mean and error of each method and measure, as the table shows them; TDS in thousandths of nats^2."""
    return {
        method: {measure: [round(x, 3) for x in mean_and_error(by_seed(runs, measure))] for measure in ROWS}
        for method, runs in results.items()
    }


def markdown_table(measures: dict[str, dict[str, list[float]]], rows: tuple[str, ...] = tuple(MEASURES)) -> str:
    """The Markdown table of the results of `means_and_errors`."""
    lines = [f"| | {' | '.join(measures)} |", f"| --- |{' --- |' * len(measures)}"]
    for row in rows:
        lines.append(f"| {ROWS[row].strip()} | {' | '.join(with_error(*each[row]) for each in measures.values())} |")
    return "\n".join(lines)


def print_table(console: Console, results: Results) -> None:
    """Means with their standard errors."""
    seeds = max(map(len, results.values()))
    over = "problems" if seeds == 1 else f"problems and over {seeds} training runs a method"
    caption = (
        f"percent ± standard error over {over}; TDS in 1/1000 nats^2\n"
        "pair order: pairs of the base's own held-out trajectories whose earlier token has the lower entropy\n"
        "TDS: variance of the masked tokens' entropies along the model's own decoding"
    )
    table = Table(box=SIMPLE_HEAD, caption=caption, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for method in results:
        table.add_column(method, justify="right")
    for measure, title in ROWS.items():
        cells = (with_error(*mean_and_error(by_seed(runs, measure))) for runs in results.values())
        table.add_row(title, *cells)
    console.print(table)


def print_verdicts(console: Console, results: Results) -> None:
    """Sentences that compare both TABOM methods with the base and the other methods, measure by measure."""
    for ours, others in (
        ("TABOM, parallel", (BASE, "NELBO, exact weights", DEFAULT)),
        (DEFAULT, (BASE, "NELBO, exact weights")),
    ):
        for other in others:
            console.print(f"\n[bold]{ours}, against {other}[/bold]")
            for outcome, measures in compared(results[ours], results[other]).items():
                console.print(f"  {outcome}: {', '.join(measures)}", highlight=False)
    console.print(
        "\n'Higher' and 'lower' are differences of more than two standard errors. One training run says nothing of the "
        "spread over runs, and one tiny model nothing of larger ones: docs/study.md has more seeds, longer training, "
        "more tasks and a second base.",
        highlight=False,
    )


def compared(ours: list[Result], theirs: list[Result]) -> dict[str, list[str]]:
    """Maps each verdict to its measures, with the difference if it is clear."""
    found: dict[str, list[str]] = {}
    for measure, name in MEASURES.items():
        mean, error = mean_and_error(by_seed(ours, measure) - by_seed(theirs, measure))
        outcome = verdict(mean, error)
        clear = "" if outcome == "no clear difference" else f" ({mean:+.1f})"
        found.setdefault(outcome, []).append(name + clear)
    return found


def verdict(mean: float, error: float) -> str:
    """The verdict on a paired difference: `higher`, `lower`, or `no clear difference` within two standard errors."""
    if abs(mean) <= 2 * error:
        return "no clear difference"
    return "higher" if mean > 0 else "lower"


def draw_accuracy_by_pace(results: Results, path: Path) -> None:
    """Accuracy on the weak task against the tokens that a step unmasks."""
    with picture(path) as figure:
        axes = figure.subplots()
        for method, look in {BASE: BASE_LOOK, **looks_of(results)}.items():
            accuracies = [by_seed(results[method], f"{pace} a step").mean() for pace in TOKENS_PER_STEP]
            axes.plot(TOKENS_PER_STEP, accuracies, label=method, **look)
        axes.set_xticks(TOKENS_PER_STEP)
        axes.set_ylim(0, 100)
        axes.set_title("Several tokens a step cost accuracy", fontsize=12)
        axes.set_xlabel("tokens unmasked a step")
        axes.set_ylabel("accuracy on subtraction, %")
        legend_below(figure)


def draw_entropy_by_step(results: Results, path: Path) -> None:
    """Mean entropy of the token unmasked at each step."""
    with picture(path) as figure:
        axes = figure.subplots()
        for method, look in {BASE: BASE_LOOK, **looks_of(results)}.items():
            values = np.mean([run["entropy_by_step"] for run in results[method]], axis=0)
            axes.plot(range(1, len(values) + 1), values, label=method, **look)
            axes.set_xticks(range(1, len(values) + 1))
        axes.set_title("Training makes the model more certain", fontsize=12)
        axes.set_xlabel("decoding step")
        axes.set_ylabel("entropy of the unmasked token, nats")
        legend_below(figure)
