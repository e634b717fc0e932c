"""Entropy-ranking losses for diffusion language models: exact gradients, few passes over the logits.

Rows are packed: N rows of B sequences, sequence b owning rows `cu_seqlens[b]:cu_seqlens[b + 1]`. Every result is in
nats. `reference` is the specification; `backend=None` takes the best backend for the tensor's device.
"""

from tabom_kernels.backends import backend_for
from tabom_kernels.fused_linear import fused_linear_cross_entropy, fused_linear_tabom_loss
from tabom_kernels.loss import TabomLoss, tabom_loss
from tabom_kernels.noise import mix_keys
from tabom_kernels.ranking import count_ordered_pairs, trajectory_rank_loss
from tabom_kernels.sampling import UnmaskStatistics, unmask_statistics
from tabom_kernels.vocabulary import cross_entropy_with_entropy, softmax_entropy

__version__ = "0.1.0"

__all__ = [
    "TabomLoss",
    "UnmaskStatistics",
    "backend_for",
    "count_ordered_pairs",
    "cross_entropy_with_entropy",
    "fused_linear_cross_entropy",
    "fused_linear_tabom_loss",
    "mix_keys",
    "softmax_entropy",
    "tabom_loss",
    "trajectory_rank_loss",
    "unmask_statistics",
]
