"""dL/dlogits from the statistics of the rows: one read of the logits and one write, which may be over them."""

import triton
import triton.language as tl
from torch import Tensor

from tabom_kernels.backends.results import LogitTransform, VocabularyStatistics
from tabom_kernels.backends.triton.arithmetic import (
    LN2,
    LOWEST_BITS,
    base_of,
    bits,
    exp2,
    expm1,
    slope_of,
    transformed,
    widen,
)
from tabom_kernels.backends.triton.launch import CHUNK_LANES, CHUNK_WARPS, alignment, on_its_device, options
from tabom_kernels.backends.triton.statistics import chunking

THREADS = tl.constexpr(CHUNK_LANES)
"""The number of threads of a program."""


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
    if (a == 0.0) & (g == 0.0):  # the row is in neither window, like most rows of a batch
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
            tl.debug_barrier()  # in place, every thread must read the label's logit before a thread writes over it

        z = transformed(z, logit_scale, softcap)
        t = bits(z, scale, c)
        dz = exp2(t) * (at_zero - slope * t)
        if logit_scale is not None:
            dz *= slope_of(z, logit_scale, softcap)
        if CHUNK < THREADS:
            tl.debug_barrier()  # in place, threads without a column of their own must read before a thread writes
        tl.store(destination, dz.to(out.dtype.element_ty), inside)
        # p - 1 loses all of its digits if p is close to 1 and rounded, so the label's column is computed by itself.
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
    """Reads (N, V) logits once and writes `out` once; see `backends.torch.statistics`."""
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
        OUT_ALIGNMENT=alignment(out),
        COLUMNS=blocks["COLUMNS"],
        CHUNK=blocks["CHUNK"],
        CHUNKS=blocks["CHUNKS"],
        ALIGNMENT=blocks["ALIGNMENT"],
        **options(CHUNK_WARPS),
    )
    return out
