"""The training objectives: what is masked, what is supervised and what is ranked in one trajectory."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from tabom.data.trajectories import Trajectory
from tabom.training.windows import draw_cut, window_at

Objective = Literal["tabom", "window", "nelbo", "fixed_ratio"]

MINIMUM_MASK_PROBABILITY = 1e-3
"""Keeps NELBO's weight 1/t finite (LLaDA, arXiv 2502.09992, uses the same floor)."""


@dataclass(frozen=True)
class ObjectiveSettings:
    """How an example is made from a trajectory; the fields are those of `TabomConfig`."""

    objective: Objective = "tabom"
    supervised_window: int = 32
    rank_window: int = 32
    mask_ratio: float = 0.5
    cut_among_non_ltr: bool = False
    rank_ties: bool = False
    drop_short: bool = False


class Target(NamedTuple):
    """What the model sees of a response of T tokens, and what it is asked.

    `num_tokens` is what this example adds to the denominator of the cross-entropy: its supervised tokens, except
    for NELBO, whose estimator divides by all response tokens (LLaDA, eq. 3).
    """

    masked: np.ndarray  # (T,) bool: replaced by the mask token in the input
    supervised: np.ndarray  # (T,) bool: cross-entropy here
    steps: np.ndarray  # (T,) int64: decoding step for the ranking, -1: not ranked
    token_weights: np.ndarray  # (T,) float32: scales each cross-entropy
    num_tokens: int


def make_target(trajectory: Trajectory, settings: ObjectiveSettings, rng: np.random.Generator) -> Target:
    """Draws the target of one trajectory.

    `tabom` and `window` replay the decoding at a random cut (`windows.py`); they differ only in the loss, where
    `window` does not use the ranking. `nelbo` masks each token with probability t ~ U(0, 1) and weighs by 1/t.
    `fixed_ratio` masks `mask_ratio` of the tokens, at least one.

    With `rank_ties`, tokens of one step are ranked as if unmasked one by one, left to right. With `drop_short`, a
    trajectory of no more than M steps is asked nothing.
    """
    steps = np.asarray(trajectory.decoding_order)
    length = len(steps)
    weights = np.ones(length, dtype=np.float32)
    unranked = np.full(length, -1)

    if settings.objective == "nelbo":
        t = max(rng.random(), MINIMUM_MASK_PROBABILITY)
        masked = rng.random(length) < t
        return Target(masked, masked, unranked, weights / np.float32(t), num_tokens=length)

    if settings.objective == "fixed_ratio":
        masked = np.zeros(length, dtype=bool)
        masked[rng.permutation(length)[: max(1, round(settings.mask_ratio * length))]] = True
        return Target(masked, masked, unranked, weights, num_tokens=int(masked.sum()))

    if settings.drop_short and steps.max() < settings.supervised_window:
        nothing = np.zeros(length, dtype=bool)
        return Target(~nothing, nothing, unranked, weights, num_tokens=0)

    among_positions = trajectory.non_ltr_positions if settings.cut_among_non_ltr else None
    cut = draw_cut(steps, settings.supervised_window, rng, among_positions)
    window = window_at(steps, cut, settings.supervised_window, settings.rank_window)
    return Target(
        masked=~window.visible,
        supervised=window.supervised,
        steps=np.where(window.ranked, break_ties(steps) if settings.rank_ties else steps, -1),
        token_weights=weights,
        num_tokens=int(window.supervised.sum()),
    )


def break_ties(steps: np.ndarray) -> np.ndarray:
    """Ranks from 0 in the order of `steps`, equal ones from left to right."""
    ranks = np.empty_like(steps)
    ranks[np.argsort(steps, kind="stable")] = np.arange(len(steps))
    return ranks
