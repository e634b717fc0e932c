"""The loss of a linear head and all of its gradients, computed in forward, a chunk of rows at a time.

For each chunk of whole sequences:

    logits = hidden @ weight.T -> statistics -> row loss, dL/dce, dL/dE -> dL/dlogits, over the logits -> dL/dhidden

so the gradients are finished before the next chunk begins: two matmuls with a frozen head and three with a trained one,
and nothing is computed twice. A sequence whose rows are coupled and that is longer than a chunk is the exception: its
pieces are computed twice, first for the statistics of all of its rows and then for the gradients.

The gradient of a trained head is a sum over the chunks. In half precision it is summed in fp32, which takes three times
the memory of the gradient while backward converts it. One chunk needs no sum of its own, because a matmul adds up in
fp32 anyway.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tabom_kernels.backends.reference import working_dtype
from tabom_kernels.backends.results import LogitTransform, VocabularyStatistics
from tabom_kernels.ops.chunks import even_slices, plan_chunks, take_rows
from tabom_kernels.ops.derivatives import refuse_second_derivatives
from tabom_kernels.ops.row_loss import IGNORE_INDEX, RowLoss

PRODUCT_TILE = 2048
"""Rows and columns of a half-precision matrix that a CPU converts to fp32 at once."""

SCALED_ROWS = 4096
"""Rows of a gradient that backward scales at once."""

FP16_SCALE = 256
"""The largest gradient factor of a row in fp16. Small probabilities need more room below it than large ones above."""


class HeadLoss(NamedTuple):
    """The loss (), its terms (k,), cross-entropies and entropies (N,), and the gradients, empty if not needed."""

    loss: Tensor
    terms: Tensor
    cross_entropy: Tensor
    entropy: Tensor
    grad_hidden: Tensor
    grad_weight: Tensor
    grad_bias: Tensor
    grad_temperature: Tensor


def loss_of_head(
    backend: ModuleType,
    row_loss: RowLoss,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lengths: Sequence[int] | None,
    transform: Sequence[float],
    max_chunk_rows: int,
    fp32_logits: bool,
    needs_grad: Sequence[bool],
) -> HeadLoss:
    """The row loss of the logits of a linear head, and its gradients.

    Args:
        backend: the module of a backend, see `backends.selection.load`.
        labels: (N,), IGNORE_INDEX for a row without a cross-entropy.
        lengths: rows of each sequence, if the host knows them.
        transform: the logit scale and the soft-cap, as far as there are any.
        needs_grad: whether hidden, weight and bias need a gradient.
    """
    transform = LogitTransform(*transform) if transform else None
    gradients = HeadGradients(hidden, weight, bias, max_chunk_rows, needs_grad)
    terms, cross_entropies, entropies, by_temperature = [], [], [], []
    with torch.autocast(hidden.device.type, enabled=False):
        for chunk in plan_chunks(row_loss.cu_seqlens, hidden.shape[0], max_chunk_rows, lengths):
            pieces, statistics = even_slices(chunk.rows, max_chunk_rows), []
            for rows in pieces:
                logits = None  # frees the memory before the next logits are made
                logits = project(take_rows(hidden, rows), weight, bias, fp32_logits)
                statistics.append(
                    backend.vocabulary_statistics(logits, take_rows(labels, rows), IGNORE_INDEX, transform)
                )
            cross_entropy, entropy = (joined([part[i] for part in statistics]) for i in range(2))
            result = row_loss(chunk, cross_entropy, entropy)
            terms.append(result.terms)
            cross_entropies.append(cross_entropy)
            entropies.append(entropy)
            if result.temperature is not None:
                by_temperature.append(result.temperature)
            if not any(needs_grad):
                continue
            start = chunk.rows.start
            for rows, saved in zip(reversed(pieces), reversed(statistics), strict=True):
                inside = slice(rows.start - start, rows.stop - start)
                factors = [None if x is None else take_rows(x, inside) for x in (result.cross_entropy, result.entropy)]
                if logits is None:  # only the logits of the last piece are still there
                    logits = project(take_rows(hidden, rows), weight, bias, fp32_logits)
                gradients.add(backend, rows, logits, take_rows(labels, rows), saved, *factors, transform)
                logits = None
    terms = added(terms)
    return HeadLoss(
        terms.sum(),
        terms,
        joined(cross_entropies),
        joined(entropies),
        gradients.hidden,
        gradients.weight,
        gradients.bias,
        added(by_temperature) if by_temperature else terms.new_zeros(()),
    )


def joined(parts: list[Tensor]) -> Tensor:
    """The parts one after the other."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def added(parts: list[Tensor]) -> Tensor:
    """The sum of the parts."""
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def scaled_for_fp16(grad_ce: Tensor, grad_entropy: Tensor | None) -> tuple[list[Tensor | None], Tensor]:
    """Divides both gradients of a row by a scale (n,), which lets dlogits fill the range of fp16 without overflow.

    Without it a mean over many tokens makes small probabilities 0 in fp16, before a gradient scaler can multiply the
    loss. An entropy's gradient is multiplied by p * (log p + E), which is below 4.
    """
    scale = grad_ce.abs() if grad_entropy is None else torch.maximum(grad_ce.abs(), 4 * grad_entropy.abs())
    scale = (scale / FP16_SCALE).masked_fill(scale == 0, 1.0)
    return [None if x is None else x / scale for x in (grad_ce, grad_entropy)], scale


