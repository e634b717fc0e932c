"""The closed forms as Triton kernels, for NVIDIA GPUs; names and signatures are those of `backends.torch`.

Logits are bf16, fp16 or fp32, every sum is fp32, and nothing waits for the host. Where there is no GPU, the tests
execute the compiled kernels on an emulator (`tests/gpu_emulator`).
"""

from tabom_kernels.backends.triton.filters import filter_thresholds
from tabom_kernels.backends.triton.gradient import vocabulary_gradient
from tabom_kernels.backends.triton.ranking import count_ordered_pairs, trajectory_rank_loss
from tabom_kernels.backends.triton.sampling import unmask_statistics
from tabom_kernels.backends.triton.statistics import vocabulary_statistics

__all__ = [
    "count_ordered_pairs",
    "filter_thresholds",
    "trajectory_rank_loss",
    "unmask_statistics",
    "vocabulary_gradient",
    "vocabulary_statistics",
]
