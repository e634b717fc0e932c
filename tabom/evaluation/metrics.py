"""Metrics of responses and of the order of certainty, computed from arrays of numbers."""

from collections.abc import Sequence
from itertools import pairwise
from math import comb, exp
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class OrderCounts(NamedTuple):
    """The number of ordered pairs, and of those whose earlier position has the lower entropy."""

    in_order: Tensor  # () int64
    pairs: Tensor  # () int64


def count_pairs_in_order(entropy: Tensor, steps: Tensor, cu_seqlens: Tensor) -> OrderCounts:
    """Pair-order accuracy as two counts, which can be added up over batches and ranks.

    A pair (i, j) is two positions of one sequence with 0 <= s_i < s_j; it is in order if E_i < E_j. Sequences are
    counted one by one, because all N rows of a batch have N^2 pairs: more than 2^31 from 46341 rows on.

    Args:
        entropy: (N,) nats.
        steps: (N,) decoding steps, -1 = not ranked.
        cu_seqlens: (B + 1,) row offsets of the sequences.
    """
    in_order, pairs = torch.zeros(2, dtype=torch.int64, device=steps.device)
    for begin, end in pairwise(cu_seqlens.tolist()):
        e, s = entropy[begin:end], steps[begin:end]
        is_pair = (s[:, None] >= 0) & (s[:, None] < s)
        in_order += (is_pair & (e[:, None] < e)).sum()
        pairs += is_pair.sum()
    return OrderCounts(in_order, pairs)


def tds(entropy: np.ndarray, masked: np.ndarray) -> float:
    """The TDS of one decoding (arXiv 2605.11854): the variance of the masked tokens' entropies, mean over its steps.

    Args:
        entropy: (S, T) nats, of T positions before each of S steps.
        masked: (S, T) bool, the positions that count: masked, and not behind the first end token. A step without one
            is left out; one position alone has variance 0.

    Returns:
        nats^2; 0 where nothing counts.
    """
    variances = [e[m].var() for e, m in zip(entropy, masked, strict=True) if m.any()]
    return float(np.mean(variances)) if variances else 0.0


class Estimate(NamedTuple):
    """A mean over problems and its standard error; None where there are no problems, or too few for an error."""

    mean: float | None
    error: float | None


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of values, one for each problem, and its standard error."""
    if len(values) == 0:
        return Estimate(None, None)
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else None
    return Estimate(float(np.mean(values)), error)


def estimate_ratio(numerators: np.ndarray, denominators: np.ndarray) -> Estimate:
    """The ratio of two means over the same problems, its error to first order in the paired residuals."""
    if len(denominators) < 2 or denominators.mean() == 0:
        return Estimate(None, None)
    ratio = numerators.mean() / denominators.mean()
    error = estimate(numerators - ratio * denominators).error / denominators.mean()
    return Estimate(float(ratio), float(error))


def pass_at_k(right: np.ndarray, samples: int, k: int) -> np.ndarray:
    """The unbiased estimate of pass@k (arXiv 2107.03374, eq. 1) for each prompt.

    Args:
        right: number of right responses of each prompt, out of `samples`.
    """
    return np.array([1 - comb(samples - c, k) / comb(samples, k) for c in right.tolist()])


def accuracy_under_parallelism(parallelism: Sequence[float], accuracy: Sequence[float]) -> float:
    """AUP, the area under a curve of accuracy over parallelism (d3LLM, arXiv 2601.07568).

    It is ρ_1 y_1 plus the trapezoids between the points that lose at most 5 percentage points of accuracy against the
    slowest one, y_1. Accuracy y counts there as y exp(-3 (1 - y/100)). d3LLM has the best accuracy of all compared
    methods in place of 100; with 100 the area of a model does not depend on what it is compared with.

    Args:
        parallelism: ρ of each point, tokens a forward pass.
        accuracy: y of each point, percent.
    """
    points = sorted(zip(parallelism, accuracy, strict=True))
    slowest, best = points[0]
    kept = [(tokens, right * exp(-3 * (1 - right / 100))) for tokens, right in points if right >= best - 5]
    return slowest * best + sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(kept))


def entropy_by_step(decoding_orders: Sequence[Sequence[int]], entropies: Sequence[Sequence[float]]) -> np.ndarray:
    """Mean entropy (nats) of the tokens unmasked at each step, over responses of the same number of steps."""
    steps = np.concatenate(decoding_orders)
    return np.bincount(steps, np.concatenate(entropies)) / np.bincount(steps)
