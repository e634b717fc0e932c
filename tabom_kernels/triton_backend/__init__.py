"""The closed forms as Triton kernels, for NVIDIA GPUs; same names and signatures as `torch_backend`.

With TRITON_INTERPRET=1 they run on CPU tensors, slowly, which is how they are tested without a GPU. Logits are bf16,
fp16 or fp32, every sum is fp32, and nothing waits for the host.
"""

from tabom_kernels.torch_backend import RankLoss, VocabularyStatistics, WeightedLoss
from tabom_kernels.triton_backend.loss import weighted_loss
from tabom_kernels.triton_backend.ranking import count_ordered_pairs, trajectory_rank_loss
from tabom_kernels.triton_backend.sampling import filter_thresholds, unmask_statistics
from tabom_kernels.triton_backend.vocabulary import vocabulary_gradient, vocabulary_statistics

__all__ = [
    "RankLoss",
    "VocabularyStatistics",
    "WeightedLoss",
    "count_ordered_pairs",
    "filter_thresholds",
    "trajectory_rank_loss",
    "unmask_statistics",
    "vocabulary_gradient",
    "vocabulary_statistics",
    "weighted_loss",
]
