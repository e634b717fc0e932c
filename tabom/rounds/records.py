"""What is on the disk of a run of rounds: a folder a round, with its responses, its weights and its figures.

    run.json            the settings, which a continued run must not change
    rounds.json         the figures of all rounds so far
    rounds/003/         rollouts.jsonl and rollouts.jsonl.rejected, model, evaluation, and round.json, written last

A round without `round.json` is not finished: its responses are completed, and its training goes on from its newest
checkpoint or begins again. Only the newest finished round keeps its weights.
"""

import shutil
from collections.abc import Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from tabom.data.json_files import finished_lines, read_json, write_json

Record = dict[str, Any]

TORN = "delete it, and the round is made again from its responses"


def round_folder(output_dir: str | Path, number: int) -> Path:
    """The folder of a round; round 0 is the base."""
    return Path(output_dir) / "rounds" / f"{number:03}"


def finished_rounds(output_dir: str | Path) -> list[Record]:
    """The figures of the finished rounds, from round 0 on."""
    found = []
    for number in count():
        path = round_folder(output_dir, number) / "round.json"
        if not path.exists():
            return found
        found.append(read_json(path, dict, TORN))


def newest_weights(output_dir: str | Path) -> Path | None:
    """The folder of the weights with which the next round begins; None: those of the base."""
    folders = [round_folder(output_dir, number) / "model" for number in range(len(finished_rounds(output_dir)))]
    return next((folder for folder in reversed(folders) if folder.exists()), None)


def finish_round(output_dir: str | Path, number: int, figures: Record) -> None:
    """Writes the figures of a round, and deletes what only an unfinished round needs, and older weights."""
    folder = round_folder(output_dir, number)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "round.json", figures)
    write_json(Path(output_dir) / "rounds.json", finished_rounds(output_dir))
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    if (folder / "model").exists():
        for earlier in range(number):
            shutil.rmtree(round_folder(output_dir, earlier) / "model", ignore_errors=True)


def check_run(output_dir: str | Path, settings: Record) -> None:
    """Notes the settings of a run that begins, and refuses to continue a run with other ones.

    Raises:
        ValueError: a setting differs; names it.
    """
    path = Path(output_dir) / "run.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
        return
    begun_with = read_json(path, dict, "restore it, or choose another output_dir")
    for name in begun_with | settings:
        if begun_with.get(name) != settings.get(name):
            raise ValueError(
                f"output_dir={output_dir}: begun with {name}={begun_with.get(name)!r}, now {name}="
                f"{settings.get(name)!r}; continue with the same settings, or choose another output_dir"
            )


def read_rollouts(folder: Path) -> list[Record]:
    """The responses of a round, right, wrong and unverified, in the order of their prompts and repeats.

    The order does not depend on when they were finished, nor on the number of processes.
    """
    rejected = islice(finished_lines(folder / "rollouts.jsonl.rejected"), 1, None)  # the first line holds the settings
    found = [*finished_lines(folder / "rollouts.jsonl"), *rejected]
    return sorted(found, key=lambda record: [int(number) for number in record["id"].split("-")])


def right_shares(rollouts: Sequence[Record], chosen: Sequence[int]) -> dict[int, float]:
    """The share of right responses to each prompt of which any was checked.

    Args:
        chosen: the index of each prompt of the round in the whole prompt set.
    """
    rewards: dict[int, list[float]] = {}
    for record in rollouts:
        if record["reward"] is not None:
            rewards.setdefault(chosen[int(record["id"].partition("-")[0])], []).append(record["reward"])
    return {index: float(np.mean(rewards[index])) for index in sorted(rewards)}


def rollout_figures(rollouts: Sequence[Record], shares: dict[int, float]) -> Record:
    """Rewards, length and cost of the responses of a round.

    `reward` is the mean of the checked responses, `length` that of the decided tokens, and `positions_per_token` the
    rows through the model's body per decided token. `always_right` and `always_wrong` count prompts.
    """
    decided = [sum(step >= 0 for step in record["decoding_order"]) for record in rollouts]
    rewards = [record["reward"] for record in rollouts if record["reward"] is not None]
    return {
        "responses": len(rollouts),
        "unverified": len(rollouts) - len(rewards),
        "reward": float(np.mean(rewards)) if rewards else None,
        "always_right": sum(share == 1 for share in shares.values()),
        "always_wrong": sum(share == 0 for share in shares.values()),
        "length": float(np.mean(decided)),
        "positions": sum(record["positions"] for record in rollouts),
        "positions_per_token": sum(record["positions"] for record in rollouts) / max(sum(decided), 1),
    }
