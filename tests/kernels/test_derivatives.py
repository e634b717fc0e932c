"""Second derivatives and forward mode: refused by name where they are not computed, right where they are."""

import pytest
import torch
from torch.autograd import forward_ad

from tabom_kernels import (
    cross_entropy_with_entropy,
    fused_linear_tabom_loss,
    softmax_entropy,
    tabom_loss,
    trajectory_rank_loss,
)
from tests.kernels.inputs import draw_labels, draw_sequences, gaussian

MESSAGE = "first derivatives only; backend='reference' has all of them"


def draw_losses(backend, inplace_backward=False):
    """Every op as a function of one tensor, with a value of that tensor."""
    steps, cu_seqlens = draw_sequences([5, 4], unranked=0)
    logits, weight = gaussian(9, 7), torch.randn(7, 4, dtype=torch.float64)
    batch = draw_labels(logits), steps, cu_seqlens
    hidden, tau = torch.randn(9, 4, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    if backend == "triton":
        logits, weight, hidden, tau = (x.float() for x in (logits, weight, hidden, tau))
    options = {"inplace_backward": inplace_backward, "backend": backend}
    return {
        "softmax_entropy": (lambda z: softmax_entropy(z, backend=backend).sum(), logits),
        "cross_entropy_with_entropy": (
            lambda z: sum(x.sum() for x in cross_entropy_with_entropy(z * 1, batch[0], **options)),
            logits,
        ),
        "tabom_loss": (lambda z: tabom_loss(z * 1, *batch, **options).loss, logits),
        "trajectory_rank_loss": (
            lambda e: trajectory_rank_loss(e, steps, cu_seqlens, backend=backend).sum(),
            logits[:, 0].abs(),
        ),
        "temperature": (
            lambda t: trajectory_rank_loss(logits[:, 0], steps, cu_seqlens, temperature=t, backend=backend).sum(),
            tau,
        ),
        "fused, hidden": (lambda h: fused_linear_tabom_loss(h, weight, *batch, backend=backend).loss, hidden),
        "fused, weight": (lambda w: fused_linear_tabom_loss(hidden, w, *batch, backend=backend).loss, weight),
    }


NAMES = list(draw_losses("torch"))


def hessian_vector_product(function, x):
    x = x.clone().requires_grad_()
    [grad] = torch.autograd.grad(function(x) ** 2, x, create_graph=True)
    return torch.autograd.grad(grad.sum(), x)


def make_dual(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


HIGHER = {
    "hvp": hessian_vector_product,
    "hessian": torch.autograd.functional.hessian,
    "func.hessian": lambda f, x: torch.func.hessian(f)(x),
    "make_dual": make_dual,
    "func.jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "func.grad": lambda f, x: torch.func.grad(f)(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
}


@pytest.mark.parametrize(
    "name, inplace_backward",
    [*((name, False) for name in NAMES), ("cross_entropy_with_entropy", True), ("tabom_loss", True)],
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("derivative", HIGHER)
def test_what_is_not_a_first_derivative_is_refused(rng, derivative, name, backend, inplace_backward):
    with pytest.raises(NotImplementedError, match=MESSAGE):
        HIGHER[derivative](*draw_losses(backend, inplace_backward)[name])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("derivative", HIGHER)
def test_the_reference_has_all_of_them(rng, derivative, name):
    function, x = draw_losses("reference")[name]
    leaf = x.clone().requires_grad_()
    [grad] = torch.autograd.grad(function(leaf), leaf)
    result = HIGHER[derivative](function, x)
    if derivative in ("func.grad", "jacrev", "jacfwd"):
        torch.testing.assert_close(result, grad)
    elif derivative in ("make_dual", "func.jvp"):
        direction = x if derivative == "func.jvp" else torch.ones_like(x)
        torch.testing.assert_close(result, (grad * direction).sum())
    elif derivative == "hvp":
        small = 1e-6
        beside = [(x + sign * small).requires_grad_() for sign in (1, -1)]
        grads = [torch.autograd.grad(function(y) ** 2, y)[0] for y in beside]
        torch.testing.assert_close(result[0], (grads[0] - grads[1]) / (2 * small), rtol=1e-5, atol=1e-6)
    else:
        torch.testing.assert_close(result, torch.autograd.functional.hessian(function, x))
        assert result.abs().sum() > 0
