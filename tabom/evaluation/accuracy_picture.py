"""The picture of `tabom evaluate`: the accuracy of every model on every prompt set."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabom.evaluation.pictures import BASE, INK, OTHERS, TUNED, picture


def draw(results: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Plots accuracy with its error, a panel for each prompt set below the other, the base's bars first."""
    sets = list(dict.fromkeys(result["prompts"] for result in results))
    names = list(dict.fromkeys((result["model"], result["sampler"]) for result in results))
    models = list(dict.fromkeys(result["model"] for result in results))
    looks = dict(zip(models, (BASE, TUNED, *OTHERS), strict=False))
    with picture(path, height=0.8 + len(sets) * (0.9 + 0.3 * len(names))) as figure:
        panels = figure.subplots(len(sets), 1, squeeze=False, sharex=True)[:, 0]
        for axes, prompts in zip(panels, sets, strict=True):
            shown = [result for result in results if result["prompts"] == prompts]
            for result in shown:
                accuracy = {key: 100 * (value or 0) for key, value in result["accuracy"].items()}
                color = looks.get(result["model"], OTHERS[-1])["color"]
                place = names.index((result["model"], result["sampler"]))
                axes.barh(place, accuracy["mean"], xerr=accuracy["error"], color=color, ecolor=INK, capsize=3)
            labels = [Path(model).name + ("" if sampler == "default" else f"\n{sampler}") for model, sampler in names]
            axes.set(title=prompts, xlim=(0, 105), yticks=range(len(names)))
            axes.set_yticklabels(labels, fontsize=9)
            axes.invert_yaxis()
            axes.grid(visible=False, axis="y")
        panels[-1].set_xlabel("accuracy, %")
