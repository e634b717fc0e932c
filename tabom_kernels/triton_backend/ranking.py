"""The rank loss and its gradient: each row looks at every other row of its sequence.

A pair enters the gradient of both of its rows, and each of them adds it up for itself, so nothing is added atomically
and the result is bitwise reproducible. Memory is linear in the rows. One launch gives sums over the pairs of each row
(loss, dE, dtau, their number); in a large batch several programs share a row, so that none waits for all rows of a long
sequence. A second launch adds up and divides by the number of pairs of the sequence. Plackett-Luce has a launch more:
the turns of all rows must be known before the first gradient.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tabom_kernels.torch_backend import RankLoss
from tabom_kernels.triton_backend.launch import PAIR_BLOCK, PAIR_WARPS, on_its_device, options, pair_tiles, setting

INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def interpreted_number(x):
    return x if isinstance(x, float) else tl.load(x)


@triton.jit
def number_on_gpu(x):
    """A setting: an argument of the launch, or in memory."""
    if x.dtype.is_ptr():
        return tl.load(x)
    else:  # to the compiler there is one return, of the branch that it takes
        return x


number = interpreted_number if INTERPRETED else number_on_gpu


@triton.jit
def partners_of(row, step, cu_seqlens, sequences, BLOCK: tl.constexpr):
    """First row and end of the sequence that owns `row`, or an empty range for a row that is not ranked."""
    ended = tl.zeros([BLOCK], tl.int32)
    for first in range(0, sequences, BLOCK):
        index = first + tl.arange(0, BLOCK)
        ended += (tl.load(cu_seqlens + 1 + index, index < sequences, other=2**31 - 1) <= row).to(tl.int32)
    owner = tl.sum(ended)
    begin = tl.load(cu_seqlens + owner)
    return begin, tl.where(step >= 0, tl.load(cu_seqlens + owner + 1), begin)


@triton.jit
def softplus_and_sigmoid(x):
    """log(1 + exp(x)) and its slope, both accurate at either end."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / (u - 1.0)))  # Kahan's: exact in the rounding of u
    return tl.maximum(x, 0.0) + log1p, tl.where(x >= 0.0, 1.0, e) / u


