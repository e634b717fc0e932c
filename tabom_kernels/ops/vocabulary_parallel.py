"""The fused linear loss with a head that is sharded over the vocabulary, as tensor parallelism does it.

Every rank computes the logits of its columns for all rows. Of each row and rank four numbers are gathered,

    m = the largest logit      log S with S = sum exp(z - m)      the entropy H      the cross-entropy

(inf if the label is on another rank), and merged to the statistics of the whole row. With d = m_rank - m and
U = (log S - H) * S of a rank,

    S = sum exp(d) * S_rank        U = sum exp(d) * (U_rank + d * S_rank)        E = log S - U / S

where the 1 of the largest logit is left out of S and not subtracted, as in every backend. Each rank computes the
gradient of its columns from the statistics of the whole row. `ops.head` does everything else: `ShardedVocabulary` has
the functions of a backend, so the loop over chunks is the same.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.distributed.distributed_c10d import _resolve_process_group

from tabom_kernels.backends.results import LogitTransform, VocabularyStatistics
from tabom_kernels.backends.selection import load
from tabom_kernels.ops.head import loss_of_head, save_gradients, scale_gradients
from tabom_kernels.ops.row_loss import ROW_LOSSES

LOWEST = -1e4
"""Replaces a log-probability of -inf: exp(LOWEST) is 0, and 0 * LOWEST is 0."""


class Sharding(NamedTuple):
    """How many rows of the head each rank of a group has, in their order, and which rank this is."""

    sizes: list[int]
    rank: int
    group_name: str

    @property
    def first(self) -> int:
        """The column of the vocabulary that is this rank's first."""
        return sum(self.sizes[: self.rank])


