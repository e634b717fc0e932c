"""Log-probabilities and entropies of a linear head, differentiable, without ever holding the logits of all rows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tabom_kernels.arguments import check_labels
from tabom_kernels.backends import reference
from tabom_kernels.backends.results import LogitTransform, VocabularyStatistics
from tabom_kernels.backends.selection import Backend, load, resolve
from tabom_kernels.ops.chunks import even_slices, take_rows
from tabom_kernels.ops.derivatives import (
    call_directly,
    differentiable,
    refuse_forward_mode,
    refuse_second_derivatives,
)
from tabom_kernels.ops.fused_linear import LinearHead
from tabom_kernels.ops.head import HeadGradients, empty_gradients, joined, project
from tabom_kernels.ops.row_loss import IGNORE_INDEX


def fused_linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    max_chunk_rows: int | None = None,
    fp32_logits: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of the label and entropy of each row of the logits `hidden @ weight.T + bias`.

    For objectives of one's own: both results are differentiable with any upstream gradients. The logits are computed a
    chunk at a time, in forward and once more in backward: 6 N V D FLOP with a frozen head, 8 N V D with a trained one.
    A loss of this package needs them once, see `fused_linear_policy_loss`.

    Args:
        hidden: (N, D) hidden states of the rows, fp32, fp64 or half precision.
        weight: (V, D) of the head, in the dtype of `hidden`; the whole head.
        labels: (N,) int64, `ignore_index` = a row whose log-probability is 0, with a gradient of 0.
        logit_scale, softcap: as in `fused_linear_tabom_loss`. For log-probabilities and entropies at a temperature,
            divide both by it.
        bias, max_chunk_rows, fp32_logits, backend: see `fused_linear_tabom_loss`.

    Returns:
        `(logprobs, entropy)`, each (N,) nats in fp32 (fp64 for fp64).

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, device or value is wrong, the head is sharded, or the backend does not exist.
    """
    head = LinearHead.of(hidden, weight, bias, None, logit_scale, softcap, max_chunk_rows, fp32_logits)
    if head.sharding is not None:
        raise ValueError("weight: a DTensor sharded over the vocabulary; expected the whole head, full_tensor()")
    check_labels(labels, *head.shape, head.hidden.device, ignore_index)
    backend = resolve(backend, head.hidden)
    refuse_forward_mode(backend, head.hidden, head.weight, head.bias)
    if backend == "reference":
        ce, entropy = reference.cross_entropy_with_entropy(head.reference_logits(), labels, ignore_index)
        return -ce, entropy
    if ignore_index != IGNORE_INDEX:
        labels = labels.where(labels != ignore_index, IGNORE_INDEX)
    settings = (head.transform, head.max_chunk_rows, fp32_logits, backend)
    ce, entropy = head_statistics(head.hidden, head.weight, head.bias, labels, *settings)
    return -ce, entropy


@torch.library.custom_op("tabom_kernels::head_statistics", mutates_args=())
def statistics_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    transform: Sequence[float],
    max_chunk_rows: int,
    fp32_logits: bool,
    backend_name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ce, entropy, maximum, log_sum), each (N,), of the logits of a linear head."""
    backend, change = load(backend_name), LogitTransform(*transform) if transform else None
    parts = []
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in even_slices(slice(0, hidden.shape[0]), max_chunk_rows):
            logits = project(take_rows(hidden, rows), weight, bias, fp32_logits)
            parts.append(backend.vocabulary_statistics(logits, take_rows(labels, rows), IGNORE_INDEX, change))
            del logits  # frees the memory before the next logits are made
    return tuple(joined(list(part)) for part in zip(*parts, strict=True))


@statistics_op.register_fake
def _(hidden: Tensor, *_: Any) -> tuple[Tensor, ...]:
    dtype = reference.working_dtype(hidden.dtype)
    return tuple(hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(4))


@torch.library.custom_op("tabom_kernels::head_gradients", mutates_args=())
def gradients_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    entropy: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    grad_ce: Tensor,
    grad_entropy: Tensor | None,
    transform: Sequence[float],
    max_chunk_rows: int,
    fp32_logits: bool,
    needs_grad: Sequence[bool],
    backend_name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by hidden states, weight and bias, empty where they are not needed; some are in fp32."""
    backend, change = load(backend_name), LogitTransform(*transform) if transform else None
    gradients = HeadGradients(hidden, weight, bias, max_chunk_rows, needs_grad)
    by_row = (labels, entropy, maximum, log_sum, grad_ce, grad_entropy)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in even_slices(slice(0, hidden.shape[0]), max_chunk_rows):
            logits = project(take_rows(hidden, rows), weight, bias, fp32_logits)
            label, *statistics, by_ce, by_entropy = (None if x is None else take_rows(x, rows) for x in by_row)
            statistics = VocabularyStatistics(None, *statistics)
            gradients.add(backend, rows, logits, label, statistics, by_ce, by_entropy, change)
            del logits
    return gradients.hidden, gradients.weight, gradients.bias


@gradients_op.register_fake
def _(hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, max_chunk_rows, _, needs_grad, _ = arguments
    return empty_gradients(hidden, weight, max_chunk_rows, needs_grad)


def save_statistics(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.transform, ctx.max_chunk_rows, ctx.fp32_logits, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])


def statistics_backward(ctx: Any, grad_ce: Tensor | None, grad_entropy: Tensor | None, *_: None) -> tuple:
    refuse_second_derivatives()
    if grad_ce is None and grad_entropy is None:
        return (None,) * 8
    hidden, weight, bias, labels, *statistics = ctx.saved_tensors
    grad_ce = torch.zeros_like(grad_entropy) if grad_ce is None else grad_ce
    needed = list(ctx.needs_input_grad[:3])
    settings = (ctx.transform, ctx.max_chunk_rows, ctx.fp32_logits, needed, ctx.backend)
    arguments = (weight, bias, labels, *statistics, grad_ce, grad_entropy, *settings)
    gradients = call_directly(gradients_op, hidden, *arguments)
    by_head = [x.to(hidden.dtype) if is_needed else None for x, is_needed in zip(gradients, needed, strict=True)]
    return *by_head, None, None, None, None, None


head_statistics = differentiable(statistics_op, save_statistics, statistics_backward, results=2)
"""Cross-entropy and entropy of each row; backward computes the logits again."""
