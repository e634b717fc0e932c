"""The training objectives: which tokens of a trajectory are masked, supervised and ranked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tabom.data.tokenized import TokenizedTrajectory
from tabom.data.trajectories import Trajectory
from tabom.training.blocks import split_into_blocks
from tabom.training.settings import REPLAYED, DrawnPer, Objective, ScaleRewards
from tabom.training.windows import (
    WindowSize,
    WindowUnit,
    break_ties,
    draw_cut,
    example_rng,
    last_cut,
    parallel_cuts,
    window_at,
)

Replayable = Trajectory | TokenizedTrajectory

MINIMUM_MASK_PROBABILITY = 1e-3
"""Keeps NELBO's weight 1/t finite (LLaDA, arXiv 2502.09992, uses the same floor)."""


@dataclass(frozen=True)
class ObjectiveSettings:
    """The settings that make an example of a trajectory; `TabomConfig` documents the fields.

    `block_size` is the model's: that of block-causal attention, or None.
    """

    objective: Objective = "tabom"
    supervised_window: WindowSize = "all"
    rank_window: WindowSize = "all"
    window_unit: WindowUnit = "steps"
    mask_ratio: float = 0.5
    tokens_per_step: int = 1
    parallel_share: float = 0.2
    cut_among_non_ltr: bool = False
    skip_last_step: bool = False
    rank_ties: bool = False
    drop_short: bool = False
    min_mask_rate: float = 0.0
    max_mask_rate: float = 1.0
    complementary_masks: bool = False
    drawn_per: DrawnPer = "block"
    every_cut: bool = False
    scale_rewards: ScaleRewards = "group"
    rank_weight: float = 0.0
    block_size: int | None = None


class Target(NamedTuple):
    """Which of a response's T tokens the model sees, and which the loss is computed on.

    Cross-entropy is the sum of weight times cross-entropy over the supervised tokens of all examples, divided by the
    sum of their `num_tokens`.
    """

    masked: np.ndarray  # (T,) bool: replaced by the mask token in the input
    supervised: np.ndarray  # (T,) bool: cross-entropy here
    steps: np.ndarray  # (T,) int64: decoding step for the ranking, -1: not ranked
    token_weights: np.ndarray  # (T,) float32: scales each cross-entropy
    num_tokens: int


class Example(NamedTuple):
    """Prompt token ids, response token ids, the target, and with the objective `policy` what its loss needs.

    `advantage` is that of the response, and `logprob` (nats) that of each token when it was sampled.
    """

    prompt: list[int]
    response: list[int]
    target: Target
    advantage: float = 0.0
    logprob: list[float] | None = None


def make_examples(
    trajectory: TokenizedTrajectory,
    settings: ObjectiveSettings,
    seed: int,
    epoch: int,
    index: int,
    advantage: float = 0.0,
) -> list[Example]:
    """The examples of a record in an epoch, which are in one batch."""
    targets = make_targets(trajectory, settings, example_rng(seed, epoch, index))
    if settings.objective == "policy" and (advantage <= 0 or settings.rank_weight == 0):
        # Only the order of good responses is learnt.
        targets = [target._replace(steps=np.full_like(target.steps, -1)) for target in targets]
    prompt, response = trajectory.prompt_token_ids, trajectory.response_token_ids
    return [Example(prompt, response, target, advantage, trajectory.logprob) for target in targets]


def empty_example() -> Example:
    """The example of a filler: one masked token without a label."""
    nowhere = np.zeros(1, dtype=bool)
    weights = np.ones(1, dtype=np.float32)
    target = Target(masked=~nowhere, supervised=nowhere, steps=np.array([-1]), token_weights=weights, num_tokens=0)
    return Example([], [0], target, logprob=[0.0])


