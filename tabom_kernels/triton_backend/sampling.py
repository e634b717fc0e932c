"""What a sampler step needs of each row, from one read of the logits: token, probability, margin, entropy.

Beside the statistics of `vocabulary`, every chunk names its best token and its second best logit. Above temperature 0
the best token is that of logits / temperature + Gumbel noise, and the noise of a column comes from the row's key and
the column alone. Filters add a search for the lowest logit that top-k and top-p keep, by bisection over the bit
patterns of floating-point numbers, which are in the order of their values: no sort.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tabom_kernels import noise
from tabom_kernels.triton_backend.launch import (
    CHUNK_WARPS,
    MERGE_WARPS,
    NOISE_WARPS,
    SCAN_BYTES,
    SCAN_WARPS,
    on_its_device,
)
from tabom_kernels.triton_backend.vocabulary import LOG2E, LOWEST, chunking, exp2, load_logits, merge_chunks

GOLDEN_GAMMA = tl.constexpr(noise.GOLDEN_GAMMA % 2**64)
MIX_1 = tl.constexpr(noise.MIX_1 % 2**64)
MIX_2 = tl.constexpr(noise.MIX_2 % 2**64)

LOW_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
"""Bits of an fp32 number that are 0 in each number of the dtype: the search can leave them out."""


@triton.jit
def gumbel_noise(key, column):
    """The same numbers as `tabom_kernels.noise.gumbel_noise`."""
    x = key.to(tl.uint64, bitcast=True) + (column + 1).to(tl.uint64) * GOLDEN_GAMMA
    x = (x ^ (x >> 30)) * MIX_1
    x = (x ^ (x >> 27)) * MIX_2
    x = x ^ (x >> 31)
    uniform = ((x >> 41).to(tl.int32).to(tl.float32) + 0.5) * (1.0 / (1 << 23))
    return -tl.log(-tl.log(uniform))


@triton.jit
def unmask_kernel(
    logits,  # (N, V)
    partials,  # (N, 3, CHUNKS) m, S, U
    candidates,  # (N, 2, CHUNKS) best score, second best logit
    best_columns,  # (N, CHUNKS) of the best score
    keys,  # (N,) or None: greedy
    thresholds,  # (N,) lowest logit that is kept, or None
    temperature,
    row_stride,
    column_stride,
    key_stride,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    RUN: tl.constexpr,
):
    row = (tl.program_id(0) // CHUNKS).to(tl.int64)
    chunk = tl.program_id(0) % CHUNKS
    # Neighbouring columns that one 128-bit load brings are a run; the top two are sought among the runs' maxima.
    neighbour = tl.arange(0, RUN)
    run = chunk * CHUNK + RUN * tl.arange(0, CHUNK // RUN)
    column = run[:, None] + neighbour[None, :]
    row_start = logits + tl.multiple_of(row * row_stride, ALIGNMENT)
    z = load_logits(row_start + column.to(tl.int64) * column_stride, column < COLUMNS)
    best_of_run = tl.max(z, 1)
    m = tl.max(best_of_run)
    p = exp2((z - m) * LOG2E)
    partial = partials + row * 3 * CHUNKS + chunk
    tl.store(partial, m)
    tl.store(partial + CHUNKS, tl.sum(tl.sum(p, 1)))
    tl.store(partial + 2 * CHUNKS, tl.sum(tl.sum(p * (z - m), 1)))

    # The first run that holds the maximum is read once more, from the cache.
    winner = tl.min(tl.where(best_of_run == m, run, COLUMNS))
    neighbour += winner
    w = load_logits(row_start + neighbour.to(tl.int64) * column_stride, neighbour < COLUMNS)
    token = tl.min(tl.where(w == m, neighbour, COLUMNS))
    second_of_winner = tl.max(tl.where(neighbour == token, LOWEST, w))
    second = tl.maximum(tl.max(tl.where(run == winner, LOWEST, best_of_run)), second_of_winner)
    score = m
    if keys is not None:
        if thresholds is not None:
            z = tl.where(z >= tl.load(thresholds + row), z, LOWEST)
        noisy = z / temperature + gumbel_noise(tl.load(keys + row * key_stride), column)
        score = tl.max(tl.max(noisy, 1))
        token = tl.min(tl.min(tl.where(noisy == score, column, COLUMNS), 1))
    candidate = candidates + row * 2 * CHUNKS + chunk
    tl.store(candidate, score)
    tl.store(candidate + CHUNKS, second)
    tl.store(best_columns + row * CHUNKS + chunk, token)


@triton.jit
def choose_kernel(
    logits,
    partials,
    candidates,
    best_columns,
    token,
    probability,
    margin,
    entropy,
    row_stride,
    column_stride,
    COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_CEILING: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    m, S, U = merge_chunks(partials, row, CHUNKS, CHUNKS_CEILING)
    chunk = tl.arange(0, CHUNKS_CEILING)
    inside = chunk < CHUNKS
    m_chunk = tl.load(partials + row * 3 * CHUNKS + chunk, inside, other=LOWEST)
    candidate = candidates + row * 2 * CHUNKS + chunk
    score = tl.load(candidate, inside, other=-float("inf"))
    second = tl.load(candidate + CHUNKS, inside, other=LOWEST)
    column = tl.load(best_columns + row * CHUNKS + chunk, inside, other=COLUMNS)

    chosen = tl.min(tl.where(score == tl.max(score), column, COLUMNS))
    chosen = tl.minimum(chosen, COLUMNS - 1).to(tl.int64)  # a row of NaN has no best token, but needs a valid one
    first = tl.min(tl.where(m_chunk == m, chunk, CHUNKS_CEILING))
    second = tl.max(tl.where(chunk == first, second, m_chunk))
    z = load_logits(logits + row * row_stride + chosen * column_stride, True)
    tl.store(token + row, chosen)
    tl.store(probability + row, tl.exp(z - m) / S)
    tl.store(margin + row, (1.0 - tl.exp(second - m)) / S)
    tl.store(entropy + row, tl.log(S) - U / S)


@triton.jit
def kept_mass(
    row_start,
    threshold,
    m,
    temperature,
    column_stride,
    WEIGHTED: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Number, or sum of exp((z - m) / temperature), of the logits that are at least `threshold`."""
    mass = tl.zeros([BLOCK], tl.float32)
    for first in range(0, COLUMNS, BLOCK):
        column = first + tl.arange(0, BLOCK)
        z = load_logits(row_start + column.to(tl.int64) * column_stride, column < COLUMNS)
        kept = (z >= threshold) & (column < COLUMNS)
        if WEIGHTED:
            mass += tl.where(kept, tl.exp((z - m) / temperature), 0.0)
        else:
            mass += kept.to(tl.float32)
    return tl.sum(mass)


