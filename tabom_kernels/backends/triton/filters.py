"""The lowest logit that top-k and top-p keep in each row, by a search and without a sort.

The search runs over the bit patterns of floating-point numbers, which are in the order of their values. Each pass tries
16 thresholds at once, over all chunks in parallel, and leaves 1/16 of the interval. The row's maximum cuts off what is
above it. That takes 3 or 4 passes in half precision and up to 8 in fp32. A search ends once a threshold keeps what it
must and no logit more, and then its other passes read nothing. Where both filters are asked for, the search of top-p
begins in what top-k keeps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tabom_kernels.backends.triton.arithmetic import LOG2E, LOWEST, exp2, load_logits, rounded_product
from tabom_kernels.backends.triton.launch import (
    FILTER_BITS,
    FILTER_WARPS,
    FILTER_WAYS,
    MERGE_WARPS,
    on_its_device,
    options,
    power_of_2,
)
from tabom_kernels.backends.triton.statistics import chunking

SUM_ERROR = tl.constexpr(2.0**-14)
"""A relative error that is far above the fp32 rounding of the sum of weights of a chunk or row."""

LARGEST = {torch.bfloat16: 0x7F7F, torch.float16: 0x7BFF, torch.float32: 0x7F7FFFFF}
"""For each dtype, the place of the largest finite number in the order of its numbers; 0 has the place 0."""

TRITON_DTYPE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def number_at(order, dtype: tl.constexpr):
    """The floating-point number at a place in their order: 0 is 0, 1 the next one above."""
    if dtype == tl.float32:
        return (order ^ ((order >> 63) & 0x7FFFFFFF)).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        return (order ^ ((order >> 63) & 0x7FFF)).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def order_of(number, dtype: tl.constexpr):
    """The place of a floating-point number in their order, the inverse of `number_at`."""
    if dtype == tl.float32:
        bits = number.to(tl.int32, bitcast=True).to(tl.int64)
        return bits ^ ((bits >> 63) & 0x7FFFFFFF)
    else:
        bits = number.to(dtype).to(tl.int16, bitcast=True).to(tl.int64)
        return bits ^ ((bits >> 63) & 0x7FFF)


@triton.jit
def at_least(z, threshold):
    """1.0 where z >= threshold, else 0.0, in one instruction; a sum of weights then takes two, not three."""
    return tl.inline_asm_elementwise(
        "set.ge.f32.f32 $0, $1, $2;", "=f,f,f", [z, threshold], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def masses_kernel(
    logits,
    intervals,  # (N, 3) places in the order of numbers: the interval's lowest, after its highest, after the row's m
    masses,  # (N, CHUNKS, WAYS) mass of the logits at or above each of WAYS thresholds, relative to the chunk's maximum
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
            # Rounded before threads add up their products, as in `sums_by_lane`.
            mass = rounded_product(mass, exp2((m_chunk - m) * scale)[:, None])
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
            # If the logits left in the interval weigh less than two of the lightest that fit in it, there is only one.
            lightest = exp2((number_at(low, dtype) - m) * scale)
            beyond = tl.sum(tl.where(way == last + 1, mass, 0.0))
            found = (mass_of_last - beyond < 1.5 * lightest) & (lightest > SUM_ERROR * mass_of_last)
        else:
            found = mass_of_last <= target
        tl.debug_barrier()  # every thread must read the interval before a thread writes over it
        tl.store(intervals + row * 3, low)
        tl.store(intervals + row * 3 + 1, tl.where(found, low + 1, tl.minimum(low + step, high)))
    tl.store(thresholds + row, number_at(low, dtype))


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
