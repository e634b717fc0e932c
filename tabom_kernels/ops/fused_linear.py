"""The loss of a linear head from hidden states, without ever holding the logits of all rows."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tabom_kernels.arguments import check_head, check_lengths, check_transform
from tabom_kernels.backends import reference
from tabom_kernels.backends.selection import Backend, load, resolve
from tabom_kernels.ops.derivatives import differentiable, refuse_forward_mode
from tabom_kernels.ops.head import HeadLoss, empty_gradients, loss_of_head, save_gradients, scale_gradients
from tabom_kernels.ops.ranking import Form
from tabom_kernels.ops.row_loss import ROW_LOSSES, TabomArguments, row_loss_inputs
from tabom_kernels.ops.tabom import TabomLoss, reference_loss
from tabom_kernels.ops.vocabulary_parallel import Sharding, local, replicated, sharded_loss, sharding_of

LOGITS_BUDGET = 2**28
"""Bytes of logits in a chunk by default."""


def fused_linear_tabom_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    steps: Tensor | None,
    cu_seqlens: Tensor | None,
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
    sequence_weights: Tensor | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    backend: Backend | None = None,
) -> TabomLoss | tuple[TabomLoss, Tensor]:
    """`tabom_loss` of the logits `hidden @ weight.T + bias`, of which only a chunk is ever in memory.

    Loss and gradients are computed together, in chunks of whole sequences; backward scales them by the upstream
    gradient. With `token_weights` the cross-entropy is NELBO's. Without a ranking it is `fused_linear_cross_entropy`.

    A ranked batch of more rows than `max_chunk_rows` reads `cu_seqlens` on the host once, unless it is given `lengths`.
    Apart from that the Triton backend never waits for the device. In fp64, which is computed by the torch backend, a
    ranking waits for a GPU.

    Args:
        hidden: (N, D) hidden states of the rows, fp32, fp64 or half precision.
        weight: (V, D) of the head, in the dtype of `hidden`.
        labels, steps, cu_seqlens: see `tabom_loss`; the last two may be None if `rank_weight` is 0.
        bias: (V,) of the head.
        lengths: rows of each of the B sequences, as the host knows them: the differences of `cu_seqlens`.
        tp_group: the ranks among which the head is sharded over the vocabulary. Weight and bias, and their gradients,
            are this rank's rows of the head, in the order of the ranks. All other arguments, results and gradients are
            the same on every rank. Not needed if the weight is a DTensor with Shard(0).
        logit_scale, softcap: for models that change their logits z after the head, to `logit_scale * z` (Cohere;
            Granite divides) and then to `softcap * tanh(z / softcap)` (Gemma's `final_logit_softcapping`); in fp32.
        max_chunk_rows: rows of logits that are in memory at once; default: 256 MiB of them. The logits of a ranked
            sequence with more rows than that are computed twice. A trained head in half precision sums its gradient in
            fp32 if the batch has more rows than that.
        fp32_logits: keeps the sums of a half-precision matmul in fp32 instead of rounding the logits.
        rank_weight, form, margin, temperature, token_weights, num_tokens, num_sequences, ignore_index: see
            `tabom_loss`. The temperature may require a gradient, as may hidden, weight and bias; a gradient that is not
            required costs nothing.
        sequence_weights: (B,), see `tabom_loss`.
        return_entropy: also returns the entropies of the rows, (N,) nats, detached.
        backend: "triton", "torch" or "reference"; None takes `backend_for(hidden)`. Under autocast, hidden, weight and
            bias are cast first, as a linear layer's would be.

    Returns:
        fp32 scalars (fp64 for fp64). Without rows the loss is 0 with a gradient of 0.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, device or value is wrong, or the backend does not exist.
    """
    head = LinearHead.of(hidden, weight, bias, tp_group, logit_scale, softcap, max_chunk_rows, fp32_logits)
    ranking = (rank_weight, form, margin, temperature)
    arguments = TabomArguments(
        labels, steps, cu_seqlens, *ranking, token_weights, num_tokens, num_sequences, ignore_index, sequence_weights
    )
    arguments.check(*head.shape, head.hidden.device)
    if lengths is not None:
        check_lengths(lengths, cu_seqlens, head.shape[0])
    backend = resolve(backend, head.hidden)
    refuse_forward_mode(backend, head.hidden, head.weight, head.bias, temperature)
    if backend == "reference":
        logits = head.reference_logits()
        result, entropy = reference_loss(logits, arguments), reference.softmax_entropy(logits.detach())
        return (result, entropy) if return_entropy else result
    labels, temperature, row_tensors = row_loss_inputs(arguments, head.hidden, backend)
    loss, terms, _, entropy = head.loss(f"tabom_{form}", temperature, labels, row_tensors, lengths, backend)
    result = TabomLoss.of(loss, terms, rank_weight)
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

    This is `F.cross_entropy` of a linear layer, without ever holding all of its logits. Loss and gradients are computed
    together, and backward scales them by the upstream gradient. Without `tp_group` it never waits for the device.

    Args:
        hidden: (N, D) hidden states of the rows, fp32, fp64 or half precision.
        weight: (V, D) of the head, in the dtype of `hidden`.
        labels: (N,) int64, `ignore_index` = a row that does not count, whatever its weight is.
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
    result = fused_linear_tabom_loss(
        hidden,
        weight,
        labels,
        None,
        None,
        bias=bias,
        tp_group=tp_group,
        logit_scale=logit_scale,
        softcap=softcap,
        max_chunk_rows=max_chunk_rows,
        fp32_logits=fp32_logits,
        rank_weight=0.0,
        token_weights=token_weights,
        num_tokens=num_tokens,
        ignore_index=ignore_index,
        backend=backend,
    )
    return result.loss


class LinearHead(NamedTuple):
    """A linear layer over hidden states, and how its logits are computed.

    `fused_linear_tabom_loss` documents the fields. `weight` and `bias` are this rank's part of a sharded head.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    sharding: Sharding | None
    logit_scale: float
    softcap: float | None
    max_chunk_rows: int
    fp32_logits: bool

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tp_group: dist.ProcessGroup | None,
        logit_scale: float,
        softcap: float | None,
        max_chunk_rows: int | None,
        fp32_logits: bool,
    ) -> "LinearHead":
        """The head of checked arguments, cast as a linear layer's are under autocast."""
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight, bias = (x if x is None else x.to(dtype) for x in (hidden, weight, bias))
        sharding = sharding_of(weight, tp_group)
        hidden, weight, bias = replicated(hidden), local(weight), local(bias)
        check_head(hidden, weight, bias)
        check_transform(logit_scale, softcap)
        if max_chunk_rows is None:
            widest = weight.shape[0] if sharding is None else max(sharding.sizes)  # the same chunks on every rank
            max_chunk_rows = max(1, LOGITS_BUDGET // (widest * (4 if fp32_logits else hidden.itemsize)))
        elif max_chunk_rows < 1:
            raise ValueError(f"max_chunk_rows={max_chunk_rows}: expected at least 1")
        return cls(hidden, weight, bias, sharding, logit_scale, softcap, max_chunk_rows, fp32_logits)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, V) of the logits, of all ranks."""
        return self.hidden.shape[0], self.weight.shape[0] if self.sharding is None else sum(self.sharding.sizes)

    @property
    def transform(self) -> list[float]:
        """The logit scale and the soft-cap, as far as there are any."""
        if self.softcap is not None:
            return [self.logit_scale, self.softcap]
        return [] if self.logit_scale == 1.0 else [self.logit_scale]

    @property
    def needs_grad(self) -> list[bool]:
        """Whether hidden states, weight and bias need a gradient."""
        tensors = (self.hidden, self.weight, self.bias)
        return [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors]

    def reference_logits(self) -> Tensor:
        """All (N, V) logits, under autograd."""
        if self.sharding is not None:
            raise ValueError("backend='reference': it needs the whole head on every rank; use 'torch'")
        tensors = (self.hidden, self.weight, self.bias)
        if self.fp32_logits:
            dtype = reference.working_dtype(self.hidden.dtype)
            tensors = (x if x is None else x.to(dtype) for x in tensors)
        return reference.transformed(F.linear(*tensors), self.logit_scale, self.softcap)

    def loss(
        self,
        row_loss: str,
        temperature: float | Tensor,
        labels: Tensor,
        row_tensors: Sequence[Tensor],
        lengths: Sequence[int] | None,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss and terms of a row loss, cross-entropies and entropies (N,); the loss is differentiable."""
        inputs = (
            *(self.hidden, self.weight, self.bias, temperature, labels, row_loss, row_tensors, lengths),
            *(self.transform, self.max_chunk_rows, self.fp32_logits, self.needs_grad, backend),
        )
        return fused_linear_loss(*inputs) if self.sharding is None else sharded_loss(*inputs, self.sharding)


