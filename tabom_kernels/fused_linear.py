"""The TABOM loss from hidden states: the logits of a chunk of sequences at a time, and never more.

Only rows of one sequence are ranked against each other, so once the logits of whole sequences are there, both factors
of their gradient are known:

    logits = hidden @ weight.T -> entropy, cross-entropy -> rank loss, dE -> dlogits, over the logits -> dhidden

and the chunk's gradient is finished before the next one begins: two matmuls with a frozen head, three with a trainable
one, nothing computed twice. A ranked sequence longer than a chunk takes two sweeps over its pieces, statistics and
gradients; without a ranking every row is on its own. Backward only scales.

The gradient of a trainable head is a sum over the chunks, which must not be rounded each time, and fp32 sums are twice
as large as the gradient in half precision. So there more than one chunk is walked the other way, over slabs of the
vocabulary with the logits of all rows: then the gradient of a slab's weights is one product, and what is added up in
fp32 is dhidden, which is small. A row's statistics are known after all slabs: two sweeps, of which the second goes back
from the slab whose logits are still there.

A model may scale and soft-cap its logits, z = softcap * tanh(logit_scale * (hidden @ weight.T) / softcap): both are
applied where the closed forms read a logit, and are one factor of the gradient.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tabom_kernels import reference
from tabom_kernels.arguments import (
    check_denominators,
    check_form,
    check_head,
    check_labels,
    check_lengths,
    check_sequences,
    check_token_weights,
    check_transform,
)
from tabom_kernels.backends import Backend, closed_forms, resolve
from tabom_kernels.derivatives import differentiable, refuse_forward_mode, refuse_second_derivatives
from tabom_kernels.loss import TabomLoss, denominator, reference_loss
from tabom_kernels.ranking import Form, as_scalar, count_ordered_pairs
from tabom_kernels.torch_backend import LogitTransform, ceil_div
from tabom_kernels.vocabulary_parallel import (
    VocabularySlice,
    local,
    merge_ranks,
    merge_slices,
    replicated,
    sharding_of,
    sum_over_ranks,
)

LOGITS_BUDGET = 2**28
"""Bytes of logits in a chunk by default."""

VOCABULARY_SLICE = 4096
"""Rows of the head whose gradient is in fp32 at once, before it is stored in fp16 or while it is scaled."""

PRODUCT_TILE = 2048
"""Rows and terms of a product in fp32 that are converted at once where no matmul of half precision adds up in it."""

FP16_FACTOR = 256
"""What the largest factor of a row becomes in fp16: small probabilities need the room below it more than it does."""

FP16_EXPONENT = 15
"""Numbers below 2^15 stay finite when they are rounded to fp16; some below 2^16 do not."""

ALIGNMENT = 8
"""Logits in half precision that a GPU reads at once, 16 bytes."""


class Chunk(NamedTuple):
    """Whole sequences, and their rows."""

    sequences: slice
    rows: slice


def even_slices(whole: slice, most: int) -> list[slice]:
    """A range in equal parts of at most `most`; one part even if it is empty."""
    size = whole.stop - whole.start
    share = max(1, ceil_div(size, max(1, ceil_div(size, most))))
    return [
        slice(start, min(start + share, whole.stop))
        for start in range(whole.start, max(whole.stop, whole.start + 1), share)
    ]


def plan_chunks(cu_seqlens: Tensor, rows: int, max_rows: int, lengths: Sequence[int] | None = None) -> Iterator[Chunk]:
    """Consecutive sequences, together at most `max_rows` rows unless one alone has more, each about as many.

    A batch that is one chunk is never asked for its lengths, which would make a GPU wait for the host.
    """
    if rows <= max_rows:
        yield Chunk(slice(0, cu_seqlens.shape[0] - 1), slice(0, rows))
        return
    offsets = cu_seqlens.tolist() if lengths is None else [0, *accumulate(lengths)]
    first = 0
    while first < len(offsets) - 1:
        start, left = offsets[first], rows - offsets[first]
        share = left / max(1, ceil_div(left, max_rows))
        last = first + 1
        # One sequence more, while that fits and brings the chunk nearer to its share, or adds nothing.
        while last < len(offsets) - 1 and (
            offsets[last + 1] == offsets[last]
            or (offsets[last + 1] - start <= max_rows and (offsets[last] + offsets[last + 1]) / 2 - start <= share)
        ):
            last += 1
        yield Chunk(slice(first, last), slice(start, offsets[last]))
        first = last


def plan_rows(rows: int, max_rows: int) -> Iterator[Chunk]:
    """About equal parts of at most `max_rows` rows: without a ranking sequences do not matter."""
    return (Chunk(slice(0, 0), piece) for piece in even_slices(slice(0, rows), max_rows))


def plan_slabs(columns: int, count: int) -> list[slice]:
    """The vocabulary in about so many equal slabs, whose rows of logits are as aligned as those of the whole."""
    width = ALIGNMENT * ceil_div(columns, ALIGNMENT * count)
    return [slice(start, min(start + width, columns)) for start in range(0, columns, width)]


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, fp32_logits: bool) -> Tensor:
    """(N, V) logits, in fp32 or in the dtype of `hidden`."""
    dtype = reference.working_dtype(hidden.dtype)
    if not fp32_logits or hidden.dtype == dtype:
        return F.linear(hidden, weight, bias)
    logits = hidden.new_empty((hidden.shape[0], weight.shape[0]), dtype=dtype)
    add_product(logits.T, weight, hidden.T, beta=0)
    return logits if bias is None else logits.add_(bias)


def add_product(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """total = beta * total + a @ b, with sums in the dtype of `total`; a and b may be in half precision."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=beta)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:
        for rows in even_slices(slice(0, a.shape[0]), PRODUCT_TILE):
            for terms in even_slices(slice(0, a.shape[1]), PRODUCT_TILE):
                tile = a[rows, terms].to(total.dtype)
                total[rows].addmm_(tile, b[terms].to(total.dtype), beta=beta if terms.start == 0 else 1)


