"""The training objectives: what is masked, what is supervised and what is ranked in one trajectory."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from tabom.data.tokenized import TokenizedTrajectory
from tabom.data.trajectories import Trajectory
from tabom.training.windows import WindowSize, WindowUnit, draw_cut, last_cut, one_by_one, window_at

Objective = Literal["tabom", "window", "nelbo", "nelbo_exact", "fixed_ratio"]

Replayable = Trajectory | TokenizedTrajectory

MINIMUM_MASK_PROBABILITY = 1e-3
"""Keeps NELBO's weight 1/t finite (LLaDA, arXiv 2502.09992, uses the same floor)."""


@dataclass(frozen=True)
class ObjectiveSettings:
    """How an example is made from a trajectory; the fields are those of `TabomConfig`."""

    objective: Objective = "tabom"
    supervised_window: WindowSize = "all"
    rank_window: WindowSize = "all"
    window_unit: WindowUnit = "steps"
    mask_ratio: float = 0.5
    cut_among_non_ltr: bool = False
    skip_last_step: bool = False
    rank_ties: bool = False
    drop_short: bool = False


class Target(NamedTuple):
    """What the model sees of a response of T tokens, and what it is asked.

    Cross-entropy is the sum of weight times cross-entropy over the supervised tokens of all examples, divided by the
    sum of their `num_tokens`.
    """

    masked: np.ndarray  # (T,) bool: replaced by the mask token in the input
    supervised: np.ndarray  # (T,) bool: cross-entropy here
    steps: np.ndarray  # (T,) int64: decoding step for the ranking, -1: not ranked
    token_weights: np.ndarray  # (T,) float32: scales each cross-entropy
    num_tokens: int


def make_target(trajectory: Replayable, settings: ObjectiveSettings, rng: np.random.Generator) -> Target:
    """Draws the target of one trajectory: of what the model sees, the objective decides.

    `tabom` and `window` replay the decoding at a random cut (`replayed`); `nelbo`, `nelbo_exact` and `fixed_ratio`
    mask at random (`randomly_masked`). Any of them may be ranked: `tabom` is `window` with a `rank_weight`.
    """
    if settings.objective in ("tabom", "window"):
        return replayed(trajectory, settings, rng)
    return randomly_masked(trajectory, settings, rng)


def replayed(trajectory: Replayable, settings: ObjectiveSettings, rng: np.random.Generator) -> Target:
    """A moment of the decoding: the windows of `windows.py` at a random cut, supervised tokens weighted alike.

    With M = "all" the cut is any step and every later token is supervised, each weighted n/k where k of the n decoded
    tokens are left, and n counts in the denominator. In the mean over cuts that is

        1/(s_max + 1) sum_c 1/k_c sum_{i: s_i >= c} CE_i(c)        nats a token,

    for one token a step the NELBO in its order-agnostic form (`nelbo_exact`), with the states that the decoding
    passed through in place of random ones.

    With `skip_last_step` the cut ends at s_max - M, as released. With `drop_short` a trajectory of no more than M
    steps is asked nothing. With `rank_ties` tokens of one step are ranked as if unmasked one by one (`one_by_one`).
    """
    steps = np.asarray(trajectory.decoding_order)
    window, unit = settings.supervised_window, settings.window_unit
    if settings.drop_short and window != "all" and steps.max() < window:
        nothing = np.zeros(len(steps), dtype=bool)
        return Target(~nothing, nothing, np.full(len(steps), -1), ones(steps), num_tokens=0)

    last = max(last_cut(steps, window, unit) - settings.skip_last_step, 0)
    cut = draw_cut(steps, last, rng, trajectory.non_ltr_positions if settings.cut_among_non_ltr else None)
    visible, supervised, ranked = window_at(steps, cut, window, settings.rank_window, unit, trajectory.entropy)
    decoded, left = int((steps >= 0).sum()), int(supervised.sum())
    return Target(
        masked=~visible,
        supervised=supervised,
        steps=ranked_steps(trajectory, ranked, settings),
        token_weights=ones(steps) * np.float32(decoded / max(left, 1)) if window == "all" else ones(steps),
        num_tokens=decoded if window == "all" else left,
    )


def randomly_masked(trajectory: Replayable, settings: ObjectiveSettings, rng: np.random.Generator) -> Target:
    """Random tokens masked, all of them supervised and ranked.

    `nelbo` masks each of T tokens with probability t ~ U(0, 1) and weighs by 1/t (LLaDA, arXiv 2502.09992, eq. 3).
    `nelbo_exact` masks k ~ U{1, .., T} of them and weighs by T/k: the same bound with less variance (LLaDA, eq. 6).
    Both divide by T. `fixed_ratio` masks `mask_ratio` of the tokens, at least one, weighted alike.
    """
    steps = np.asarray(trajectory.decoding_order)
    length = len(steps)
    if settings.objective == "nelbo":
        t = max(rng.random(), MINIMUM_MASK_PROBABILITY)
        masked = rng.random(length) < t
        weight, num_tokens = 1 / t, length
    else:
        is_exact = settings.objective == "nelbo_exact"
        count = int(rng.integers(length)) + 1 if is_exact else max(1, round(settings.mask_ratio * length))
        masked = np.zeros(length, dtype=bool)
        masked[rng.permutation(length)[:count]] = True
        weight, num_tokens = (length / count, length) if is_exact else (1.0, count)
    return Target(
        masked, masked, ranked_steps(trajectory, masked, settings), ones(steps) * np.float32(weight), num_tokens
    )


def ranked_steps(trajectory: Replayable, ranked: np.ndarray, settings: ObjectiveSettings) -> np.ndarray:
    """(T,) the decoding steps where `ranked`, elsewhere -1."""
    steps = np.asarray(trajectory.decoding_order)
    ranks = np.where(steps >= 0, one_by_one(steps, trajectory.entropy), -1) if settings.rank_ties else steps
    return np.where(ranked, ranks, -1)


def ones(steps: np.ndarray) -> np.ndarray:
    """(T,) weights that change nothing."""
    return np.ones(len(steps), dtype=np.float32)
