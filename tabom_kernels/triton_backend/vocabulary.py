"""Cross-entropy, entropy and their gradient: one read of the logits forward, one read and one write backward.

A row of logits z is cut into chunks. A program holds one chunk in registers, so its exact maximum is known before the
first exponential, and leaves m = max z, S = sum exp(z - m) and U = sum exp(z - m) * (z - m). A second, tiny launch
merges the chunks of each row, always in the same order: with r = exp(m_chunk - m), d = m_chunk - m,

    S = sum r * S_chunk        U = sum r * (U_chunk + d * S_chunk)
    E = log S - U / S          ce = log S - (z_label - m).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import libdevice

from tabom_kernels.torch_backend import VocabularyStatistics
from tabom_kernels.triton_backend.launch import CHUNK_WARPS, MERGE_WARPS, alignment, chunk_columns, on_its_device

LOWEST = tl.constexpr(-1e30)
"""Stands for -inf: its exponential is exactly 0, and 0 * LOWEST is not NaN. NaN itself is kept."""

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def interpreted_exp2(x):
    return tl.exp2(x)


# libdevice's exp2 flushes denormal results to 0, which saves three of fourteen instructions a logit; the interpreter
# has no libdevice.
exp2 = interpreted_exp2 if triton.knobs.runtime.interpret else libdevice.exp2


@triton.jit
def load_logits(pointers, mask):
    z = tl.load(pointers, mask, other=-float("inf")).to(tl.float32)
    return tl.maximum(z, LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def statistics_kernel(
    logits,  # (N, V)
    partials,  # (N, 3, CHUNKS) m, S, U
    row_stride,
    column_stride,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    row = (tl.program_id(0) // CHUNKS).to(tl.int64)
    chunk = tl.program_id(0) % CHUNKS
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    start = tl.multiple_of(row * row_stride, ALIGNMENT)
    z = load_logits(logits + start + column.to(tl.int64) * column_stride, column < COLUMNS)
    m = tl.max(z)
    p = exp2((z - m) * LOG2E)
    partial = partials + row * 3 * CHUNKS + chunk
    tl.store(partial, m)
    tl.store(partial + CHUNKS, tl.sum(p))
    tl.store(partial + 2 * CHUNKS, tl.sum(p * (z - m)))


@triton.jit
def merge_chunks(partials, row, CHUNKS: tl.constexpr, CHUNKS_CEILING: tl.constexpr):
    """(m, S, U) of a whole row, from the (m, S, U) of its chunks."""
    chunk = tl.arange(0, CHUNKS_CEILING)
    partial = partials + row * 3 * CHUNKS + chunk
    m_chunk = tl.load(partial, chunk < CHUNKS, other=LOWEST)
    S = tl.load(partial + CHUNKS, chunk < CHUNKS, other=0.0)
    U = tl.load(partial + 2 * CHUNKS, chunk < CHUNKS, other=0.0)
    m = tl.max(m_chunk)
    r = tl.exp(m_chunk - m)
    # A row of -inf alone has no softmax.
    total = tl.where(m > LOWEST, tl.sum(r * S), float("nan"))
    return m, total, tl.sum(r * (U + (m_chunk - m) * S))


@triton.jit
def merge_kernel(
    logits,
    labels,  # (N,) or None
    partials,
    cross_entropy,  # (N,) or None
    entropy,
    maximum,
    log_sum,
    row_stride,
    column_stride,
    label_stride,
    ignore_index,
    CHUNKS: tl.constexpr,
    CHUNKS_CEILING: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    m, S, U = merge_chunks(partials, row, CHUNKS, CHUNKS_CEILING)
    tl.store(maximum + row, m)
    tl.store(log_sum + row, tl.log(S))
    tl.store(entropy + row, tl.log(S) - U / S)
    if labels is not None:
        label = tl.load(labels + row * label_stride)
        used = label != ignore_index
        z = tl.load(logits + row * row_stride + label * column_stride, used, other=0.0).to(tl.float32)
        tl.store(cross_entropy + row, tl.where(used, tl.log(S) - (z - m), 0.0))


@on_its_device
def vocabulary_statistics(logits: Tensor, labels: Tensor | None, ignore_index: int) -> VocabularyStatistics:
    """Reads (N, V) logits once; see `torch_backend.vocabulary_statistics`."""
    rows, blocks = len(logits), chunking(logits)
    chunks = blocks["CHUNKS"]
    entropy, maximum, log_sum = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    ce = None if labels is None else torch.empty_like(entropy)
    statistics = VocabularyStatistics(ce, entropy, maximum, log_sum)
    if rows == 0:
        return statistics
    partials = logits.new_empty((rows, 3, chunks), dtype=torch.float32)
    statistics_kernel[(rows * chunks,)](logits, partials, *logits.stride(), **blocks, num_warps=CHUNK_WARPS)
    merge_kernel[(rows,)](
        logits,
        labels,
        partials,
        *statistics,
        *logits.stride(),
        0 if labels is None else labels.stride(0),
        ignore_index,
        CHUNKS=chunks,
        CHUNKS_CEILING=triton.next_power_of_2(chunks),
        num_warps=MERGE_WARPS,
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
    out,
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
    column = tl.program_id(0) % CHUNKS * CHUNK + tl.arange(0, CHUNK)
    start = tl.multiple_of(row * row_stride, ALIGNMENT)
    out_start = tl.multiple_of(row * out_row_stride, OUT_ALIGNMENT)
    destination = out + out_start + column.to(tl.int64) * out_column_stride
    label = -1
    a = 0.0
    g = 0.0
    if grad_ce is not None:
        label = tl.load(labels + row * label_stride)
        a = tl.where(label == ignore_index, 0.0, tl.load(grad_ce + row * grad_ce_stride))
    if grad_entropy is not None:
        g = tl.load(grad_entropy + row * grad_entropy_stride)
    if (a == 0.0) & (g == 0.0):  # most rows of a batch are outside both windows
        tl.store(destination, tl.zeros([CHUNK], out.dtype.element_ty), column < COLUMNS)
    else:
        z = load_logits(logits + start + column.to(tl.int64) * column_stride, column < COLUMNS)
        log_p = z - tl.load(maximum + row) - tl.load(log_sum + row)
        dz = exp2(log_p * LOG2E) * (a - g * (log_p + tl.load(entropy + row)))
        # The label's column while dz is still fp32: p rounded to bf16 and then less 1 can lose all of it.
        dz = tl.where(column == label, dz - a, dz)
        tl.store(destination, dz.to(out.dtype.element_ty), column < COLUMNS)


@on_its_device
def vocabulary_gradient(
    logits: Tensor,
    labels: Tensor | None,
    ignore_index: int,
    statistics: VocabularyStatistics,
    grad_ce: Tensor | None,
    grad_entropy: Tensor | None,
    out: Tensor,
) -> Tensor:
    """Reads (N, V) logits once and writes `out` once; see `torch_backend.vocabulary_gradient`."""
    rows, blocks = len(logits), chunking(logits)
    if rows == 0:
        return out
    gradient_kernel[(rows * blocks["CHUNKS"],)](
        logits,
        labels,
        *statistics[1:],
        grad_ce,
        grad_entropy,
        out,
        *logits.stride(),
        *out.stride(),
        *(0 if rowwise is None else rowwise.stride(0) for rowwise in (labels, grad_ce, grad_entropy)),
        ignore_index,
        OUT_ALIGNMENT=alignment(out.data_ptr(), out.stride(0), out.itemsize),
        **blocks,
        num_warps=CHUNK_WARPS,
    )
    return out


def chunking(logits: Tensor) -> dict[str, int]:
    """The compile-time shape of a launch with one program a chunk."""
    columns = logits.shape[1]
    chunk = chunk_columns(columns, logits.itemsize)
    return {
        "COLUMNS": columns,
        "CHUNK": chunk,
        "CHUNKS": triton.cdiv(columns, chunk),
        "ALIGNMENT": alignment(logits.data_ptr(), logits.stride(0), logits.itemsize),
    }