def store_product(out: Tensor, units: Tensor, a: Tensor, b: Tensor) -> None:
    """out = units * (a @ b) in fp16, from sums in fp32, a slice of rows at a time.

    Each row has a unit of its own, a power of two that lets it fit and fill fp16: units (n, 1) are written as well.
    """
    slices = even_slices(slice(0, a.shape[0]), VOCABULARY_SLICE)
    memory = units.new_empty(slices[0].stop, out.shape[1])
    for rows in slices:
        total = memory[: rows.stop - rows.start]
        add_product(total, a[rows], b, beta=0)
        bound = total.norm(dim=1, keepdim=True)  # of a row's largest number, from one read
        units[rows] = torch.exp2(FP16_EXPONENT - bound.frexp().exponent)
        out[rows] = total.mul_(units[rows])


def is_by_columns(hidden: Tensor, max_chunk_rows: int, wanted: list[bool]) -> bool:
    """Whether the logits are walked over the vocabulary: for a trained head in half precision, more than one chunk."""
    return hidden.itemsize == 2 and wanted[1] and hidden.shape[0] > max_chunk_rows


class HeadGradients:
    """Gradients by hidden (N, D), weight (V, D) and bias (V,), from tiles of the logits; empty unless wanted.

    A tile has all columns or all rows: the products of one gradient are added up, and those of the other one stand side
    by side.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: list[bool], max_chunk_rows: int
    ) -> None:
        self.inputs, self.wanted, self.beta = (hidden, weight), wanted, 0
        self.is_by_columns = is_by_columns(hidden, max_chunk_rows, wanted)
        memory = empty_gradients(hidden, weight, max_chunk_rows, wanted)
        self.hidden, self.weight, self.bias, self.weight_units = memory
        self.bias.zero_()

    def add(self, rows: slice, columns: slice, dlogits: Tensor) -> None:
        """The part of a tile, from its dL/dlogits."""
        hidden, weight = self.inputs
        if self.wanted[2]:
            self.bias[columns] += dlogits.sum(0, dtype=self.bias.dtype)
        dlogits = dlogits.to(hidden.dtype)
        by_hidden, by_weight = (self.beta, 0) if self.is_by_columns else (0, self.beta)
        if self.wanted[0]:
            add_product(self.hidden[rows], dlogits, weight[columns], by_hidden)
        if self.wanted[1] and hidden.dtype == torch.float16:
            store_product(self.weight[columns], self.weight_units[columns], dlogits.T, hidden[rows])
        elif self.wanted[1]:
            add_product(self.weight[columns], dlogits.T, hidden[rows], by_weight)
        self.beta = 1  # the first tile has overwritten the memory


def empty_gradients(
    hidden: Tensor, weight: Tensor, max_chunk_rows: int, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for those by hidden, weight and bias and for the units of the weight's, of no elements unless wanted.

    What is added up is kept in fp32 until backward. A single product is not, as a matmul adds up in fp32 by itself; but
    before backward scales it, it may be beyond fp16: there it is in fp32 as well, or, by the weight, in units of rows.
    """
    dtype = reference.working_dtype(hidden.dtype)
    is_added_up = is_by_columns(hidden, max_chunk_rows, wanted)
    of_hidden = dtype if is_added_up or hidden.dtype == torch.float16 else hidden.dtype
    by_hidden = torch.empty_like(hidden, dtype=of_hidden) if wanted[0] else hidden.new_empty(0, dtype=of_hidden)
    by_weight = torch.empty_like(weight) if wanted[1] else weight.new_empty(0)
    by_bias = hidden.new_empty(weight.shape[0] if wanted[2] else 0, dtype=dtype)
    units = weight.shape[0] if wanted[1] and hidden.dtype == torch.float16 else 0
    return by_hidden, by_weight, by_bias, hidden.new_empty(units, 1, dtype=dtype)


