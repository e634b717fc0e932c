"""What an error is allowed beside twice that of the naive loss, which is now and then 0 by luck."""

from torch import Tensor


def fp32_rounding(exact: Tensor) -> float:
    """1e-6 of the largest value, or of 1: eight units in the last place of an fp32 result."""
    return 1e-6 * max(1.0, exact.abs().max().item())