def make_target(trajectory: Replayable, settings: ObjectiveSettings, rng: np.random.Generator) -> Target:
    """Draws the target of one trajectory: with block-causal attention, that of each of its blocks.

    A block is learnt as a trajectory of its own, behind the finished blocks: with a cut or a masking rate of its own,
    windows that end with it, and weights and denominators of its own tokens. With `drawn_per="response"` the random
    masks are drawn for the whole response.
    """
    if settings.block_size is None or settings.drawn_per == "response":
        return draw_target(trajectory, settings, rng)
    return joined([draw_target(block, settings, rng) for block in split_into_blocks(trajectory, settings.block_size)])


def make_targets(trajectory: Replayable, settings: ObjectiveSettings, rng: np.random.Generator) -> list[Target]:
    """The targets of all the noisy copies of a record that are learnt together.

    There is one, unless `complementary_masks` adds the copy that masks the other tokens (Fast-dLLM v2, arXiv
    2509.26328), or `every_cut` takes all cuts that are M steps apart: 0, M, 2M, .. in every block at once, until no
    block has a step left (TraceRL, arXiv 2509.06949).
    """
    if settings.every_cut:
        blocks = list(split_into_blocks(trajectory, settings.block_size))
        apart = 1 if settings.supervised_window == "all" else settings.supervised_window
        cuts = range(0, max(max(block.decoding_order, default=0) for block in blocks) + 1, apart)
        return [joined([target_at(block, cut, settings) for block in blocks]) for cut in cuts]
    target = make_target(trajectory, settings, rng)
    return [target, complement(trajectory, target, settings)] if settings.complementary_masks else [target]


def draw_target(trajectory: Replayable, settings: ObjectiveSettings, rng: np.random.Generator) -> Target:
    """Draws the target of a whole response or of one block.

    `tabom`, `window` and `policy` replay the decoding at a random cut (`replayed`); the others mask at random
    (`randomly_masked`). Any of them may be ranked: `tabom` is `window` with a `rank_weight`.
    """
    if settings.objective in REPLAYED:
        return replayed(trajectory, settings, rng)
    return randomly_masked(trajectory, settings, rng)


def replayed(trajectory: Replayable, settings: ObjectiveSettings, rng: np.random.Generator) -> Target:
    """Replays the decoding at a random cut: the windows of `windows.py`, with equal weights of supervised tokens.

    With M = "all" the cut is any step and every later token is supervised, each weighted n/k where k of the n decoded
    tokens are left, and n counts in the denominator. In the mean over cuts that is

        1/(s_max + 1) sum_c 1/k_c sum_{i: s_i >= c} CE_i(c)        nats a token,

    which for one token a step is the NELBO in its order-agnostic form (`nelbo_exact`), with the states of the decoding
    in place of random ones.

    With `tokens_per_step` above 1 the cuts of a share of the examples are drawn from those that a decoding of so many
    tokens a step passes through (`parallel_cuts`), which are more often at the beginning.

    With `skip_last_step` the cut ends at s_max - M, as released. With `drop_short` a trajectory of at most M steps
    has no loss. With `rank_ties` tokens of one step are ranked as if they were unmasked one by one (`break_ties`).
    """
    steps = np.asarray(trajectory.decoding_order)
    window, unit = settings.supervised_window, settings.window_unit
    if settings.drop_short and window != "all" and steps.max() < window:
        nothing = np.zeros(len(steps), dtype=bool)
        return Target(~nothing, nothing, np.full(len(steps), -1), ones(steps), num_tokens=0)

    last = max(last_cut(steps, window, unit) - settings.skip_last_step, 0)
    if settings.tokens_per_step > 1 and rng.random() < settings.parallel_share:
        cut = int(rng.choice(parallel_cuts(steps, last, settings.tokens_per_step)))
    else:
        cut = draw_cut(steps, last, rng, trajectory.non_ltr_positions if settings.cut_among_non_ltr else None)
    return target_at(trajectory, cut, settings)


