"""Cross-entropy and entropy of each row, from one read of the logits.

A row of logits z is cut into chunks. A program holds one chunk in registers, so its exact maximum m is known before
the first exponential. It works in base 2, on t = z * log2 e - c with c = fp32(m * log2 e): one fused multiply-add a
logit. That is exact but for the rounding of c, which is the same number for every logit, `residual`. The program writes
m,

    S' = sum of 2^t without the largest logit        U = sum 2^t * t        (both as if residual were 0).

A second, tiny launch merges the chunks of each row, always in the same order: with d = (m_chunk - m) * log2 e, r = 2^d,

    S' = sum r * (1 + S'_chunk) - 1        U = sum r * (U_chunk + d * (1 + S'_chunk))
    E = log1p(S') - log 2 * U / (1 + S')        ce = log1p(S') - (z_label - m)

The 1 of the largest logit is left out of S' and not subtracted, because 1 + 1e-12 is 1 in fp32, and a sampler has to
order rows that are as certain as that. A chunk leaves it out only where its largest logit has more than half of the
chunk's mass. Elsewhere S' = S - 1 loses nothing, and the chunk takes one sweep. That sweep does not clamp logits of
-inf, whose 0 * -inf makes U NaN; then the chunk is computed again, from the cache, with the clamp.

Logits that are scaled or soft-capped are changed in registers as they are read, and are never written. Both changes
rise with the logit, so the largest logit is known before.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tabom_kernels.backends.results import LogitTransform, VocabularyStatistics
from tabom_kernels.backends.triton.arithmetic import (
    LN2,
    LOG2E,
    LOWEST,
    LOWEST_BITS,
    ORDINARY,
    PADDING,
    base_of,
    bits,
    exp2,
    load_logits,
    log1p,
    rounded_product,
    sum_both,
    transformed,
    widen,
)
from tabom_kernels.backends.triton.launch import (
    CHUNK_LANES,
    CHUNK_WARPS,
    MERGE_WARPS,
    alignment,
    chunk_columns,
    on_its_device,
    options,
    power_of_2,
)


@triton.jit
def columns_of_runs(RUN: tl.constexpr, CHUNK: tl.constexpr):
    """(CHUNK // RUN, RUN) columns of a chunk, counted from its first; a thread loads a run at once."""
    return RUN * tl.arange(0, CHUNK // RUN)[:, None] + tl.arange(0, RUN)[None, :]


@triton.jit
def by_lane(of_run, LANES: tl.constexpr):
    """(steps, LANES) values of the runs of a chunk; a thread loads a lane, one run a step."""
    return tl.reshape(of_run, [of_run.shape[0] // LANES, LANES])


@triton.jit
def load_lane(
    row_start,
    chunk,
    winner,
    column_stride,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
    RUN: tl.constexpr,
):
    """(LANES,) logits of one lane of a chunk, one for each thread, and their columns."""
    lane = tl.arange(0, LANES)
    column = chunk * CHUNK + RUN * winner + lane // RUN * (LANES * RUN) + lane % RUN
    return load_logits(row_start, column, column_stride, (lane < CHUNK // LANES) & (column < COLUMNS)), column


@triton.jit
def sums_by_lane(z, m, LANES: tl.constexpr, ALIGNMENT: tl.constexpr, CLAMPED: tl.constexpr):
    """(LANES,) sums of p = 2^t and of p * t over logits z with the maximum m; logits of -inf need CLAMPED.

    Where a thread may hold a single logit of a run, because the run is unaligned or has no second one, threads add each
    other's p * t to their own, and the product is rounded before that. A fused multiply-add would leave a thread's own
    product exact and not the others', so each thread would hold a different sum.
    """
    scale, c, _ = base_of(m)
    t = bits(z, scale, c) if CLAMPED else tl.fma(z, scale, -c)
    p = exp2(t)
    S, U = sum_both(p, p * t if ALIGNMENT > 1 and z.shape[1] > 1 else rounded_product(p, t), 1)
    return sum_both(by_lane(S, LANES), by_lane(U, LANES), 0)


@triton.jit
def without_the_best(S, U, w, is_best, m, winner, LANES: tl.constexpr):
    """S' and U of a chunk from its sums by lane; the lane `winner` has the logits w and holds the maximum m.

    The sums of the other lanes are added up, and that lane is added without its best.
    """
    scale, c, residual = base_of(m)
    is_winner = tl.arange(0, LANES) == winner
    t = bits(w, scale, c)
    p = tl.where(is_best, 0.0, exp2(t))
    S, U = sum_both(tl.where(is_winner, 0.0, S) + p, tl.where(is_winner, 0.0, U) + p * t, 0)
    ties = tl.sum(is_best.to(tl.int32)) - 1
    shrink = exp2(-residual)
    return S * shrink + ties, (U - residual * S) * shrink


@triton.jit
def sweep(
    pointers,
    inside,
    padding,
    logit_scale,
    softcap,
    LANES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    CLAMPED: tl.constexpr,
):
    """The largest logit of each lane and of the chunk as read, the largest transformed logit m, and `sums_by_lane`."""
    z = widen(tl.load(pointers, inside, other=padding))
    best_of_lane = tl.max(by_lane(tl.max(z, 1), LANES), 0)
    best = tl.max(best_of_lane)
    m = transformed(best, logit_scale, softcap)
    if logit_scale is not None:
        z = tl.where(inside, transformed(z, logit_scale, softcap), padding)
    S, U = sums_by_lane(z, m, LANES, ALIGNMENT, CLAMPED)
    return best_of_lane, best, m, S, U


@triton.jit
def statistics_kernel(
    logits,  # (N, V)
    partials,  # (N, 3, CHUNKS) m, S', U
    logit_scale,  # or None, as softcap
    softcap,
    row_stride,
    column_stride,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
    RUN: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    row = (tl.program_id(0) // CHUNKS).to(tl.int64)
    chunk = tl.program_id(0) % CHUNKS
    row_start = logits + tl.multiple_of(row * row_stride, ALIGNMENT)
    first = chunk * CHUNK
    column = columns_of_runs(RUN, CHUNK)
    inside = column < COLUMNS - first
    places = row_start + first.to(tl.int64) * column_stride + column.to(tl.int64) * column_stride
    transform = logit_scale, softcap
    best_of_lane, best, m, S_of_lane, U_of_lane = sweep(places, inside, PADDING, *transform, LANES, ALIGNMENT, False)
    S, U = sum_both(S_of_lane, U_of_lane, 0)
    _, _, residual = base_of(m)
    shrink = exp2(-residual)
    sum_without_max = S * shrink - 1.0
    is_special = (tl.maximum(tl.abs(best), tl.abs(m)) > ORDINARY) | (U != U)
    U = (U - residual * S) * shrink
    if is_special | (S < 2.0):
        if is_special:
            lowest = -float("inf")
            best_of_lane, best, m, S_of_lane, U_of_lane = sweep(
                places, inside, lowest, *transform, LANES, ALIGNMENT, True
            )
        winner = tl.min(tl.where(best_of_lane == best, tl.arange(0, LANES), LANES - 1))
        w, column_of_w = load_lane(row_start, chunk, winner, column_stride, COLUMNS, CHUNK, LANES, RUN)
        is_best = w == best
        if logit_scale is not None:
            w_is_inside = (tl.arange(0, LANES) < CHUNK // LANES) & (column_of_w < COLUMNS)
            w = tl.where(w_is_inside, transformed(w, logit_scale, softcap), -float("inf"))
            is_best = is_best & w_is_inside  # where all are -inf, padding is as good
        sum_without_max, U = without_the_best(S_of_lane, U_of_lane, w, is_best, m, winner, LANES)
    partial = partials + row * 3 * CHUNKS + chunk
    tl.store(partial, m)
    tl.store(partial + CHUNKS, sum_without_max)
    tl.store(partial + 2 * CHUNKS, U)


@triton.jit
def merge_chunks(partials, row, CHUNKS: tl.constexpr, CHUNKS_CEILING: tl.constexpr):
    """(m, S', U) of a whole row from those of its chunks, and the first chunk that holds m."""
    chunk = tl.arange(0, CHUNKS_CEILING)
    partial = partials + row * 3 * CHUNKS + chunk
    m_chunk = tl.load(partial, chunk < CHUNKS, other=-float("inf"))
    sum_without_max = tl.load(partial + CHUNKS, chunk < CHUNKS, other=0.0)
    U = tl.load(partial + 2 * CHUNKS, chunk < CHUNKS, other=0.0)
    m = tl.max(m_chunk)
    first = tl.min(tl.where(m_chunk == m, chunk, CHUNKS_CEILING))
    d = tl.maximum((m_chunk - m) * LOG2E, LOWEST_BITS, propagate_nan=tl.PropagateNan.ALL)
    r = exp2(d)
    # A row of -inf alone has no softmax, nor has one with inf.
    sum_of_row = tl.where(
        tl.abs(m) <= -LOWEST,
        tl.sum(tl.where(chunk == first, sum_without_max, r * (1.0 + sum_without_max))),
        float("nan"),
    )
    # Products are rounded before threads add them up, as in `sums_by_lane`.
    return m, sum_of_row, tl.sum(rounded_product(r, U + d * (1.0 + sum_without_max))), first


@triton.jit
def merge_kernel(
    logits,
    labels,  # (N,) or None
    partials,
    cross_entropy,  # (N,) or None
    entropy,
    maximum,
    log_sum,
    logit_scale,
    softcap,
    row_stride,
    column_stride,
    label_stride,
    ignore_index,
    COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_CEILING: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    m, sum_without_max, U, _ = merge_chunks(partials, row, CHUNKS, CHUNKS_CEILING)
    log_S = log1p(sum_without_max)
    tl.store(maximum + row, m)
    tl.store(log_sum + row, log_S)
    tl.store(entropy + row, log_S - LN2 * U / (1.0 + sum_without_max))
    if labels is not None:
        label = tl.load(labels + row * label_stride)
        used = label != ignore_index
        # A label that is no column gives NaN, and reads nothing.
        inside = used & (label >= 0) & (label < COLUMNS)
        z = tl.load(logits + row * row_stride + label * column_stride, inside, other=float("nan")).to(tl.float32)
        z = transformed(z, logit_scale, softcap)
        tl.store(cross_entropy + row, tl.where(used, log_S - (z - m), 0.0))


@on_its_device
def vocabulary_statistics(
    logits: Tensor, labels: Tensor | None, ignore_index: int, transform: LogitTransform | None = None
) -> VocabularyStatistics:
    """Reads (N, V) logits once; see `backends.torch.statistics`."""
    rows, blocks = logits.shape[0], chunking(logits)
    chunks = blocks["CHUNKS"]
    entropy, maximum, log_sum = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    ce = None if labels is None else torch.empty_like(entropy)
    statistics = VocabularyStatistics(ce, entropy, maximum, log_sum)
    if rows == 0:
        return statistics
    partials = logits.new_empty((rows, 3, chunks), dtype=torch.float32)
    transform = transform or (None, None)
    statistics_kernel[(rows * chunks,)](
        logits, partials, *transform, *logits.stride(), **blocks, **options(CHUNK_WARPS)
    )
    merge_kernel[(rows,)](
        logits,
        labels,
        partials,
        *statistics,
        *transform,
        *logits.stride(),
        0 if labels is None else labels.stride(0),
        ignore_index,
        COLUMNS=blocks["COLUMNS"],
        CHUNKS=chunks,
        CHUNKS_CEILING=power_of_2(chunks),
        **options(MERGE_WARPS),
    )
    return statistics


def chunking(logits: Tensor) -> dict[str, int]:
    """The constants of a launch with one program for each chunk."""
    return chunks_of(logits.shape[1], logits.itemsize) | {"ALIGNMENT": alignment(logits)}


@cache
def chunks_of(columns: int, itemsize: int) -> dict[str, int]:
    """How a row of `columns` logits is cut into chunks."""
    chunk = chunk_columns(columns, itemsize)
    lanes = min(CHUNK_LANES, chunk)
    return {
        "COLUMNS": columns,
        "CHUNK": chunk,
        "CHUNKS": triton.cdiv(columns, chunk),
        "LANES": lanes,
        "RUN": min(16 // itemsize, chunk // lanes),
    }
