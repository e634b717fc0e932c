"""Gathers the data of a report from trajectory files and from folders of training runs and evaluations."""

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tabom.data.encoding import encode_prompt
from tabom.data.json_files import read_json
from tabom.data.sources import read_records
from tabom.data.store import ResponseFolder, TrajectoryFile
from tabom.data.trajectories import Trajectory, parse_trajectory, response_blocks
from tabom.evaluation.evaluate import Cell

TORN_RESULTS = "run the `tabom evaluate` command again, which reuses all answers and writes the file anew"
TORN_ROUNDS = "run the `tabom improve` command again, which writes it anew"
TORN_STATE = "delete the checkpoint that the file belongs to"
"""Remedies for incomplete files, for error messages."""

FIGURES = {"model", "prompts", "sampler", "accuracy", "pass_at", "tds", "tokens", "steps", "positions", "answers"}
"""What a result of `tabom evaluate` must hold to be shown."""


@dataclass
class Source:
    """The records of one file or cell, and the settings that they were made with, empty where these are not known.

    `role` is "base" or "tuned" where an evaluation compared the cell's model.
    """

    name: str
    settings: dict[str, Any]
    records: list[dict[str, Any]]
    role: str | None = None


@dataclass
class Gathered:
    """The data of a report.

    `training` maps a run to the log entries of its trainer; `results` and `comparisons` are `tabom evaluate`'s: a
    comparison names `base` and `tuned`, and has `comparisons`, one for each prompt set and sampler.
    """

    sources: list[Source] = field(default_factory=list)
    training: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    rounds: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)
    comparisons: list[dict[str, Any]] = field(default_factory=list)


def gather(inputs: Sequence[str], limit: int) -> Gathered:
    """Reads every input.

    Args:
        inputs: files of trajectories, and folders that `tabom train` or `tabom evaluate` wrote.
        limit: the most trajectories of each file or cell.

    Raises:
        FileNotFoundError: an input does not exist.
        ValueError: a folder of neither kind, or a file or one of its lines that does not parse.
    """
    found = Gathered()
    for name in inputs:
        path = Path(name)
        if not path.exists():
            raise FileNotFoundError(
                f"{name}: no such file or folder; give trajectories, or a run's or evaluation's folder"
            )
        if not path.is_dir():
            output = path.with_suffix("") if path.suffix == ".rejected" else path
            settings = TrajectoryFile(output).settings()
            found.sources.append(Source(str(path), settings, list(islice(judged_records(path), limit))))
            continue
        if (path / "rounds.json").exists():
            entries = read_json(path / "rounds.json", list, TORN_ROUNDS)
            found.rounds[name] = [figures_of_round(entry) for entry in entries]
            newest = path / "rounds" / f"{entries[-1]['round']:03}" / "rollouts.jsonl"
            for rollouts in (newest, newest.with_name("rollouts.jsonl.rejected")) if newest.exists() else ():
                records = list(islice(judged_records(rollouts), limit))
                found.sources.append(
                    Source(str(rollouts.relative_to(path)), TrajectoryFile(newest).settings(), records)
                )
            continue
        states = sorted(path.glob("**/trainer_state.json"), key=lambda state: state.stat().st_mtime)
        if states:
            found.training[name] = read_list(states[-1], "log_history", TORN_STATE)
        results: list[dict[str, Any]] = []
        if (path / "results.json").exists():
            results = read_parts(path / "results.json", "result", FIGURES)
            found.results += results
        roles: dict[Path, str] = {}
        if (path / "comparison.json").exists():
            comparisons = read_parts(path / "comparison.json", "comparison", {"base", "tuned", "comparisons"})
            found.comparisons += comparisons
            roles = roles_of_cells(comparisons, path)
        cells = cells_of(path, results)
        for cell in cells:
            responses = ResponseFolder(cell)
            records = list(islice(responses.records(), limit))
            name = " · ".join(cell.relative_to(path).parts)
            found.sources.append(Source(name, responses.settings(), records, roles.get(cell)))
        if not states and not cells:
            raise ValueError(f"{name}: a folder without trainer_state.json, results.json or answers")
    return found


def read_list(path: Path, name: str, remedy: str) -> list[Any]:
    """A list in a JSON object.

    Raises:
        ValueError: the file holds no such list.
    """
    content = read_json(path, dict, remedy).get(name)
    if not isinstance(content, list):
        raise ValueError(f"{path}: expected a list {name!r}, got {content!r:.60}; {remedy}")
    return content


