"""The closed forms on slices of the vocabulary: a rank's, as tensor parallelism shards the head, or one's own in turn.

Whoever has a slice computes the logits of its columns for all rows. Four numbers a row of each slice,

    m = its best logit      log S with S = sum exp(z - m)      its entropy H      its cross-entropy

(inf if the label is elsewhere) are merged as the chunks of a row are; those of ranks are gathered once. With
d = m_slice - m and U = (log S - H) * S,

    S = sum exp(d) * S_slice        U = sum exp(d) * (U_slice + d * S_slice)        E = log S - U / S

where the 1 of the best slice's S is left out and not subtracted, as everywhere. Then the gradient of each slice's
columns is made from the statistics of the whole row.
"""

from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from tabom_kernels.torch_backend import LOWEST, LogitTransform, VocabularyStatistics


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
    """How a head is sharded over its vocabulary, None if it is not: a DTensor knows, the slices of a group are asked.

    Raises:
        ValueError: it is sharded otherwise, in two ways at once, or has fewer rows than there are ranks.
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
    """A DTensor's own part, differentiable; anything else as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def replicated(hidden: Tensor) -> Tensor:
    """A DTensor's own part, which must be all of it, differentiable; anything else as it is."""
    if is_dtensor(hidden) and not all(placement.is_replicate() for placement in hidden.placements):
        raise ValueError(f"hidden: expected the same on every rank, Replicate(), got {hidden.placements}")
    return local(hidden)


def is_dtensor(tensor: Tensor | None) -> bool:
    """Told without importing them, which takes half a second."""
    return hasattr(tensor, "placements")


def sum_over_ranks(tensor: Tensor, group_name: str) -> None:
    """In place."""
    dist.all_reduce(tensor, group=_resolve_process_group(group_name))


class VocabularySlice(NamedTuple):
    """A backend's closed forms, for columns from `first` on of logits whose other columns are elsewhere.

    Labels are those of the whole vocabulary.
    """

    forms: ModuleType
    first: int

    def vocabulary_statistics(
        self, logits: Tensor, labels: Tensor, ignore_index: int, transform: LogitTransform | None = None
    ) -> VocabularyStatistics:
        """Of these columns alone, from one read of (N, columns) logits; cross-entropies to labels elsewhere are inf."""
        column, is_elsewhere = self.columns_of(labels, logits, ignore_index)
        statistics = self.forms.vocabulary_statistics(logits, column, ignore_index, transform)
        return statistics._replace(cross_entropy=statistics.cross_entropy.masked_fill(is_elsewhere, torch.inf))

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
        """Reads the (N, columns) logits once and writes dL/dlogits to `out`, which may be `logits` itself.

        The statistics are those of whole rows. A row whose label is elsewhere has its first column for a label, and
        that column is mended.
        """
        column, is_elsewhere = self.columns_of(labels, logits, ignore_index)
        z, derivative = logits[:, 0].to(grad_ce.dtype, copy=True), torch.ones_like(grad_ce)
        if transform is not None:
            transform.apply_(z, derivative)
        log_p = (z - statistics.maximum - statistics.log_sum).clamp(min=LOWEST)
        first = grad_ce if grad_entropy is None else grad_ce - grad_entropy * (log_p + statistics.entropy)
        first = (log_p.exp() * first * derivative).to(out.dtype)
        self.forms.vocabulary_gradient(
            logits, column, ignore_index, statistics, grad_ce, grad_entropy, out, upstream, transform
        )
        out[:, 0] = torch.where(is_elsewhere, first, out[:, 0])
        return out

    def columns_of(self, labels: Tensor, logits: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        """(N,) the labels as columns of this slice, 0 if they are not in it, and (N,) whether they are elsewhere."""
        column, is_label = labels - self.first, labels != ignore_index
        is_elsewhere = is_label & ((column < 0) | (column >= logits.shape[1]))
        return column.masked_fill(is_elsewhere, 0).masked_fill(~is_label, ignore_index), is_elsewhere


def merge_slices(slices: list[VocabularyStatistics], labels: Tensor, ignore_index: int) -> VocabularyStatistics:
    """The statistics of rows from those of the slices of their columns."""
    if len(slices) == 1:
        return slices[0]
    ce, entropy, maximum, log_sum = (torch.stack(part) for part in zip(*slices, strict=True))
    m, best = maximum.max(0)
    is_best = torch.arange(len(slices), device=m.device)[:, None] == best
    is_nothing = (maximum == -torch.inf) & (m > -torch.inf)  # all of the slice is -inf, but not all of the row
    d, total = maximum - m, log_sum.exp()
    label = (d + (log_sum - ce)).masked_fill(is_nothing, -torch.inf).amax(0)
    share = d.exp()
    rest = torch.where(is_best, log_sum.expm1(), share * total).masked_fill(is_nothing, 0.0).sum(0)
    weighted = (share * ((log_sum - entropy) * total + d * total)).masked_fill(is_nothing, 0.0).sum(0)
    log_sum = rest.log1p()
    ce = (log_sum - label).masked_fill(labels == ignore_index, 0.0)
    return VocabularyStatistics(ce, log_sum - weighted / (1 + rest), m, log_sum)


def merge_ranks(own: VocabularyStatistics, labels: Tensor, ignore_index: int, group_name: str) -> VocabularyStatistics:
    """The same from the slices that the ranks of a group have: 4 numbers a row are gathered from each."""
    own, group = torch.stack(own), _resolve_process_group(group_name)
    gathered = own.new_empty(group.size() * len(own), own.shape[1])
    dist.all_gather_into_tensor(gathered, own, group=group)
    slices = [VocabularyStatistics(*part.unbind()) for part in gathered.split(len(own))]
    return merge_slices(slices, labels, ignore_index)
