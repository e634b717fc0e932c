"""The TABOM loss: cross-entropy in the window plus the rank loss."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tabom_kernels import reference
from tabom_kernels.arguments import (
    check_denominators,
    check_form,
    check_labels,
    check_logits,
    check_overlap,
    check_sequences,
    check_token_weights,
)
from tabom_kernels.backends import Backend, closed_forms, resolve
from tabom_kernels.derivatives import differentiable, refuse_forward_mode, refuse_second_derivatives
from tabom_kernels.ranking import Form, as_settings
from tabom_kernels.torch_backend import denominator
from tabom_kernels.vocabulary import logits_gradient


class TabomLoss(NamedTuple):
    """Scalars, nats: `loss = cross_entropy + rank_weight * rank`; the last two are detached, for logs."""

    loss: Tensor
    cross_entropy: Tensor
    rank: Tensor


def tabom_loss(
    logits: Tensor,
    labels: Tensor,
    steps: Tensor,
    cu_seqlens: Tensor,
    *,
    rank_weight: float = 1.0,
    form: Form = "logistic",
    margin: float = 0.0,
    temperature: float | Tensor = 1.0,
    token_weights: Tensor | None = None,
    num_tokens: float | Tensor | None = None,
    num_sequences: float | Tensor | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    backend: Backend | None = None,
) -> TabomLoss:
    """CE + `rank_weight` * rank (arXiv 2605.11854), as means over the global batch.

    CE is sum(token_weights * ce) / num_tokens, rank is the sum over sequences of `trajectory_rank_loss` /
    num_sequences. Given both denominators of the global batch, the losses of its micro-batches add up to its loss.

    Args:
        logits: (N, V) of any floating dtype.
        labels: (N,) int64, `ignore_index` = no cross-entropy on this row.
        steps: (N,) int32 or int64, -1 = no ranking on this row.
        cu_seqlens: (B + 1,) int32 row offsets of the sequences.
        form, margin, temperature: of the rank loss, see `trajectory_rank_loss`.
        token_weights: (N,) floating point, scales each row's cross-entropy (NELBO's 1/t).
        num_tokens: denominator of CE, tokens; default: the rows with a label.
        num_sequences: denominator of rank, sequences; default: those with an ordered pair.
        inplace_backward: backward writes the gradient over the logits, see `cross_entropy_with_entropy`.
        backend: "triton", "torch" or "reference"; None takes `backend_for(logits)`.

    Returns:
        fp32 scalars (fp64 for fp64 logits). Without rows the loss is 0 with a gradient of 0.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, device or value is wrong, or the backend does not exist.
    """
    check_logits(logits)
    check_labels(labels, *logits.shape, logits.device, ignore_index)
    check_sequences(steps, cu_seqlens, logits.shape[0], logits.device)
    check_form(form, margin, temperature)
    check_denominators(rank_weight, num_tokens, num_sequences)
    check_token_weights(token_weights, logits.shape[0], logits.device)
    backend = resolve(backend, logits)
    refuse_forward_mode(backend, logits, temperature)
    batch = (labels, steps, cu_seqlens)
    counts = (token_weights, num_tokens, num_sequences)
    if backend == "reference":
        return reference_loss(logits, *batch, rank_weight, form, margin, temperature, *counts, ignore_index)
    temperature, margin, rank_weight, num_tokens, num_sequences = as_settings(
        logits, temperature, margin, rank_weight or None, num_tokens, num_sequences
    )
    settings = (rank_weight, form, margin, token_weights, num_tokens, num_sequences, ignore_index)
    return TabomLoss(*whole_loss(logits, temperature, *batch, *settings, inplace_backward, backend))


@torch.library.custom_op("tabom_kernels::tabom_loss", mutates_args=())
def loss_op(
    logits: Tensor,
    temperature: Tensor,
    labels: Tensor,
    steps: Tensor,
    cu_seqlens: Tensor,
    rank_weight: Tensor | None,
    form: str,
    margin: Tensor,
    token_weights: Tensor | None,
    num_tokens: Tensor | None,
    num_sequences: Tensor | None,
    ignore_index: int,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, cross_entropy, rank; entropy, maximum, log_sum, dce, dE (N,) (empty without ranking) and dtemperature."""
    if inplace_backward:
        check_overlap(logits)
    forms = closed_forms(backend)
    statistics = forms.vocabulary_statistics(logits, labels, ignore_index)
    counts = (token_weights, num_tokens)
    ranking = (steps, cu_seqlens, form, margin, temperature, rank_weight, num_sequences)
    whole = forms.weighted_loss(*statistics[:2], labels, ignore_index, *counts, *ranking)
    grad_entropy = logits.new_empty(0, dtype=whole.loss.dtype) if rank_weight is None else whole.grad_entropy
    return *whole[:3], *statistics[1:], whole.grad_ce, grad_entropy, whole.grad_temperature


