"""Row losses: functions of the cross-entropy and the entropy of each row, with both gradients in closed form.

Every loss of this package has one shape. The statistics of each row of logits go into a row loss, which returns the
loss and its gradients by the statistics, dL/dce and dL/dE; these two numbers a row are all that the gradient of the
logits needs. A row loss may couple the rows of one sequence, as a ranking does. A policy loss is a row loss as well,
because the log-probability of a token is -ce.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tabom_kernels.arguments import (
    FORMS,
    NOT_NEGATIVE,
    check_form,
    check_labels,
    check_scalar,
    check_sequences,
    check_weights,
)
from tabom_kernels.backends.reference import working_dtype
from tabom_kernels.ops.chunks import Chunk, take_rows
from tabom_kernels.ops.derivatives import call_directly
from tabom_kernels.ops.ranking import as_settings, count_op

IGNORE_INDEX = -100
"""Label of a row without a cross-entropy, inside the ops."""


class RowGradients(NamedTuple):
    """What a row loss returns for the n rows of a chunk; the results of all chunks add up.

    The loss is the sum of its `terms` (k,), which are logged one by one. `cross_entropy` and `entropy` (None for zeros)
    are the gradients (n,) of the loss by the statistics, and `temperature` () is its gradient by the temperature (None
    without one).
    """

    terms: Tensor
    cross_entropy: Tensor
    entropy: Tensor | None
    temperature: Tensor | None


class RowLoss(Protocol):
    """A loss of the rows' statistics.

    `cu_seqlens` holds the offsets of the sequences whose rows must be evaluated together, or None if every row stands
    alone. `number_of_terms` is that of the loss's terms.
    """

    cu_seqlens: Tensor | None
    number_of_terms: int

    def __call__(self, chunk: Chunk, cross_entropy: Tensor, entropy: Tensor) -> RowGradients:
        """The loss of the rows of a chunk and its gradients, from their statistics (n,) in nats."""
        ...


class TabomRowLoss:
    """sum(ce_weights * ce) + sum(rank_weights * trajectory_rank_loss(E)); the terms are these sums.

    Args:
        form: of the rank loss.
        backend: the module of a backend, see `backends.selection.load`.
        temperature: of the rank loss, a number or ().
        ce_weights: (N,) weight of each row's cross-entropy, divided by the number of tokens, 0 for an ignored row.
        rank_weights: (B,) weight of each sequence's rank loss, divided by the number of sequences; None without a
            ranking, and then the arguments that follow are None as well.
        steps, cu_seqlens, margin: of the rank loss.
    """

    def __init__(
        self,
        form: str,
        backend: ModuleType,
        temperature: float | Tensor,
        ce_weights: Tensor,
        rank_weights: Tensor | None = None,
        steps: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        margin: float | Tensor | None = None,
    ) -> None:
        self.form, self.backend, self.ce_weights, self.rank_weights = form, backend, ce_weights, rank_weights
        self.steps, self.cu_seqlens, self.margin, self.temperature = steps, cu_seqlens, margin, temperature
        self.number_of_terms = 1 if rank_weights is None else 2

    def __call__(self, chunk: Chunk, cross_entropy: Tensor, entropy: Tensor) -> RowGradients:
        """See `RowLoss`."""
        ce_weights = take_rows(self.ce_weights, chunk.rows)
        ce_sum = (ce_weights * cross_entropy).sum(0, keepdim=True)
        if self.rank_weights is None:
            return RowGradients(ce_sum, ce_weights, None, None)
        first, stop = chunk.sequences.start, chunk.sequences.stop
        offsets = take_rows(self.cu_seqlens, slice(first, stop + 1))
        weights, steps = take_rows(self.rank_weights, chunk.sequences), take_rows(self.steps, chunk.rows)
        if chunk.rows.start > 0:
            offsets = offsets - chunk.rows.start
        rank = self.backend.trajectory_rank_loss(entropy, steps, offsets, self.form, self.margin, self.temperature)
        rank_sum = (weights * rank.loss).sum(0, keepdim=True)
        row_weights = weights.repeat_interleave(offsets.diff(), output_size=entropy.shape[0])
        by_temperature = (weights * rank.grad_temperature).sum()
        return RowGradients(torch.cat([ce_sum, rank_sum]), ce_weights, rank.grad_entropy * row_weights, by_temperature)


ROW_LOSSES: dict[str, Callable[..., RowLoss]] = {f"tabom_{form}": partial(TabomRowLoss, form) for form in FORMS}
"""Row losses by name, called with a backend, a temperature and tensors: an op cannot be given an object."""


class TabomArguments(NamedTuple):
    """The arguments that `tabom_loss` and `fused_linear_tabom_loss` share; `tabom_loss` documents them."""

    labels: Tensor
    steps: Tensor | None
    cu_seqlens: Tensor | None
    rank_weight: float
    form: str
    margin: float
    temperature: float | Tensor
    token_weights: Tensor | None
    num_tokens: float | Tensor | None
    num_sequences: float | Tensor | None
    ignore_index: int
    sequence_weights: Tensor | None = None

    def check(self, rows: int, columns: int, device: torch.device) -> None:
        """Checks the arguments of the loss of (N, V) logits on `device`."""
        check_labels(self.labels, rows, columns, device, self.ignore_index)
        if self.rank_weight != 0 or self.steps is not None or self.cu_seqlens is not None:
            check_sequences(self.steps, self.cu_seqlens, rows, device)
        check_form(self.form, self.margin, self.temperature)
        check_scalar("rank_weight", self.rank_weight, *NOT_NEGATIVE)
        for name, count in (("num_tokens", self.num_tokens), ("num_sequences", self.num_sequences)):
            if count is not None:
                check_scalar(name, count, *NOT_NEGATIVE)
        check_weights("token_weights", self.token_weights, rows, device)
        if self.sequence_weights is not None:
            if self.cu_seqlens is None:
                raise ValueError("sequence_weights: expected None, as cu_seqlens is None")
            check_weights("sequence_weights", self.sequence_weights, self.cu_seqlens.shape[0] - 1, device)


def row_loss_inputs(
    arguments: TabomArguments, like: Tensor, backend: str
) -> tuple[Tensor, float | Tensor, list[Tensor]]:
    """The labels with IGNORE_INDEX, and the temperature and the tensors that make a `TabomRowLoss`.

    Weights are divided by their denominators here, in the working dtype of `like`. An ignored row does not count,
    whatever its token weight is, NaN included.
    """
    labels, token_weights, dtype = arguments.labels, arguments.token_weights, working_dtype(like.dtype)
    temperature, margin, rank_weight = as_settings(like, arguments.temperature, arguments.margin, arguments.rank_weight)
    is_used = labels != arguments.ignore_index
    tokens = is_used.sum().clamp(min=1) if arguments.num_tokens is None else nonzero(arguments.num_tokens)
    weights = is_used.to(dtype) if token_weights is None else token_weights.to(dtype).where(is_used, 0.0)
    tensors = [weights / tokens]
    if arguments.ignore_index != IGNORE_INDEX:
        labels = labels.where(is_used, IGNORE_INDEX)
    if arguments.rank_weight != 0:
        steps, cu_seqlens = arguments.steps, arguments.cu_seqlens
        if arguments.num_sequences is None:
            sequences = (call_directly(count_op, steps, cu_seqlens, backend) > 0).sum().clamp(min=1)
        else:
            sequences = nonzero(arguments.num_sequences)
        if not isinstance(rank_weight, Tensor):  # filled on the device, because a copy would wait for it
            rank_weight = torch.full((), rank_weight, dtype=dtype, device=like.device)
        rank_weights = (rank_weight / sequences).expand(cu_seqlens.shape[0] - 1)
        if arguments.sequence_weights is not None:
            rank_weights = rank_weights * arguments.sequence_weights.to(dtype)
        tensors += [rank_weights, steps, cu_seqlens, margin]
    return labels, temperature, tensors


def nonzero(count: float | Tensor) -> float | Tensor:
    """The denominator itself, or 1 where it is 0, as the sum that it divides is then 0."""
    return count.masked_fill(count == 0, 1) if isinstance(count, Tensor) else count or 1
