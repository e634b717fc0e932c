"""`tabom collect`: answers a prompt set, verifies the answers, keeps the right ones with their decoding order.

Two files grow side by side: `<output>` gets the right answers and those that nobody could check (`"correct": null`),
`<output>.rejected` the wrong ones, under a first line that holds the settings. Every record says why. Every finished
attempt is a line of exactly one of them, written as soon as it is judged, so a process killed at any moment loses no
more than what is in flight, and a restart repeats nothing.
"""

import fcntl
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, TypeVar

from rich.progress import Progress

from tabom.data.encoding import encode_prompt
from tabom.data.prompts import PromptSet
from tabom.data.sources import read_json_lines
from tabom.data.trajectories import Trajectory, non_ltr_positions
from tabom.models.diffusion_model import DiffusionModel
from tabom.sampling.engine import Engine, EngineConfig, Request
from tabom.sampling.policies import check_at_least
from tabom.sampling.sampler import Completion, Cost, SamplerConfig, decode_response, response_length

T = TypeVar("T")

JUDGED_AT_ONCE = 16
"""Answers; verifiers work on several at a time."""

PUBLISHED_METHODS = {"dream_entropy": "entropy", "llada_low_confidence": "default"}
"""What the authors' records call a policy in `method`, and their recipes keep; the other policies keep their names."""


@dataclass
class CollectConfig:
    """How many attempts are made and where the right ones go."""

    output: str = field(metadata={"help": "JSONL file of trajectories; a second run on the same file continues it."})
    samples_per_prompt: int = field(
        default=1,
        metadata={"help": "Attempts a prompt, with seeds seed, seed + 1, ... Needs temperature > 0."},
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Tokens; longer prompts lose the end of their last message. Default: no limit."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Delete what an earlier run wrote and start anew."})

    def __post_init__(self) -> None:
        for name in ("samples_per_prompt", "max_prompt_length"):
            check_at_least(name, getattr(self, name), 1)


@dataclass(frozen=True)
class CollectReport:
    """Attempts over all runs on this output, the right and the unverified among them, and the attempts of this run.

    `positions_per_token`: computed a decided token in this run.
    """

    attempts: int
    correct: int
    unverified: int
    new_attempts: int
    positions_per_token: float


def collect(
    model: DiffusionModel,
    prompts: PromptSet,
    sampler: SamplerConfig,
    config: CollectConfig,
    engine: EngineConfig | None = None,
) -> CollectReport:
    """Makes the attempts that are not yet finished and appends the right ones to `config.output`.

    Raises:
        ValueError: `config.output` was begun with other settings or weights, or another process writes to it.
    """
    output = Path(config.output)
    rejected = output.with_name(output.name + ".rejected")
    settings = {
        "model": model.model.config.name_or_path,
        "weights": model.fingerprint(),
        "prompts": prompts.fingerprint(),
        "verifier": prompts.verifier,
        **asdict(sampler),
        "max_new_tokens": response_length(model, sampler),
        "max_prompt_length": config.max_prompt_length,
    }
    with locked(output):
        return collect_into(output, rejected, settings, model, prompts, sampler, config, engine)


def collect_into(
    output: Path,
    rejected: Path,
    settings: dict[str, Any],
    model: DiffusionModel,
    prompts: PromptSet,
    sampler: SamplerConfig,
    config: CollectConfig,
    engine: EngineConfig | None,
) -> CollectReport:
    """`collect` as the only writer of both files."""
    verdicts = start_or_resume(output, rejected, settings, config.overwrite)
    attempts = [
        (index, repeat)
        for index in range(len(prompts.prompts))
        for repeat in range(config.samples_per_prompt)
        if attempt_id(index, repeat) not in verdicts
    ]

    requests = (
        Request(
            encode_prompt(model.tokenizer, prompts.prompts[index], config.max_prompt_length),
            response_length(model, sampler),
            sampler.seed + repeat,
        )
        for index, repeat in attempts
    )
    cost = Cost()
    with Progress() as progress, output.open("a") as kept_lines, rejected.open("a") as rejected_lines:
        bar = progress.add_task("collecting", total=len(attempts))
        for finished in in_groups(Engine(model, sampler, engine).run(requests), JUDGED_AT_ONCE):
            batch = [attempts[number] for number, _ in finished]
            trajectories = [
                to_trajectory(model, prompts, index, completion, sampler.policy, sampler.cache_name)
                for (index, _), (_, completion) in zip(batch, finished, strict=True)
            ]
            judged = prompts.verdicts([index for index, _ in batch], [each.response for each in trajectories])
            for attempt, trajectory, verdict in zip(batch, trajectories, judged, strict=True):
                name = attempt_id(*attempt)
                verdicts[name] = verdict.correct
                lines = rejected_lines if verdict.correct is False else kept_lines
                write_line(lines, {"id": name, **trajectory.to_record(), **verdict._asdict()})
            write_to_disk(kept_lines)
            write_to_disk(rejected_lines)
            for _, completion in finished:
                cost.add(completion)
            progress.update(bar, advance=len(batch), description=hit_rate(verdicts.values()))

    counts = Counter(verdicts.values())
    return CollectReport(len(verdicts), counts[True], counts[None], len(attempts), cost.positions_per_token)