@triton.jit
def order_of(x):
    """Integers in the order of the floating-point numbers."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def number_at(order):
    """The inverse of `order_of`."""
    bits = order.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def highest_threshold(
    row_start,
    target,
    lowest,
    m,
    temperature,
    column_stride,
    WEIGHTED: tl.constexpr,
    LOW_BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The highest threshold from `lowest` to the maximum that still keeps a mass of `target`."""
    low = order_of(lowest) >> LOW_BITS  # keeps enough
    high = (order_of(m) >> LOW_BITS) + 1  # keeps nothing
    for _ in range(33 - LOW_BITS):
        middle = (low + high) >> 1
        threshold = number_at(middle << LOW_BITS)
        mass = kept_mass(row_start, threshold, m, temperature, column_stride, WEIGHTED, COLUMNS, BLOCK)
        enough = mass >= target
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return number_at(low << LOW_BITS)


@triton.jit
def threshold_kernel(
    logits,
    thresholds,  # (N,)
    top_k,  # or None
    top_p,  # or None
    temperature,
    row_stride,
    column_stride,
    LOW_BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_start = logits + row * row_stride
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    for first in range(0, COLUMNS, BLOCK):
        column = first + tl.arange(0, BLOCK)
        best = tl.maximum(best, load_logits(row_start + column.to(tl.int64) * column_stride, column < COLUMNS))
    m = tl.max(best)
    threshold = tl.full([], LOWEST, tl.float32)
    if top_k is not None:
        threshold = highest_threshold(
            row_start, top_k, threshold, m, temperature, column_stride, False, LOW_BITS, COLUMNS, BLOCK
        )
    if top_p is not None:
        mass = kept_mass(row_start, threshold, m, temperature, column_stride, True, COLUMNS, BLOCK)
        threshold = highest_threshold(
            row_start, top_p * mass, threshold, m, temperature, column_stride, True, LOW_BITS, COLUMNS, BLOCK
        )
    tl.store(thresholds + row, threshold)


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
    chunks = blocks["CHUNKS"]
    thresholds = None
    if keys is not None:
        thresholds = filter_thresholds(logits, temperature, top_k, top_p)
    partials, candidates = (logits.new_empty((rows, parts, chunks), dtype=torch.float32) for parts in (3, 2))
    best_columns = logits.new_empty((rows, chunks), dtype=torch.int32)
    unmask_kernel[(rows * chunks,)](
        logits,
        partials,
        candidates,
        best_columns,
        keys,
        thresholds,
        temperature,
        *logits.stride(),
        0 if keys is None else keys.stride(0),
        **blocks,
        RUN=16 // logits.itemsize,
        num_warps=CHUNK_WARPS if keys is None else NOISE_WARPS,
    )
    choose_kernel[(rows,)](
        logits,
        partials,
        candidates,
        best_columns,
        token,
        probability,
        margin,
        entropy,
        *logits.stride(),
        COLUMNS=columns,
        CHUNKS=chunks,
        CHUNKS_CEILING=triton.next_power_of_2(chunks),
        num_warps=MERGE_WARPS,
    )
    return token, probability, margin, entropy


@on_its_device
def filter_thresholds(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor | None:
    """(N,) the lowest logit of each row that top-k, and then top-p, keeps; None when they keep all."""
    rows, columns = logits.shape
    top_k = None if top_k is None or top_k >= columns else top_k
    top_p = None if top_p is None or top_p >= 1 else top_p
    if top_k is None and top_p is None:
        return None
    thresholds = logits.new_empty(rows, dtype=torch.float32)
    threshold_kernel[(rows,)](
        logits,
        thresholds,
        top_k,
        top_p,
        temperature,
        *logits.stride(),
        LOW_BITS=LOW_BITS[logits.dtype],
        COLUMNS=columns,
        BLOCK=min(SCAN_BYTES // logits.itemsize, triton.next_power_of_2(columns)),
        num_warps=SCAN_WARPS,
    )
    return thresholds
