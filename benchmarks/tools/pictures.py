"""Draws the committed JSON of benchmarks/results/ again: a picture beside each.

python -m benchmarks.tools.pictures
"""

import json
from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.tools.measure import RESULTS

Record = dict[str, Any]
COLORS = {
    "authors' way": "tab:red",
    "reference": "tab:orange",
    "torch.compile": "tab:brown",
    "checkpoint": "tab:purple",
    "Liger CE + entropy": "tab:green",
    "TRL CE + entropy": "tab:olive",
    "ours, logits": "tab:cyan",
    "ours, fused": "tab:blue",
    "two matmuls": "tab:gray",
    "three matmuls": "tab:gray",
}
"""A contender has one colour in all pictures; the others are not drawn."""
TIME = ("forward + backward, ms", lambda record: record["seconds"]["median"] * 1e3)
MEMORY = ("peak memory above the inputs, MiB", lambda record: record["peak_bytes"] / 2**20)


def draw_lines(axes: Axes, records: list[Record], quantity: str, label: str, value: Callable[[Record], float]) -> None:
    """One line a contender, both axes logarithmic."""
    for name, color in COLORS.items():
        points = sorted((r["shape"][quantity], value(r)) for r in records if r["contender"] == name)
        if points and all(y > 0 for _, y in points):
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name, color=color)
    axes.set(xscale="log", yscale="log", xlabel=quantity, ylabel=label)
    ticks = sorted({record["shape"][quantity] for record in records})
    names = [f"{tick // 1000}k" if tick >= 8000 else str(tick) for tick in ticks]
    axes.set_xticks(ticks, labels=names, minor=False, rotation=45 if max(ticks) >= 8000 else 0)
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def draw_legend(figure: Figure) -> None:
    """Beside the axes, where no line runs."""
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)


def eager(result: Record) -> list[Record]:
    """The figures of plain calls, which every contender has."""
    return [record for record in result["figures"] if record["mode"] == "eager"]


def draw_loss(result: Record) -> Figure:
    """Time and memory against the number of rows, at the first vocabulary."""
    vocabulary = result["figures"][0]["shape"]["vocabulary"]
    records = [record for record in eager(result) if record["shape"]["vocabulary"] == vocabulary]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, (label, value) in zip(figure.subplots(1, 2), (TIME, MEMORY), strict=True):
        draw_lines(axes, records, "rows", label, value)
    draw_legend(figure)
    shape = records[0]["shape"]
    size = f"V = {vocabulary}, D = {shape['width']}, bf16, {shape['length'] // shape['window']} positions a row"
    figure.suptitle(f"{result['device']}, {size}", fontsize=10)
    return figure


def draw_scaling(result: Record) -> Figure:
    """Time above, memory below, a column a sweep."""
    records = eager(result)
    sweeps = list(dict.fromkeys(record["sweep"] for record in records))
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    for row, (label, value) in zip(figure.subplots(2, len(sweeps), squeeze=False), (TIME, MEMORY), strict=True):
        for axes, sweep in zip(row, sweeps, strict=True):
            draw_lines(axes, [r for r in records if r["sweep"] == sweep], sweep, label, value)
    draw_legend(figure)
    figure.suptitle(f"{result['device']}: the loss, one quantity at a time", fontsize=10)
    return figure


DRAWINGS = {"loss": draw_loss, "scaling": draw_scaling}


def main() -> None:
    """Every JSON that has a drawing."""
    for path in sorted(RESULTS.glob("*.json")):
        draw = DRAWINGS.get(path.stem.partition("-")[0])
        if draw is not None:
            picture = path.with_suffix(".png")
            draw(json.loads(path.read_text())).savefig(picture, dpi=110)
            print(f"wrote {picture}")


if __name__ == "__main__":
    main()
