"""Kernel tests run where the kernels do: on the GPU when there is one, else on the CPU through the interpreter.

Unwritten outputs show: torch.empty is filled with NaN in these tests.
"""

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture(autouse=True)
def on_the_gpu_if_there_is_one():
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    yield
    torch.set_default_device("cpu")


@pytest.fixture(autouse=True)
def nan_in_uninitialized_memory(on_the_gpu_if_there_is_one):
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def bf16_rounds_to_nearest(monkeypatch):
    """As on a GPU: Triton's interpreter truncates, and would spend the whole tolerance of a bf16 gradient."""
    convert = interpreter._convert_float

    def rounding_convert(data, source, target, rounding_mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, rounding_mode)
        rounded = torch.tensor(data, device="cpu").bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", rounding_convert)
