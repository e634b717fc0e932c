"""Cuts and windows: which tokens of a trajectory are visible, supervised and ranked (arXiv 2605.11854).

A trajectory unmasks position i at step s_i (-1: never). Training replays the moment before step c, the cut:

    visible      0 <= s_i < c        shown to the model, all other positions are masked
    supervised   c <= s_i < c + M    cross-entropy
    ranked       c <= s_i < c + W    pairs (i, j) with s_i < s_j

M and W count steps, as in the authors' release, or tokens, as in their paper: then the next M tokens in the order of
the steps are supervised, with ties broken by entropy. "all" means every later token, in either unit.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

WindowSize = int | Literal["all"]
WindowUnit = Literal["steps", "tokens"]


class Window(NamedTuple):
    """The parts of a trajectory of T tokens at one cut."""

    visible: np.ndarray  # (T,) bool
    supervised: np.ndarray  # (T,) bool
    ranked: np.ndarray  # (T,) bool


def example_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random generator of one record in one epoch, the same on every worker and rank and after a resume."""
    return np.random.default_rng((seed, epoch, index))


def break_ties(steps: np.ndarray, entropy: Sequence[float] | None = None) -> np.ndarray:
    """(T,) ranks from 0 in the order of `steps`; equal steps are ordered by entropy, then from left to right.

    Args:
        entropy: (T,) nats, of each token when it was unmasked; None if the record has none.
    """
    ranks = np.empty_like(steps)
    ranks[np.lexsort((np.zeros(len(steps)) if entropy is None else entropy, steps))] = np.arange(len(steps))
    return ranks


def last_cut(steps: np.ndarray, supervised_window: WindowSize, unit: WindowUnit = "steps") -> int:
    """The first cut whose window reaches the end: s_max - M + 1 in steps, or 0 for a trajectory shorter than that.

    In tokens it is the first step before which at most M tokens are left, or s_max if the last step unmasks more than
    M. For "all" it is the last step, s_max.
    """
    last_step = max(int(steps.max()), 0)
    if supervised_window == "all":
        return last_step
    if unit == "steps":
        return max(last_step - supervised_window + 1, 0)
    tokens_left = np.sort(steps)[::-1]  # the step of the k-th last token
    if supervised_window >= (steps >= 0).sum():
        return 0
    return min(int(tokens_left[supervised_window]) + 1, last_step)


def draw_cut(
    steps: np.ndarray, last: int, rng: np.random.Generator, among_positions: Sequence[int] | None = None
) -> int:
    """Draws the cut c ~ U{0, .., last}.

    Args:
        steps: (T,) decoding steps from 0, -1 for never.
        last: see `last_cut`.
        among_positions: if given (the record's `non_ltr_positions`), draw among the steps of these positions that are
            at most `last`; ignored if there are none.
    """
    if among_positions:
        candidates = np.unique(steps[np.asarray(among_positions)])
        candidates = candidates[(candidates >= 0) & (candidates <= last)]
        if len(candidates):
            return int(rng.choice(candidates))
    return int(rng.integers(last + 1))


def parallel_cuts(steps: np.ndarray, last: int, tokens_per_step: int) -> np.ndarray:
    """The cuts up to `last` that a decoding of so many tokens a step passes through.

    Before them a multiple of `tokens_per_step` tokens is visible. The first is 0.
    """
    visible = np.searchsorted(np.sort(steps[steps >= 0]), np.arange(last + 1))
    return np.flatnonzero(visible % tokens_per_step == 0)


def window_at(
    steps: np.ndarray,
    cut: int,
    supervised_window: WindowSize,
    rank_window: WindowSize,
    unit: WindowUnit = "steps",
    entropy: Sequence[float] | None = None,
) -> Window:
    """The window of M = `supervised_window` and W = `rank_window` at `cut`.

    Args:
        entropy: (T,) nats, breaks ties if the windows count tokens; see `break_ties`.
    """
    visible = (steps >= 0) & (steps < cut)
    later = steps >= cut
    ahead = break_ties(steps, entropy) - (~later).sum() if unit == "tokens" else steps - cut

    def next_ones(window: WindowSize) -> np.ndarray:
        return later if window == "all" else later & (ahead < window)

    return Window(visible, next_ones(supervised_window), next_ones(rank_window))