class HeadGradients:
    """Sums the gradients by hidden (N, D), weight (V, D) and bias (V,) over the chunks."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, max_chunk_rows: int, needs_grad: Sequence[bool]
    ) -> None:
        self.inputs, self.needs_grad, self.beta = (hidden, weight), needs_grad, 0
        self.hidden, self.weight, self.bias = empty_gradients(hidden, weight, max_chunk_rows, needs_grad)

    def add(
        self,
        backend: ModuleType,
        rows: slice,
        logits: Tensor,
        labels: Tensor,
        statistics: VocabularyStatistics,
        grad_ce: Tensor | None,
        grad_entropy: Tensor | None,
        transform: LogitTransform | None,
    ) -> None:
        """Adds the part of some rows, and writes dL/dlogits over their logits (n, V).

        Args:
            labels, grad_ce, grad_entropy: (n,) of these rows, as are the statistics.
        """
        hidden, weight = self.inputs
        scale = None
        if hidden.dtype == torch.float16:
            (grad_ce, grad_entropy), scale = scaled_for_fp16(grad_ce, grad_entropy)
        backend.vocabulary_gradient(
            logits, labels, IGNORE_INDEX, statistics, grad_ce, grad_entropy, logits, None, transform
        )
        dlogits = logits
        if self.needs_grad[0]:
            add_product(take_rows(self.hidden, rows), dlogits.to(hidden.dtype), weight, 0)
            if scale is not None:
                self.hidden[rows] *= scale[:, None]
        if scale is not None and any(self.needs_grad[1:]):
            dlogits = dlogits * scale[:, None]  # in fp32, as fp16 may hold neither the gradients nor their sums
        if self.needs_grad[2]:
            self.bias += dlogits.sum(0, dtype=self.bias.dtype)
        if self.needs_grad[1]:
            factor = take_rows(hidden, rows)
            factor = factor if scale is None else factor.to(dlogits.dtype)
            add_product(self.weight, dlogits.to(factor.dtype).T, factor, self.beta)
            self.beta = 1  # the first product overwrites the memory


def empty_gradients(
    hidden: Tensor, weight: Tensor, max_chunk_rows: int, needs_grad: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the gradients by hidden, weight and bias (zeros); without elements for those that are not needed.

    Sums over chunks are kept in fp32 until backward, and so is all in fp16, whose range ends at 65504.
    """
    dtype, is_fp16 = working_dtype(hidden.dtype), hidden.dtype == torch.float16
    hidden_dtype = dtype if is_fp16 else hidden.dtype
    # The number of rows is compared last, because torch.export would fix a number that it has compared.
    is_summed_in_fp32 = is_fp16 or (hidden.itemsize == 2 and hidden.shape[0] > max_chunk_rows)
    weight_dtype = dtype if is_summed_in_fp32 else weight.dtype
    return (
        hidden.new_empty(hidden.shape if needs_grad[0] else 0, dtype=hidden_dtype),
        weight.new_empty(weight.shape if needs_grad[1] else 0, dtype=weight_dtype),
        hidden.new_zeros(weight.shape[0] if needs_grad[2] else 0, dtype=dtype),
    )


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, fp32_logits: bool) -> Tensor:
    """(n, V) logits, in the dtype of `hidden` or in fp32."""
    dtype = working_dtype(hidden.dtype)
    if not fp32_logits or hidden.dtype == dtype:
        return F.linear(hidden, weight, bias)
    logits = hidden.new_empty((hidden.shape[0], weight.shape[0]), dtype=dtype)
    add_product(logits.T, weight, hidden.T, beta=0)
    return logits if bias is None else logits.add_(bias)


def add_product(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """total = beta * total + a @ b, summed in the dtype of `total`; a and b may be in half precision.

    A CPU has no half-precision matmul with fp32 sums, so there tiles of a and b are converted.
    """
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=beta)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:
        for rows in even_slices(slice(0, a.shape[0]), PRODUCT_TILE):
            for terms in even_slices(slice(0, a.shape[1]), PRODUCT_TILE):
                tile = a[rows, terms].to(total.dtype)
                total[rows].addmm_(tile, b[terms].to(total.dtype), beta=beta if terms.start == 0 else 1)


def save_gradients(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[4:])
    ctx.dtype, ctx.arguments = inputs[0].dtype, len(inputs)


def scale_gradients(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple:
    refuse_second_derivatives()
    gradients: list[Tensor | None] = [None] * ctx.arguments
    if grad_loss is not None:
        *by_head, by_temperature = ctx.saved_tensors
        for i, gradient in enumerate(by_head):
            if ctx.needs_input_grad[i]:
                gradients[i] = scaled(gradient, grad_loss, ctx.dtype)
        if ctx.needs_input_grad[3]:
            gradients[3] = by_temperature * grad_loss
    return tuple(gradients)


def scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * scale in `dtype`, written over the gradient if this backward frees the graph that saved it.

    The gradient is multiplied a slice at a time, because half precision is converted to fp32 for it and the whole
    gradient may be as large as the head. The scale gets a dimension, because PyTorch rounds a factor without one to
    half precision.
    """
    if type(gradient) is not Tensor:
        return (gradient * scale[None]).to(dtype)  # under torch.compile, which fuses this
    is_last_use = not torch._C._autograd._get_current_graph_task_keep_graph()
    target = gradient if is_last_use and gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    if target is gradient and scale.is_cpu and scale.item() == 1:
        return gradient
    slices = (x.split(SCALED_ROWS) for x in (gradient, scale.expand(gradient.shape), target))
    for part, factor, scaled_part in zip(*slices, strict=True):
        torch.mul(part, factor, out=scaled_part)
    return target
