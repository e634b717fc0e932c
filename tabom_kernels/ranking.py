"""The rank loss over the entropies of a trajectory, differentiable."""

from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tabom_kernels import reference
from tabom_kernels.backends import Backend, closed_form
from tabom_kernels.checks import INTEGERS, check_dtype, check_entropy, check_form, check_sequences

Form = Literal["logistic", "hinge", "plackett_luce"]


class RankLossFunction(torch.autograd.Function):
    """(B,) rank losses; the gradients are finished in forward, backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        entropy: Tensor,
        temperature: float | Tensor,
        steps: Tensor,
        cu_seqlens: Tensor,
        form: str,
        margin: float,
        backend: ModuleType,
    ) -> Tensor:
        result = backend.trajectory_rank_loss(entropy, steps, cu_seqlens, form, margin, temperature)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(result.grad_entropy, result.grad_temperature, cu_seqlens)
        return result.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_entropy, grad_temperature, cu_seqlens = ctx.saved_tensors
        by_entropy = by_temperature = None
        if ctx.needs_input_grad[0]:
            rows = len(grad_entropy)
            by_entropy = grad_entropy * grad_loss.repeat_interleave(cu_seqlens.diff(), output_size=rows)
        if ctx.needs_input_grad[1]:
            by_temperature = (grad_temperature * grad_loss).sum()
        return by_entropy, by_temperature, None, None, None, None, None


def trajectory_rank_loss(
    entropy: Tensor,
    steps: Tensor,
    cu_seqlens: Tensor,
    *,
    form: Form = "logistic",
    margin: float = 0.0,
    temperature: float | Tensor = 1.0,
    backend: Backend | None = None,
) -> Tensor:
    """How far the entropies are from rising in the order of decoding (arXiv 2605.11854).

    An ordered pair (i, j) is two rows of one sequence with 0 <= s_i < s_j. With x = E_i - E_j + margin,

    - `logistic`: mean over the ordered pairs of softplus(x / temperature), Bradley-Terry;
    - `hinge`: mean over the ordered pairs of relu(x), the authors' release; the temperature is not used;
    - `plackett_luce`: the exact likelihood of the whole order, ties by Breslow's rule: mean over the ranked rows i of
      E_i / temperature + log sum_{j: s_j >= s_i} exp(-E_j / temperature); the margin is not used.

    Args:
        entropy: (N,) nats.
        steps: (N,) int32 or int64 decoding steps, -1 = not ranked (such a row's entropy may even be NaN).
        cu_seqlens: (B + 1,) int32 row offsets of the sequences.
        margin: nats.
        temperature: nats, above 0; a 0-dim tensor may require a gradient.
        backend: "torch" or "reference"; None takes `backend_for(entropy)`.

    Returns:
        (B,) in the dtype of `entropy` (half precision in fp32), 0 where a sequence has no ordered pair.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, device, form, temperature or offset is wrong, or the backend does not exist.
    """
    check_entropy(entropy)
    check_sequences(steps, cu_seqlens, len(entropy), entropy.device)
    check_form(form, temperature)
    entropy = entropy.to(reference.working_dtype(entropy.dtype))
    forms = closed_form(backend, entropy)
    if forms is None:
        return reference.trajectory_rank_loss(entropy, steps, cu_seqlens, form, margin, temperature)
    return RankLossFunction.apply(entropy, temperature, steps, cu_seqlens, form, margin, forms)


def count_ordered_pairs(steps: Tensor, cu_seqlens: Tensor, *, backend: Backend | None = None) -> Tensor:
    """Number of pairs (i, j) of each sequence with 0 <= s_i < s_j.

    Args:
        steps: (N,) int32 or int64 decoding steps, -1 = not ranked.
        cu_seqlens: (B + 1,) int32 row offsets of the sequences.
        backend: "torch" or "reference"; None takes `backend_for(steps)`.

    Returns:
        (B,) int64.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, device or offset is wrong, or the backend does not exist.
    """
    check_dtype("steps", steps, INTEGERS)
    check_sequences(steps, cu_seqlens, len(steps), steps.device)
    return (closed_form(backend, steps) or reference).count_ordered_pairs(steps, cu_seqlens)
