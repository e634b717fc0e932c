"""Renders gathered data as one HTML file that needs no network."""

import base64
import gzip
from collections import Counter
from collections.abc import Iterable
from importlib.resources import files
from pathlib import PurePath
from typing import Any

from jinja2 import Environment, PackageLoader

from tabom.data.json_files import to_json
from tabom.evaluation.compare import percent
from tabom.report.gather import Gathered


def render(gathered: Gathered, trajectories: dict[str, list[dict[str, Any]]], title: str) -> str:
    """The HTML of the page.

    Args:
        trajectories: results of `tabom.report.gather.describe_record`, by source.
    """
    environment = Environment(loader=PackageLoader("tabom.report", "assets"), autoescape=True)
    models = [result["model"] for result in gathered.results]
    models += [each[role] for each in gathered.comparisons for role in ("base", "tuned")]
    environment.filters["short"] = short_names([*models, *gathered.training, *gathered.rounds]).__getitem__
    environment.filters["percent"] = percent
    environment.filters["change"] = lambda estimated: percent(estimated, signed=True)
    roles = {source.name: source.role for source in gathered.sources}
    data = {
        "sources": [{"name": name, "role": roles[name], "records": each} for name, each in trajectories.items()],
        "training": gathered.training,
        "rounds": gathered.rounds,
    }
    assets = files("tabom.report").joinpath("assets")
    most_samples = max((len(result["pass_at"]) for result in gathered.results), default=1)
    return environment.get_template("page.html").render(
        title=title,
        style=assets.joinpath("report.css").read_text(encoding="utf-8"),
        script=assets.joinpath("report.js").read_text(encoding="utf-8"),
        data=pack(data),
        results=gathered.results,
        pass_at=str(most_samples) if most_samples > 1 else None,
        has_unverified=any(result["unverified"] for result in gathered.results),
        comparisons=gathered.comparisons,
        runs={name: outcome_of(log) for name, log in gathered.training.items()},
        rounds={name: outcome_of_rounds(log) for name, log in gathered.rounds.items()},
        counts={source.name: counts_of(source.records) for source in gathered.sources if source.role is None},
        has_responses=any(trajectories.values()),
        has_pairs=len(trajectories) > 1,
    )


def pack(data: dict[str, Any]) -> str:
    """Compresses data as JSON in base64, which needs no HTML escapes; the page unpacks it with DecompressionStream."""
    content = to_json(data, "the report", separators=(",", ":"))
    return base64.b64encode(gzip.compress(content, mtime=0)).decode()


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Maps paths to their last part, or to as many parts as tell them apart."""
    parts = {path: PurePath(path).parts for path in dict.fromkeys(paths)}
    names = {}
    for path, whole in parts.items():
        for length in range(1, len(whole) + 1):
            if not any(other != path and parts[other][-length:] == whole[-length:] for other in parts):
                break
        names[path] = "/".join(whole[-length:])
    return names


def outcome_of(log: list[dict[str, float]]) -> str:
    """How long a run was and where its loss began and ended, in one line."""
    steps = max((entry["step"] for entry in log), default=0)
    losses = [entry["loss"] for entry in log if isinstance(entry.get("loss"), float | int)]
    loss = f", loss {losses[0]:.2f} → {losses[-1]:.2f}" if losses else ""
    return f"{steps} steps{loss}"


def outcome_of_rounds(log: list[dict[str, float]]) -> str:
    """How many rounds there were, and where accuracy and pass@k began and ended, in one line."""
    names = [
        name for name in dict.fromkeys(name for entry in log for name in entry) if name.startswith(("acc", "pass@"))
    ]
    parts = [f"{log[-1]['step']} rounds"]
    for name in names:
        values = [entry[name] for entry in log if name in entry]
        parts.append(f"{name.removesuffix(', %')} {values[0]:.1f} → {values[-1]:.1f} %")
    return ", ".join(parts)


def counts_of(records: list[dict[str, Any]]) -> str:
    """How many responses there are, and how many of those that were judged are right."""
    verdicts = Counter(record.get("correct") for record in records)
    judged = verdicts[True] + verdicts[False]
    return f"{len(records)} responses" + (f", {verdicts[True]} of {judged} right" if judged else "")
