"""`tabom collect`: answers a prompt set, verifies the answers, keeps the right ones with their decoding order.

Two files grow side by side: `<output>` gets the right answers, `<output>.rejected` the wrong ones, under a first line
that holds the settings. Every finished attempt is a line of exactly one of them, written at once, so a process killed
at any moment loses no more than what is in flight, and a restart repeats nothing.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rich.progress import Progress

from tabom.data.encoding import encode_prompt
from tabom.data.prompts import PromptSet
from tabom.data.trajectories import Trajectory, non_ltr_positions
from tabom.models.diffusion_model import DiffusionModel
from tabom.sampling.engine import Engine, EngineConfig, Request
from tabom.sampling.sampler import Completion, Cost, SamplerConfig, decode_response, response_length


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
        if self.samples_per_prompt < 1:
            raise ValueError(f"samples_per_prompt={self.samples_per_prompt}: expected at least 1")


@dataclass(frozen=True)
class CollectReport:
    """Attempts over all runs on this output, those of them that were right, and the attempts of this run.

    `positions_per_token`: computed a decided token in this run.
    """

    attempts: int
    correct: int
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
        ValueError: `config.output` was begun with other settings.
    """
    output = Path(config.output)
    rejected = output.with_name(output.name + ".rejected")
    settings = {
        "model": model.model.config.name_or_path,
        "prompts": prompts.fingerprint(),
        **asdict(sampler),
        "max_new_tokens": response_length(model, sampler),
        "max_prompt_length": config.max_prompt_length,
    }
    right, wrong = start_or_resume(output, rejected, settings, config.overwrite)
    attempts = [
        (index, repeat)
        for index in range(len(prompts.prompts))
        for repeat in range(config.samples_per_prompt)
        if attempt_id(index, repeat) not in right | wrong
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
    with Progress() as progress, output.open("a") as right_lines, rejected.open("a") as wrong_lines:
        bar = progress.add_task("collecting", total=len(attempts))
        for number, completion in Engine(model, sampler, engine).run(requests):
            index, repeat = attempts[number]
            trajectory = to_trajectory(model, prompts, index, completion, sampler)
            is_correct = prompts.is_correct(index, trajectory.response)
            name = attempt_id(index, repeat)
            (right if is_correct else wrong).add(name)
            lines = right_lines if is_correct else wrong_lines
            write_line(lines, {"id": name, **trajectory.to_record()})
            lines.flush()
            cost.add(completion)
            progress.advance(bar)
        write_to_disk(right_lines)
        write_to_disk(wrong_lines)

    return CollectReport(len(right | wrong), len(right), len(attempts), cost.positions_per_token)


def to_trajectory(
    model: DiffusionModel, prompts: PromptSet, index: int, completion: Completion, sampler: SamplerConfig
) -> Trajectory:
    """The record of one completion."""
    return Trajectory(
        prompt=prompts.prompts[index],
        response=decode_response(model, completion.token_ids),
        response_token_ids=completion.token_ids,
        decoding_order=completion.decoding_order,
        non_ltr_positions=non_ltr_positions(completion.decoding_order),
        method=sampler.policy,
        data_source=prompts.name,
        cache=sampler.cache_name,
    )


def attempt_id(index: int, repeat: int) -> str:
    """Names an attempt: prompt index and repeat."""
    return f"{index}-{repeat}"


def start_or_resume(
    output: Path, rejected: Path, settings: dict[str, Any], overwrite: bool
) -> tuple[set[str], set[str]]:
    """Readies both files for appending and returns the attempts that were right and those that were wrong."""
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
    return {record["id"] for record in read_lines(output)}, {record["id"] for record in wrong}


def drop_torn_line(path: Path) -> None:
    """Cuts off a last line that has no newline: its writer was killed in the middle of it."""
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file that `write_line` wrote."""
    with path.open() as lines:
        return [json.loads(line) for line in lines]


def write_line(lines: TextIO, record: dict[str, Any]) -> None:
    """Appends one JSON object."""
    lines.write(json.dumps(record, ensure_ascii=False) + "\n")


def write_to_disk(lines: TextIO) -> None:
    """Flushes a file through to the disk."""
    lines.flush()
    os.fsync(lines.fileno())
