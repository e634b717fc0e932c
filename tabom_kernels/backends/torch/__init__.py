"""The closed forms in PyTorch, without autograd: the backend of the CPU and of every device without Triton."""

from tabom_kernels.backends.torch.ranking import count_ordered_pairs, trajectory_rank_loss
from tabom_kernels.backends.torch.sampling import filter_thresholds, unmask_statistics
from tabom_kernels.backends.torch.statistics import vocabulary_gradient, vocabulary_statistics

__all__ = [
    "count_ordered_pairs",
    "filter_thresholds",
    "trajectory_rank_loss",
    "unmask_statistics",
    "vocabulary_gradient",
    "vocabulary_statistics",
]
