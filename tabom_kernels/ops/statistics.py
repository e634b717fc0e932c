"""Cross-entropy and entropy of every row of logits, differentiable."""

from typing import Any

import torch
from torch import Tensor

from tabom_kernels.arguments import check_labels, check_logits, check_overlap
from tabom_kernels.backends import reference
from tabom_kernels.backends.results import VocabularyStatistics
from tabom_kernels.backends.selection import Backend, load, resolve
from tabom_kernels.ops.derivatives import (
    call_directly,
    differentiable,
    is_eager,
    refuse_forward_mode,
    refuse_second_derivatives,
)


@torch.library.custom_op("tabom_kernels::vocabulary_statistics", mutates_args=())
def statistics_op(
    logits: Tensor, labels: Tensor | None, ignore_index: int, inplace_backward: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ce, entropy, maximum, log_sum), each (N,); ce is empty without labels."""
    if inplace_backward:
        check_overlap(logits)
    ce, entropy, maximum, log_sum = load(backend).vocabulary_statistics(logits, labels, ignore_index)
    return entropy.new_empty(0) if ce is None else ce, entropy, maximum, log_sum


@statistics_op.register_fake
def _(logits: Tensor, labels: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    rows, dtype = logits.shape[0], reference.working_dtype(logits.dtype)
    sizes = (0 if labels is None else rows, rows, rows, rows)
    return tuple(logits.new_empty(size, dtype=dtype) for size in sizes)


@torch.library.custom_op("tabom_kernels::vocabulary_gradient", mutates_args=())
def gradient_op(
    logits: Tensor,
    labels: Tensor | None,
    ignore_index: int,
    entropy: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    grad_ce: Tensor | None,
    grad_entropy: Tensor | None,
    upstream: Tensor | None,
    backend: str,
) -> Tensor:
    """(N, V) dL/dlogits."""
    statistics = VocabularyStatistics(None, entropy, maximum, log_sum)
    out = torch.empty_like(logits)
    row_grads = (grad_ce, grad_entropy)
    load(backend).vocabulary_gradient(logits, labels, ignore_index, statistics, *row_grads, out, upstream)
    return out


@gradient_op.register_fake
def _(logits: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(logits)


@torch.library.custom_op("tabom_kernels::vocabulary_gradient_", mutates_args=("logits",))
def inplace_gradient_op(
    logits: Tensor,
    labels: Tensor | None,
    ignore_index: int,
    entropy: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    grad_ce: Tensor | None,
    grad_entropy: Tensor | None,
    upstream: Tensor | None,
    backend: str,
) -> None:
    """Writes dL/dlogits over the logits."""
    statistics = VocabularyStatistics(None, entropy, maximum, log_sum)
    row_grads = (grad_ce, grad_entropy)
    load(backend).vocabulary_gradient(logits, labels, ignore_index, statistics, *row_grads, logits, upstream)


def save_statistics(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    logits, labels, ctx.ignore_index, ctx.inplace, ctx.backend = inputs
    _, entropy, maximum, log_sum = output
    ctx.mark_non_differentiable(maximum, log_sum)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, entropy, maximum, log_sum)


def statistics_backward(ctx: Any, grad_ce: Tensor | None, grad_entropy: Tensor | None, *_: None) -> tuple:
    refuse_second_derivatives()
    if grad_ce is None and grad_entropy is None:
        return None, None, None, None, None
    logits, labels, *statistics = ctx.saved_tensors
    if labels is None:
        grad_ce = None  # torch.compile gives the gradient of the empty cross-entropy
    row_grads = (grad_ce, grad_entropy, None)
    by_logits = logits_gradient(ctx.inplace, logits, labels, ctx.ignore_index, *statistics, *row_grads, ctx.backend)
    return by_logits, None, None, None, None


def logits_gradient(inplace: bool, logits: Tensor, *arguments: Any) -> Tensor:
    """(N, V) dL/dlogits, in place of the logits or in memory of its own."""
    if not inplace:
        return call_directly(gradient_op, logits, *arguments)
    if is_eager(logits):
        inplace_gradient_op._init_fn(logits, *arguments)
        torch.autograd.graph.increment_version(logits)
    else:
        inplace_gradient_op(logits, *arguments)
    return logits


statistics = differentiable(statistics_op, save_statistics, statistics_backward, results=2)


def softmax_entropy(logits: Tensor, *, backend: Backend | None = None) -> Tensor:
    """Shannon entropy of the softmax of each row.

    Args:
        logits: (N, V) of any floating dtype and row stride. A logit of -inf has probability 0 and contributes 0.
        backend: "triton", "torch" or "reference"; None takes `backend_for(logits)`.

    Returns:
        (N,) nats in fp32 (fp64 for fp64 logits), differentiable.

    Raises:
        TypeError: logits are not floating point.
        ValueError: logits are not (N, V), or the backend does not exist.
    """
    check_logits(logits)
    backend = resolve(backend, logits)
    refuse_forward_mode(backend, logits)
    if backend == "reference":
        return reference.softmax_entropy(logits)
    return statistics(logits, None, 0, False, backend)[1]


def cross_entropy_with_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and entropy of each row, together.

    Args:
        logits: (N, V) of any floating dtype and row stride.
        labels: (N,) int64; `ignore_index` = no cross-entropy on this row (it is 0, and so is its gradient).
        inplace_backward: backward writes the gradient over the logits and so destroys them; a second backward
            through the same graph then raises a RuntimeError. The logits must not be an expanded view. The reference
            backend ignores this argument, because it has no in-place form.
        backend: "triton", "torch" or "reference"; None takes `backend_for(logits)`.

    Returns:
        `(ce, entropy)`, each (N,) nats in fp32 (fp64 for fp64 logits), both differentiable.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, stride or device is wrong, a label is out of range, or the backend does not exist.
    """
    check_logits(logits)
    check_labels(labels, *logits.shape, logits.device, ignore_index)
    backend = resolve(backend, logits)
    refuse_forward_mode(backend, logits)
    if backend == "reference":
        return reference.cross_entropy_with_entropy(logits, labels, ignore_index)
    return statistics(logits, labels, ignore_index, inplace_backward, backend)
