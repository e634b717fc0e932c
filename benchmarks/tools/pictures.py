"""Draws the committed JSON of benchmarks/results/ again: a picture beside each.

python -m benchmarks.tools.pictures
"""

import json
from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.tools.measure import RESULTS
from tabom.evaluation.pictures import BASE, OTHERS, TUNED, legend_below, picture

Record = dict[str, Any]
LOOKS = {
    "ours, fused": TUNED,
    "authors' way": BASE,
    "Liger CE + entropy": OTHERS[0],
    "TRL CE + entropy": OTHERS[1],
}
"""A contender looks the same in all pictures; the others are in the JSON alone."""


def draw_lines(axes: Axes, records: list[Record], quantity: str, label: str, value: Callable[[Record], float]) -> None:
    """One line a contender, both axes logarithmic."""
    for name, look in LOOKS.items():
        points = sorted((r["shape"][quantity], value(r)) for r in records if r["contender"] == name)
        if points:
            axes.plot(*zip(*points, strict=True), label=name, **look)
    axes.set(xscale="log", yscale="log", xlabel=quantity, ylabel=label)
    ticks = sorted({record["shape"][quantity] for record in records})
    ticks = [tick for tick, after in zip(ticks, [*ticks[1:], None], strict=True) if after is None or after > 1.5 * tick]
    axes.set_xticks(ticks, labels=[f"{tick // 1000}k" if tick >= 8000 else str(tick) for tick in ticks], minor=False)
    axes.minorticks_off()


def eager(result: Record) -> list[Record]:
    """The figures of plain calls, which every contender has."""
    return [record for record in result["figures"] if record["mode"] == "eager"]


def draw_loss(result: Record, figure: Figure) -> None:
    """Time and memory against the number of rows, at the first vocabulary."""
    vocabulary = result["figures"][0]["shape"]["vocabulary"]
    records = [record for record in eager(result) if record["shape"]["vocabulary"] == vocabulary]
    time, memory = figure.subplots(2, 1, sharex=True)
    draw_lines(time, records, "rows", "time, ms", lambda record: record["seconds"]["median"] * 1e3)
    draw_lines(memory, records, "rows", "memory, MiB", lambda record: record["peak_bytes"] / 2**20)
    time.set(xlabel="", title=f"Loss and gradient, vocabulary of {vocabulary}\n{result['device']}")
    legend_below(figure)


def draw_scaling(result: Record, figure: Figure) -> None:
    """Time, a panel a sweep."""
    records = eager(result)
    sweeps = list(dict.fromkeys(record["sweep"] for record in records))
    panels = figure.subplots(len(sweeps), 1, squeeze=False)[:, 0]
    for axes, sweep in zip(panels, sweeps, strict=True):
        swept = [record for record in records if record["sweep"] == sweep]
        draw_lines(axes, swept, sweep, "time, ms", lambda record: record["seconds"]["median"] * 1e3)
    panels[0].set_title(f"Loss and gradient, one quantity at a time\n{result['device']}")
    legend_below(figure)


DRAWINGS = {"loss": draw_loss, "scaling": draw_scaling}


def main() -> None:
    """Every JSON that has a drawing."""
    for path in sorted(RESULTS.glob("*.json")):
        draw = DRAWINGS.get(path.stem.partition("-")[0])
        if draw is not None:
            drawn = path.with_suffix(".png")
            with picture(drawn, height=7.5) as figure:
                draw(json.loads(path.read_text()), figure)
            print(f"wrote {drawn}")


if __name__ == "__main__":
    main()
