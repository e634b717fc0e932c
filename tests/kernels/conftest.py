"""Kernel tests run on the GPU where there is one. Else the compiled kernels run on an emulator, `tests.gpu_emulator`.

Outputs that nothing writes show: torch.empty is filled with NaN in these tests.
"""

import pytest
import torch


@pytest.fixture(autouse=True)
def on_the_gpu_if_there_is_one():
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    yield
    torch.set_default_device("cpu")


@pytest.fixture(autouse=True)
def nan_in_uninitialized_memory(on_the_gpu_if_there_is_one, marked_memory):
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
