"""What the trainer and the reports say about the order of certainty."""

from typing import NamedTuple

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
