"""`tabom collect`: answers a prompt set, verifies the answers, keeps the right ones with their decoding order.

Attempts are appended to a `tabom.data.store.TrajectoryFile` as soon as they are judged: right ones, and those that the
verifier could not check (`"correct": null`), to `<output>`, wrong ones to `<output>.rejected`. Every record holds the
reason of its verdict.
A process that is killed loses only the attempts that it was working on, and a restart repeats no finished attempt.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from tabom.data.encoding import encode_prompt
from tabom.data.json_files import Append
from tabom.data.prompts import PromptSet
from tabom.data.store import TrajectoryFile
from tabom.data.trajectories import Trajectory, non_ltr_positions, prompt_group
from tabom.data.verifiers import Verifier, as_verifier
from tabom.data.verifiers.verdict import Verdict
from tabom.models.diffusion_model import DiffusionModel
from tabom.sampling.answerable import check_prompts
from tabom.sampling.completions import (
    Completion,
    Cost,
    cost_of,
    decode_response,
    guaranteed_text,
    response_length,
    with_block_length,
)
from tabom.sampling.config import CollectConfig, EngineConfig, SamplerConfig
from tabom.sampling.engine import Engine, Request
from tabom.sampling.ranks import Ranks, joined

T = TypeVar("T")

Attempt = tuple[int, int]
"""Index of the prompt, and repeat."""

VERDICT_BATCH = 16
"""How many responses are judged together; verifiers judge several in parallel."""

PUBLISHED_METHODS = {"dream_entropy": "entropy", "llada_low_confidence": "default"}
"""Names of policies in the `method` field of the authors' records, by which their recipes filter; other policies keep
their own names."""


@dataclass(frozen=True)
class CollectReport:
    """Attempts over all runs on this output, the right and the unverified among them, and the attempts of this run.

    `positions_per_token`: rows that this run computed per decided token.
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
            with a verifier that cannot tell; or the model cannot answer an empty prompt.
    """
    check_prompts(model, prompts)
    if config.give_up:
        check_giving_up(prompts)
    store = TrajectoryFile(Path(config.output), config.overwrite)
    with joined(config.peer_timeout) as ranks:
        with store.opened(settings_of(model, prompts, sampler, config.max_prompt_length), ranks) as (verdicts, append):
            attempts = [
                (index, repeat)
                for index in range(len(prompts.prompts))
                for repeat in range(config.samples_per_prompt)
                if attempt_id(index, repeat) not in verdicts
            ]
            before = Counter(verdicts.values())
            counts = make_attempts(model, prompts, sampler, config, engine, attempts, append, ranks, before)
        if not ranks.is_first:
            return None
        cost = Cost(ranks.add("positions", 0), ranks.add("tokens", 0))
        return CollectReport(counts.total(), counts[True], counts[None], len(attempts), cost.positions_per_token)


def settings_of(
    model: DiffusionModel, prompts: PromptSet, sampler: SamplerConfig, max_prompt_length: int | None
) -> dict[str, Any]:
    """All that a response depends on besides its prompt and seed; a store is only continued with the same values."""
    return {
        "model": model.model.config.name_or_path,
        "weights": model.fingerprint(),
        "prompts": prompts.fingerprint(),
        "verifier": prompts.verifier,
        **asdict(sampler),
        "max_new_tokens": response_length(model, sampler),
        "max_prompt_length": max_prompt_length,
        "block_size": with_block_length(model, sampler).block_size,
    }


def make_attempts(
    model: DiffusionModel,
    prompts: PromptSet,
    sampler: SamplerConfig,
    config: CollectConfig,
    engine: EngineConfig | None,
    attempts: Sequence[Attempt],
    append: Append,
    ranks: Ranks,
    before: Counter[bool | None],
) -> Counter[bool | None]:
    """Makes this process's share of the attempts and appends them to the store.

    Returns the verdicts of all processes so far, counted on top of those `before`; on the first process, of all.
    """
    taken: list[Attempt] = []

    def is_hopeless(number: int, beginning: list[int]) -> bool:
        return prompts.is_hopeless(taken[number][0], guaranteed_text(model, beginning))

    decode = Engine(model, sampler, engine, is_hopeless=is_hopeless if config.give_up else None).run
    share = (attempts[number] for number in ranks.take(len(attempts)))
    decoded = decode_attempts(model, prompts, sampler, config.max_prompt_length, share, decode, taken)
    with ranks.progress("collecting", len(attempts)) as advance:
        for finished in in_groups(decoded, VERDICT_BATCH):
            trajectories = [
                to_trajectory(model, prompts, index, completion, sampler.policy, sampler.cache_name)
                for (index, _), completion in finished
            ]
            judged = prompts.verdicts([index for (index, _), _ in finished], [each.response for each in trajectories])
            append(
                attempt_record(
                    attempt,
                    trajectory,
                    verdict,
                    positions=completion.positions,
                    temperature=sampler.temperature if completion.logprob is not None else None,
                    given_up=completion.given_up,
                    edits=completion.edits,
                )
                for (attempt, completion), trajectory, verdict in zip(finished, trajectories, judged, strict=True)
            )
            cost = cost_of(completion for _, completion in finished)
            ranks.add("positions", cost.positions)
            ranks.add("tokens", cost.tokens)
            counts = before + ranks.count(verdict.correct for verdict in judged)
            advance(len(finished), hit_rate(counts))
    return before + ranks.count([])


def decode_attempts(
    model: DiffusionModel,
    prompts: PromptSet,
    sampler: SamplerConfig,
    max_prompt_length: int | None,
    attempts: Iterable[Attempt],
    decode: Callable[[Iterable[Request]], Iterator[tuple[int, T]]],
    taken: list[Attempt] | None = None,
) -> Iterator[tuple[Attempt, T]]:
    """Decodes attempts and yields each with its result, in the order in which they finish.

    An attempt is taken only when `decode` asks for its next request.

    Args:
        taken: the attempts that were taken are appended to this list, in the order of the requests.
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
    """Yields lists of `size` items; the last list may be shorter."""
    items = iter(stream)
    while group := list(islice(items, size)):
        yield group


