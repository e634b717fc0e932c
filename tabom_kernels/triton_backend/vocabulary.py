"""Cross-entropy, entropy and their gradient: one read of the logits forward, one read and one write backward.

A row of logits z is cut into chunks. A program holds one chunk in registers, so its exact maximum m is known before
the first exponential. It works in base 2, on t = z * log2 e - c with c = fp32(m * log2 e): one fused multiply-add a
logit, exact but for the rounding of c, and that is the same number for every logit, `residual`. It leaves m,

    S' = sum of 2^t without the best logit        U = sum 2^t * t        (both as if residual were 0).

A second, tiny launch merges the chunks of each row, always in the same order: with d = (m_chunk - m) * log2 e, r = 2^d,

    S' = sum r * (1 + S'_chunk) - 1        U = sum r * (U_chunk + d * (1 + S'_chunk))
    E = log1p(S') - log 2 * U / (1 + S')        ce = log1p(S') - (z_label - m)

where the 1 of the best chunk is left out, not subtracted: 1 + 1e-12 is 1 in fp32, and rows as certain as that are what
a sampler has to put in order. A chunk leaves it out only where that matters, where its best logit has more than half
of its mass: else S' = S - 1 loses nothing, and the chunk is done in one sweep. That sweep leaves out the clamp of -inf
as well, whose 0 * -inf shows as NaN in U: then the chunk is done again, from the cache, with it.

Logits that are to be scaled or soft-capped are so in registers, as they are read, and never written: it costs
instructions and no pass over the memory. Which logit is the best is decided before, as both rise with the logit.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import libdevice

from tabom_kernels.torch_backend import LogitTransform, VocabularyStatistics
from tabom_kernels.triton_backend.launch import (
    CHUNK_LANES,
    CHUNK_WARPS,
    MERGE_WARPS,
    alignment,
    chunk_columns,
    on_its_device,
    options,
    power_of_2,
)

LOG2E = tl.constexpr(1.44269502162933349609375)
"""In fp32, so that the interpreter multiplies by the same number as a GPU."""
LN2 = tl.constexpr(0.6931471805599453)

LOWEST_BITS = tl.constexpr(-256.0)
"""Stands for t = -inf: its power of 2 is exactly 0 in fp32, and 0 * LOWEST_BITS is not NaN. NaN itself is kept."""

LOWEST = tl.constexpr(-3.4028234663852886e38)
"""The lowest finite number: what a row or chunk of -inf alone takes for its maximum."""

FAR = tl.constexpr(2.0**29)
"""From here on neighbouring fp32 numbers are 64 apart, and c is off by as much: the base no longer matters."""

PADDING = tl.constexpr(-60000.0)
"""What columns beyond the last are read as: finite in every dtype, and without a part in any ordinary chunk."""

ORDINARY = tl.constexpr(30000.0)
"""So far from 0 the maximum of a chunk may be for one sweep to do."""


@triton.jit
def interpreted_exp2(x):
    return tl.exp2(x)


@triton.jit
def interpreted_fma(x, y, z):
    return (x.to(tl.float64) * y + z).to(tl.float32)


@triton.jit
def interpreted_widen(x):
    return x.to(tl.float32)


@triton.jit
def interpreted_tanh(x):
    decay = tl.exp(-2.0 * tl.abs(x.to(tl.float64)))
    y = ((1.0 - decay) / (1.0 + decay)).to(tl.float32)
    return tl.where(x < 0.0, -y, y)


@triton.jit
def interpreted_sum_both(S, U, axis: tl.constexpr):
    return tl.sum(S, axis), tl.sum(U, axis)


@triton.jit
def add_both(S, U, other_S, other_U):
    return S + other_S, U + other_U


@triton.jit
def sum_both_on_gpu(S, U, axis: tl.constexpr):
    """In one reduction: the terms of one do not wait in registers for the other, and warps meet once."""
    return tl.reduce((S, U), axis, add_both)


@triton.jit
def widen_on_gpu(x):
    """fp32 of logits of any dtype; a pair of bf16 takes two instructions, not the compiler's three."""
    if x.dtype == tl.bfloat16:
        asm: tl.constexpr = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
        bits = tl.inline_asm_elementwise(asm, "=r,=r,r", [x], dtype=tl.int32, is_pure=True, pack=2)
        return bits.to(tl.float32, bitcast=True)
    return x.to(tl.float32)


