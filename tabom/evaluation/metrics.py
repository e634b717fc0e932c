"""What the trainer and the reports say of answers and of the order of certainty: numbers in, numbers out."""

from collections.abc import Sequence
from math import comb
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class OrderCounts(NamedTuple):
    """Ordered pairs, and those of them whose earlier position has the lower entropy."""

    in_order: Tensor  # () int64
    pairs: Tensor  # () int64


def count_pairs_in_order(entropy: Tensor, steps: Tensor, cu_seqlens: Tensor) -> OrderCounts:
    """Pair-order accuracy as two counts, so that batches and ranks can be added up.

    A pair (i, j) is two positions of one sequence with 0 <= s_i < s_j; it is in order if E_i < E_j.

    Args:
        entropy: (N,) nats.
        steps: (N,) decoding steps, -1 = not ranked.
        cu_seqlens: (B + 1,) row offsets of the sequences.
    """
    sequence = torch.bucketize(
        torch.arange(len(steps), dtype=cu_seqlens.dtype, device=steps.device), cu_seqlens[1:], right=True
    )
    first, second = torch.where((sequence[:, None] == sequence) & (steps[:, None] >= 0) & (steps[:, None] < steps))
    return OrderCounts((entropy[first] < entropy[second]).sum(), torch.tensor(len(first), device=steps.device))


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
    """The mean of one value a problem."""
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
    """The unbiased estimate of pass@k (arXiv 2107.03374, eq. 1), one a prompt.

    Args:
        right: right answers of each prompt, of `samples` drawn.
    """
    return np.array([1 - comb(samples - c, k) / comb(samples, k) for c in right.tolist()])


def entropy_by_step(decoding_orders: Sequence[Sequence[int]], entropies: Sequence[Sequence[float]]) -> np.ndarray:
    """Mean entropy (nats) of the tokens unmasked at each step, over responses of the same number of steps."""
    steps = np.concatenate(decoding_orders)
    return np.bincount(steps, np.concatenate(entropies)) / np.bincount(steps)
