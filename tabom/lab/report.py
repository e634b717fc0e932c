"""The table, the sentences and the pictures of the quickstart."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

Scores = dict[str, np.ndarray]
"""Measure -> its scores in [0, 1], one a problem."""

PASS_AT = (1, 2, 4, 8, 16)

ROWS = {
    "1 a step": "weak task",
    "2 a step": "  2 tokens/step",
    "4 a step": "  4 tokens/step",
    **{f"pass@{k}": f"  pass@{k}" for k in PASS_AT},
    "retention": "other tasks",
    **{task: f"  {task}" for task in ("addition", "sorting", "reversing", "sudoku")},
    "pair order": "pair order",
}

COLORS = ("black", "tab:blue", "tab:orange", "tab:green", "tab:red")
"""Of the methods, the base first, in every picture."""

MEASURES = {
    "1 a step": "accuracy on the weak task",
    "retention": "accuracy on the other tasks",
    "pass@16": "pass@16",
    "pair order": "pair-order accuracy",
    "2 a step": "accuracy at 2 tokens a step",
    "4 a step": "accuracy at 4 tokens a step",
}


def print_table(console: Console, results: dict[str, Scores]) -> None:
    """Means in percent with their standard errors."""
    caption = (
        "percent ± standard error over held-out problems; one training run a method\n"
        "pair order: pairs of the base's own held-out trajectories whose earlier token has the lower entropy"
    )
    table = Table(box=SIMPLE_HEAD, caption=caption, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for method in results:
        table.add_column(method.replace(", ", ",\n"), justify="right")
    for name, title in ROWS.items():
        table.add_row(title, *(with_error(scores[name]) for scores in results.values()))
    console.print(table)


def with_error(scores: np.ndarray) -> str:
    """`61.2 ±2.1`."""
    return f"{100 * scores.mean():.1f} ±{100 * scores.std() / np.sqrt(len(scores)):.1f}"


def print_verdicts(console: Console, results: dict[str, Scores]) -> None:
    """TABOM beside the base and each other method, measure by measure, in words."""
    for other in ("base", "NELBO, ground truth", "NELBO, trajectories", "window CE"):
        verdicts = {name: verdict(results["TABOM"][name], results[other][name]) for name in MEASURES}
        console.print(f"\n[bold]TABOM against {other}[/bold]")
        for outcome in ("higher", "lower", "no clear difference"):
            named = [
                f"{MEASURES[name]}{difference(results['TABOM'][name], results[other][name], outcome)}"
                for name, found in verdicts.items()
                if found == outcome
            ]
            if named:
                console.print(f"  {outcome}: {', '.join(named)}", highlight=False)
    console.print(
        "\n'Higher' and 'lower' are differences of more than two standard errors on the same problems. They say "
        "nothing of the spread over training runs (--seed), nor of models larger than this one.",
        highlight=False,
    )


def verdict(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Compares paired scores: `higher`, `lower`, or `no clear difference` within two standard errors."""
    differences = ours - theirs
    error = differences.std() / np.sqrt(len(differences))
    if abs(differences.mean()) <= 2 * error:
        return "no clear difference"
    return "higher" if differences.mean() > 0 else "lower"


def difference(ours: np.ndarray, theirs: np.ndarray, outcome: str) -> str:
    """The difference in points, where it is clear."""
    return "" if outcome == "no clear difference" else f" ({100 * (ours.mean() - theirs.mean()):+.1f} points)"


def draw_accuracy_against_retention(results: dict[str, Scores], path: Path) -> None:
    """One point a method, with standard errors; up and to the right is better."""
    figure, axes = plt.subplots(figsize=(6, 4.2), layout="constrained")
    for color, marker, (method, scores) in zip(COLORS, "sDo^*", results.items(), strict=True):
        x, y = 100 * scores["retention"], 100 * scores["1 a step"]
        axes.errorbar(
            x.mean(),
            y.mean(),
            xerr=x.std() / np.sqrt(len(x)),
            yerr=y.std() / np.sqrt(len(y)),
            color=color,
            marker=marker,
            markersize=9,
            linestyle="none",
            capsize=3,
            label=method,
        )
    axes.set_xlabel("accuracy on the other tasks, % (retention)")
    axes.set_ylabel("accuracy on the weak task, %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_entropy_by_step(entropies: dict[str, np.ndarray], path: Path) -> None:
    """Mean entropy of the token unmasked at each step; the base is dashed."""
    figure, axes = plt.subplots(figsize=(6, 4.2), layout="constrained")
    for color, (method, values) in zip(COLORS, entropies.items(), strict=True):
        axes.plot(values, marker="o", label=method, color=color, linestyle="--" if method == "base" else "-")
    axes.set_xlabel("decode step")
    axes.set_ylabel("mean entropy of the unmasked token, nats")
    axes.set_xticks(range(len(next(iter(entropies.values())))))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