def hit_rate(verdicts: Iterable[bool | None] | Mapping[bool | None, int]) -> str:
    """A text that gives the share of right attempts among those that could be checked."""
    counts = Counter(verdicts)
    checked = counts[True] + counts[False]
    rate = f"{counts[True] / checked:.1%} of {checked} right" if checked else "none checked"
    return f"{rate}, {counts[None]} unverified" if counts[None] else rate


def check_giving_up(prompts: PromptSet) -> None:
    """Raises a ValueError if the verifier cannot tell from the beginning of a response that it is wrong."""
    if type(as_verifier(prompts.check)).is_hopeless is Verifier.is_hopeless:
        raise ValueError(
            f"give_up=True with verifier={prompts.verifier!r}: this verifier cannot judge the beginning of an answer; "
            "set give_up=False, or use a verifier that defines is_hopeless, such as exact"
        )


def check_samples(samples_per_prompt: int, sampler: SamplerConfig) -> None:
    """Raises a ValueError if several samples are asked for and the sampler does not depend on the seed."""
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
        logprob=completion.logprob and [float(f"{nats:.5g}") for nats in completion.logprob],
        cache=cache,
    )


def attempt_record(attempt: Attempt, trajectory: Trajectory, verdict: Verdict, **others: Any) -> dict[str, Any]:
    """What is written of an attempt: the trajectory, the verdict, and what a policy loss needs of both.

    Args:
        others: further fields, left out where they are None, False or 0.
    """
    record = {"id": attempt_id(*attempt), **trajectory.to_record(), **verdict._asdict(), "reward": verdict.reward}
    record["group"] = prompt_group(trajectory.prompt)
    return record | {name: value for name, value in others.items() if value}


def attempt_id(index: int, repeat: int) -> str:
    """The id of an attempt: index of the prompt and repeat."""
    return f"{index}-{repeat}"
