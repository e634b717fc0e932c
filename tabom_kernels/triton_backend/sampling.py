"""What a sampler step needs of each row, from one read of the logits: token, probability, margin, entropy.

Beside the statistics of `vocabulary`, every chunk names its best token and its second best logit. Above temperature 0
it leaves the weight of each of its segments of 256 columns, and the second launch draws a segment, and then a column of
that segment, as `reference.draw` says: the noise comes from the row's key alone, and one segment is read again.

Filters add a search for the lowest logit that top-k and top-p keep, over the bit patterns of floating-point numbers,
which are in the order of their values: no sort. Each pass tries 16 thresholds at once, over all chunks in parallel, and
leaves 1/16 of the interval, of which the row's maximum cuts off what is above: 3 or 4 passes in half precision, up to 8
in fp32. A search ends, and its other passes read nothing, once a threshold keeps what it must and no logit more; where
both filters are asked for, top-p's begins in what top-k keeps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tabom_kernels import noise
from tabom_kernels.torch_backend import ceil_div
from tabom_kernels.triton_backend.launch import (
    CHUNK_WARPS,
    DRAW_WARPS,
    FILTER_BITS,
    FILTER_WARPS,
    FILTER_WAYS,
    MERGE_WARPS,
    on_its_device,
    options,
    power_of_2,
)
from tabom_kernels.triton_backend.vocabulary import (
    INTERPRETED,
    LN2,
    LOG2E,
    LOWEST,
    by_lane,
    chunking,
    columns_of_runs,
    exp2,
    expm1,
    load_lane,
    load_logits,
    log1p,
    merge_chunks,
    sums_by_lane,
    without_the_best,
)

GOLDEN_GAMMA = tl.constexpr(noise.GOLDEN_GAMMA % 2**64)
MIX_1 = tl.constexpr(noise.MIX_1 % 2**64)
MIX_2 = tl.constexpr(noise.MIX_2 % 2**64)

SUM_ERROR = tl.constexpr(2.0**-14)
"""Far above the rounding of a chunk's or row's sum of weights in fp32, relative to it."""

LARGEST = {torch.bfloat16: 0x7F7F, torch.float16: 0x7BFF, torch.float32: 0x7F7FFFFF}
"""Of each dtype, the largest finite number's place in the order of its numbers, in which 0 is at 0."""

