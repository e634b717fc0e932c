"""Unmasking policies: how certain each masked position is, and how many positions a step unmasks.

The `dream_` and `llada_` policies are those of the models' own generation code. Dream's measure certainty on the
distribution that the tokens are drawn from, after temperature and filters; all others on the model's own.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


class Candidates(NamedTuple):
    """The positions of a response that may be unmasked now, (B, T) each; values count only where `masked`."""

    masked: Tensor  # bool
    probability: Tensor  # of the token that would be unmasked
    margin: Tensor  # best minus second best probability
    entropy: Tensor  # nats
    uniform: Tensor  # random numbers in (0, 1)


class Step(NamedTuple):
    """Where the decoding of a block stands: numbers, or (B,) tensors where every sequence stands at its own step."""

    index: int | Tensor  # from 0
    steps: int | Tensor  # planned for the block
    tokens: int | Tensor  # of the block
    share: float | Tensor = 1.0  # of the masked positions, what Dream's time schedule unmasks (see `time_shares`)


Certainty = Callable[[Candidates], Tensor]
"""(B, T) scores; the highest is unmasked first, the leftmost of equals."""

Count = Callable[[Candidates, Step, "PolicySettings"], Tensor | int]
"""(B,) how many positions are unmasked, or one number for all sequences."""


@dataclass(frozen=True)
class Policy:
    """`paced`: the number of steps is planned, and not found on the way. `on_draw_distribution`: see above."""

    certainty: Certainty
    count: Count
    paced: bool = True
    on_draw_distribution: bool = False


def by_entropy(candidates: Candidates) -> Tensor:
    """Lowest entropy first."""
    return -candidates.entropy


def by_probability(candidates: Candidates) -> Tensor:
    """Highest probability first."""
    return beyond_rounding(candidates.probability, candidates.entropy)


def by_margin(candidates: Candidates) -> Tensor:
    """Largest gap between the best two first."""
    return beyond_rounding(candidates.margin, candidates.entropy)


def beyond_rounding(certainty: Tensor, entropy: Tensor) -> Tensor:
    """Tells those that round to 1 apart by their entropies, which are exact; in fp64, less than a rounding of fp32."""
    half_a_step = 2.0**-25
    more = half_a_step - (entropy.double() / 32).clamp(max=half_a_step)
    return certainty.double() + torch.where(certainty == 1, more, 0.0)


def by_chance(candidates: Candidates) -> Tensor:
    """In a random order."""
    return -candidates.uniform


def even_count(_candidates: Candidates, step: Step, settings: "PolicySettings") -> int:
    """The same number every step, one more in the first steps where it does not come out even (LLaDA)."""
    if settings.tokens_per_step is not None:
        return settings.tokens_per_step
    return step.tokens // step.steps + (step.index < step.tokens % step.steps)


@cache
def time_shares(steps: int, eps: float) -> Tensor:
    """(steps,) fp32, 1 - s/t: what each step unmasks of the masked, between the times t and s; all in the last (Dream).

    Time runs evenly from 1 to `eps`.
    """
    times = torch.linspace(1, eps, steps + 1)
    shares = 1 - times[1:] / times[:-1]
    shares[-1] = 1.0
    return shares


@cache
def steps_that_unmask(policy: str, steps: int, tokens: int, eps: float) -> tuple[int, ...]:
    """Of the steps planned for a block, those that may unmask something; the others need no forward.

    Dream's time schedule rounds down to nothing in some steps, which its plan tells beforehand; every other policy
    unmasks something in every step, or tells only when it is there.
    """
    if POLICIES[policy].count is not count_by_time:
        return tuple(range(steps))
    found, masked = [], float(tokens)
    for index, share in enumerate(time_shares(steps, eps)):
        count = (masked * share).floor().item()  # in fp32, as the step itself rounds
        masked -= count
        if count > 0:
            found.append(index)
    return tuple(found)


def count_by_time(candidates: Candidates, step: Step, _settings: "PolicySettings") -> Tensor:
    """The expected number of the time schedule, rounded down; a step may unmask nothing (Dream)."""
    return (candidates.masked.sum(1).float() * step.share).long()


def chance_by_time(candidates: Candidates, step: Step, _settings: "PolicySettings") -> Tensor:
    """Every position by itself, with the probability of the time schedule (Dream's `origin`)."""
    share = torch.as_tensor(step.share, device=candidates.uniform.device).reshape(-1, 1)
    return (candidates.masked & (candidates.uniform < share)).sum(1)


def above_threshold(candidates: Candidates, _step: Step, settings: "PolicySettings") -> Tensor:
    """All whose token has at least the probability `threshold`, and never none (Fast-dLLM, arXiv 2505.22618)."""
    return (candidates.masked & (candidates.probability >= settings.threshold)).sum(1).clamp(min=1)


def within_entropy_bound(candidates: Candidates, _step: Step, settings: "PolicySettings") -> Tensor:
    """As many as keep the sum of their entropies without the largest at most `entropy_bound` (arXiv 2505.24857)."""
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
    "threshold": Policy(by_probability, above_threshold, paced=False),
    "entropy_bound": Policy(by_entropy, within_entropy_bound, paced=False),
    "dream_origin": dream(by_chance, chance_by_time),
    "dream_maskgit_plus": dream(by_probability),
    "dream_topk_margin": dream(by_margin),
    "dream_entropy": dream(by_entropy),
    "llada_low_confidence": Policy(by_probability, even_count),
    "llada_random": Policy(by_chance, even_count),
}


