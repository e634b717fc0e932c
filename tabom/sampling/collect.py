"""`tabom collect`: answers a prompt set, verifies the answers, keeps the right ones with their decoding order.

Two files grow side by side: `<output>` gets the right answers and those that nobody could check (`"correct": null`),
`<output>.rejected` the wrong ones, under a first line that holds the settings. Every record says why. Every finished
attempt is a line of exactly one of them, written as soon as it is judged, so a process killed at any moment loses no
more than what is in flight, and a restart repeats nothing.

Of several processes each writes such a pair of its own, a shard (`<output>.rank0`), and the first process moves the
shards into the output: at the end, and at the start those that a killed job has left.
"""

import fcntl
import glob
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO, TypeVar

from tabom.data.encoding import encode_prompt
from tabom.data.prompts import PromptSet
from tabom.data.sources import read_json_lines
from tabom.data.trajectories import Trajectory, non_ltr_positions
from tabom.data.verifiers import Verifier, as_verifier
from tabom.models.diffusion_model import DiffusionModel
from tabom.sampling.engine import Engine, EngineConfig, Request
from tabom.sampling.policies import check_at_least
from tabom.sampling.ranks import Ranks
from tabom.sampling.sampler import (
    Completion,
    Cost,
    SamplerConfig,
    certain_text,
    cost_of,
    decode_response,
    response_length,
)

T = TypeVar("T")

Attempt = tuple[int, int]
"""Index of the prompt, and repeat."""

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
    give_up: bool = field(
        default=False,
        metadata={
            "help": "Leave an answer as it stands once it begins as no right one can; right answers stay what they "
            "are. The verifier must be able to tell: exact can."
        },
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
) -> CollectReport | None:
    """Makes the attempts that are not yet finished and appends the right ones to `config.output`.

    Under torchrun or accelerate the processes share the attempts, whatever their number was before; the first one
    returns the report when all is done, the others None.

    Raises:
        ValueError: `config.output` was begun with other settings or weights, or another job writes to it; `give_up`
            with a verifier that cannot tell.
    """
    if config.give_up:
        check_giving_up(prompts)
    output = Path(config.output)
    settings = {
        "model": model.model.config.name_or_path,
        "weights": model.fingerprint(),
        "prompts": prompts.fingerprint(),
        "verifier": prompts.verifier,
        **asdict(sampler),
        "max_new_tokens": response_length(model, sampler),
        "max_prompt_length": config.max_prompt_length,
    }
    ranks = Ranks()
    with locked(output, ranks):
        if ranks.is_first:
            verdicts = start_or_resume(output, settings, config.overwrite)
            merge(shards_of(output), output, settings, verdicts)
            ranks.say("begun")
        else:
            ranks.hear("begun", 0)
            verdicts = read_verdicts(output)
        attempts = [
            (index, repeat)
            for index in range(len(prompts.prompts))
            for repeat in range(config.samples_per_prompt)
            if attempt_id(index, repeat) not in verdicts
        ]
        before = Counter(verdicts.values())
        own = output
        if ranks.size > 1:
            own = shard_of(output, ranks.rank)
            start_or_resume(own, settings)
        counts = make_attempts(model, prompts, sampler, config, engine, attempts, own, ranks, before)
        if not ranks.is_first:
            return None
        if ranks.size > 1:
            merge([shard_of(output, rank) for rank in range(ranks.size)], output, settings, verdicts)
    cost = Cost(ranks.add("positions", 0), ranks.add("tokens", 0))
    return CollectReport(counts.total(), counts[True], counts[None], len(attempts), cost.positions_per_token)