def sharding_of(weight: Tensor, tp_group: dist.ProcessGroup | None) -> Sharding | None:
    """How a head is sharded over its vocabulary; None if it is not.

    A DTensor holds this itself. In a `tp_group` the ranks exchange the sizes of their parts.

    Raises:
        ValueError: the head is sharded along another dimension or in two ways at once, or it has fewer rows than there
            are ranks.
    """
    if is_dtensor(weight):
        from torch.distributed.tensor import Shard

        sharded = [i for i, placement in enumerate(weight.placements) if not placement.is_replicate()]
        if tp_group is not None:
            raise ValueError("tp_group: expected None, as weight is a DTensor, which has its own group")
        if not sharded:
            return None
        if len(sharded) > 1 or weight.placements[sharded[0]] != Shard(0):
            raise ValueError(
                f"weight: expected a DTensor sharded once and over the vocabulary, Shard(0), got {weight.placements}"
            )
        group = weight.device_mesh.get_group(sharded[0])
        width = -(-weight.shape[0] // group.size())
        sizes = [min(width, max(0, weight.shape[0] - rank * width)) for rank in range(group.size())]
    elif tp_group is not None:
        group = tp_group
        sizes = torch.empty(group.size(), dtype=torch.int64, device=weight.device)
        dist.all_gather_into_tensor(sizes, sizes.new_tensor([weight.shape[0]]), group=group)
        sizes = sizes.tolist()
    else:
        return None
    if 0 in sizes:
        raise ValueError(f"weight: {sum(sizes)} rows on {len(sizes)} ranks, {sizes}; expected at least one on each")
    return Sharding(sizes, dist.get_rank(group), group.group_name)


def local(tensor: Tensor | None) -> Tensor | None:
    """The local part of a DTensor, differentiable; another tensor is returned unchanged."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def replicated(hidden: Tensor) -> Tensor:
    """The local tensor of a replicated DTensor, differentiable; another tensor is returned unchanged.

    Raises:
        ValueError: the DTensor is not replicated.
    """
    if is_dtensor(hidden) and not all(placement.is_replicate() for placement in hidden.placements):
        raise ValueError(f"hidden: expected the same on every rank, Replicate(), got {hidden.placements}")
    return local(hidden)


def is_dtensor(tensor: Tensor | None) -> bool:
    """Whether a tensor is a DTensor. The class is not imported, because its import takes half a second."""
    return hasattr(tensor, "placements")


class ShardedVocabulary(NamedTuple):
    """A backend for one rank's columns, whose first one is `first_column`; its statistics are those of whole rows.

    Labels are columns of the whole vocabulary. Without a group the statistics are those of the rank's columns alone.
    """

    backend: ModuleType
    first_column: int
    group_name: str | None

    def vocabulary_statistics(
        self, logits: Tensor, labels: Tensor, ignore_index: int, transform: LogitTransform | None = None
    ) -> VocabularyStatistics:
        """See `backends.torch.statistics`; (N, columns) logits."""
        column, is_elsewhere = self.columns_of(labels, logits, ignore_index)
        own = self.backend.vocabulary_statistics(logits, column, ignore_index, transform)
        own = own._replace(cross_entropy=own.cross_entropy.masked_fill(is_elsewhere, torch.inf))
        return own if self.group_name is None else merge_ranks(own, labels, ignore_index, self.group_name)

    def vocabulary_gradient(
        self,
        logits: Tensor,
        labels: Tensor,
        ignore_index: int,
        statistics: VocabularyStatistics,
        grad_ce: Tensor,
        grad_entropy: Tensor | None,
        out: Tensor,
        upstream: None = None,
        transform: LogitTransform | None = None,
    ) -> Tensor:
        """See `backends.torch.statistics`; the statistics are those of whole rows.

        A row whose label is on another rank is computed as if its label were the first column, and then the gradient of
        that column is replaced.
        """
        column, is_elsewhere = self.columns_of(labels, logits, ignore_index)
        z, derivative = logits[:, 0].to(grad_ce.dtype, copy=True), torch.ones_like(grad_ce)
        if transform is not None:
            transform.apply_(z, derivative)
        log_p = (z - statistics.maximum - statistics.log_sum).clamp(min=LOWEST)
        first = grad_ce if grad_entropy is None else grad_ce - grad_entropy * (log_p + statistics.entropy)
        first = (log_p.exp() * first * derivative).to(out.dtype)
        self.backend.vocabulary_gradient(
            logits, column, ignore_index, statistics, grad_ce, grad_entropy, out, upstream, transform
        )
        out[:, 0] = torch.where(is_elsewhere, first, out[:, 0])
        return out

    def columns_of(self, labels: Tensor, logits: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        """(N,) the labels as columns of this rank, 0 if they are elsewhere, and (N,) whether they are."""
        column, is_label = labels - self.first_column, labels != ignore_index
        is_elsewhere = is_label & ((column < 0) | (column >= logits.shape[1]))
        return column.masked_fill(is_elsewhere, 0).masked_fill(~is_label, ignore_index), is_elsewhere


def merge_slices(slices: list[VocabularyStatistics], labels: Tensor, ignore_index: int) -> VocabularyStatistics:
    """The statistics of whole rows from those of slices of their columns."""
    if len(slices) == 1:
        return slices[0]
    ce, entropy, maximum, log_sum = (torch.stack(part) for part in zip(*slices, strict=True))
    m, best = maximum.max(0)
    is_best = torch.arange(len(slices), device=m.device)[:, None] == best
    is_nothing = (maximum == -torch.inf) & (m > -torch.inf)  # the slice is all -inf, and the row is not
    d, total = maximum - m, log_sum.exp()
    label = (d + (log_sum - ce)).masked_fill(is_nothing, -torch.inf).amax(0)
    share = d.exp()
    sum_without_max = torch.where(is_best, log_sum.expm1(), share * total).masked_fill(is_nothing, 0.0).sum(0)
    weighted = (share * ((log_sum - entropy) * total + d * total)).masked_fill(is_nothing, 0.0).sum(0)
    log_sum = sum_without_max.log1p()
    ce = (log_sum - label).masked_fill(labels == ignore_index, 0.0)
    return VocabularyStatistics(ce, log_sum - weighted / (1 + sum_without_max), m, log_sum)


def merge_ranks(own: VocabularyStatistics, labels: Tensor, ignore_index: int, group_name: str) -> VocabularyStatistics:
    """The statistics of whole rows from those of the ranks' columns: 4 numbers a row are gathered from each rank."""
    own, group = torch.stack(own), _resolve_process_group(group_name)
    gathered = own.new_empty(group.size() * len(own), own.shape[1])
    dist.all_gather_into_tensor(gathered, own, group=group)
    slices = [VocabularyStatistics(*part.unbind()) for part in gathered.split(len(own))]
    return merge_slices(slices, labels, ignore_index)


@_disable_dynamo  # torch.compiler.disable would import torch._dynamo, and with it Triton, together with this module
def sharded_loss(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `fused_linear_loss` returns, from its inputs and a `Sharding`; it is not compiled."""
    return ShardedLoss.apply(*inputs)


class ShardedLoss(torch.autograd.Function):
    """`loss_of_head` of one rank's columns; the ranks' gradients of the hidden states are summed."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        hidden, weight, bias, temperature, labels, row_loss, row_tensors, *settings, name, sharding = inputs
        backend = load(name)
        function = ROW_LOSSES[row_loss](backend, temperature, *row_tensors)
        vocabulary = ShardedVocabulary(backend, sharding.first, sharding.group_name)
        result = loss_of_head(vocabulary, function, hidden, weight, bias, labels, *settings)
        if result.grad_hidden.numel():
            dist.all_reduce(result.grad_hidden, group=_resolve_process_group(sharding.group_name))
        save_gradients(ctx, inputs, result)
        return result[:4]

    backward = staticmethod(scale_gradients)
