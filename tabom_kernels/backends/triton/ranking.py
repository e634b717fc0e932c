"""The rank loss and its gradient: one program compares a row with every other row of its sequence.

A pair enters the gradient of both of its rows, and the program of each row computes the pair for itself. So there are
no atomic additions, results are bitwise reproducible, and memory is linear in the rows. The first launch sums over the
pairs of each row (loss, dE, dtau, number of pairs). In a large batch several programs share a row, so that no program
compares all rows of a long sequence. The second launch adds the sums of each sequence and divides them by its number of
pairs.

In Plackett-Luce each ranked row has one turn, in which it was chosen among its risk set, the rows of its step and of
later steps. This form takes one launch more, because a row's gradient needs the normalizers of all turns.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tabom_kernels.backends.results import RankLoss
from tabom_kernels.backends.triton.launch import PAIR_BLOCK, PAIR_WARPS, on_its_device, options, pair_tiles


def setting(value: float | Tensor) -> float | Tensor:
    """A setting as a kernel takes it: a float if the host knows it, else a tensor, which the kernel reads.

    Integers become floats, because Triton specializes integer arguments and would recompile.
    """
    if isinstance(value, Tensor):
        return value.item() if value.is_cpu else value
    return float(value)


@triton.jit
def number(x):
    """The value of a setting, which is an argument of the launch or is in memory."""
    if x.dtype.is_ptr():
        return tl.load(x)
    else:  # Triton compiles one of the two branches, so the types of the returned values may differ
        return x


@triton.jit
def partners_of(row, step, cu_seqlens, sequences, BLOCK: tl.constexpr):
    """First row and end of the sequence of `row`; an empty range for a row that is not ranked."""
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
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / (u - 1.0)))  # Kahan's quotient corrects the rounding of u
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
    margin_nats = number(margin)
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    by_entropy = tl.zeros([BLOCK], tl.float32)
    by_temperature = tl.zeros([BLOCK], tl.float32)
    for first in range(begin + tile * BLOCK, end, TILES * BLOCK):
        other = first + tl.arange(0, BLOCK)
        other_step = tl.load(steps + other, other < end, other=-1)
        other_e = tl.load(entropy + other, other_step >= 0, other=0.0)  # the entropy of an unranked row may be NaN
        comes_first = step < other_step
        comes_second = (other_step >= 0) & (other_step < step)
        x = tl.where(comes_first, e - other_e, other_e - e) + margin_nats
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
    lowest,  # (N,) min E_j over the risk set of a row
    log_sum,  # (N,) log sum exp((min E - E_j) / tau) over the same rows
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
    # Entropies enter as their distance to the lowest one; divided by a small tau they would be too large for fp32.
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
    # The gradient is 1 for the row's own turn, minus its probability at each turn for which it was in the risk set.
    tl.store(grad_entropy + row, tl.where(step >= 0, (1.0 - tl.sum(probability)) * inverse_tau, 0.0))


@triton.jit
def means_kernel(
    steps,
    cu_seqlens,
    row_loss,  # (TILES, N) sums of each row, like the three arguments that follow
    row_pairs,
    row_grad_entropy,
    row_grad_temperature,
    loss,  # (B,)
    pairs,  # (B,)
    grad_entropy,  # (N,)
    grad_temperature,  # (B,)
    rows,
    PER_ROW: tl.constexpr,  # a mean over ranked rows, not over pairs
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0)
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    by_temperature = tl.zeros([BLOCK], tl.float32)
    pair_count = tl.zeros([BLOCK], tl.int64)
    row_count = tl.zeros([BLOCK], tl.int64)
    for first in range(begin, end, BLOCK):
        row = first + tl.arange(0, BLOCK)
        row_count += (tl.load(steps + row, row < end, other=-1) >= 0).to(tl.int64)
        for tile in tl.static_range(TILES):
            place = row + tile * rows
            total += tl.load(row_loss + place, row < end, other=0.0)
            by_temperature += tl.load(row_grad_temperature + place, row < end, other=0.0)
            pair_count += tl.load(row_pairs + place, row < end, other=0)
    count = tl.sum(pair_count)
    terms = tl.sum(row_count) if PER_ROW else count
    # Without a pair the loss and its gradients are 0, even if an entropy is NaN.
    has_pair = count > 0
    scale = 1.0 / tl.maximum(terms, 1).to(tl.float32)
    tl.store(loss + sequence, tl.where(has_pair, tl.sum(total) * scale, 0.0))
    tl.store(pairs + sequence, count)
    tl.store(grad_temperature + sequence, tl.where(has_pair, tl.sum(by_temperature) * scale, 0.0))
    for first in range(begin, end, BLOCK):
        row = first + tl.arange(0, BLOCK)
        by_entropy = tl.zeros([BLOCK], tl.float32)
        for tile in tl.static_range(TILES):
            by_entropy += tl.load(row_grad_entropy + row + tile * rows, row < end, other=0.0)
        tl.store(grad_entropy + row, tl.where(has_pair, by_entropy * scale, 0.0), row < end)


class RowSums(NamedTuple):
    """(TILES, N) sums over the pairs of each row; each of the TILES programs that share a row writes one."""

    loss: Tensor
    pairs: Tensor
    grad_entropy: Tensor
    grad_temperature: Tensor


def row_sums(
    entropy: Tensor, steps: Tensor, cu_seqlens: Tensor, form: str, margin: float | Tensor, temperature: float | Tensor
) -> RowSums:
    """Sums over the pairs of each row, by one or two launches; tensors must be contiguous."""
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
    """Loss and gradients over all pairs; see `backends.torch.ranking`."""
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
            PER_ROW=form == "plackett_luce",
            TILES=sums.loss.shape[0],
            BLOCK=PAIR_BLOCK,
            **options(PAIR_WARPS),
        )
    return means


def count_ordered_pairs(steps: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(B,) int64, as the rank loss counts them."""
    entropy = torch.zeros(steps.shape[0], device=steps.device)
    one = entropy.new_ones(())
    return trajectory_rank_loss(entropy, steps, cu_seqlens, "hinge", one, one).pairs
