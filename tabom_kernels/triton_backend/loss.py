"""The sum of both means, and what each row is worth to it: one program, as it reads a few numbers a row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tabom_kernels.torch_backend import WeightedLoss
from tabom_kernels.triton_backend.launch import (
    SUM_BLOCK,
    SUM_SEQUENCES,
    SUM_WARPS,
    on_its_device,
    options,
    power_of_2,
    setting,
)
from tabom_kernels.triton_backend.ranking import means_of, number, row_sums, store_entropy_gradients


@triton.jit
def not_zero(count):
    return tl.where(count == 0.0, 1.0, count)


@triton.jit
def load_weights(labels, token_weights, row, rows, label_stride, weight_stride, ignore_index):
    """Of each row, and whether it has a label."""
    used = (row < rows) & (tl.load(labels + row * label_stride, row < rows, other=ignore_index) != ignore_index)
    weight = used.to(tl.float32)
    if token_weights is not None:
        weight = tl.load(token_weights + row * weight_stride, used, other=0.0).to(tl.float32)
    return weight, used


@triton.jit
def weighted_loss_kernel(
    cross_entropy,  # (N,)
    labels,  # (N,)
    token_weights,  # (N,) or None
    num_tokens,  # a number, () in memory, or None
    steps,  # (N,) or None without ranking, as all that follow down to num_sequences
    cu_seqlens,  # (B + 1,)
    row_loss,  # (TILES, N), as the three that follow
    row_pairs,
    row_grad_entropy,
    row_grad_temperature,
    rank_weight,  # a number, or () in memory
    num_sequences,  # the same, or None
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
    PER_ROW: tl.constexpr,
    TILES: tl.constexpr,
    SEQUENCES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ce_sum = tl.zeros([BLOCK], tl.float32)
    used_rows = tl.zeros([BLOCK], tl.int32)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK).to(tl.int64)
        weight, used = load_weights(labels, token_weights, row, rows, label_stride, weight_stride, ignore_index)
        ce_sum += weight * tl.load(cross_entropy + row, used, other=0.0)
        used_rows += used.to(tl.int32)
    tokens = tl.sum(used_rows).to(tl.float32) if num_tokens is None else number(num_tokens)
    tokens = not_zero(tokens)
    ce = tl.sum(ce_sum) / tokens
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK).to(tl.int64)
        weight, _ = load_weights(labels, token_weights, row, rows, label_stride, weight_stride, ignore_index)
        tl.store(grad_ce + row, weight / tokens, row < rows)
    whole = ce
    rank = 0.0
    by_temperature = 0.0
    if steps is not None:
        AT_ONCE: tl.constexpr = BLOCK // SEQUENCES
        sums = row_loss, row_pairs, row_grad_temperature
        rank_sum = tl.zeros([SEQUENCES], tl.float32)
        temperature_sum = tl.zeros([SEQUENCES], tl.float32)
        with_pairs = tl.zeros([SEQUENCES], tl.int32)
        for first in range(0, sequences, SEQUENCES):
            sequence = first + tl.arange(0, SEQUENCES)
            mean, pairs, by_tau, _ = means_of(
                sequence, steps, cu_seqlens, *sums, rows, sequences, PER_ROW, TILES, AT_ONCE
            )
            rank_sum += mean
            temperature_sum += by_tau
            with_pairs += (pairs > 0).to(tl.int32)
        divisor = tl.sum(with_pairs).to(tl.float32) if num_sequences is None else number(num_sequences)
        divisor = not_zero(divisor)
        factor = number(rank_weight) / divisor
        rank = tl.sum(rank_sum) / divisor
        whole += number(rank_weight) * rank
        by_temperature = tl.sum(temperature_sum) * factor
        for first in range(0, sequences, SEQUENCES):
            sequence = first + tl.arange(0, SEQUENCES)
            _, pairs, _, scale = means_of(sequence, steps, cu_seqlens, *sums, rows, sequences, PER_ROW, TILES, AT_ONCE)
            place = sequence, cu_seqlens, pairs, scale * factor
            store_entropy_gradients(grad_entropy, row_grad_entropy, *place, rows, sequences, TILES, AT_ONCE)
    tl.store(loss, whole)
    tl.store(ce_mean, ce)
    tl.store(rank_mean, rank)
    tl.store(grad_temperature, by_temperature)


@on_its_device
def weighted_loss(
    cross_entropy: Tensor,
    entropy: Tensor,
    labels: Tensor,
    ignore_index: int,
    token_weights: Tensor | None,
    num_tokens: float | Tensor | None,
    steps: Tensor,
    cu_seqlens: Tensor,
    form: str,
    margin: float | Tensor,
    temperature: float | Tensor,
    rank_weight: float | Tensor | None,
    num_sequences: float | Tensor | None,
) -> WeightedLoss:
    """Both means and their sum; see `torch_backend.weighted_loss`."""
    sequences = cu_seqlens.shape[0] - 1
    scalars = [cross_entropy.new_empty(()) for _ in range(4)]
    grad_ce = torch.empty_like(cross_entropy)
    grad_entropy, ranking, tiles = None, (None,) * 6, 1
    if rank_weight is not None:
        steps, cu_seqlens = steps.contiguous(), cu_seqlens.contiguous()
        sums = row_sums(entropy, steps, cu_seqlens, form, margin, temperature)
        grad_entropy, ranking, tiles = torch.empty_like(entropy), (steps, cu_seqlens, *sums), sums.loss.shape[0]
    weighted_loss_kernel[(1,)](
        cross_entropy,
        labels,
        token_weights,
        setting(num_tokens),
        *ranking,
        setting(rank_weight),
        setting(num_sequences),
        *scalars,
        grad_ce,
        grad_entropy,
        labels.stride(0),
        0 if token_weights is None else token_weights.stride(0),
        cross_entropy.shape[0],
        sequences,
        ignore_index,
        PER_ROW=form == "plackett_luce",
        TILES=tiles,
        SEQUENCES=min(SUM_SEQUENCES, power_of_2(max(sequences, 1))),
        BLOCK=SUM_BLOCK,
        **options(SUM_WARPS),
    )
    return WeightedLoss(*scalars[:3], grad_ce, grad_entropy, scalars[3])
