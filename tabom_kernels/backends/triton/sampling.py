"""What a sampler step needs of each row, from one read of the logits: token, probability, margin, entropy.

Beside the statistics of a chunk, its program finds the best token and the second best logit. Above temperature 0 it
also writes the weight of each segment of 256 columns. The second launch draws a segment and then a column of that
segment, as `reference.draw` says. The noise depends on the row's key alone, and one segment is read again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tabom_kernels import noise
from tabom_kernels.backends.triton.arithmetic import LN2, LOG2E, LOWEST, exp2, expm1, load_logits, log1p
from tabom_kernels.backends.triton.filters import filter_thresholds
from tabom_kernels.backends.triton.launch import (
    CHUNK_WARPS,
    DRAW_WARPS,
    MERGE_WARPS,
    on_its_device,
    options,
    power_of_2,
)
from tabom_kernels.backends.triton.statistics import (
    by_lane,
    chunking,
    columns_of_runs,
    load_lane,
    merge_chunks,
    sums_by_lane,
    without_the_best,
)

GOLDEN_GAMMA = tl.constexpr(noise.GOLDEN_GAMMA % 2**64)
MIX_1 = tl.constexpr(noise.MIX_1 % 2**64)
MIX_2 = tl.constexpr(noise.MIX_2 % 2**64)


@triton.jit
def exponential_noise(key, counter):
    """The same numbers as `tabom_kernels.noise.exponential_noise`."""
    x = key.to(tl.uint64, bitcast=True) + (counter + 1).to(tl.int64).to(tl.uint64, bitcast=True) * GOLDEN_GAMMA
    x = (x ^ (x >> 30)) * MIX_1
    x = (x ^ (x >> 27)) * MIX_2
    bits = (x ^ (x >> 31)).to(tl.int64, bitcast=True)
    distance = ((bits ^ (bits >> 63)).to(tl.float32) + 0.5) * 2.0**-64
    return tl.where(bits < 0, -log1p(-distance), -tl.log(distance))


@triton.jit
def unmask_kernel(
    logits,  # (N, V)
    partials,  # (N, 3, CHUNKS) m, S', U
    seconds,  # (N, CHUNKS) second best logit
    best_columns,  # (N, CHUNKS)
    weights,  # (N, SEGMENTS) sum of exp((z - m of the chunk) / temperature), or None: greedy
    thresholds,  # (N,) lowest logit that is kept, or None
    scale,  # log2 e / temperature
    row_stride,
    column_stride,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
    RUN: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    row = (tl.program_id(0) // CHUNKS).to(tl.int64)
    chunk = tl.program_id(0) % CHUNKS
    row_start = logits + tl.multiple_of(row * row_stride, ALIGNMENT)
    first = chunk * CHUNK
    column = columns_of_runs(RUN, CHUNK)
    z = load_logits(row_start + first.to(tl.int64) * column_stride, column, column_stride, column < COLUMNS - first)
    best_of_run = by_lane(tl.max(z, 1), LANES)
    best_of_lane = tl.max(best_of_run, 0)
    m = tl.max(best_of_lane)
    # The lane of the first run that holds the maximum.
    STEPS: tl.constexpr = CHUNK // (LANES * RUN)
    lane = tl.arange(0, LANES)
    run = LANES * tl.arange(0, STEPS)[:, None] + lane[None, :]
    winner = tl.min(tl.min(tl.where(best_of_run == m, run, LANES * STEPS - 1), 0)) % LANES
    w, column_of_w = load_lane(row_start, chunk, winner, column_stride, COLUMNS, CHUNK, LANES, RUN)
    S_of_lane, U_of_lane = sums_by_lane(z, m, LANES, ALIGNMENT, True)
    sum_without_max, U = without_the_best(S_of_lane, U_of_lane, w, w == m, m, winner, LANES)
    token = tl.min(tl.where(w == m, column_of_w, COLUMNS))
    others = tl.maximum(
        tl.where(column_of_w == token, -float("inf"), w), tl.where(lane == winner, -float("inf"), best_of_lane)
    )
    partial = partials + row * 3 * CHUNKS + chunk
    tl.store(partial, m)
    tl.store(partial + CHUNKS, sum_without_max)
    tl.store(partial + 2 * CHUNKS, U)
    tl.store(seconds + row * CHUNKS + chunk, tl.max(others))
    tl.store(best_columns + row * CHUNKS + chunk, token)

    if weights is not None:
        weight = exp2((z - tl.maximum(m, LOWEST)) * scale)
        if thresholds is not None:
            weight = tl.where(z >= tl.load(thresholds + row), weight, 0.0)
        RUNS: tl.constexpr = min(SEGMENT // RUN, LANES)  # of a segment, neighbouring lanes of one step
        of_segment = tl.sum(tl.reshape(tl.sum(weight, 1), [CHUNK // RUN // RUNS, RUNS]), 1)
        segment = chunk * (CHUNK // RUN // RUNS) + tl.arange(0, CHUNK // RUN // RUNS)
        tl.store(weights + row * SEGMENTS + segment, of_segment, segment < SEGMENTS)


@triton.jit
def first_arrival(times):
    """The index of the smallest time.

    NaN counts as infinity: comparisons with it are false both ways, so threads could end up with different indices.
    """
    return tl.argmin(tl.where(times == times, times, float("inf")), 0)


@triton.jit
def choose_kernel(
    logits,
    partials,
    seconds,
    best_columns,
    weights,
    thresholds,
    keys,  # (N,) or None: greedy
    token,
    probability,
    margin,
    entropy,
    scale,
    row_stride,
    column_stride,
    key_stride,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_CEILING: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SEGMENTS_CEILING: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_start = logits + row * row_stride
    m, sum_without_max, U, first = merge_chunks(partials, row, CHUNKS, CHUNKS_CEILING)
    chunk = tl.arange(0, CHUNKS_CEILING)
    inside = chunk < CHUNKS
    m_chunk = tl.load(partials + row * 3 * CHUNKS + chunk, inside, other=-float("inf"))
    second = tl.load(seconds + row * CHUNKS + chunk, inside, other=-float("inf"))
    second = tl.max(tl.where(chunk == first, second, m_chunk))
    if keys is None:
        chosen = tl.load(best_columns + row * CHUNKS + tl.minimum(first, CHUNKS - 1))
    else:
        # As `reference.draw` does: a segment, and then a column of it.
        highest = tl.maximum(m, LOWEST)
        key = tl.load(keys + row * key_stride)
        segment = tl.arange(0, SEGMENTS_CEILING)
        m_chunk = tl.load(partials + row * 3 * CHUNKS + segment * SEGMENT // CHUNK, segment < SEGMENTS, other=LOWEST)
        weight = tl.load(weights + row * SEGMENTS + segment, segment < SEGMENTS, other=0.0)
        weight *= exp2((tl.maximum(m_chunk, LOWEST) - highest) * scale)
        segment = first_arrival(exponential_noise(key, -segment) / weight)
        column = segment * SEGMENT + tl.arange(0, SEGMENT)
        z = load_logits(row_start, column, column_stride, column < COLUMNS)
        weight = exp2((z - highest) * scale)
        if thresholds is not None:
            weight = tl.where(z >= tl.load(thresholds + row), weight, 0.0)
        chosen = segment * SEGMENT + first_arrival(exponential_noise(key, column + 1) / weight)
    chosen = tl.minimum(chosen, COLUMNS - 1).to(tl.int64)  # a row of NaN has no best token, but needs a valid one
    z = tl.load(row_start + chosen * column_stride).to(tl.float32)
    tl.store(token + row, chosen)
    tl.store(probability + row, tl.exp(z - m) / (1.0 + sum_without_max))
    tl.store(margin + row, -expm1(second - m) / (1.0 + sum_without_max))
    tl.store(entropy + row, log1p(sum_without_max) - LN2 * U / (1.0 + sum_without_max))


@on_its_device
def unmask_statistics(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, keys: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token, probability, margin and entropy, each (N,); see `backends.torch.sampling`."""
    rows, columns = logits.shape
    token = logits.new_empty(rows, dtype=torch.int64)
    probability, margin, entropy = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    if rows == 0:
        return token, probability, margin, entropy
    blocks = chunking(logits)
    chunks, segments = blocks["CHUNKS"], triton.cdiv(columns, noise.SEGMENT)
    weights = thresholds = None
    if keys is not None:
        weights = logits.new_empty((rows, segments), dtype=torch.float32)
        thresholds = filter_thresholds(logits, temperature, top_k, top_p)
    scale = 0.0 if keys is None else LOG2E.value / temperature
    partials = logits.new_empty((rows, 3, chunks), dtype=torch.float32)
    seconds = logits.new_empty((rows, chunks), dtype=torch.float32)
    best_columns = logits.new_empty((rows, chunks), dtype=torch.int32)
    drawn_from = (partials, seconds, best_columns, weights, thresholds)
    sizes = {"SEGMENT": noise.SEGMENT, "SEGMENTS": segments}
    unmask_kernel[(rows * chunks,)](
        logits, *drawn_from, scale, *logits.stride(), **blocks, **sizes, **options(CHUNK_WARPS)
    )
    choose_kernel[(rows,)](
        logits,
        *drawn_from,
        keys,
        token,
        probability,
        margin,
        entropy,
        scale,
        *logits.stride(),
        0 if keys is None else keys.stride(0),
        COLUMNS=columns,
        CHUNK=blocks["CHUNK"],
        CHUNKS=chunks,
        CHUNKS_CEILING=power_of_2(chunks),
        SEGMENTS_CEILING=power_of_2(segments),
        **sizes,
        **options(MERGE_WARPS if keys is None else DRAW_WARPS),
    )
    return token, probability, margin, entropy