@torch.library.custom_op("tabom_kernels::fused_linear_tabom_loss", mutates_args=())
def fused_linear_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    margin: Tensor,
    rank_weight: Tensor | None,
    labels: Tensor,
    steps: Tensor | None,
    cu_seqlens: Tensor | None,
    token_weights: Tensor | None,
    num_tokens: Tensor,
    num_sequences: Tensor,
    lengths: Sequence[int] | None,
    form: str,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    tp_group: str | None,
    first_column: int,
    max_chunk_rows: int,
    fp32_logits: bool,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, cross_entropy, rank, entropy (N,); dhidden, dweight, dbias, weight_units, or empty; dtemperature, unit.

    Without `rank_weight`, steps and cu_seqlens are not read. The gradients are those of unit * loss. The unit is 1, but
    for fp16: there it brings a row's factors where dlogits fit, neither lost in a mean over many tokens nor beyond fp16
    by large weights; and dweight is multiplied by weight_units (V, 1), powers of two that do the same for each row of
    the head, a sum over all tokens.
    """
    forms = closed_forms(backend)
    transform = None if (logit_scale, softcap) == (1.0, None) else LogitTransform(logit_scale, softcap)
    dtype = reference.working_dtype(hidden.dtype)
    ce_sum, rank_sum, grad_temperature = (hidden.new_zeros((), dtype=dtype) for _ in range(3))
    entropy = hidden.new_empty(hidden.shape[0], dtype=dtype)
    grad_ce = entropy.new_ones(()) if token_weights is None else token_weights.to(dtype)
    grad_ce = grad_ce.expand(hidden.shape[0])
    unit = entropy.new_ones(())
    if hidden.dtype == torch.float16:
        rank_scale = None if rank_weight is None else rank_weight * num_tokens / num_sequences
        largest = largest_factor(grad_ce.masked_fill(labels == ignore_index, 0.0), rank_scale, form, temperature)
        unit = FP16_FACTOR * num_tokens / (largest * logit_scale)
    grad_ce = grad_ce * (unit / num_tokens)
    rank_scale = None if rank_weight is None else rank_weight * unit / num_sequences
    gradients = HeadGradients(hidden, weight, bias, wanted, max_chunk_rows)
    tile_rows, slabs = max_chunk_rows, [slice(0, weight.shape[0])]
    if gradients.is_by_columns:
        tile_rows = hidden.shape[0]
        slabs = plan_slabs(weight.shape[0], ceil_div(tile_rows, max_chunk_rows))
    is_whole = tp_group is None and len(slabs) == 1
    slab_forms = [forms if is_whole else VocabularySlice(forms, first_column + slab.start) for slab in slabs]
    chunks = (
        plan_rows(hidden.shape[0], tile_rows)
        if rank_scale is None
        else plan_chunks(cu_seqlens, hidden.shape[0], tile_rows, lengths)
    )

    def logits_of(rows: slice, columns: slice) -> Tensor:
        return project(hidden[rows], weight[columns], None if bias is None else bias[columns], fp32_logits)

    with torch.autocast(hidden.device.type, enabled=False):
        for chunk in chunks:
            pieces, statistics = even_slices(chunk.rows, tile_rows), []
            for rows in pieces:
                of_slabs = []
                for columns, slab in zip(slabs, slab_forms, strict=True):
                    logits = None  # before the next tile's are made
                    logits = logits_of(rows, columns)
                    of_slabs.append(slab.vocabulary_statistics(logits, labels[rows], ignore_index, transform))
                whole = merge_slices(of_slabs, labels[rows], ignore_index)
                if tp_group is not None:
                    whole = merge_ranks(whole, labels[rows], ignore_index, tp_group)
                statistics.append(whole)
                entropy[rows] = whole.entropy
                ce_sum += (whole.cross_entropy * grad_ce[rows]).sum()
            grad_entropy = None
            if rank_scale is not None:
                offsets = cu_seqlens[chunk.sequences.start : chunk.sequences.stop + 1] - chunk.rows.start
                rank = forms.trajectory_rank_loss(
                    entropy[chunk.rows], steps[chunk.rows], offsets, form, margin, temperature
                )
                rank_sum += rank.loss.sum()
                grad_temperature += rank.grad_temperature.sum() * rank_scale
                grad_entropy = torch.empty_like(entropy)
                grad_entropy[chunk.rows] = rank.grad_entropy * rank_scale
            if not any(wanted):
                continue
            for rows, saved in zip(reversed(pieces), reversed(statistics), strict=True):
                row_grads = (grad_ce[rows], None if grad_entropy is None else grad_entropy[rows])
                for columns, slab in zip(reversed(slabs), reversed(slab_forms), strict=True):
                    logits = logits_of(rows, columns) if logits is None else logits  # the last tile's are there
                    slab.vocabulary_gradient(
                        logits, labels[rows], ignore_index, saved, *row_grads, logits, None, transform
                    )
                    gradients.add(rows, columns, logits)
                    logits = None

    if tp_group is not None and wanted[0]:
        sum_over_ranks(gradients.hidden, tp_group)
    cross_entropy, rank_mean = ce_sum / unit, rank_sum / num_sequences
    loss = cross_entropy + (0 if rank_weight is None else rank_weight * rank_mean)
    by_head = (gradients.hidden, gradients.weight, gradients.bias, gradients.weight_units)
    return loss, cross_entropy, rank_mean, entropy, *by_head, grad_temperature, unit


def largest_factor(grad_ce: Tensor, rank_scale: Tensor | None, form: str, temperature: Tensor) -> Tensor:
    """() what the row factors are divided by in fp16: the largest of the cross-entropy's, or a bound of the ranking's.

    The slope of the rank loss by one entropy is at most 1 / tau, which it nears with one pair alone; fp16 has room for
    16 times FP16_FACTOR, times p (log p + E), which is below 4 in any vocabulary there is.
    """
    bound = grad_ce.new_zeros(()) if rank_scale is None else rank_scale / 16
    bound = bound if form == "hinge" else bound / temperature
    largest = torch.cat([grad_ce.abs(), bound[None]]).amax()
    return largest.masked_fill(largest == 0, 1.0)


@fused_linear_op.register_fake
def _(hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *_, max_chunk_rows, _, wanted, _ = arguments
    dtype = reference.working_dtype(hidden.dtype)
    loss, cross_entropy, rank, by_temperature, unit = (hidden.new_empty((), dtype=dtype) for _ in range(5))
    entropy = hidden.new_empty(hidden.shape[0], dtype=dtype)
    by_head = empty_gradients(hidden, weight, max_chunk_rows, wanted)
    return loss, cross_entropy, rank, entropy, *by_head, by_temperature, unit


def save_gradients(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[4:])
    ctx.dtype = inputs[0].dtype


def scale_gradients(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple:
    refuse_second_derivatives()
    if grad_loss is None:
        return (None,) * 23
    *by_head, weight_units, by_temperature, unit = ctx.saved_tensors
    # One dimension: a factor of none would be rounded to the dtype of a gradient in half precision.
    scale = (grad_loss / unit)[None]
    scales = (scale, scale / weight_units if weight_units.numel() else scale, scale)
    by_head = [
        scaled(gradient, scale, ctx.dtype) if is_needed else None
        for gradient, scale, is_needed in zip(by_head, scales, ctx.needs_input_grad, strict=False)
    ]
    return *by_head, by_temperature * scale[0] if ctx.needs_input_grad[3] else None, *[None] * 19


def scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * scale in `dtype`, over the gradient if this backward frees the graph that saved it.

    A slice at a time, so that nothing else as large as the head is made: half precision is multiplied in fp32.
    """
    if type(gradient) is not Tensor:
        return (gradient * scale).to(dtype)  # traced, and the compiler's to fuse
    is_last_use = not torch._C._autograd._get_current_graph_task_keep_graph()
    target = gradient if is_last_use and gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    if target is gradient and scale.device.type == "cpu" and (scale == 1).all():
        return gradient
    slices = (x.split(VOCABULARY_SLICE) for x in (gradient, scale.expand_as(gradient), target))
    for part, factor, scaled_part in zip(*slices, strict=True):
        torch.mul(part, factor, out=scaled_part)
    return target