def make_attempts(
    model: DiffusionModel,
    prompts: PromptSet,
    sampler: SamplerConfig,
    config: CollectConfig,
    engine: EngineConfig | None,
    attempts: Sequence[Attempt],
    own: Path,
    ranks: Ranks,
    before: Counter[bool | None],
) -> Counter[bool | None]:
    """Makes this process's share of the attempts and appends them to its own files.

    Returns the verdicts of all processes so far, counted on top of those `before`; on the first process, of all.
    """
    taken: list[Attempt] = []

    def is_hopeless(number: int, beginning: list[int]) -> bool:
        return prompts.is_hopeless(taken[number][0], certain_text(model, beginning))

    decode = Engine(model, sampler, engine, is_hopeless=is_hopeless if config.give_up else None).run
    share = (attempts[number] for number in ranks.take(len(attempts)))
    answers = answer(model, prompts, sampler, config.max_prompt_length, share, decode, taken)
    with ranks.progress("collecting", len(attempts)) as advance, appending(own) as append:
        for finished in in_groups(answers, JUDGED_AT_ONCE):
            trajectories = [
                to_trajectory(model, prompts, index, completion, sampler.policy, sampler.cache_name)
                for (index, _), completion in finished
            ]
            judged = prompts.verdicts([index for (index, _), _ in finished], [each.response for each in trajectories])
            append(
                {"id": attempt_id(*attempt), **trajectory.to_record(), **verdict._asdict()}
                | ({"given_up": True} if completion.given_up else {})
                for (attempt, completion), trajectory, verdict in zip(finished, trajectories, judged, strict=True)
            )
            cost = cost_of(completion for _, completion in finished)
            ranks.add("positions", cost.positions)
            ranks.add("tokens", cost.tokens)
            counts = before + ranks.count(verdict.correct for verdict in judged)
            advance(len(finished), hit_rate(counts))
    return before + ranks.count([])


def answer(
    model: DiffusionModel,
    prompts: PromptSet,
    sampler: SamplerConfig,
    max_prompt_length: int | None,
    attempts: Iterable[Attempt],
    decode: Callable[[Iterable[Request]], Iterator[tuple[int, T]]],
    taken: list[Attempt] | None = None,
) -> Iterator[tuple[Attempt, T]]:
    """Yields attempts with what `decode` made of them, as they finish; they are taken when there is room for them.

    Args:
        taken: gets the attempts as they are taken, in the order of the requests.
    """
    taken = [] if taken is None else taken

    def requests() -> Iterator[Request]:
        for index, repeat in attempts:
            taken.append((index, repeat))
            prompt = encode_prompt(model.tokenizer, prompts.prompts[index], max_prompt_length)
            yield Request(prompt, response_length(model, sampler), sampler.seed + repeat)

    for number, made in decode(requests()):
        yield taken[number], made


def in_groups(stream: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one of what is left."""
    items = iter(stream)
    while group := list(islice(items, size)):
        yield group


@contextmanager
def locked(output: Path, ranks: Ranks) -> Iterator[None]:
    """Keeps other jobs off an output; the lock ends with the last process of its job, however that ends.

    The first process has the lock alone for a moment, then every process of the job shares it.

    Raises:
        ValueError: another job has it.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.with_name(output.name + ".lock").open("a+") as lock:
        try:
            if ranks.is_first:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                ranks.hear("locked", 0)
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"output={output}: another process is collecting into it; wait for it, or choose another output"
            ) from error
        ranks.say("locked")
        ranks.hear("locked")
        yield


def hit_rate(verdicts: Iterable[bool | None] | Mapping[bool | None, int]) -> str:
    """How many of the attempts so far were right, of those that could be checked."""
    counts = Counter(verdicts)
    checked = counts[True] + counts[False]
    rate = f"{counts[True] / checked:.1%} of {checked} right" if checked else "none checked"
    return f"{rate}, {counts[None]} unverified" if counts[None] else rate


def check_giving_up(prompts: PromptSet) -> None:
    """Giving up needs a verifier that can tell from an answer's beginning that it is wrong."""
    if type(as_verifier(prompts.check)).is_hopeless is Verifier.is_hopeless:
        raise ValueError(
            f"give_up=True with verifier={prompts.verifier!r}: it cannot tell from a beginning that an answer is "
            "wrong; leave it out, or take a verifier with is_hopeless, such as exact"
        )


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


