"""The sum of both means, and what each row is worth to it: one program, as it reads a few numbers a row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tabom_kernels.torch_backend import RankLoss, WeightedLoss
from tabom_kernels.triton_backend.launch import SUM_BLOCK, SUM_WARPS, on_its_device, options


@triton.jit
def not_zero(count):
    return tl.where(count == 0.0, 1.0, count)


@triton.jit
def weighted_loss_kernel(
    cross_entropy,  # (N,)
    labels,  # (N,)
    token_weights,  # (N,) or None
    num_tokens,  # () or None
    rank_loss,  # (B,) or None without ranking, as all that follow down to num_sequences
    pairs,  # (B,)
    rank_grad_entropy,  # (N,)
    rank_grad_temperature,  # (B,)
    rank_weight,  # ()
    num_sequences,  # () or None
    loss,  # (), as the three that follow
    ce_mean,
    rank_mean,
    grad_temperature,
    grad_ce,  # (N,)
    grad_entropy,  # (N,) or None
    label_stride,
    weight_stride,
    rows,
    sequences,
    ignore_index,
    BLOCK: tl.constexpr,
):
    ce_sum = tl.zeros([BLOCK], tl.float32)
    used_rows = tl.zeros([BLOCK], tl.int32)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK).to(tl.int64)
        used = (row < rows) & (tl.load(labels + row * label_stride, row < rows, other=ignore_index) != ignore_index)
        weight = used.to(tl.float32)
        if token_weights is not None:
            weight = tl.load(token_weights + row * weight_stride, used, other=0.0).to(tl.float32)
        ce_sum += weight * tl.load(cross_entropy + row, used, other=0.0)
        used_rows += used.to(tl.int32)
    tokens = tl.sum(used_rows).to(tl.float32) if num_tokens is None else tl.load(num_tokens).to(tl.float32)
    tokens = not_zero(tokens)
    ce = tl.sum(ce_sum) / tokens
    whole = ce
    rank = 0.0
    by_temperature = 0.0
    factor = 0.0
    if rank_loss is not None:
        rank_sum = tl.zeros([BLOCK], tl.float32)
        temperature_sum = tl.zeros([BLOCK], tl.float32)
        with_pairs = tl.zeros([BLOCK], tl.int32)
        for first in range(0, sequences, BLOCK):
            sequence = first + tl.arange(0, BLOCK)
            rank_sum += tl.load(rank_loss + sequence, sequence < sequences, other=0.0)
            temperature_sum += tl.load(rank_grad_temperature + sequence, sequence < sequences, other=0.0)
            with_pairs += (tl.load(pairs + sequence, sequence < sequences, other=0) > 0).to(tl.int32)
        number = tl.sum(with_pairs).to(tl.float32) if num_sequences is None else tl.load(num_sequences).to(tl.float32)
        number = not_zero(number)
        rank = tl.sum(rank_sum) / number
        whole += tl.load(rank_weight) * rank
        factor = tl.load(rank_weight) / number
        by_temperature = tl.sum(temperature_sum) * factor
    tl.store(loss, whole)
    tl.store(ce_mean, ce)
    tl.store(rank_mean, rank)
    tl.store(grad_temperature, by_temperature)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK).to(tl.int64)
        used = (row < rows) & (tl.load(labels + row * label_stride, row < rows, other=ignore_index) != ignore_index)
        weight = used.to(tl.float32)
        if token_weights is not None:
            weight = tl.load(token_weights + row * weight_stride, used, other=0.0).to(tl.float32)
        tl.store(grad_ce + row, weight / tokens, row < rows)
        if rank_loss is not None:
            by_entropy = tl.load(rank_grad_entropy + row, row < rows, other=0.0) * factor
            tl.store(grad_entropy + row, by_entropy, row < rows)


@on_its_device
def weighted_loss(
    cross_entropy: Tensor,
    labels: Tensor,
    ignore_index: int,
    token_weights: Tensor | None,
    num_tokens: Tensor | None,
    rank: RankLoss | None,
    rank_weight: Tensor | None,
    num_sequences: Tensor | None,
) -> WeightedLoss:
    """Both means and their sum; see `torch_backend.weighted_loss`."""
    scalars = [cross_entropy.new_empty(()) for _ in range(4)]
    grad_ce = torch.empty_like(cross_entropy)
    grad_entropy = None if rank is None else torch.empty_like(cross_entropy)
    weighted_loss_kernel[(1,)](
        cross_entropy,
        labels,
        token_weights,
        num_tokens,
        *((None,) * 4 if rank is None else rank),
        rank_weight,
        num_sequences,
        *scalars,
        grad_ce,
        grad_entropy,
        labels.stride(0),
        0 if token_weights is None else token_weights.stride(0),
        cross_entropy.shape[0],
        0 if rank is None else rank.loss.shape[0],
        ignore_index,
        BLOCK=SUM_BLOCK,
        **options(SUM_WARPS),
    )
    return WeightedLoss(*scalars[:3], grad_ce, grad_entropy, scalars[3])
