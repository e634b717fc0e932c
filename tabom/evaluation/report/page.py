"""Gathered data into one HTML file that needs no network."""

import base64
import gzip
import json
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader

from tabom.evaluation.report.gather import Gathered


def render(gathered: Gathered, trajectories: dict[str, list[dict[str, Any]]], title: str) -> str:
    """The page.

    Args:
        trajectories: by source, what `tabom.evaluation.report.gather.describe_record` gave.
    """
    environment = Environment(loader=PackageLoader("tabom.evaluation.report", "assets"), autoescape=True)
    environment.filters["percent"] = lambda estimated: show(estimated, 100)
    environment.filters["figure"] = lambda estimated: show(estimated, 1)
    data = {"sources": [{"name": name, "records": each} for name, each in trajectories.items()]}
    data["training"] = gathered.training
    assets = files("tabom.evaluation.report").joinpath("assets")
    return environment.get_template("page.html").render(
        title=title,
        style=assets.joinpath("report.css").read_text(encoding="utf-8"),
        script=assets.joinpath("report.js").read_text(encoding="utf-8"),
        data=pack(data),
        results=gathered.results,
        comparisons=gathered.comparisons,
        has_responses=any(trajectories.values()),
        has_pairs=len(trajectories) > 1,
        has_training=bool(gathered.training),
    )


def pack(data: dict[str, Any]) -> str:
    """JSON, compressed, in letters that mean nothing to HTML; the page unpacks it with DecompressionStream."""
    content = json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()
    return base64.b64encode(gzip.compress(content, mtime=0)).decode()


def show(estimated: dict[str, float | None], scale: float) -> str:
    """`61.2 ± 1.3`, or a dash."""
    if estimated["mean"] is None:
        return "-"
    error = "" if estimated["error"] is None else f" ± {scale * estimated['error']:.3g}"
    return f"{scale * estimated['mean']:.4g}{error}"
