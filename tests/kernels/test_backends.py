import pytest
import torch

from tabom_kernels import backend_for, softmax_entropy


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_what_triton_refuses(no_interpreter):
    """The dtype first: it is wrong on every device."""
    with pytest.raises(TypeError, match=r"backend='triton': .* got float64"):
        softmax_entropy(torch.zeros(1, 2, dtype=torch.float64, device="cpu"), backend="triton")
    with pytest.raises(ValueError, match="backend='triton': expected a CUDA tensor, got cpu; use 'torch'"):
        softmax_entropy(torch.zeros(1, 2, device="cpu"), backend="triton")


def test_fp64_takes_torch_everywhere():
    assert backend_for(torch.zeros(1, dtype=torch.float64)) == "torch"