TRITON_DTYPE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


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
    S_of_lane, U_of_lane = sums_by_lane(z, m, LANES, True)
    rest, U = without_the_best(S_of_lane, U_of_lane, w, w == m, m, winner, LANES)
    token = tl.min(tl.where(w == m, column_of_w, COLUMNS))
    others = tl.maximum(
        tl.where(column_of_w == token, -float("inf"), w), tl.where(lane == winner, -float("inf"), best_of_lane)
    )
    partial = partials + row * 3 * CHUNKS + chunk
    tl.store(partial, m)
    tl.store(partial + CHUNKS, rest)
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
def draw_token(
    row_start,
    partials,
    weights,
    thresholds,
    keys,
    row,
    m,
    scale,
    column_stride,
    key_stride,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SEGMENTS_CEILING: tl.constexpr,
):
    """The column that `reference.draw` draws."""
    m = tl.maximum(m, LOWEST)
    key = tl.load(keys + row * key_stride)
    segment = tl.arange(0, SEGMENTS_CEILING)
    m_chunk = tl.load(partials + row * 3 * CHUNKS + segment * SEGMENT // CHUNK, segment < SEGMENTS, other=LOWEST)
    weight = tl.load(weights + row * SEGMENTS + segment, segment < SEGMENTS, other=0.0)
    weight *= exp2((tl.maximum(m_chunk, LOWEST) - m) * scale)
    segment = tl.argmin(exponential_noise(key, -segment) / weight, 0)

    column = segment * SEGMENT + tl.arange(0, SEGMENT)
    z = load_logits(row_start, column, column_stride, column < COLUMNS)
    weight = exp2((z - m) * scale)
    if thresholds is not None:
        weight = tl.where(z >= tl.load(thresholds + row), weight, 0.0)
    return segment * SEGMENT + tl.argmin(exponential_noise(key, column + 1) / weight, 0)


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
    m, rest, U, first = merge_chunks(partials, row, CHUNKS, CHUNKS_CEILING)
    chunk = tl.arange(0, CHUNKS_CEILING)
    inside = chunk < CHUNKS
    m_chunk = tl.load(partials + row * 3 * CHUNKS + chunk, inside, other=-float("inf"))
    second = tl.load(seconds + row * CHUNKS + chunk, inside, other=-float("inf"))
    second = tl.max(tl.where(chunk == first, second, m_chunk))
    if keys is None:
        chosen = tl.load(best_columns + row * CHUNKS + tl.minimum(first, CHUNKS - 1))
    else:
        chosen = draw_token(
            row_start,
            partials,
            weights,
            thresholds,
            keys,
            row,
            m,
            scale,
            column_stride,
            key_stride,
            COLUMNS,
            CHUNK,
            CHUNKS,
            SEGMENT,
            SEGMENTS,
            SEGMENTS_CEILING,
        )
    chosen = tl.minimum(chosen, COLUMNS - 1).to(tl.int64)  # a row of NaN has no best token, but needs a valid one
    z = tl.load(row_start + chosen * column_stride).to(tl.float32)
    tl.store(token + row, chosen)
    tl.store(probability + row, tl.exp(z - m) / (1.0 + rest))
    tl.store(margin + row, -expm1(second - m) / (1.0 + rest))
    tl.store(entropy + row, log1p(rest) - LN2 * U / (1.0 + rest))


@triton.jit
def number_at(order, dtype: tl.constexpr):
    """The floating-point number at a place in their order: 0 is 0, 1 the next one above."""
    if dtype == tl.float32:
        return (order ^ ((order >> 63) & 0x7FFFFFFF)).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        return (order ^ ((order >> 63) & 0x7FFF)).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def order_of(number, dtype: tl.constexpr):
    """The place of a floating-point number in their order: `number_at` backwards."""
    if dtype == tl.float32:
        bits = number.to(tl.int32, bitcast=True).to(tl.int64)
        return bits ^ ((bits >> 63) & 0x7FFFFFFF)
    else:
        bits = number.to(dtype).to(tl.int16, bitcast=True).to(tl.int64)
        return bits ^ ((bits >> 63) & 0x7FFF)


@triton.jit
def at_least_on_gpu(z, threshold):
    """1.0 or 0.0 in one instruction, and a multiply-add then sums a weight: two a logit and threshold, not three."""
    return tl.inline_asm_elementwise(
        "set.ge.f32.f32 $0, $1, $2;", "=f,f,f", [z, threshold], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def interpreted_at_least(z, threshold):
    return tl.where(z >= threshold, 1.0, 0.0)


at_least = interpreted_at_least if INTERPRETED else at_least_on_gpu


@triton.jit
def masses_kernel(
    logits,
    intervals,  # (N, 3) of the threshold's place in the order of numbers: lowest, past the highest, past the row's m
    masses,  # (N, CHUNKS, WAYS) of the logits from each of WAYS thresholds on, relative to the maximum of the chunk
    maxima,  # (N, CHUNKS)
    scale,  # log2 e / temperature
    row_stride,
    column_stride,
    WEIGHTED: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    WAYS: tl.constexpr,
):
    row = (tl.program_id(0) // CHUNKS).to(tl.int64)
    chunk = tl.program_id(0) % CHUNKS
    low = tl.load(intervals + row * 3)
    high = tl.load(intervals + row * 3 + 1)
    if high - low > 1:
        step = (high - low + WAYS - 1) // WAYS
        start = logits + tl.multiple_of(row * row_stride, ALIGNMENT) + (chunk * CHUNK).to(tl.int64) * column_stride
        column = tl.arange(0, CHUNK)
        z = load_logits(start, column, column_stride, column < COLUMNS - chunk * CHUNK)
        m = tl.maximum(tl.max(z), LOWEST)
        weight = exp2((z - m) * scale) if WEIGHTED else tl.full([CHUNK], 1.0, tl.float32)
        tl.store(maxima + row * CHUNKS + chunk, m)
        for way in tl.static_range(WAYS):
            threshold = number_at(low + way * step, logits.dtype.element_ty)
            mass = tl.sum(weight * at_least(z, threshold))
            tl.store(masses + (row * CHUNKS + chunk) * WAYS + way, mass)


@triton.jit
def narrow_kernel(
    intervals,
    masses,
    maxima,
    targets,  # (N,) mass that the threshold must keep
    thresholds,  # (N,)
    scale,
    kept,  # the target, or its share of the mass of the interval where the search begins
    WEIGHTED: tl.constexpr,
    FIRST: tl.constexpr,
    dtype: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_CEILING: tl.constexpr,
    WAYS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    low = tl.load(intervals + row * 3)
    high = tl.load(intervals + row * 3 + 1)
    if high - low > 1:
        step = (high - low + WAYS - 1) // WAYS
        chunk = tl.arange(0, CHUNKS_CEILING)
        way = tl.arange(0, WAYS)
        inside = chunk < CHUNKS
        places = (row * CHUNKS + chunk[:, None]) * WAYS + way[None, :]
        mass = tl.load(masses + places, inside[:, None], other=0.0)
        m_chunk = tl.load(maxima + row * CHUNKS + chunk, inside, other=LOWEST)
        m = tl.max(m_chunk)
        if WEIGHTED:
            mass *= exp2((m_chunk - m) * scale)[:, None]
        mass = tl.sum(mass, 0)
        if FIRST:
            target = kept * tl.sum(tl.where(way == 0, mass, 0.0)) if WEIGHTED else kept
            tl.store(targets + row, target)
            past_m = order_of(m, dtype) + 1
            tl.store(intervals + row * 3 + 2, past_m)
            high = tl.minimum(high, past_m)
        else:
            target = tl.load(targets + row)
        last = tl.max(tl.where(mass >= target, way, 0))
        low += last * step
        mass_of_last = tl.sum(tl.where(way == last, mass, 0.0))
        if WEIGHTED:
            # What is left of the interval is one logit if it weighs less than two of the lightest that fit in it.
            lightest = exp2((number_at(low, dtype) - m) * scale)
            beyond = tl.sum(tl.where(way == last + 1, mass, 0.0))
            found = (mass_of_last - beyond < 1.5 * lightest) & (lightest > SUM_ERROR * mass_of_last)
        else:
            found = mass_of_last <= target
        tl.store(intervals + row * 3, low)
        tl.store(intervals + row * 3 + 1, tl.where(found, low + 1, tl.minimum(low + step, high)))
    tl.store(thresholds + row, number_at(low, dtype))


@on_its_device
def unmask_statistics(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, keys: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token, probability, margin and entropy, each (N,); see `torch_backend.unmask_statistics`."""
    rows, columns = logits.shape
    token = logits.new_empty(rows, dtype=torch.int64)
    probability, margin, entropy = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    if rows == 0:
        return token, probability, margin, entropy
    blocks = chunking(logits)
    chunks, segments = blocks["CHUNKS"], ceil_div(columns, noise.SEGMENT)
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


@on_its_device
def filter_thresholds(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor | None:
    """(N,) the lowest logit of each row that top-k, and then top-p, keeps; None when they keep all."""
    rows, blocks = logits.shape[0], chunking(logits)
    if rows == 0 or (top_k is None and top_p is None):
        return None
    chunks, largest = blocks["CHUNKS"], LARGEST[logits.dtype]
    thresholds, targets = (logits.new_empty(rows, dtype=torch.float32) for _ in range(2))
    masses = logits.new_empty((rows, chunks, FILTER_WAYS), dtype=torch.float32)
    maxima = logits.new_empty((rows, chunks), dtype=torch.float32)
    intervals = logits.new_full((rows, 3), largest + 2, dtype=torch.int64)
    intervals[:, 0] = -largest - 1
    scale = LOG2E.value / temperature
    for kept, weighted in ((top_k, False), (top_p, True)):
        if kept is None:
            continue
        intervals[:, 1] = intervals[:, 2]
        for search in range(8 * logits.itemsize // FILTER_BITS):
            masses_kernel[(rows * chunks,)](
                logits,
                intervals,
                masses,
                maxima,
                scale,
                *logits.stride(),
                WEIGHTED=weighted,
                COLUMNS=blocks["COLUMNS"],
                CHUNK=blocks["CHUNK"],
                CHUNKS=chunks,
                ALIGNMENT=blocks["ALIGNMENT"],
                WAYS=FILTER_WAYS,
                **options(FILTER_WARPS),
            )
            narrow_kernel[(rows,)](
                intervals,
                masses,
                maxima,
                targets,
                thresholds,
                scale,
                float(kept),
                WEIGHTED=weighted,
                FIRST=search == 0,
                dtype=TRITON_DTYPE[logits.dtype],
                CHUNKS=chunks,
                CHUNKS_CEILING=power_of_2(chunks),
                WAYS=FILTER_WAYS,
                **options(MERGE_WARPS),
            )
    return thresholds
