import pytest
import torch

from tabom_kernels import backend_for, check
from tabom_kernels.backends.selection import load


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(check, "DREAM_VOCABULARY", 1000)
    monkeypatch.setattr(check, "DREAM_WIDTH", 64)


def test_this_machine_passes(small, capsys):
    assert check.main() == 0
    out = capsys.readouterr().out
    assert "all gradients are right" in out and "backend: " in out and "times as long" in out


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_wrong_gradient_fails(small, monkeypatch, capsys, factor):
    backend = load(backend_for(torch.empty(0)))
    right = backend.vocabulary_gradient

    def wrong(*args):
        right(*args)[3] *= factor  # one row

    monkeypatch.setattr(backend, "vocabulary_gradient", wrong)
    assert check.main() == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith("WRONG")]
    assert {line.split()[0] for line in lines} == {
        "softmax_entropy",
        "cross_entropy_with_entropy",
        "tabom_loss",
        "fused_linear_tabom_loss",
    }