def rejected_of(output: Path) -> Path:
    """The file of the wrong answers."""
    return output.with_name(output.name + ".rejected")


def shard_of(output: Path, rank: int) -> Path:
    """Where one of several processes writes."""
    return output.with_name(f"{output.name}.rank{rank}")


def shards_of(output: Path) -> list[Path]:
    """What a killed job has left, of however many processes."""
    files = output.parent.glob(f"{glob.escape(output.name)}.rank*.rejected")
    return sorted(file.with_suffix("") for file in files)


def start_or_resume(output: Path, settings: dict[str, Any], overwrite: bool = False) -> dict[str, bool | None]:
    """Readies both files for appending and returns the verdicts on the attempts that are finished."""
    rejected = rejected_of(output)
    if overwrite:
        for path in (*shards_of(output), output):
            delete(path)
    if output.exists() and not rejected.exists():
        raise ValueError(f"output={output}: exists, but not from `tabom collect`; choose another, or --overwrite")
    for path in (rejected, output):  # in this order: an output without its companion is taken for somebody else's
        path.touch()
        drop_torn_line(path)
    if rejected.stat().st_size == 0:
        with rejected.open("w") as lines:
            write_line(lines, settings)
            write_to_disk(lines)

    begun_with = next(stream_lines(rejected))
    for name, value in settings.items():
        if begun_with.get(name) != value:
            raise ValueError(
                f"output={output} was begun with {name}={begun_with.get(name)!r}, now {name}={value!r}; "
                "continue with the same settings, choose another output, or --overwrite"
            )
    return read_verdicts(output)


def delete(output: Path) -> None:
    """Both files, in this order, so that one alone is never taken for somebody else's."""
    output.unlink(missing_ok=True)
    rejected_of(output).unlink(missing_ok=True)


def merge(shards: Iterable[Path], output: Path, settings: dict[str, Any], verdicts: dict[str, bool | None]) -> None:
    """Moves the attempts of shards into the output and adds their verdicts.

    Killed in the middle, it can be done again: what the output holds already is left out.
    """
    for shard in shards:
        start_or_resume(shard, settings)
        with appending(output) as append:
            append(record for record in read_attempts(shard) if record["id"] not in verdicts)
        verdicts |= read_verdicts(shard)
        delete(shard)


def read_attempts(output: Path) -> Iterator[dict[str, Any]]:
    """The records of both files, one at a time."""
    wrong = islice(stream_lines(rejected_of(output)), 1, None)  # after the settings
    for record in chain(stream_lines(output), wrong):
        if not isinstance(record.get("id"), str) or "correct" not in record:
            raise ValueError(f"output={output}: holds records without id and verdict, so not from `tabom collect`")
        yield record


def read_verdicts(output: Path) -> dict[str, bool | None]:
    """Whether each finished attempt is right."""
    return {record["id"]: record["correct"] for record in read_attempts(output)}


@contextmanager
def appending(output: Path) -> Iterator[Callable[[Iterable[dict[str, Any]]], None]]:
    """Gives a function that appends records to the file that each belongs in, and through to the disk."""
    with output.open("a") as kept, rejected_of(output).open("a") as rejected:

        def append(records: Iterable[dict[str, Any]]) -> None:
            for record in records:
                write_line(rejected if record["correct"] is False else kept, record)
            write_to_disk(kept)
            write_to_disk(rejected)

        yield append


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
    return list(stream_lines(path))


def stream_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The same, one at a time."""
    for number, record in read_json_lines(path):
        if isinstance(record, ValueError):
            raise ValueError(f"{path}, line {number}: {record}")
        yield record


def write_line(lines: TextIO, record: dict[str, Any]) -> None:
    """Appends one JSON object."""
    lines.write(json.dumps(record, ensure_ascii=False) + "\n")


def write_to_disk(lines: TextIO) -> None:
    """Flushes a file through to the disk."""
    lines.flush()
    os.fsync(lines.fileno())
