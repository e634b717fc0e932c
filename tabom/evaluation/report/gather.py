"""What a report shows, found in files of trajectories, folders of training runs and folders of evaluations."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tabom.data.sources import read_records
from tabom.data.trajectories import Trajectory, parse_trajectory


@dataclass
class Source:
    """Trajectories of one file or cell with the records they come from, and the name of the model that made them."""

    name: str
    model: str | None
    records: list[dict[str, Any]]


@dataclass
class Gathered:
    """All that a report shows.

    `training` maps a run to the log entries of its trainer; `results` and `comparisons` are `tabom evaluate`'s.
    """

    sources: list[Source] = field(default_factory=list)
    training: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)
    comparisons: list[dict[str, Any]] = field(default_factory=list)


def gather(inputs: Sequence[str], limit: int) -> Gathered:
    """Reads every input.

    Args:
        inputs: files of trajectories, folders that `tabom train` or `tabom evaluate` wrote.
        limit: trajectories of each file or cell.

    Raises:
        ValueError: a folder of neither kind, or a line of a file that does not parse.
    """
    found = Gathered()
    for name in inputs:
        path = Path(name)
        if not path.is_dir():
            found.sources.append(read_source(path, settings_of_file(path), limit))
            continue
        states = sorted(path.glob("**/trainer_state.json"), key=lambda state: state.stat().st_mtime)
        if states:
            found.training[name] = json.loads(states[-1].read_text())["log_history"]
        if (path / "results.json").exists():
            found.results += json.loads((path / "results.json").read_text())
        if (path / "comparison.json").exists():
            found.comparisons += json.loads((path / "comparison.json").read_text())["comparisons"]
        cells = sorted(settings.parent for settings in path.glob("**/settings.json"))
        for cell in cells:
            settings = json.loads((cell / "settings.json").read_text())
            answers = [read_source(file, settings, limit) for file in sorted(cell.glob("answers-*.jsonl"))]
            records = [record for source in answers for record in source.records]
            found.sources.append(Source(str(cell.relative_to(path)), settings.get("model"), records[:limit]))
        if not states and not cells:
            raise ValueError(f"{name}: a folder without trainer_state.json, results.json or answers")
    return found


def settings_of_file(path: Path) -> dict[str, Any]:
    """What `tabom collect` noted of its settings beside its output, if it made this file."""
    noted = path if path.suffix == ".rejected" else path.with_name(path.name + ".rejected")
    if not noted.exists():
        return {}
    with noted.open() as lines:
        return json.loads(lines.readline())


def read_source(path: Path, settings: dict[str, Any], limit: int) -> Source:
    """The first records of a file that have a response; collect's line of settings has none."""
    return Source(str(path), settings.get("model"), list(islice(with_response(path), limit)))


def with_response(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file.

    Raises:
        ValueError: a line does not parse.
    """
    for place, record in read_records(path, default_split="train"):
        if isinstance(record, ValueError):
            raise ValueError(f"{path}, {place}: {record}") from record
        if "policy" not in record:
            yield {"correct": None, **record} if "why" in record else record  # a judged one that nobody could check


def describe_record(
    record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, replayed: dict[str, list] | None
) -> dict[str, Any]:
    """What the page is told of one record; see report.js."""
    trajectory = parse_trajectory(record, tokenizer, len(tokenizer))
    shown = {
        "prompt": plain_text(trajectory),
        "tokens": token_texts(tokenizer, trajectory.response_token_ids),
        "steps": trajectory.decoding_order,
        "entropy": record.get("entropy"),
        "correct": record.get("correct", "unknown"),
        "why": record.get("why", ""),
        "id": str(record.get("id", "")),
        **(replayed or {}),
    }
    return {name: value for name, value in shown.items() if value is not None or name == "correct"}


def plain_text(trajectory: Trajectory) -> str:
    """The prompt as text, a conversation turn by turn."""
    if isinstance(trajectory.prompt, str):
        return trajectory.prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in trajectory.prompt)


def token_texts(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """The text that each token adds; one that holds a part of a character adds nothing until the last part."""
    texts, before = [], ""
    for end in range(1, len(token_ids) + 1):
        text = tokenizer.decode(token_ids[:end], skip_special_tokens=False)
        is_partial = text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(token_ids)
        texts.append("" if is_partial else text[len(before) :])
        before = before if is_partial else text
    return texts
