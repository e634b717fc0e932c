"""The TABOM loss of logits: cross-entropy in the supervised window plus the rank loss."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tabom_kernels.arguments import check_logits, check_overlap
from tabom_kernels.backends import reference
from tabom_kernels.backends.selection import Backend, load, resolve
from tabom_kernels.ops.chunks import Chunk
from tabom_kernels.ops.derivatives import differentiable, refuse_forward_mode, refuse_second_derivatives
from tabom_kernels.ops.ranking import Form
from tabom_kernels.ops.row_loss import IGNORE_INDEX, ROW_LOSSES, TabomArguments, nonzero, row_loss_inputs
from tabom_kernels.ops.statistics import logits_gradient


class TabomLoss(NamedTuple):
    """Scalars, nats: `loss = cross_entropy + rank_weight * rank`; the last two are detached, for logs."""

    loss: Tensor
    cross_entropy: Tensor
    rank: Tensor

    @classmethod
    def of(cls, loss: Tensor, terms: Tensor, rank_weight: float) -> "TabomLoss":
        """From the loss and its terms, the cross-entropy and, with a ranking, the weighted rank loss."""
        cross_entropy = terms[0]
        return cls(loss, cross_entropy, terms[1] / rank_weight if rank_weight else torch.zeros_like(cross_entropy))


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
    sequence_weights: Tensor | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    backend: Backend | None = None,
) -> TabomLoss:
    """CE + `rank_weight` * rank (arXiv 2605.11854), as means over the global batch.

    CE is sum(token_weights * ce) / num_tokens, rank is sum(sequence_weights * `trajectory_rank_loss`) / num_sequences,
    over the sequences. Given both denominators of the global batch, the losses of its micro-batches add up to its loss.

    Args:
        logits: (N, V) of any floating dtype.
        labels: (N,) int64, `ignore_index` = no cross-entropy on this row.
        steps: (N,) int32 or int64, -1 = no ranking on this row.
        cu_seqlens: (B + 1,) int32 row offsets of the sequences.
        form, margin, temperature: of the rank loss, see `trajectory_rank_loss`.
        token_weights: (N,) floating point, scales each row's cross-entropy (NELBO's 1/t).
        num_tokens: denominator of CE, tokens; default: the rows with a label.
        num_sequences: denominator of rank, sequences; default: those with an ordered pair.
        sequence_weights: (B,) floating point, scales each sequence's rank loss (1 / blocks of a response, where a
            sequence is a block); default: 1.
        inplace_backward: backward writes the gradient over the logits, see `cross_entropy_with_entropy`.
        backend: "triton", "torch" or "reference"; None takes `backend_for(logits)`.

    Returns:
        fp32 scalars (fp64 for fp64 logits). Without rows the loss is 0 with a gradient of 0.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, device or value is wrong, or the backend does not exist.
    """
    ranking = (rank_weight, form, margin, temperature)
    arguments = TabomArguments(
        labels, steps, cu_seqlens, *ranking, token_weights, num_tokens, num_sequences, ignore_index, sequence_weights
    )
    check_logits(logits)
    arguments.check(*logits.shape, logits.device)
    backend = resolve(backend, logits)
    refuse_forward_mode(backend, logits, temperature)
    if backend == "reference":
        return reference_loss(logits, arguments)
    labels, temperature, row_tensors = row_loss_inputs(arguments, logits, backend)
    loss, terms = loss_of_logits(logits, temperature, labels, f"tabom_{form}", row_tensors, inplace_backward, backend)
    return TabomLoss.of(loss, terms, rank_weight)


@torch.library.custom_op("tabom_kernels::loss_of_logits", mutates_args=())
def loss_of_logits_op(
    logits: Tensor,
    temperature: Tensor,
    labels: Tensor,
    row_loss: str,
    row_tensors: Sequence[Tensor],
    inplace_backward: bool,
    backend_name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The row loss of that name and its terms; entropy, maximum, log_sum, dce, dE (N,) and dtemperature for backward.

    dE has no elements where it is zero.
    """
    if inplace_backward:
        check_overlap(logits)
    backend = load(backend_name)
    function = ROW_LOSSES[row_loss](backend, temperature, *row_tensors)
    statistics = backend.vocabulary_statistics(logits, labels, IGNORE_INDEX)
    sequences = 0 if function.cu_seqlens is None else function.cu_seqlens.shape[0] - 1
    result = function(Chunk(slice(0, sequences), slice(0, logits.shape[0])), *statistics[:2])
    grad_ce = result.cross_entropy.clone()  # an output of an op must not be a view of an input
    grad_entropy = grad_ce.new_empty(0) if result.entropy is None else result.entropy
    loss = result.terms.sum()
    grad_temperature = torch.zeros_like(loss) if result.temperature is None else result.temperature
    return loss, result.terms, *statistics[1:], grad_ce, grad_entropy, grad_temperature