fused_loss = differentiable(fused_linear_op, save_gradients, scale_gradients, results=4)


def fused_linear_tabom_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    steps: Tensor,
    cu_seqlens: Tensor,
    *,
    bias: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    tp_group: dist.ProcessGroup | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    max_chunk_rows: int | None = None,
    fp32_logits: bool = False,
    rank_weight: float = 1.0,
    form: Form = "logistic",
    margin: float = 0.0,
    temperature: float | Tensor = 1.0,
    token_weights: Tensor | None = None,
    num_tokens: float | Tensor | None = None,
    num_sequences: float | Tensor | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    backend: Backend | None = None,
) -> TabomLoss | tuple[TabomLoss, Tensor]:
    """`tabom_loss` of the logits `hidden @ weight.T + bias`, of which only a chunk is ever in memory.

    Loss and gradients are computed together, in chunks of whole sequences; backward scales them by the upstream
    gradient. With `token_weights` its cross-entropy is NELBO's; without a ranking it is `fused_linear_cross_entropy`. A
    batch of more rows than `max_chunk_rows` reads `cu_seqlens` on the host once, unless it is given `lengths` or has a
    trained head in half precision; any other never waits for the device.

    Args:
        hidden: (N, D) hidden states of the rows, fp32, fp64 or half precision.
        weight: (V, D) of the head, in the dtype of `hidden`.
        labels, steps, cu_seqlens: see `tabom_loss`.
        bias: (V,) of the head.
        lengths: rows of each of the B sequences, as the host knows them: the differences of `cu_seqlens`.
        tp_group: the ranks among which the head is sharded over the vocabulary: weight and bias are this rank's rows
            of it, in the order of the ranks, as their gradients will be; all else, labels too, is the same on every
            rank, and so are the loss and the other gradients. Not needed if the weight is a DTensor with Shard(0).
        logit_scale, softcap: for models that change their logits z after the head, to `logit_scale * z` (Cohere;
            Granite divides) and then to `softcap * tanh(z / softcap)` (Gemma's `final_logit_softcapping`); in fp32.
        max_chunk_rows: rows of logits that are in memory at once; default: 256 MiB of them. One ranked sequence with
            more rows than that has its logits computed twice, and so has every batch with more rows than that under a
            trained head in half precision, a slab of the vocabulary at a time in the same memory.
        fp32_logits: keep the sums of a half-precision matmul in fp32 instead of rounding the logits.
        rank_weight, form, margin, temperature, token_weights, num_tokens, num_sequences, ignore_index: see
            `tabom_loss`. The temperature may require a gradient, as may hidden, weight and bias; what does not costs
            nothing.
        return_entropy: also return the entropies of the rows, (N,) nats, detached: they are known anyway.
        backend: "triton", "torch" or "reference"; None takes `backend_for(hidden)`. Under autocast, hidden, weight and
            bias are cast first, as a linear layer's would be.

    Returns:
        fp32 scalars (fp64 for fp64). Without rows the loss is 0 with a gradient of 0.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, device or value is wrong, or the backend does not exist.
    """
    result, entropy = loss_of_head(
        hidden,
        weight,
        bias,
        labels,
        steps,
        cu_seqlens,
        lengths,
        tp_group,
        logit_scale=logit_scale,
        softcap=softcap,
        max_chunk_rows=max_chunk_rows,
        fp32_logits=fp32_logits,
        rank_weight=rank_weight,
        form=form,
        margin=margin,
        temperature=temperature,
        token_weights=token_weights,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        ignore_index=ignore_index,
        backend=backend,
    )
    return (result, entropy) if return_entropy else result