@triton.jit
def pairs_kernel(
    entropy,  # (N,)
    steps,  # (N,)
    cu_seqlens,  # (B + 1,)
    temperature,  # a number, or () in memory
    margin,  # the same
    loss_sum,  # (TILES, N) over the pairs in which a row comes first
    pairs,  # (TILES, N) number of them
    grad_entropy,  # (TILES, N) over all pairs of a row
    grad_temperature,  # (TILES, N)
    rows,
    sequences,
    HINGE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    tile = tl.program_id(1)
    e = tl.load(entropy + row)
    step = tl.load(steps + row)
    begin, end = partners_of(row, step, cu_seqlens, sequences, BLOCK)
    inverse_tau = 1.0 / number(temperature)
    least_lead = number(margin)
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    by_entropy = tl.zeros([BLOCK], tl.float32)
    by_temperature = tl.zeros([BLOCK], tl.float32)
    for first in range(begin + tile * BLOCK, end, TILES * BLOCK):
        other = first + tl.arange(0, BLOCK)
        other_step = tl.load(steps + other, other < end, other=-1)
        other_e = tl.load(entropy + other, other_step >= 0, other=0.0)  # an unranked row may hold NaN
        comes_first = step < other_step
        comes_second = (other_step >= 0) & (other_step < step)
        x = tl.where(comes_first, e - other_e, other_e - e) + least_lead
        if HINGE:
            loss = tl.maximum(x, 0.0)
            slope = (x > 0.0).to(tl.float32)
        else:
            loss, slope = softplus_and_sigmoid(x * inverse_tau)
            by_temperature += tl.where(comes_first, slope * x, 0.0)
        total += tl.where(comes_first, loss, 0.0)
        count += comes_first.to(tl.int32)
        by_entropy += tl.where(comes_first, slope, 0.0) - tl.where(comes_second, slope, 0.0)
    scale = 1.0 if HINGE else inverse_tau
    place = tile.to(tl.int64) * rows + row
    tl.store(loss_sum + place, tl.sum(total))
    tl.store(pairs + place, tl.sum(count))
    tl.store(grad_entropy + place, tl.sum(by_entropy) * scale)
    tl.store(grad_temperature + place, -tl.sum(by_temperature) * scale * scale)


@triton.jit
def turns_kernel(
    entropy,
    steps,
    cu_seqlens,
    temperature,
    lowest,  # (N,) min E_j over the rows j that could have had row i's turn
    log_sum,  # (N,) log sum exp((min E - E_j) / tau) over them
    loss,  # (N,)
    pairs,
    grad_temperature,
    sequences,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    step = tl.load(steps + row)
    begin, end = partners_of(row, step, cu_seqlens, sequences, BLOCK)
    inverse_tau = 1.0 / number(temperature)
    low = tl.full([BLOCK], float("inf"), tl.float32)
    for first in range(begin, end, BLOCK):
        other = first + tl.arange(0, BLOCK)
        other_step = tl.load(steps + other, other < end, other=-1)
        low = tl.minimum(low, tl.load(entropy + other, step <= other_step, other=float("inf")))
    m = tl.min(low)
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    # Entropies enter as their distance to the lowest: over a small tau they are too large for fp32.
    for first in range(begin, end, BLOCK):
        other = first + tl.arange(0, BLOCK)
        other_step = tl.load(steps + other, other < end, other=-1)
        at_risk = step <= other_step
        distance = tl.load(entropy + other, at_risk, other=0.0) - m
        p = tl.where(at_risk, tl.exp(-distance * inverse_tau), 0.0)
        total += p
        weighted += tl.where(at_risk, p * distance, 0.0)
        count += (step < other_step).to(tl.int32)
    S = tl.sum(total)
    own = tl.load(entropy + row) - m
    tl.store(lowest + row, m)
    tl.store(log_sum + row, tl.log(S))
    tl.store(loss + row, tl.where(step >= 0, own * inverse_tau + tl.log(S), 0.0))
    tl.store(pairs + row, tl.sum(count))
    by_temperature = (tl.sum(weighted) / S - own) * inverse_tau * inverse_tau
    tl.store(grad_temperature + row, tl.where(step >= 0, by_temperature, 0.0))


@triton.jit
def turns_gradient_kernel(
    entropy,
    steps,
    cu_seqlens,
    temperature,
    lowest,
    log_sum,
    grad_entropy,
    sequences,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    e = tl.load(entropy + row)
    step = tl.load(steps + row)
    begin, end = partners_of(row, step, cu_seqlens, sequences, BLOCK)
    inverse_tau = 1.0 / number(temperature)
    probability = tl.zeros([BLOCK], tl.float32)
    for first in range(begin, end, BLOCK):
        other = first + tl.arange(0, BLOCK)
        other_step = tl.load(steps + other, other < end, other=-1)
        had_a_turn = (other_step >= 0) & (other_step <= step)
        m = tl.load(lowest + other, had_a_turn, other=0.0)
        turn = tl.load(log_sum + other, had_a_turn, other=0.0)
        probability += tl.where(had_a_turn, tl.exp((m - e) * inverse_tau - turn), 0.0)
    # 1 for the row's own turn, less its probability at every turn that it could have had.
    tl.store(grad_entropy + row, tl.where(step >= 0, (1.0 - tl.sum(probability)) * inverse_tau, 0.0))


@triton.jit
def means_of(
    sequence,
    steps,
    cu_seqlens,
    row_loss,  # (TILES, N) sums to be added and divided, as the two that follow
    row_pairs,
    row_grad_temperature,
    rows,
    sequences,
    PER_ROW: tl.constexpr,  # a mean over ranked rows, not over pairs
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of each `sequence`: its loss, number of pairs, gradient by tau, and the factor of its rows' sums."""
    inside = sequence < sequences
    begin = tl.load(cu_seqlens + sequence, inside, other=0)
    end = tl.load(cu_seqlens + sequence + 1, inside, other=0)
    total = tl.zeros([sequence.shape[0], BLOCK], tl.float32)
    by_temperature = tl.zeros([sequence.shape[0], BLOCK], tl.float32)
    pair_count = tl.zeros([sequence.shape[0], BLOCK], tl.int64)
    row_count = tl.zeros([sequence.shape[0], BLOCK], tl.int64)
    for first in range(0, tl.max(end - begin), BLOCK):
        row = begin[:, None].to(tl.int64) + first + tl.arange(0, BLOCK)[None, :]
        is_row = row < end[:, None]
        row_count += (tl.load(steps + row, is_row, other=-1) >= 0).to(tl.int64)
        for tile in tl.static_range(TILES):
            place = row + tile * rows
            total += tl.load(row_loss + place, is_row, other=0.0)
            by_temperature += tl.load(row_grad_temperature + place, is_row, other=0.0)
            pair_count += tl.load(row_pairs + place, is_row, other=0)
    pairs = tl.sum(pair_count, 1)
    terms = tl.sum(row_count, 1) if PER_ROW else pairs
    scale = 1.0 / tl.maximum(terms, 1).to(tl.float32)
    # Without a pair all is 0, even if an entropy is NaN.
    loss = tl.where(pairs > 0, tl.sum(total, 1) * scale, 0.0)
    return loss, pairs, tl.where(pairs > 0, tl.sum(by_temperature, 1) * scale, 0.0), scale


@triton.jit
def store_entropy_gradients(
    grad_entropy,  # (N,)
    row_grad_entropy,  # (TILES, N)
    sequence,
    cu_seqlens,
    pairs,  # of each `sequence`, as scale
    scale,
    rows,
    sequences,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    begin = tl.load(cu_seqlens + sequence, sequence < sequences, other=0)
    end = tl.load(cu_seqlens + sequence + 1, sequence < sequences, other=0)
    for first in range(0, tl.max(end - begin), BLOCK):
        row = begin[:, None].to(tl.int64) + first + tl.arange(0, BLOCK)[None, :]
        is_row = row < end[:, None]
        by_entropy = tl.zeros([sequence.shape[0], BLOCK], tl.float32)
        for tile in tl.static_range(TILES):
            by_entropy += tl.load(row_grad_entropy + row + tile * rows, is_row, other=0.0)
        tl.store(grad_entropy + row, tl.where(pairs[:, None] > 0, by_entropy * scale[:, None], 0.0), is_row)


@triton.jit
def means_kernel(
    steps,
    cu_seqlens,
    row_loss,  # (TILES, N), as the three that follow
    row_pairs,
    row_grad_entropy,
    row_grad_temperature,
    loss,  # (B,)
    pairs,  # (B,)
    grad_entropy,  # (N,)
    grad_temperature,  # (B,)
    rows,
    sequences,
    PER_ROW: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0) + tl.arange(0, 1)
    sums = row_loss, row_pairs, row_grad_temperature
    mean, count, by_temperature, scale = means_of(
        sequence, steps, cu_seqlens, *sums, rows, sequences, PER_ROW, TILES, BLOCK
    )
    tl.store(loss + sequence, mean)
    tl.store(pairs + sequence, count)
    tl.store(grad_temperature + sequence, by_temperature)
    store_entropy_gradients(
        grad_entropy, row_grad_entropy, sequence, cu_seqlens, count, scale, rows, sequences, TILES, BLOCK
    )


class RowSums(NamedTuple):
    """(TILES, N) sums over the pairs of each row, by the programs that share it: a mean's numerators."""

    loss: Tensor
    pairs: Tensor
    grad_entropy: Tensor
    grad_temperature: Tensor


def row_sums(
    entropy: Tensor, steps: Tensor, cu_seqlens: Tensor, form: str, margin: float | Tensor, temperature: float | Tensor
) -> RowSums:
    """One launch, or two; every argument that has rows is contiguous."""
    rows, sequences = entropy.shape[0], cu_seqlens.shape[0] - 1
    tiles = 1 if form == "plackett_luce" else pair_tiles(rows)
    loss, grad_entropy, grad_temperature = (entropy.new_empty(tiles, rows) for _ in range(3))
    sums = RowSums(loss, entropy.new_empty((tiles, rows), dtype=torch.int32), grad_entropy, grad_temperature)
    inputs = (entropy, steps, cu_seqlens, setting(temperature))
    launch = {"BLOCK": PAIR_BLOCK, **options(PAIR_WARPS)}
    if rows and form == "plackett_luce":
        lowest, log_sum = (entropy.new_empty(rows) for _ in range(2))
        turns_kernel[(rows,)](*inputs, lowest, log_sum, loss, sums.pairs, grad_temperature, sequences, **launch)
        turns_gradient_kernel[(rows,)](*inputs, lowest, log_sum, grad_entropy, sequences, **launch)
    elif rows:
        pairs_kernel[(rows, tiles)](
            *inputs, setting(margin), *sums, rows, sequences, HINGE=form == "hinge", TILES=tiles, **launch
        )
    return sums


@on_its_device
def trajectory_rank_loss(
    entropy: Tensor, steps: Tensor, cu_seqlens: Tensor, form: str, margin: float | Tensor, temperature: float | Tensor
) -> RankLoss:
    """Loss and gradients over all pairs; see `torch_backend.trajectory_rank_loss`."""
    rows, sequences = entropy.shape[0], cu_seqlens.shape[0] - 1
    entropy, steps, cu_seqlens = entropy.contiguous(), steps.contiguous(), cu_seqlens.contiguous()
    sums = row_sums(entropy, steps, cu_seqlens, form, margin, temperature)
    loss, grad_temperature = (entropy.new_empty(sequences) for _ in range(2))
    pairs = torch.empty(sequences, dtype=torch.int64, device=entropy.device)
    means = RankLoss(loss, pairs, entropy.new_empty(rows), grad_temperature)
    if sequences:
        means_kernel[(sequences,)](
            steps,
            cu_seqlens,
            *sums,
            *means,
            rows,
            sequences,
            PER_ROW=form == "plackett_luce",
            TILES=sums.loss.shape[0],
            BLOCK=PAIR_BLOCK,
            **options(PAIR_WARPS),
        )
    return means


def count_ordered_pairs(steps: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(B,) int64: what the rank loss counts by the way."""
    entropy = torch.zeros(steps.shape[0], device=steps.device)
    one = entropy.new_ones(())
    return trajectory_rank_loss(entropy, steps, cu_seqlens, "hinge", one, one).pairs
