"""Cross-entropy and entropy of every row of logits, differentiable."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tabom_kernels import reference
from tabom_kernels.backends import Backend, closed_form
from tabom_kernels.checks import check_labels, check_logits


class VocabularyFunction(torch.autograd.Function):
    """(cross-entropy, entropy) of each row by the closed forms of a backend."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor | None, ignore_index: int, inplace: bool, backend: ModuleType
    ) -> tuple[Tensor | None, Tensor]:
        statistics = backend.vocabulary_statistics(logits, labels, ignore_index)
        ctx.set_materialize_grads(False)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(logits, labels, *statistics[1:])
        ctx.ignore_index, ctx.inplace, ctx.backend = ignore_index, inplace, backend
        return statistics.cross_entropy, statistics.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ce: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_ce is None and grad_entropy is None:
            return None, None, None, None, None
        logits, labels, *saved = ctx.saved_tensors
        statistics = ctx.backend.VocabularyStatistics(None, *saved)
        out = logits if ctx.inplace else torch.empty_like(logits)
        grad = ctx.backend.vocabulary_gradient(logits, labels, ctx.ignore_index, statistics, grad_ce, grad_entropy, out)
        return grad, None, None, None, None


def softmax_entropy(logits: Tensor, *, backend: Backend | None = None) -> Tensor:
    """Shannon entropy of the softmax of each row.

    Args:
        logits: (N, V) of any floating dtype and row stride. A logit of -inf has probability 0 and contributes 0.
        backend: "torch" or "reference"; None takes `backend_for(logits)`.

    Returns:
        (N,) nats in fp32 (fp64 for fp64 logits), differentiable.

    Raises:
        TypeError: logits are not floating point.
        ValueError: logits are not (N, V), or the backend does not exist.
    """
    check_logits(logits)
    forms = closed_form(backend, logits)
    if forms is None:
        return reference.softmax_entropy(logits)
    return VocabularyFunction.apply(logits, None, 0, False, forms)[1]


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
            through the same graph then raises a RuntimeError. `reference` has no in-place form and ignores it.
        backend: "torch" or "reference"; None takes `backend_for(logits)`.

    Returns:
        `(ce, entropy)`, each (N,) nats in fp32 (fp64 for fp64 logits), both differentiable.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or device is wrong, a label is out of range, or the backend does not exist.
    """
    check_logits(logits)
    check_labels(labels, logits, ignore_index)
    forms = closed_form(backend, logits)
    if forms is None:
        return reference.cross_entropy_with_entropy(logits, labels, ignore_index)
    return VocabularyFunction.apply(logits, labels, ignore_index, inplace_backward, forms)