# libdevice's exp2 flushes denormal results to 0, which saves three instructions a logit. The interpreter has no
# libdevice and no assembly, its fma rounds twice, and its reductions by a function take a loop of Python.
INTERPRETED = triton.knobs.runtime.interpret
exp2 = interpreted_exp2 if INTERPRETED else libdevice.exp2
fma = interpreted_fma if INTERPRETED else tl.fma
sum_both = interpreted_sum_both if INTERPRETED else sum_both_on_gpu
widen = interpreted_widen if INTERPRETED else widen_on_gpu
tanh = interpreted_tanh if INTERPRETED else libdevice.tanh


@triton.jit
def log1p(x):
    """Exact in the rounding of 1 + x, which Kahan's quotient takes back."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))


@triton.jit
def expm1(x):
    """The same for exp(x) - 1 and x <= 0."""
    u = tl.exp(x)
    near = tl.where(u == 1.0, x, (u - 1.0) * (x / tl.log(tl.maximum(u, 0.5))))
    return tl.where(u < 0.5, u - 1.0, near)


@triton.jit
def transformed(z, scale, softcap):
    """softcap * tanh(scale * z / softcap), or scale * z; None leaves out what it stands for."""
    if softcap is not None:
        return softcap * tanh(z * scale / softcap)
    return z if scale is None else z * scale


@triton.jit
def slope_of(z, scale, softcap):
    """The derivative of `transformed`, at a logit z that is transformed."""
    slope = scale
    if softcap is not None:
        y = z / softcap
        slope = scale * (1.0 - y * y)
    return slope


@triton.jit
def base_of(m):
    """The scale, c and residual with which t = fma(z, scale, -c), and t = residual at z = m."""
    m = tl.maximum(m, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    scale = tl.where(tl.abs(m) < FAR, LOG2E, 1.0)
    c = m * scale
    return scale, c, fma(m, scale, -c)


@triton.jit
def bits(z, scale, c):
    """t of logits."""
    return tl.maximum(fma(z, scale, -c), LOWEST_BITS, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def columns_of_runs(RUN: tl.constexpr, CHUNK: tl.constexpr):
    """(CHUNK // RUN, RUN) columns of a chunk, from its first: a run is what a thread loads at once."""
    return RUN * tl.arange(0, CHUNK // RUN)[:, None] + tl.arange(0, RUN)[None, :]


@triton.jit
def load_logits(row_start, column, column_stride, inside):
    return widen(tl.load(row_start + column.to(tl.int64) * column_stride, inside, other=-float("inf")))


@triton.jit
def by_lane(of_run, LANES: tl.constexpr):
    """(steps, LANES) of the runs of a chunk: a lane is what one thread loads, in so many steps."""
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
    """(LANES,) logits of one lane of a chunk, one a thread, and their columns."""
    lane = tl.arange(0, LANES)
    column = chunk * CHUNK + RUN * winner + lane // RUN * (LANES * RUN) + lane % RUN
    return load_logits(row_start, column, column_stride, (lane < CHUNK // LANES) & (column < COLUMNS)), column


@triton.jit
def sums_by_lane(z, m, LANES: tl.constexpr, CLAMPED: tl.constexpr):
    """(LANES,) sums of p = 2^t and of p * t over logits z, whose maximum is m; a logit of -inf needs CLAMPED."""
    scale, c, _ = base_of(m)
    t = bits(z, scale, c) if CLAMPED else fma(z, scale, -c)
    p = exp2(t)
    S, U = sum_both(p, p * t, 1)
    return sum_both(by_lane(S, LANES), by_lane(U, LANES), 0)


@triton.jit
def without_the_best(S, U, w, is_best, m, winner, LANES: tl.constexpr):
    """S' and U of a chunk from its sums by lane, of which `winner` is one that holds the maximum m, w its logits.

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
def sweep(pointers, inside, padding, logit_scale, softcap, LANES: tl.constexpr, CLAMPED: tl.constexpr):
    """The best logit of each lane and of all as they are read, the maximum m of all transformed, `sums_by_lane`."""
    z = widen(tl.load(pointers, inside, other=padding))
    best_of_lane = tl.max(by_lane(tl.max(z, 1), LANES), 0)
    best = tl.max(best_of_lane)
    m = transformed(best, logit_scale, softcap)
    if logit_scale is not None:
        z = tl.where(inside, transformed(z, logit_scale, softcap), padding)
    S, U = sums_by_lane(z, m, LANES, CLAMPED)
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
    best_of_lane, best, m, S_of_lane, U_of_lane = sweep(places, inside, PADDING, *transform, LANES, False)
    S, U = sum_both(S_of_lane, U_of_lane, 0)
    _, _, residual = base_of(m)
    shrink = exp2(-residual)
    rest = S * shrink - 1.0
    is_special = (tl.maximum(tl.abs(best), tl.abs(m)) > ORDINARY) | (U != U)
    U = (U - residual * S) * shrink
    if is_special | (S < 2.0):
        if is_special:
            lowest = -float("inf")
            best_of_lane, best, m, S_of_lane, U_of_lane = sweep(places, inside, lowest, *transform, LANES, True)
        winner = tl.min(tl.where(best_of_lane == best, tl.arange(0, LANES), LANES - 1))
        w, column_of_w = load_lane(row_start, chunk, winner, column_stride, COLUMNS, CHUNK, LANES, RUN)
        is_best = w == best
        if logit_scale is not None:
            w_is_inside = (tl.arange(0, LANES) < CHUNK // LANES) & (column_of_w < COLUMNS)
            w = tl.where(w_is_inside, transformed(w, logit_scale, softcap), -float("inf"))
            is_best = is_best & w_is_inside  # where all are -inf, padding is as good
        rest, U = without_the_best(S_of_lane, U_of_lane, w, is_best, m, winner, LANES)
    partial = partials + row * 3 * CHUNKS + chunk
    tl.store(partial, m)
    tl.store(partial + CHUNKS, rest)
    tl.store(partial + 2 * CHUNKS, U)


@triton.jit
def merge_chunks(partials, row, CHUNKS: tl.constexpr, CHUNKS_CEILING: tl.constexpr):
    """(m, S', U) of a whole row, from those of its chunks, and the first chunk that holds m."""
    chunk = tl.arange(0, CHUNKS_CEILING)
    partial = partials + row * 3 * CHUNKS + chunk
    m_chunk = tl.load(partial, chunk < CHUNKS, other=-float("inf"))
    rest = tl.load(partial + CHUNKS, chunk < CHUNKS, other=0.0)
    U = tl.load(partial + 2 * CHUNKS, chunk < CHUNKS, other=0.0)
    m = tl.max(m_chunk)
    first = tl.min(tl.where(m_chunk == m, chunk, CHUNKS_CEILING))
    d = tl.maximum((m_chunk - m) * LOG2E, LOWEST_BITS, propagate_nan=tl.PropagateNan.ALL)
    r = exp2(d)
    # A row of -inf alone has no softmax, nor has one with inf.
    rest_of_row = tl.where(tl.abs(m) <= -LOWEST, tl.sum(tl.where(chunk == first, rest, r * (1.0 + rest))), float("nan"))
    return m, rest_of_row, tl.sum(r * (U + d * (1.0 + rest))), first


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
    m, rest, U, _ = merge_chunks(partials, row, CHUNKS, CHUNKS_CEILING)
    log_S = log1p(rest)
    tl.store(maximum + row, m)
    tl.store(log_sum + row, log_S)
    tl.store(entropy + row, log_S - LN2 * U / (1.0 + rest))
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
    """Reads (N, V) logits once; see `torch_backend.vocabulary_statistics`."""
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


@triton.jit
def gradient_kernel(
    logits,
    labels,  # (N,) or None
    entropy,
    maximum,
    log_sum,
    grad_ce,  # (N,) or None
    grad_entropy,  # (N,) or None
    upstream,  # () or None, multiplies both
    out,
    logit_scale,
    softcap,
    row_stride,
    column_stride,
    out_row_stride,
    out_column_stride,
    label_stride,
    grad_ce_stride,
    grad_entropy_stride,
    ignore_index,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    OUT_ALIGNMENT: tl.constexpr,
):
    row = (tl.program_id(0) // CHUNKS).to(tl.int64)
    first = tl.program_id(0) % CHUNKS * CHUNK
    start = logits + tl.multiple_of(row * row_stride, ALIGNMENT) + first.to(tl.int64) * column_stride
    out_start = out + tl.multiple_of(row * out_row_stride, OUT_ALIGNMENT) + first.to(tl.int64) * out_column_stride
    column = tl.arange(0, CHUNK)
    inside = column < COLUMNS - first
    destination = out_start + column.to(tl.int64) * out_column_stride
    label = tl.full([], -1, tl.int64)
    a = 0.0
    g = 0.0
    if grad_ce is not None:
        label = tl.load(labels + row * label_stride)
        a = tl.where(label == ignore_index, 0.0, tl.load(grad_ce + row * grad_ce_stride).to(tl.float32))
        is_known = (label == ignore_index) | ((label >= 0) & (label < COLUMNS))
        a = tl.where(is_known, a, float("nan"))
    if grad_entropy is not None:
        g = tl.load(grad_entropy + row * grad_entropy_stride).to(tl.float32)
    if upstream is not None:
        a *= tl.load(upstream)
        g *= tl.load(upstream)
    if (a == 0.0) & (g == 0.0):  # most rows of a batch are outside both windows
        tl.store(destination, tl.zeros([CHUNK], out.dtype.element_ty), inside)
    else:
        m = tl.load(maximum + row)
        log_S = tl.load(log_sum + row)
        E = tl.load(entropy + row)
        scale, c, residual = base_of(m)
        # dz = p * (a - g * (log p + E)) with p = 2^t * share and log p = log 2 * (t - residual) - log S
        share = exp2(-residual) * tl.exp(-log_S)
        at_zero = (a + g * (log_S - E + LN2 * residual)) * share
        slope = g * LN2 * share
        label -= first
        has_label = (a != 0.0) & (label >= 0) & (label < CHUNK) & (label < COLUMNS - first)
        z = widen(tl.load(start + column.to(tl.int64) * column_stride, inside))
        z_label = 0.0
        if has_label:
            z_label = tl.load(start + label * column_stride).to(tl.float32)
            tl.debug_barrier()  # in place, every thread has read the label's logit before one writes over it

        z = transformed(z, logit_scale, softcap)
        t = bits(z, scale, c)
        dz = exp2(t) * (at_zero - slope * t)
        if logit_scale is not None:
            dz *= slope_of(z, logit_scale, softcap)
        tl.store(destination, dz.to(out.dtype.element_ty), inside)
        # p - 1 of a certain label is lost when p is rounded: its column is computed by itself and written last.
        if has_label:
            z_label = transformed(z_label, logit_scale, softcap)
            log_p = tl.maximum(z_label - m - log_S, LOWEST_BITS, propagate_nan=tl.PropagateNan.ALL)
            dz_label = a * expm1(log_p) - g * tl.exp(log_p) * (log_p + E)
            if logit_scale is not None:
                dz_label *= slope_of(z_label, logit_scale, softcap)
            tl.debug_barrier()
            tl.store(out_start + label * out_column_stride, dz_label.to(out.dtype.element_ty))


@on_its_device
def vocabulary_gradient(
    logits: Tensor,
    labels: Tensor | None,
    ignore_index: int,
    statistics: VocabularyStatistics,
    grad_ce: Tensor | None,
    grad_entropy: Tensor | None,
    out: Tensor,
    upstream: Tensor | None = None,
    transform: LogitTransform | None = None,
) -> Tensor:
    """Reads (N, V) logits once and writes `out` once; see `torch_backend.vocabulary_gradient`."""
    rows, blocks = logits.shape[0], chunking(logits)
    if rows == 0:
        return out
    gradient_kernel[(rows * blocks["CHUNKS"],)](
        logits,
        labels,
        *statistics[1:],
        grad_ce,
        grad_entropy,
        upstream,
        out,
        *(transform or (None, None)),
        *logits.stride(),
        *out.stride(),
        *(0 if rowwise is None else rowwise.stride(0) for rowwise in (labels, grad_ce, grad_entropy)),
        ignore_index,
        OUT_ALIGNMENT=alignment(out.data_ptr(), out.stride(0), out.itemsize),
        COLUMNS=blocks["COLUMNS"],
        CHUNK=blocks["CHUNK"],
        CHUNKS=blocks["CHUNKS"],
        ALIGNMENT=blocks["ALIGNMENT"],
        **options(CHUNK_WARPS),
    )
    return out


def chunking(logits: Tensor) -> dict[str, int]:
    """The compile-time shape of a launch with one program a chunk."""
    return chunks_of(logits.shape[1], logits.itemsize) | {
        "ALIGNMENT": alignment(logits.data_ptr(), logits.stride(0), logits.itemsize)
    }


@cache
def chunks_of(columns: int, itemsize: int) -> dict[str, int]:
    """How a row of so many logits is cut."""
    chunk = chunk_columns(columns, itemsize)
    lanes = min(CHUNK_LANES, chunk)
    return {
        "COLUMNS": columns,
        "CHUNK": chunk,
        "CHUNKS": triton.cdiv(columns, chunk),
        "LANES": lanes,
        "RUN": min(16 // itemsize, chunk // lanes),
    }
