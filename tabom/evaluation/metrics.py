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
