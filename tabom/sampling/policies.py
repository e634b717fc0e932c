"""Unmasking policies: how certain each masked position is, and how many positions a step unmasks.

The policies `dream_*`, `llada_*`, `sdar_*`, `llada2` and `fast_dllm` are those of the models' own generation code.
Dream's measure certainty on the distribution that the tokens are drawn from, after temperature and filters; all others
on the model's own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from tabom.sampling.config import PolicySettings, SamplerConfig
from tabom_kernels import cross_entropy_with_entropy, mix_keys, unmask_statistics
from tabom_kernels.noise import uniform_noise
from tabom_kernels.ops.sampling import filter_logits


class Candidates(NamedTuple):
    """The positions of a response that may be unmasked now, (B, T) each; values count only where `masked`."""

    masked: Tensor  # bool
    probability: Tensor  # of the token that would be unmasked
    margin: Tensor  # best minus second best probability
    entropy: Tensor  # nats
    uniform: Tensor  # random numbers in (0, 1)
    logprob: Tensor | None = None  # of the token, nats, at the temperature it is drawn with; None if it is not drawn


class Step(NamedTuple):
    """The current step of a block: numbers, or (B,) tensors if every sequence is at a step of its own."""

    index: int | Tensor  # from 0
    steps: int | Tensor  # planned for the block
    tokens: int | Tensor  # of the block
    share: float | Tensor = 1.0  # of the masked positions that Dream's time schedule unmasks (see `time_shares`)


Certainty = Callable[[Candidates], Tensor]
"""(B, T) scores; the position with the highest score is unmasked first, and of equal scores the leftmost."""

Count = Callable[[Candidates, Step, PolicySettings], Tensor | int]
"""(B,) how many positions are unmasked, or one number for all sequences."""


@dataclass(frozen=True)
class Policy:
    """How certain each position is, and how many are unmasked.

    `on_draw_distribution`: certainty is measured after temperature and filters. `begins_alone`: the first token of a
    block is decided before the model sees the masks of this block, as the next token after the blocks before it.
    `sub_block_length`: tokens of the parts of a block, where the config says nothing else. `edits`: decided tokens of
    the active block may be replaced, and the block ends when none is (see `edited`).
    """

    certainty: Certainty
    count: Count
    on_draw_distribution: bool = False
    begins_alone: bool = False
    sub_block_length: int | None = None
    edits: bool = False


def by_entropy(candidates: Candidates) -> Tensor:
    """Lowest entropy first."""
    return -candidates.entropy


def by_probability(candidates: Candidates) -> Tensor:
    """Highest probability first."""
    return beyond_rounding(candidates.probability, candidates.entropy)


def by_margin(candidates: Candidates) -> Tensor:
    """Largest gap between the best two first."""
    return beyond_rounding(candidates.margin, candidates.entropy)


def by_position(candidates: Candidates) -> Tensor:
    """From left to right."""
    count = candidates.masked.shape[1]
    places = torch.arange(count, 0, -1, dtype=torch.float32, device=candidates.masked.device)
    return places.expand_as(candidates.masked)


def beyond_rounding(certainty: Tensor, entropy: Tensor) -> Tensor:
    """Orders certainties that round to 1 in fp32 by their entropies, which are still exact there.

    The fp64 result differs from the certainty by less than half a unit in the last place of fp32.
    """
    half_a_step = 2.0**-25
    more = half_a_step - (entropy.double() / 32).clamp(max=half_a_step)
    return certainty.double() + torch.where(certainty == 1, more, 0.0)


def by_chance(candidates: Candidates) -> Tensor:
    """In a random order."""
    return -candidates.uniform


def even_count(_candidates: Candidates, step: Step, settings: PolicySettings) -> int:
    """The same number every step; a remainder is spread over the first steps, one more in each (LLaDA)."""
    if settings.tokens_per_step is not None:
        return settings.tokens_per_step
    return step.tokens // step.steps + (step.index < step.tokens % step.steps)


@cache
def time_shares(steps: int, eps: float) -> Tensor:
    """(steps,) fp32: the share 1 - s/t of the masked positions that the step from time t to s unmasks (Dream).

    Time runs evenly from 1 to `eps`. The last step unmasks all that is left.
    """
    times = torch.linspace(1, eps, steps + 1)
    shares = 1 - times[1:] / times[:-1]
    shares[-1] = 1.0
    return shares


@cache
def steps_that_unmask(policy: str, steps: int, tokens: int, eps: float) -> tuple[int, ...]:
    """The planned steps of a block that may unmask something; the others need no forward.

    Dream's time schedule rounds down to nothing in some steps, which are known beforehand. Every other policy unmasks
    something in every step, or decides only in the step itself.
    """
    if POLICIES[policy].count is not count_by_time:
        return tuple(range(steps))
    found, masked = [], float(tokens)
    for index, share in enumerate(time_shares(steps, eps)):
        count = (masked * share).floor().item()  # in fp32, so that it rounds as the step itself does
        masked -= count
        if count > 0:
            found.append(index)
    return tuple(found)


def count_by_time(candidates: Candidates, step: Step, _settings: PolicySettings) -> Tensor:
    """The expected number of the time schedule, rounded down; a step may unmask nothing (Dream)."""
    return (candidates.masked.sum(1).float() * step.share).long()


def chance_by_time(candidates: Candidates, step: Step, _settings: PolicySettings) -> Tensor:
    """Each position independently with the probability of the time schedule (Dream's `origin`)."""
    share = torch.as_tensor(step.share, device=candidates.uniform.device).reshape(-1, 1)
    return (candidates.masked & (candidates.uniform < share)).sum(1)


def above_threshold(candidates: Candidates, _step: Step, settings: PolicySettings) -> Tensor:
    """All positions whose token has at least the probability `threshold`, or one (Fast-dLLM, arXiv 2505.22618)."""
    return (candidates.masked & (candidates.probability >= settings.threshold)).sum(1).clamp(min=1)


def strictly_above_threshold(candidates: Candidates, _step: Step, settings: PolicySettings) -> Tensor:
    """All positions whose token has more than the probability `threshold`, or one (Fast-dLLM v2)."""
    return (candidates.masked & (candidates.probability > settings.threshold)).sum(1).clamp(min=1)


def above_threshold_or_even(candidates: Candidates, step: Step, settings: PolicySettings) -> Tensor:
    """All positions above `threshold` if they are at least as many as `even_count`, else that many (SDAR, LLaDA2)."""
    above = (candidates.masked & (candidates.probability > settings.threshold)).sum(1)
    return above.maximum(torch.as_tensor(even_count(candidates, step, settings), device=above.device))


def within_entropy_bound(candidates: Candidates, _step: Step, settings: PolicySettings) -> Tensor:
    """The most positions whose entropies, without the largest, sum to at most `entropy_bound` (arXiv 2505.24857)."""
    entropy = candidates.entropy.masked_fill(~candidates.masked, torch.inf).sort(1).values
    return (entropy.cumsum(1) - entropy <= settings.entropy_bound).sum(1)


def dream(certainty: Certainty, count: Count = count_by_time) -> Policy:
    """A policy of Dream's generation code."""
    return Policy(certainty, count, on_draw_distribution=True)


POLICIES = {
    "entropy": Policy(by_entropy, even_count),
    "confidence": Policy(by_probability, even_count),
    "margin": Policy(by_margin, even_count),
    "random": Policy(by_chance, even_count),
    "threshold": Policy(by_probability, above_threshold),
    "entropy_bound": Policy(by_entropy, within_entropy_bound),
    "dream_origin": dream(by_chance, chance_by_time),
    "dream_maskgit_plus": dream(by_probability),
    "dream_topk_margin": dream(by_margin),
    "dream_entropy": dream(by_entropy),
    "llada_low_confidence": Policy(by_probability, even_count),
    "llada_random": Policy(by_chance, even_count),
    "sdar_static": Policy(by_probability, even_count),
    "sdar_dynamic": Policy(by_probability, above_threshold_or_even),
    "sdar_sequential": Policy(by_position, even_count),
    "llada2": Policy(by_probability, above_threshold_or_even),
    "llada2_edit": Policy(by_probability, strictly_above_threshold, edits=True),
    "fast_dllm": Policy(by_probability, strictly_above_threshold, begins_alone=True, sub_block_length=8),
}


EDITING_THRESHOLD, MAX_POST_STEPS = 0.9, 16
"""Of LLaDA2.1, where the config says nothing else."""


def edited(candidates: Candidates, editable: Tensor, token: Tensor, tokens: Tensor, config: SamplerConfig) -> Tensor:
    """(B, T) bool: the decided positions whose token is replaced by another one above the editing threshold (LLaDA2.1).

    Args:
        editable: (B, T) bool: the decided positions of the active block.
        token: (B, T) the token that the model would choose now.
        tokens: (B, T) the tokens as they are.
    """
    threshold = EDITING_THRESHOLD if config.editing_threshold is None else config.editing_threshold
    return editable & (candidates.probability > threshold) & (token != tokens)


def is_settled(had_masks: Tensor, edits: Tensor, post_steps: Tensor, config: SamplerConfig) -> Tensor:
    """(B,) bool: whether the active block ends after a step: it had no mask, and nothing was edited, or for too long.

    Args:
        had_masks: (B,) bool, before the step.
        edits: (B, T) bool: what the step replaced.
        post_steps: (B,) the steps of the block so far in which it had no mask, this one included.
    """
    return ~had_masks & (~edits.any(1) | (post_steps >= (config.max_post_steps or MAX_POST_STEPS)))


def first_sub_block(masked: Tensor, given: Tensor, size: Tensor | int, config: SamplerConfig) -> Tensor:
    """(B, T) bool: of the masked positions of the active block, those of the first sub-block that has any.

    With `Policy.begins_alone` the first position of a block is a sub-block of its own.

    Args:
        masked: (B, T) bool.
        given: (B,) positions of the first block that stand before the response.
        size: positions of a block, or (B,).
    """
    policy = POLICIES[config.policy]
    length = config.sub_block_length or policy.sub_block_length
    if length is None:
        return masked
    size = torch.as_tensor(size, device=masked.device).expand(len(masked))[:, None]
    place = (torch.arange(masked.shape[1], device=masked.device) + given[:, None]) % size
    part = place // length
    if policy.begins_alone:
        part = part.masked_fill(place == 0, -1)
    first = part.where(masked, size).amin(1, keepdim=True)
    return masked & (part == first)


def read_candidates(logits: Tensor, masked: Tensor, keys: Tensor, config: SamplerConfig) -> tuple[Tensor, Candidates]:
    """The token that would be unmasked at each masked position (B, T), and the model's certainty of it.

    Args:
        logits: (N, V) of the masked positions, row by row of `masked`.
        masked: (B, T) bool.
        keys: (N,) keys of the random numbers.
    """
    temperature, top_k, top_p = config.temperature, config.top_k, config.top_p
    model_logits = logits
    changes_distribution = temperature > 0 or top_k is not None or top_p is not None
    if POLICIES[config.policy].on_draw_distribution and changes_distribution:
        logits = filter_logits(filter_logits(logits, temperature=temperature or 1.0, top_p=top_p), top_k=top_k)
        temperature, top_k, top_p = float(temperature > 0), None, None
    statistics = unmask_statistics(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=keys)

    def on_grid(values: Tensor) -> Tensor:
        return values.new_zeros(masked.shape).masked_scatter_(masked, values)

    logprob = None
    if config.temperature > 0:
        logprob = on_grid(token_logprobs(model_logits, statistics.token, config.temperature))
    token, *certainties = map(on_grid, statistics)
    return token, Candidates(masked, *certainties, on_grid(uniform_noise(mix_keys(keys, 1))), logprob)


def token_logprobs(logits: Tensor, token: Tensor, temperature: float) -> Tensor:
    """(N,) log-probability (nats) of a token (N,) under softmax(logits / temperature), without top-k and top-p."""
    logits = logits if temperature == 1 else logits / temperature
    return -cross_entropy_with_entropy(logits, token)[0]


def choose(candidates: Candidates, step: Step, settings: PolicySettings) -> Tensor:
    """(B, T) bool: the candidates that are unmasked.

    With `alg_temp` they are drawn without replacement, by the softmax of certainty / alg_temp (Gumbel top-k).
    """
    policy = POLICIES[settings.policy]
    certainty = policy.certainty(candidates)
    if settings.alg_temp > 0:
        certainty = certainty / settings.alg_temp - candidates.uniform.log().neg().log()
    count = policy.count(candidates, step, settings)
    order = certainty.masked_fill(~candidates.masked, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    count = torch.as_tensor(count, device=order.device).reshape(-1, 1)
    return candidates.masked & (rank < count)
