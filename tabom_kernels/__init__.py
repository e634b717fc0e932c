"""Losses that rank entropies, for diffusion language models, with exact gradients in few passes over the logits.

Rows are packed: there are N rows of B sequences, and sequence b has the rows `cu_seqlens[b]:cu_seqlens[b + 1]`. Every
result is in nats. The module `reference` is the specification. `backend=None` takes the best backend for the device.
"""

from tabom_kernels.backends import reference as reference
from tabom_kernels.backends.selection import backend_for
from tabom_kernels.noise import mix_keys
from tabom_kernels.ops.fused_linear import fused_linear_cross_entropy, fused_linear_tabom_loss
from tabom_kernels.ops.logprobs import fused_linear_logprobs
from tabom_kernels.ops.policy import PolicyLoss, fused_linear_policy_loss
from tabom_kernels.ops.ranking import count_ordered_pairs, trajectory_rank_loss
from tabom_kernels.ops.sampling import UnmaskStatistics, unmask_statistics
from tabom_kernels.ops.statistics import cross_entropy_with_entropy, softmax_entropy
from tabom_kernels.ops.tabom import TabomLoss, tabom_loss

__version__ = "0.1.0"

__all__ = [
    "PolicyLoss",
    "TabomLoss",
    "UnmaskStatistics",
    "backend_for",
    "count_ordered_pairs",
    "cross_entropy_with_entropy",
    "fused_linear_cross_entropy",
    "fused_linear_logprobs",
    "fused_linear_policy_loss",
    "fused_linear_tabom_loss",
    "mix_keys",
    "softmax_entropy",
    "tabom_loss",
    "trajectory_rank_loss",
    "unmask_statistics",
]
