"""Cuts and windows: which tokens of a trajectory are visible, supervised and ranked (arXiv 2605.11854).

A trajectory unmasks position i at step s_i (-1: never). Training replays the moment c, the cut:

    visible      0 <= s_i < c        shown to the model, all other positions are masked
    supervised   c <= s_i < c + M    cross-entropy
    ranked       c <= s_i < c + W    pairs (i, j) with s_i < s_j
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Window(NamedTuple):
    """A trajectory of T tokens seen at one cut."""

    visible: np.ndarray  # (T,) bool
    supervised: np.ndarray  # (T,) bool
    ranked: np.ndarray  # (T,) bool


def example_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random numbers of one record in one epoch: the same on every worker, every rank and after a resume."""
    return np.random.default_rng((seed, epoch, index))


def draw_cut(
    steps: np.ndarray,
    supervised_window: int,
    rng: np.random.Generator,
    among_positions: Sequence[int] | None = None,
) -> int:
    """Draws the cut c ~ U{0, .., s_max - M} (steps), or 0 for a trajectory shorter than the window.

    The upper end is the paper's: with s_max counted from 0, a trajectory of more than M steps never supervises its
    very last step, as the cut that would reach it, s_max - M + 1, is not drawn.

    Args:
        steps: (T,) decoding steps from 0, -1 for never.
        supervised_window: M, in steps.
        among_positions: draw among the steps of these positions instead (the record's `non_ltr_positions`), as far as
            they are at most s_max - M. Where none is: as if not given.
    """
    last_cut = max(int(steps.max()) - supervised_window, 0)
    if among_positions:
        candidates = np.unique(steps[np.asarray(among_positions)])
        candidates = candidates[(candidates >= 0) & (candidates <= last_cut)]
        if len(candidates):
            return int(rng.choice(candidates))
    return int(rng.integers(last_cut + 1))


def window_at(steps: np.ndarray, cut: int, supervised_window: int, rank_window: int) -> Window:
    """The window of M = `supervised_window` and W = `rank_window` steps at `cut`."""
    decoded_later = steps >= cut
    return Window(
        visible=(steps >= 0) & ~decoded_later,
        supervised=decoded_later & (steps < cut + supervised_window),
        ranked=decoded_later & (steps < cut + rank_window),
    )