def target_at(trajectory: Replayable, cut: int, settings: ObjectiveSettings) -> Target:
    """The target of a trajectory at a cut; without a loss if the cut is behind its last step."""
    steps, window = np.asarray(trajectory.decoding_order), settings.supervised_window
    visible, supervised, ranked = window_at(
        steps, cut, window, settings.rank_window, settings.window_unit, trajectory.entropy
    )
    decoded, left = int((steps >= 0).sum()), int(supervised.sum())
    return Target(
        masked=~visible,
        supervised=supervised,
        steps=ranked_steps(trajectory, ranked, settings),
        token_weights=ones(steps) * np.float32(decoded / max(left, 1)) if window == "all" else ones(steps),
        num_tokens=decoded if window == "all" and left else left,
    )


def randomly_masked(trajectory: Replayable, settings: ObjectiveSettings, rng: np.random.Generator) -> Target:
    """Masks random tokens, all of which are supervised and ranked.

    `nelbo` masks each of T tokens with probability t ~ U(0, 1) and weighs by 1/t (LLaDA, arXiv 2502.09992, eq. 3).
    `nelbo_exact` masks k ~ U{1, .., T} of them and weighs by T/k: the same bound with less variance (LLaDA, eq. 6).
    Both divide by T. `fixed_ratio` masks `mask_ratio` of the tokens, at least one, weighted alike. `random_ratio` masks
    as `nelbo` does, and weighs alike. The t of both is between `min_mask_rate` and `max_mask_rate`.
    """
    steps = np.asarray(trajectory.decoding_order)
    length = len(steps)
    if settings.objective in ("nelbo", "random_ratio"):
        lowest, highest = settings.min_mask_rate, settings.max_mask_rate
        t = max(lowest + (highest - lowest) * rng.random(), MINIMUM_MASK_PROBABILITY)
        masked = rng.random(length) < t
        weight, num_tokens = (1 / t, length) if settings.objective == "nelbo" else (1.0, int(masked.sum()))
    else:
        is_exact = settings.objective == "nelbo_exact"
        count = int(rng.integers(length)) + 1 if is_exact else max(1, round(settings.mask_ratio * length))
        masked = np.zeros(length, dtype=bool)
        masked[rng.permutation(length)[:count]] = True
        weight, num_tokens = (length / count, length) if is_exact else (1.0, count)
    return Target(
        masked, masked, ranked_steps(trajectory, masked, settings), ones(steps) * np.float32(weight), num_tokens
    )


def complement(trajectory: Replayable, target: Target, settings: ObjectiveSettings) -> Target:
    """The target that masks what another one shows. NELBO's weights 1/t become 1/(1 - t)."""
    masked, weights, num_tokens = ~target.masked, target.token_weights, target.num_tokens
    if settings.objective in ("nelbo", "nelbo_exact"):
        weights = 1 / np.maximum(1 - 1 / weights, np.float32(MINIMUM_MASK_PROBABILITY))
    else:
        num_tokens = int(masked.sum())
    return Target(masked, masked, ranked_steps(trajectory, masked, settings), weights, num_tokens)


def joined(targets: Sequence[Target]) -> Target:
    """The target of consecutive blocks as one."""
    *arrays, num_tokens = zip(*targets, strict=True)
    return Target(*map(np.concatenate, arrays), num_tokens=sum(num_tokens))


def ranked_steps(trajectory: Replayable, ranked: np.ndarray, settings: ObjectiveSettings) -> np.ndarray:
    """(T,) the decoding steps where `ranked`, elsewhere -1."""
    steps = np.asarray(trajectory.decoding_order)
    ranks = np.where(steps >= 0, break_ties(steps, trajectory.entropy), -1) if settings.rank_ties else steps
    return np.where(ranked, ranks, -1)


def ones(steps: np.ndarray) -> np.ndarray:
    """(T,) weights of 1."""
    return np.ones(len(steps), dtype=np.float32)
