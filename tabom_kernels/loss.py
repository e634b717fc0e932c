"""The TABOM loss: cross-entropy in the window plus the rank loss."""

from typing import NamedTuple

import torch
from torch import Tensor

from tabom_kernels.backends import Backend, resolve
from tabom_kernels.checks import check_denominators, check_form, check_logits, check_sequences, check_token_weights
from tabom_kernels.derivatives import refuse_forward_mode
from tabom_kernels.ranking import Form, rank_loss_and_pairs
from tabom_kernels.vocabulary import cross_entropy_with_entropy


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
    check_sequences(steps, cu_seqlens, logits.shape[0], logits.device)
    check_form(form, margin, temperature)
    check_denominators(rank_weight, num_tokens, num_sequences)
    check_token_weights(token_weights, logits.shape[0], logits.device)
    backend = resolve(backend, logits)
    refuse_forward_mode(backend, logits, temperature)
    ce, entropy = cross_entropy_with_entropy(
        logits, labels, ignore_index=ignore_index, inplace_backward=inplace_backward, backend=backend
    )
    if token_weights is not None:
        ce = ce * token_weights.to(ce.dtype)
    if num_tokens is None:
        num_tokens = (labels != ignore_index).sum()
    cross_entropy = ce.sum() / denominator(num_tokens)
    if rank_weight == 0:
        return TabomLoss(cross_entropy, cross_entropy.detach(), torch.zeros_like(cross_entropy).detach())

    losses, pairs = rank_loss_and_pairs(entropy, steps, cu_seqlens, form, margin, temperature, backend)
    if num_sequences is None:
        num_sequences = (pairs > 0).sum()
    rank = losses.sum() / denominator(num_sequences)
    return TabomLoss(cross_entropy + rank_weight * rank, cross_entropy.detach(), rank.detach())


def denominator(count: float | Tensor) -> float | Tensor:
    """What to divide a sum by that is 0 when `count` is 0."""
    return count.masked_fill(count == 0, 1) if isinstance(count, Tensor) else count or 1