def in_groups(stream: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one of what is left."""
    items = iter(stream)
    while group := list(islice(items, size)):
        yield group


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keeps other processes off an output; the lock ends with its process, however that ends.

    Raises:
        ValueError: another process has it.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.with_name(output.name + ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"output={output}: another process is collecting into it; wait for it, or choose another output"
            ) from error
        yield


def hit_rate(verdicts: Collection[bool | None]) -> str:
    """How many of the attempts so far were right, of those that could be checked."""
    counts = Counter(verdicts)
    checked = counts[True] + counts[False]
    rate = f"{counts[True] / checked:.1%} of {checked} right" if checked else "none checked"
    return f"{rate}, {counts[None]} unverified" if counts[None] else rate


def check_samples(samples_per_prompt: int, sampler: SamplerConfig) -> None:
    """Several samples of a prompt need a sampler that another seed changes."""
    if samples_per_prompt > 1 and not sampler.is_random:
        raise ValueError(
            f"samples_per_prompt={samples_per_prompt} with temperature=0: all samples of a prompt would be the "
            "same; give --temperature or --alg_temp above 0, or a random --policy"
        )


def to_trajectory(
    model: DiffusionModel, prompts: PromptSet, index: int, completion: Completion, policy: str, cache: str | None = None
) -> Trajectory:
    """The record of one completion."""
    return Trajectory(
        prompt=prompts.prompts[index],
        response=decode_response(model, completion.token_ids),
        response_token_ids=completion.token_ids,
        decoding_order=completion.decoding_order,
        non_ltr_positions=non_ltr_positions(completion.decoding_order),
        method=PUBLISHED_METHODS.get(policy, policy),
        data_source=prompts.name,
        entropy=[float(f"{nats:.4g}") for nats in completion.entropy],
        cache=cache,
    )


def attempt_id(index: int, repeat: int) -> str:
    """Names an attempt: prompt index and repeat."""
    return f"{index}-{repeat}"


def start_or_resume(output: Path, rejected: Path, settings: dict[str, Any], overwrite: bool) -> dict[str, bool | None]:
    """Readies both files for appending and returns the verdicts on the attempts that are finished."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if overwrite:
        output.unlink(missing_ok=True)
        rejected.unlink(missing_ok=True)
    if output.exists() and not rejected.exists():
        raise ValueError(f"output={output}: exists, but not from `tabom collect`; choose another, or --overwrite")
    for path in (rejected, output):  # in this order: an output without its companion is taken for somebody else's
        path.touch()
        drop_torn_line(path)
    if rejected.stat().st_size == 0:
        with rejected.open("w") as lines:
            write_line(lines, settings)
            write_to_disk(lines)

    begun_with, *wrong = read_lines(rejected)
    for name, value in settings.items():
        if begun_with.get(name) != value:
            raise ValueError(
                f"output={output} was begun with {name}={begun_with.get(name)!r}, now {name}={value!r}; "
                "continue with the same settings, choose another output, or --overwrite"
            )
    finished = [*read_lines(output), *wrong]
    if any(not isinstance(record.get("id"), str) or "correct" not in record for record in finished):
        raise ValueError(f"output={output}: holds records without id and verdict, so not from `tabom collect`")
    return {record["id"]: record["correct"] for record in finished}


def drop_torn_line(path: Path) -> None:
    """Cuts off a last line that has no newline: its writer was killed in the middle of it."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        whole = 0
        while end > 0 and whole == 0:
            start = max(end - 2**16, 0)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            whole, end = (0 if newline < 0 else start + newline + 1), start
        file.truncate(whole)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file that `write_line` wrote."""
    records = []
    for number, record in read_json_lines(path):
        if isinstance(record, ValueError):
            raise ValueError(f"{path}, line {number}: {record}")
        records.append(record)
    return records


def write_line(lines: TextIO, record: dict[str, Any]) -> None:
    """Appends one JSON object."""
    lines.write(json.dumps(record, ensure_ascii=False) + "\n")


def write_to_disk(lines: TextIO) -> None:
    """Flushes a file through to the disk."""
    lines.flush()
    os.fsync(lines.fileno())
