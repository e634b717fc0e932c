"""Tables of results, and the paired comparison of two models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tabom.data.store import ResponseFolder
from tabom.evaluation.evaluate import Cell, by_problem
from tabom.evaluation.metrics import estimate, estimate_ratio


def compare(base: Cell, tuned: Cell, output_dir: str | Path) -> dict[str, Any]:
    """The change of accuracy from `base` to `tuned` on the problems that both have, and its paired standard error.

    A problem is won if more of its responses are right, and lost if fewer are. Retention is the ratio of accuracies.
    """
    before, after = (by_problem(ResponseFolder(cell.folder(output_dir)).records()) for cell in (base, tuned))
    shared = [index for index in before if index in after]
    a, b = (np.array([np.mean(cell[index]) for index in shared]) for cell in (before, after))
    return {
        "prompts": base.prompts,
        "sampler": base.sampler,
        "problems": len(shared),
        "base": estimate(a)._asdict(),
        "tuned": estimate(b)._asdict(),
        "change": estimate(b - a)._asdict(),
        "won": int((b > a).sum()),
        "lost": int((b < a).sum()),
        "retention": estimate_ratio(b, a)._asdict(),
    }


def results_table(results: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of cells."""
    most = max((len(result["pass_at"]) for result in results), default=0)
    header = ["model", "prompts", "sampler", "problems", "unverified", "accuracy, %"]
    header += [f"pass@{most}, %"] if most > 1 else []
    header += ["pair order, %", "TDS, nats²", "tokens", "steps", "positions", "seconds"]
    rows = []
    for result in results:
        row = [result["model"], result["prompts"], result["sampler"], str(result["problems"])]
        row += [str(result["unverified"]), percent(result["accuracy"])]
        row += [percent(result["pass_at"].get(str(most)))] if most > 1 else []
        row += [f"{result['pair_order']:.1%}"[:-1] if result["pair_order"] is not None else "-"]
        row += [f"{result['tds']['mean']:.3g}"]
        row += [f"{result[name]['mean']:.1f}" for name in ("tokens", "steps", "positions")]
        row += [f"{result['seconds']['mean']:.3g}"]
        rows.append(row)
    return markdown(header, rows)


def comparison_table(comparisons: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of `compare`'s results; retention is shown for all prompt sets but the first."""
    header = ["prompts", "sampler", "problems", "base, %", "tuned, %", "change, points", "won", "lost", "retention, %"]
    rows = [
        [
            each["prompts"],
            each["sampler"],
            str(each["problems"]),
            percent(each["base"]),
            percent(each["tuned"]),
            percent(each["change"], signed=True),
            str(each["won"]),
            str(each["lost"]),
            "-" if each["prompts"] == comparisons[0]["prompts"] else percent(each["retention"]),
        ]
        for each in comparisons
    ]
    return markdown(header, rows)


def percent(estimated: dict[str, float | None] | None, signed: bool = False) -> str:
    """Percent with its error, `61.2 ± 1.3`; a dash if it was not measured."""
    if estimated is None or estimated["mean"] is None:
        return "-"
    error = "" if estimated["error"] is None else f" ± {100 * estimated['error']:.1f}"
    return f"{100 * estimated['mean']:{'+' if signed else ''}.1f}{error}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; bars inside cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