@torch.library.custom_op("tabom_kernels::fused_linear_loss", mutates_args=())
def fused_linear_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    labels: Tensor,
    row_loss: str,
    row_tensors: Sequence[Tensor],
    lengths: Sequence[int] | None,
    transform: Sequence[float],
    max_chunk_rows: int,
    fp32_logits: bool,
    needs_grad: Sequence[bool],
    backend_name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The `HeadLoss` of a row loss, which is given by its name in `ROW_LOSSES`, a temperature and its tensors.

    `loss_of_head` documents the other arguments.
    """
    backend = load(backend_name)
    function = ROW_LOSSES[row_loss](backend, temperature, *row_tensors)
    settings = (lengths, transform, max_chunk_rows, fp32_logits, needs_grad)
    return loss_of_head(backend, function, hidden, weight, bias, labels, *settings)


@fused_linear_op.register_fake
def _(hidden: Tensor, weight: Tensor, *arguments: Any) -> HeadLoss:
    _, temperature, _, row_loss, row_tensors, _, _, max_chunk_rows, _, needs_grad, _ = arguments
    dtype = reference.working_dtype(hidden.dtype)
    terms = ROW_LOSSES[row_loss](None, temperature, *row_tensors).number_of_terms
    loss, grad_temperature = (hidden.new_empty((), dtype=dtype) for _ in range(2))
    gradients = empty_gradients(hidden, weight, max_chunk_rows, needs_grad)
    cross_entropy, entropy = (loss.new_empty(hidden.shape[0]) for _ in range(2))
    return HeadLoss(loss, loss.new_empty(terms), cross_entropy, entropy, *gradients, grad_temperature)


fused_linear_loss = differentiable(fused_linear_op, save_gradients, scale_gradients, results=4)
"""Loss, terms, cross-entropies and entropies; forward computes the gradients, and backward scales them."""