def read_parts(path: Path, kind: str, names: Set[str]) -> list[dict[str, Any]]:
    """The results or comparisons of an evaluation.

    Args:
        kind: what errors call one of them.
        names: what each must have.

    Raises:
        ValueError: one of them lacks a part.
    """
    parts = read_json(path, list, TORN_RESULTS)
    for number, part in enumerate(parts):
        missing = names - (part.keys() if isinstance(part, dict) else set())
        if missing:
            raise ValueError(f"{path}: {kind} {number} has no {', '.join(sorted(missing))}; {TORN_RESULTS}")
    return parts


def cells_of(folder: Path, results: Sequence[dict[str, Any]]) -> list[Path]:
    """The folders of responses in the order of the results, so the base before what was compared with it."""
    measured = [Cell(each["model"], each["prompts"], each["sampler"]).folder(folder) for each in results]
    order = {cell: number for number, cell in enumerate(measured)}
    cells = sorted(settings.parent for settings in folder.glob("**/settings.json"))
    return sorted(cells, key=lambda cell: order.get(cell, len(order)))


def roles_of_cells(comparisons: Sequence[dict[str, Any]], folder: Path) -> dict[Path, str]:
    """Which folders of responses are those of a base, and which of a model that was compared with it."""
    return {
        Cell(comparison[role], each["prompts"], each["sampler"]).folder(folder): role
        for comparison in comparisons
        for each in comparison["comparisons"]
        for role in ("tuned", "base")
    }


def figures_of_round(entry: dict[str, Any]) -> dict[str, float]:
    """The figures of a round as the page draws them, shares in percent."""
    figures = {"step": entry["round"]}
    estimates = {"accuracy": entry.get("accuracy")}
    estimates |= {f"pass@{k}": each for k, each in entry.get("pass_at", {}).items() if k != "1"}
    figures |= {
        f"{name}, %": 100 * each["mean"] for name, each in estimates.items() if each and each["mean"] is not None
    }
    drawn = ("reward", "ratio", "clip_share", "kl", "entropy", "loss", "length", "positions_per_token")
    drawn += ("always_right", "always_wrong")
    return figures | {name.replace("_", " "): entry[name] for name in drawn if entry.get(name) is not None}


def judged_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file, with the verdict of those that could not be checked.

    Raises:
        ValueError: a line does not parse.
    """
    for place, record in read_records(path, default_split="train"):
        if isinstance(record, ValueError):
            raise ValueError(f"{path}, {place}: {record}") from record
        yield {"correct": None, **record} if "why" in record else record  # judged, but it could not be checked


def describe_record(
    record: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
    replayed: dict[str, list] | None,
) -> dict[str, Any]:
    """The data of one record on the page; report.js reads it."""
    trajectory = parse_trajectory(record, tokenizer, len(tokenizer))
    shown = {
        "prompt": plain_text(trajectory),
        "question": trajectory.prompt if isinstance(trajectory.prompt, str) else trajectory.prompt[-1]["content"],
        "tokens": token_texts(tokenizer, trajectory.response_token_ids),
        "steps": trajectory.decoding_order,
        "blocks": blocks_of_tokens(trajectory, tokenizer, settings),
        "entropy": record.get("entropy"),
        "correct": record.get("correct", "unknown"),
        "why": record.get("why", ""),
        "id": str(record.get("id", "")),
        **(replayed or {}),
    }
    return {name: value for name, value in shown.items() if value is not None or name == "correct"}


def blocks_of_tokens(
    trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]
) -> list[int] | None:
    """The block that each token was decoded in, from 0; None where the response was decoded as one block.

    The blocks of block-causal attention are counted from the first token of the prompt, and those of `block_length`
    with full attention from that of the response. Tokens of two blocks are no pair, because the sampler never chooses
    between them.
    """
    length, size = len(trajectory.response_token_ids), settings.get("block_size")
    if size is not None:
        prompt_length = len(encode_prompt(tokenizer, trajectory.prompt, settings["max_prompt_length"]))
        blocks = response_blocks(prompt_length, length, size)
    else:
        blocks = response_blocks(0, length, settings.get("block_length"))
    numbers = [number for number, block in enumerate(blocks) for _ in range(block.start, block.stop)]
    return numbers if len(blocks) > 1 else None


def plain_text(trajectory: Trajectory) -> str:
    """The prompt as text, a conversation turn by turn."""
    if isinstance(trajectory.prompt, str):
        return trajectory.prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in trajectory.prompt)


def token_texts(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """The text that each token adds; a token that ends inside a character adds no text."""
    texts, before = [], ""
    for end in range(1, len(token_ids) + 1):
        text = tokenizer.decode(token_ids[:end], skip_special_tokens=False)
        is_partial = text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(token_ids)
        texts.append("" if is_partial else text[len(before) :])
        before = before if is_partial else text
    return texts
