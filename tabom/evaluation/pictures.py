"""How pictures look: on a light and on a dark page, at the width of a phone, and to every kind of eye."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

INK = "#808080"
"""Of text and axes: readable on white and on black."""

BASE: dict[str, Any] = {"color": "#c26e00", "marker": "s", "linestyle": "--"}
TUNED: dict[str, Any] = {"color": "#2b7bba", "marker": "o", "linestyle": "-"}
"""The looks of base and tuned model, whose colours the report has too."""

OTHERS: tuple[dict[str, Any], ...] = (
    {"color": "#8c8c8c", "marker": "^", "linestyle": ":"},
    {"color": "#159a6e", "marker": "D", "linestyle": "-."},
)
"""The looks of what they are compared with: a picture has at most four lines, which differ in more than colour."""

LOOK = {
    "font.size": 12,
    "lines.linewidth": 2,
    "lines.markersize": 6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "savefig.transparent": True,
    **{f"{part}.color": INK for part in ("text", "xtick", "ytick", "grid")},
    **{f"axes.{part}color": INK for part in ("edge", "label")},
}


@contextmanager
def picture(path: str | Path, width: float = 5.0, height: float = 4.2) -> Iterator[Figure]:
    """Yields a figure of this size in inches, and saves it: 5 inches are 800 pixels, or the width of a phone."""
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(path, dpi=160)


def legend_below(figure: Figure, columns: int = 2) -> None:
    """The names of the lines of the first axes, where no line runs."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
