"""Unwritten outputs show: torch.empty is filled with NaN in these tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def nan_in_uninitialized_memory():
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