@dataclass
class PolicySettings:
    """Which policy, and the numbers that policies read.

    Raises:
        ValueError: settings that contradict each other.
    """

    policy: str = field(
        default="entropy",
        metadata={
            "help": "What is unmasked first: lowest entropy, highest probability (confidence), largest top-2 margin, "
            "or random; or as many as a threshold or entropy_bound allows; or as Dream and LLaDA do.",
            "choices": sorted(POLICIES),
        },
    )
    tokens_per_step: int | None = field(
        default=None, metadata={"help": "Tokens unmasked in one step. Default 1; excludes steps."}
    )
    steps: int | None = field(
        default=None, metadata={"help": "Total denoising steps, shared evenly; excludes tokens_per_step."}
    )
    alg_temp: float = field(
        default=0.0, metadata={"help": "Temperature of the choice of positions (Dream); 0 takes the most certain."}
    )
    eps: float = field(default=1e-3, metadata={"help": "Where the time of the dream_ policies ends."})
    threshold: float = field(default=0.9, metadata={"help": "Probability from which the threshold policy unmasks."})
    entropy_bound: float = field(default=0.1, metadata={"help": "Of the entropy_bound policy, nats."})

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy={self.policy!r}: expected one of {', '.join(POLICIES)}")
        for name in ("tokens_per_step", "steps"):
            check_at_least(name, getattr(self, name), 1)
        for name in ("alg_temp", "entropy_bound"):
            check_at_least(name, getattr(self, name), 0)
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold}: expected a probability in [0, 1]")
        if not 0 < self.eps < 1:
            raise ValueError(f"eps={self.eps}: expected a time in (0, 1)")
        if self.tokens_per_step is not None and self.steps is not None:
            raise ValueError(f"tokens_per_step={self.tokens_per_step} and steps={self.steps}: give only one of them")
        pace = [name for name in ("tokens_per_step", "steps") if getattr(self, name) is not None]
        if pace and not POLICIES[self.policy].paced:
            raise ValueError(f"{pace[0]}={getattr(self, pace[0])} with policy={self.policy!r}: it finds its own pace")
        if self.tokens_per_step is not None and self.policy.startswith("dream_"):
            raise ValueError(f"tokens_per_step={self.tokens_per_step} with policy={self.policy!r}: give steps")
        if self.alg_temp > 0 and POLICIES[self.policy].certainty is by_chance:
            raise ValueError(f"alg_temp={self.alg_temp} with policy={self.policy!r}: it is random already")

    @property
    def order_is_random(self) -> bool:
        """Whether another seed can unmask in another order."""
        return self.alg_temp > 0 or POLICIES[self.policy].certainty is by_chance


def check_at_least(name: str, value: float | None, least: int) -> None:
    """Raises a ValueError that names the setting, unless it is None."""
    if value is not None and not value >= least:  # NaN neither
        raise ValueError(f"{name}={value}: expected at least {least}")


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