def fused_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    token_weights: Tensor | None = None,
    num_tokens: float | Tensor | None = None,
    bias: Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    max_chunk_rows: int | None = None,
    fp32_logits: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """sum(token_weights * cross_entropy) / num_tokens of the logits `hidden @ weight.T + bias`, a chunk at a time.

    `F.cross_entropy` of a linear layer without its logits: loss and gradients are computed together, and backward
    scales them by the upstream gradient. Without `tp_group` it never waits for the device.

    Args:
        hidden: (N, D) hidden states of the rows, fp32, fp64 or half precision.
        weight: (V, D) of the head, in the dtype of `hidden`.
        labels: (N,) int64, `ignore_index` = a row that does not count.
        token_weights: (N,) floating point, scales each row's cross-entropy (NELBO's 1/t).
        num_tokens: what the sum is divided by, such as the tokens of all micro-batches; default: the rows with a label.
        bias: (V,) of the head.
        tp_group, logit_scale, softcap, max_chunk_rows, fp32_logits, backend: see `fused_linear_tabom_loss`.

    Returns:
        An fp32 scalar in nats (fp64 for fp64). Without labels it is 0 with a gradient of 0.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, device or value is wrong, or the backend does not exist.
    """
    result, _ = loss_of_head(
        hidden,
        weight,
        bias,
        labels,
        None,
        None,
        None,
        tp_group,
        logit_scale=logit_scale,
        softcap=softcap,
        max_chunk_rows=max_chunk_rows,
        fp32_logits=fp32_logits,
        rank_weight=0.0,
        form="logistic",
        margin=0.0,
        temperature=1.0,
        token_weights=token_weights,
        num_tokens=num_tokens,
        num_sequences=1,
        ignore_index=ignore_index,
        backend=backend,
    )
    return result.loss


