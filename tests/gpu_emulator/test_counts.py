"""The counts that `benchmarks.emulated` writes are those of a kernel whose accesses are known."""

import pytest
import torch

from benchmarks import emulated

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the emulator")


def test_the_emulator_counts_what_a_row_moves():
    """4096 logits of two bytes: each is read once, and for the gradient written once."""
    calls = emulated.ours(torch.zeros(1, 4096, dtype=torch.bfloat16), torch.tensor([3]))
    statistics, gradient = (emulated.count(calls[op], 4096) for op in ("statistics", "gradient"))
    for counts in (statistics, gradient):
        assert counts["exponentials"] >= 1 and counts["loaded_bytes"] == pytest.approx(2, abs=0.1)
    assert gradient["stored_bytes"] == pytest.approx(2, abs=0.05)
