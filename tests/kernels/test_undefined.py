"""What NVIDIA leaves open: the order in which warps run, and the last bits of approximate instructions."""

import numpy as np
import pytest
import torch

from tabom_kernels import cross_entropy_with_entropy, trajectory_rank_loss, unmask_statistics
from tests.gpu_emulator.settings import SETTINGS
from tests.kernels.inputs import draw_labels, draw_sequences, gaussian, peaked

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="changes what the emulator does")


def draw_inputs(dtype):
    logits = torch.cat([gaussian(3, 5000), peaked(2, 5000)]).to(dtype)
    steps, cu_seqlens = draw_sequences([40, 20])
    return logits, draw_labels(logits), 5 * torch.rand(len(steps)), steps, cu_seqlens


def every_op(logits, labels, entropy, steps, cu_seqlens, backend):
    """Values and gradients of all kernels, through the public functions."""
    keys = torch.arange(len(logits))
    filtered = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "generator": keys}
    found = [x for settings in ({}, filtered) for x in unmask_statistics(logits, backend=backend, **settings)]
    leaf = logits.clone().requires_grad_()
    losses = cross_entropy_with_entropy(leaf * 1, labels, inplace_backward=True, backend=backend)
    found += [*losses, *torch.autograd.grad(sum(x.sum() for x in losses), leaf)]
    for form in ("logistic", "hinge", "plackett_luce"):
        leaf = entropy.clone().requires_grad_()
        loss = trajectory_rank_loss(leaf, steps, cu_seqlens, form=form, margin=0.1, temperature=0.7, backend=backend)
        found += [loss, *torch.autograd.grad(loss.sum(), leaf)]
    return [x.detach() for x in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_warps_changes_no_bit(rng, monkeypatch, dtype):
    inputs = draw_inputs(dtype)
    monkeypatch.setattr(SETTINGS, "chaos", False)
    expected = every_op(*inputs, "triton")
    monkeypatch.setattr(SETTINGS, "chaos", True)
    monkeypatch.setattr(SETTINGS, "random", np.random.default_rng(rng.randrange(2**31)))
    for ours, theirs in zip(every_op(*inputs, "triton"), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_approximate_instructions_may_be_off_by_their_bound(rng, monkeypatch, dtype):
    """Results stay next to those of fp64, and differ from those of exact instructions."""
    logits, labels, entropy, steps, cu_seqlens = draw_inputs(dtype)
    exact = every_op(logits.double(), labels, entropy.double(), steps, cu_seqlens, "reference")
    monkeypatch.setattr(SETTINGS, "perturb", False)
    unperturbed = every_op(logits, labels, entropy, steps, cu_seqlens, "triton")
    monkeypatch.setattr(SETTINGS, "perturb", True)
    ours = every_op(logits, labels, entropy, steps, cu_seqlens, "triton")
    assert not all(torch.equal(*pair) for pair in zip(ours, unperturbed, strict=True))
    for got, want in zip(ours, exact, strict=True):
        rtol = 2**-7 if got.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(got.double(), want.double(), rtol=rtol, atol=1e-6)