def loss_of_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    steps: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Sequence[int] | None,
    tp_group: dist.ProcessGroup | None,
    *,
    logit_scale: float,
    softcap: float | None,
    max_chunk_rows: int | None,
    fp32_logits: bool,
    rank_weight: float,
    form: Form,
    margin: float,
    temperature: float | Tensor,
    token_weights: Tensor | None,
    num_tokens: float | Tensor | None,
    num_sequences: float | Tensor | None,
    ignore_index: int,
    backend: Backend | None,
) -> tuple[TabomLoss, Tensor]:
    """The loss and the entropies of the rows; with a `rank_weight` of 0 steps and cu_seqlens may be None."""
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = (x if x is None else x.to(dtype) for x in (hidden, weight, bias))
    sharding = sharding_of(weight, tp_group)
    hidden, weight, bias = replicated(hidden), local(weight), local(bias)
    check_head(hidden, weight, bias)
    columns = weight.shape[0] if sharding is None else sum(sharding.sizes)
    check_labels(labels, hidden.shape[0], columns, hidden.device, ignore_index)
    if cu_seqlens is not None:
        check_sequences(steps, cu_seqlens, hidden.shape[0], hidden.device)
        check_lengths(lengths, cu_seqlens.shape[0] - 1, hidden.shape[0])
    check_form(form, margin, temperature)
    check_denominators(rank_weight, num_tokens, num_sequences)
    check_token_weights(token_weights, hidden.shape[0], hidden.device)
    check_transform(logit_scale, softcap)
    if max_chunk_rows is not None and max_chunk_rows < 1:
        raise ValueError(f"max_chunk_rows={max_chunk_rows}: expected at least 1")
    backend = resolve(backend, hidden)
    refuse_forward_mode(backend, hidden, weight, bias, temperature)
    if num_tokens is None:
        num_tokens = (labels != ignore_index).sum()
    if num_sequences is None:
        num_sequences = 1 if rank_weight == 0 else (count_ordered_pairs(steps, cu_seqlens, backend=backend) > 0).sum()
    if backend == "reference" and sharding is not None:
        raise ValueError("backend='reference': it needs the whole head on every rank; use 'torch'")
    if backend == "reference":
        logits = reference_logits(hidden, weight, bias, fp32_logits)
        logits = reference.transformed(logits, logit_scale, softcap)
        ranking = (rank_weight, form, margin, temperature)
        counts = (token_weights, num_tokens, num_sequences)
        loss = reference_loss(logits, labels, steps, cu_seqlens, *ranking, *counts, ignore_index)
        return loss, reference.softmax_entropy(logits.detach())

    if max_chunk_rows is None:
        widest = weight.shape[0] if sharding is None else max(sharding.sizes)  # the chunks are the same on every rank
        max_chunk_rows = max(1, LOGITS_BUDGET // (widest * (4 if fp32_logits else hidden.itemsize)))
    like = hidden.new_empty(0, dtype=reference.working_dtype(hidden.dtype))
    scalars = (temperature, margin, denominator(num_tokens), denominator(num_sequences))
    temperature, margin, num_tokens, num_sequences = (as_scalar(x, like) for x in scalars)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    loss, cross_entropy, rank, entropy = fused_loss(
        hidden,
        weight,
        bias,
        temperature,
        margin,
        None if rank_weight == 0 else as_scalar(rank_weight, like),
        labels,
        steps,
        cu_seqlens,
        token_weights,
        num_tokens,
        num_sequences,
        lengths,
        form,
        ignore_index,
        logit_scale,
        softcap,
        None if sharding is None else sharding.group_name,
        0 if sharding is None else sharding.first,
        max_chunk_rows,
        fp32_logits,
        wanted,
        backend,
    )
    return TabomLoss(loss, cross_entropy, rank), entropy


def reference_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, fp32_logits: bool) -> Tensor:
    """All (N, V) of them, under autograd."""
    if fp32_logits:
        dtype = reference.working_dtype(hidden.dtype)
        hidden, weight, bias = (x if x is None else x.to(dtype) for x in (hidden, weight, bias))
    return F.linear(hidden, weight, bias)
