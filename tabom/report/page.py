"""Renders gathered data as one HTML file that needs no network."""

import base64
import gzip
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader

from tabom.data.json_files import to_json
from tabom.report.gather import Gathered


def render(gathered: Gathered, trajectories: dict[str, list[dict[str, Any]]], title: str) -> str:
    """The HTML of the page.

    Args:
        trajectories: results of `tabom.report.gather.describe_record`, by source.
    """
    environment = Environment(loader=PackageLoader("tabom.report", "assets"), autoescape=True)
    environment.filters["percent"] = lambda estimated: show(estimated, 100)
    environment.filters["figure"] = lambda estimated: show(estimated, 1)
    data = {"sources": [{"name": name, "records": each} for name, each in trajectories.items()]}
    data["training"] = gathered.training
    assets = files("tabom.report").joinpath("assets")
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
    """Compresses data as JSON in base64, which needs no HTML escapes; the page unpacks it with DecompressionStream."""
    content = to_json(data, "the report", separators=(",", ":"))
    return base64.b64encode(gzip.compress(content, mtime=0)).decode()


def show(estimated: dict[str, float | None], scale: float) -> str:
    """A figure with its error, `61.2 ± 1.3`; a dash if it was not measured."""
    if estimated["mean"] is None:
        return "-"
    error = "" if estimated["error"] is None else f" ± {scale * estimated['error']:.3g}"
    return f"{scale * estimated['mean']:.4g}{error}"
