"""The rank loss over the entropies of a trajectory, differentiable."""

from typing import Any, Literal

import torch
from torch import Tensor

from tabom_kernels.arguments import INTEGERS, check_dtype, check_entropy, check_form, check_sequences
from tabom_kernels.backends import reference
from tabom_kernels.backends.selection import Backend, load, resolve
from tabom_kernels.ops.derivatives import (
    call_directly,
    differentiable,
    is_eager,
    refuse_forward_mode,
    refuse_second_derivatives,
)

Form = Literal["logistic", "hinge", "plackett_luce"]


@torch.library.custom_op("tabom_kernels::trajectory_rank_loss", mutates_args=())
def rank_loss_op(
    entropy: Tensor, temperature: Tensor, margin: Tensor, steps: Tensor, cu_seqlens: Tensor, form: str, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses (B,), ordered pairs (B,), dE (N,) and dtau (B,); backward only scales these gradients."""
    return tuple(load(backend).trajectory_rank_loss(entropy, steps, cu_seqlens, form, margin, temperature))


@rank_loss_op.register_fake
def _(
    entropy: Tensor, temperature: Tensor, margin: Tensor, steps: Tensor, cu_seqlens: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    loss, grad_temperature = (entropy.new_empty(cu_seqlens.shape[0] - 1) for _ in range(2))
    return loss, torch.empty_like(loss, dtype=torch.int64), torch.empty_like(entropy), grad_temperature


def save_gradients(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    _, pairs, grad_entropy, grad_temperature = output
    ctx.mark_non_differentiable(pairs, grad_entropy, grad_temperature)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_entropy, grad_temperature, inputs[4])


def scale_gradients(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple:
    refuse_second_derivatives()
    if grad_loss is None:
        return (None,) * 7
    grad_entropy, grad_temperature, cu_seqlens = ctx.saved_tensors
    by_entropy = by_temperature = None
    if ctx.needs_input_grad[0]:
        rows = grad_entropy.shape[0]
        by_entropy = grad_entropy * grad_loss.repeat_interleave(cu_seqlens.diff(), output_size=rows)
    if ctx.needs_input_grad[1]:
        by_temperature = (grad_temperature * grad_loss).sum()
    return by_entropy, by_temperature, None, None, None, None, None


rank_loss = differentiable(rank_loss_op, save_gradients, scale_gradients, results=1)


@torch.library.custom_op("tabom_kernels::count_ordered_pairs", mutates_args=())
def count_op(steps: Tensor, cu_seqlens: Tensor, backend: str) -> Tensor:
    """(B,) int64."""
    return load(backend).count_ordered_pairs(steps, cu_seqlens)


@count_op.register_fake
def _(steps: Tensor, cu_seqlens: Tensor, backend: str) -> Tensor:
    return steps.new_empty(cu_seqlens.shape[0] - 1, dtype=torch.int64)


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
    """Measures how far the entropies are from rising in the order of decoding (arXiv 2605.11854).

    An ordered pair (i, j) is two rows of one sequence with 0 <= s_i < s_j. With x = E_i - E_j + margin,

    - `logistic`: mean over the ordered pairs of softplus(x / temperature): Bradley-Terry, Eq. 3 and 5;
    - `hinge`: mean over the ordered pairs of relu(x): Eq. 8, and the release; the temperature is not used;
    - `plackett_luce`: the exact likelihood of the whole order, ties by Breslow's rule: mean over the ranked rows i of
      E_i / temperature + log sum_{j: s_j >= s_i} exp(-E_j / temperature); the margin is not used.

    Args:
        entropy: (N,) nats.
        steps: (N,) int32 or int64 decoding steps, -1 = not ranked (such a row's entropy may even be NaN).
        cu_seqlens: (B + 1,) int32 row offsets of the sequences.
        margin: nats.
        temperature: nats, above 0; a 0-dim tensor may require a gradient.
        backend: "triton", "torch" or "reference"; None takes `backend_for(entropy)`.

    Returns:
        (B,) in the dtype of `entropy` (half precision in fp32), 0 where a sequence has no ordered pair.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, device, form, temperature or offset is wrong, or the backend does not exist.
    """
    check_entropy(entropy)
    check_sequences(steps, cu_seqlens, entropy.shape[0], entropy.device)
    check_form(form, margin, temperature)
    backend = resolve(backend, entropy)
    refuse_forward_mode(backend, entropy, temperature)
    entropy = entropy.to(reference.working_dtype(entropy.dtype))
    if backend == "reference":
        return reference.trajectory_rank_loss(entropy, steps, cu_seqlens, form, margin, temperature)
    temperature, margin = as_settings(entropy, temperature, margin)
    return rank_loss(entropy, temperature, margin, steps, cu_seqlens, form, backend)[0]


def as_settings(like: Tensor, *values: float | Tensor | None) -> list[float | Tensor | None]:
    """Settings as the backends take them: tensors () on the device and in the working dtype of `like`, or numbers.

    Numbers stay numbers in eager mode. Under torch.compile they become tensors, because a graph is compiled anew for
    each number that is an argument of an op or of torch.full.
    """
    numbers_stay, dtype = is_eager(like), reference.working_dtype(like.dtype)
    settings = []
    for value in values:
        if isinstance(value, Tensor):
            value = value.to(like.device, dtype)
        elif value is not None and not numbers_stay:
            value = torch.zeros((), dtype=dtype, device=like.device) + value
        settings.append(value)
    return settings


def count_ordered_pairs(steps: Tensor, cu_seqlens: Tensor, *, backend: Backend | None = None) -> Tensor:
    """Number of pairs (i, j) of each sequence with 0 <= s_i < s_j.

    Args:
        steps: (N,) int32 or int64 decoding steps, -1 = not ranked.
        cu_seqlens: (B + 1,) int32 row offsets of the sequences.
        backend: "triton", "torch" or "reference"; None takes `backend_for(steps)`.

    Returns:
        (B,) int64.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, device or offset is wrong, or the backend does not exist.
    """
    check_dtype("steps", steps, INTEGERS)
    check_sequences(steps, cu_seqlens, steps.numel(), steps.device)
    backend = resolve(backend, steps)
    if backend == "reference":
        return reference.count_ordered_pairs(steps, cu_seqlens)
    return call_directly(count_op, steps, cu_seqlens, backend)