@loss_of_logits_op.register_fake
def _(
    logits: Tensor, temperature: Tensor, labels: Tensor, row_loss: str, row_tensors: Sequence[Tensor], *_: Any
) -> tuple[Tensor, ...]:
    dtype, function = reference.working_dtype(logits.dtype), ROW_LOSSES[row_loss](None, temperature, *row_tensors)
    loss, grad_temperature = (logits.new_empty((), dtype=dtype) for _ in range(2))
    rows = [logits.new_empty(logits.shape[0], dtype=dtype) for _ in range(4)]
    grad_entropy = logits.new_empty(0 if function.cu_seqlens is None else logits.shape[0], dtype=dtype)
    return loss, loss.new_empty(function.number_of_terms), *rows, grad_entropy, grad_temperature


def save_for_gradient(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    logits, _, labels, _, _, ctx.inplace, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, *output[2:])


def loss_backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple:
    refuse_second_derivatives()
    by_logits = by_temperature = None
    if grad_loss is not None:
        logits, labels, *statistics, grad_ce, grad_entropy, grad_temperature = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            row_grads = (grad_ce, grad_entropy if grad_entropy.numel() == grad_ce.numel() else None, grad_loss)
            by_logits = logits_gradient(ctx.inplace, logits, labels, IGNORE_INDEX, *statistics, *row_grads, ctx.backend)
        if ctx.needs_input_grad[1]:
            by_temperature = grad_temperature * grad_loss
    return by_logits, by_temperature, None, None, None, None, None


loss_of_logits = differentiable(loss_of_logits_op, save_for_gradient, loss_backward, results=2)


def reference_loss(logits: Tensor, arguments: TabomArguments) -> TabomLoss:
    """The loss of the same arguments in naive PyTorch, under autograd."""
    ce, entropy = reference.cross_entropy_with_entropy(logits, arguments.labels, arguments.ignore_index)
    cross_entropy, rank = (arguments.token_shares(ce.dtype) * ce).sum(), rank_term(arguments, entropy)
    return TabomLoss(cross_entropy + arguments.rank_weight * rank, cross_entropy.detach(), rank.detach())


def rank_term(arguments: TabomArguments, entropy: Tensor) -> Tensor:
    """The mean rank loss of the sequences, under autograd; 0 if its weight is 0."""
    _, steps, cu_seqlens, rank_weight, form, margin, temperature, _, _, sequences, _, sequence_weights = arguments
    if rank_weight == 0:
        return torch.zeros_like(entropy.sum().detach())
    losses = reference.trajectory_rank_loss(entropy, steps, cu_seqlens, form, margin, temperature)
    if sequences is None:
        sequences = (reference.count_ordered_pairs(steps, cu_seqlens) > 0).sum()
    if sequence_weights is not None:
        losses = losses * sequence_weights.to(losses.dtype)
    return losses.sum() / nonzero(sequences)