@loss_op.register_fake
def _(logits: Tensor, temperature: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    dtype, has_ranking = reference.working_dtype(logits.dtype), arguments[3] is not None
    loss, cross_entropy, rank, grad_temperature = (logits.new_empty((), dtype=dtype) for _ in range(4))
    rows = [logits.new_empty(logits.shape[0], dtype=dtype) for _ in range(4)]
    grad_entropy = logits.new_empty(logits.shape[0] if has_ranking else 0, dtype=dtype)
    return loss, cross_entropy, rank, *rows, grad_entropy, grad_temperature


def save_for_gradient(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    logits, _, labels, _, _, rank_weight, *_, ctx.ignore_index, ctx.inplace, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.has_ranking = rank_weight is not None
    ctx.save_for_backward(logits, labels, *output[3:])


def loss_backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple:
    refuse_second_derivatives()
    if grad_loss is None:
        return (None,) * 14
    logits, labels, *statistics, grad_ce, grad_entropy, grad_temperature = ctx.saved_tensors
    by_logits = by_temperature = None
    if ctx.needs_input_grad[0]:
        row_grads = (grad_ce, grad_entropy if ctx.has_ranking else None, grad_loss)
        by_logits = logits_gradient(ctx.inplace, logits, labels, ctx.ignore_index, *statistics, *row_grads, ctx.backend)
    if ctx.needs_input_grad[1]:
        by_temperature = grad_temperature * grad_loss
    return by_logits, by_temperature, *[None] * 12


whole_loss = differentiable(loss_op, save_for_gradient, loss_backward, results=3)


def reference_loss(
    logits: Tensor,
    labels: Tensor,
    steps: Tensor,
    cu_seqlens: Tensor,
    rank_weight: float,
    form: str,
    margin: float,
    temperature: float | Tensor,
    token_weights: Tensor | None,
    num_tokens: float | Tensor | None,
    num_sequences: float | Tensor | None,
    ignore_index: int,
) -> TabomLoss:
    """The same under autograd."""
    ce, entropy = reference.cross_entropy_with_entropy(logits, labels, ignore_index)
    if token_weights is not None:
        ce = ce * token_weights.to(ce.dtype)
    if num_tokens is None:
        num_tokens = (labels != ignore_index).sum()
    cross_entropy = ce.sum() / denominator(num_tokens)
    if rank_weight == 0:
        return TabomLoss(cross_entropy, cross_entropy.detach(), torch.zeros_like(cross_entropy).detach())
    losses = reference.trajectory_rank_loss(entropy, steps, cu_seqlens, form, margin, temperature)
    if num_sequences is None:
        num_sequences = (reference.count_ordered_pairs(steps, cu_seqlens) > 0).sum()
    rank = losses.sum() / denominator(num_sequences)
    return TabomLoss(cross_entropy + rank_weight * rank, cross_entropy.detach(), rank.detach())
