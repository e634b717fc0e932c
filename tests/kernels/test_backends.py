import subprocess
import sys

import pytest
import torch

from tabom_kernels import backend_for, softmax_entropy
from tabom_kernels.backends import selection


def test_kernels_take_tensors_of_a_gpu():
    code = "from tabom_kernels.backends import selection; print(selection.KERNEL_DEVICE)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.stdout == "cuda\n", child.stderr


def test_what_triton_refuses(monkeypatch):
    """The dtype first: it is wrong on every device."""
    monkeypatch.setattr(selection, "KERNEL_DEVICE", "cuda")
    with pytest.raises(TypeError, match=r"backend='triton': .* got float64"):
        softmax_entropy(torch.zeros(1, 2, dtype=torch.float64, device="cpu"), backend="triton")
    with pytest.raises(ValueError, match="backend='triton': expected a CUDA tensor, got cpu; use 'torch'"):
        softmax_entropy(torch.zeros(1, 2, device="cpu"), backend="triton")


def test_fp64_takes_torch_everywhere():
    assert backend_for(torch.zeros(1, dtype=torch.float64)) == "torch"
