"""The rank loss and its gradients over the pairs of each sequence, in closed form.

The ranked rows of sequences of similar length are padded to one (B, T) tensor, and their pairs are one (B, T, T) tensor
that is computed in chunks of its first row index. Sequences that all have the same length are only reshaped.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tabom_kernels.backends.results import RankLoss
from tabom_kernels.backends.torch.chunks import pair_chunks
from tabom_kernels.backends.torch.threads import in_threads

LINEAR_FROM = 40.0
"""For x of at least this, softplus(x) rounds to x in every dtype, fp64 included."""


class Group(NamedTuple):
    """Sequences (B,) of similar length, padded to T places, and the row (B, T) that stands in each place.

    A place after the end of its sequence has the row -1. `rows` is None if the group holds all rows in their order.
    """

    sequences: Tensor | slice
    rows: Tensor | None
    shape: tuple[int, int]

    def take(self, values: Tensor, padding: float) -> Tensor:
        """(B, T) values of the group's places, from the values (N,) of the rows; `padding` where a place has no row."""
        if self.rows is None:
            return values.reshape(self.shape)
        return values[self.rows].masked_fill_(self.rows < 0, padding)


def trajectory_rank_loss(
    entropy: Tensor, steps: Tensor, cu_seqlens: Tensor, form: str, margin: float | Tensor, temperature: float | Tensor
) -> RankLoss:
    """The rank loss of each sequence and its gradients; see `reference.trajectory_rank_loss`.

    The lengths of the sequences are read on the host.
    """
    is_ranked = steps >= 0
    if not is_ranked.all():
        rows = is_ranked.nonzero().squeeze(1)
        offsets = F.pad(is_ranked.cumsum(0), (1, 0))[cu_seqlens]
        ranked = trajectory_rank_loss(entropy[rows], steps[rows], offsets, form, margin, temperature)
        return ranked._replace(
            grad_entropy=entropy.new_zeros(entropy.shape[0]).index_copy_(0, rows, ranked.grad_entropy)
        )
    settings = (entropy, steps, form, margin, temperature)
    groups = groups_of_similar_length(cu_seqlens, steps.shape[0])
    if len(groups) == 1 and groups[0].rows is None:
        result = rank_loss_of_group(groups[0], *settings)
        return result._replace(grad_entropy=result.grad_entropy.flatten())
    loss, grad_temperature = (entropy.new_zeros(cu_seqlens.shape[0] - 1) for _ in range(2))
    pairs = torch.zeros_like(loss, dtype=torch.int64)
    grad_entropy = entropy.new_zeros(entropy.shape[0])
    for group in groups:
        result = rank_loss_of_group(group, *settings)
        loss[group.sequences], pairs[group.sequences] = result.loss, result.pairs
        grad_temperature[group.sequences] = result.grad_temperature
        is_row = group.rows >= 0
        grad_entropy[group.rows[is_row]] = result.grad_entropy[is_row]
    return RankLoss(loss, pairs, grad_entropy, grad_temperature)


def rank_loss_of_group(
    group: Group, entropy: Tensor, steps: Tensor, form: str, margin: float | Tensor, temperature: float | Tensor
) -> RankLoss:
    """The rank loss of the sequences of a group, and its gradients; the gradient by the entropies is (B, T)."""
    e, s = group.take(entropy, 0.0), group.take(steps, -1)
    if form == "plackett_luce":
        total, by_entropy, by_temperature = plackett_luce_sums(e, s, temperature)
        pairs, terms = count_pairs(s), (s >= 0).sum(1)
    else:
        comes_before = group.take(steps, torch.iinfo(steps.dtype).max)  # padding comes before no row
        total, by_entropy, by_temperature, pairs = pairwise_sums(e, comes_before, s, form, margin, temperature)
        terms = pairs
    terms = terms.to(e.dtype)
    total, by_entropy, by_temperature = total / terms, by_entropy / terms[:, None], by_temperature / terms
    if not pairs.all():  # without a pair the loss is 0, not 0 / 0, even if an entropy is NaN
        for x in (total, by_entropy, by_temperature):
            x[pairs == 0] = 0.0
    return RankLoss(total, pairs, by_entropy, by_temperature)


def groups_of_similar_length(offsets: Tensor, rows: int) -> list[Group]:
    """Groups the sequences by their length rounded down to a power of 2; empty sequences are left out.

    So padding adds at most three times the pairs that there are, however uneven a batch is.
    """
    starts = offsets.tolist()
    sequences, length = len(starts) - 1, rows // max(len(starts) - 1, 1)
    if length and starts == list(range(0, rows + 1, length)):
        return [Group(slice(None), None, (sequences, length))]
    similar: dict[int, list[int]] = {}
    for sequence in range(sequences):
        length = starts[sequence + 1] - starts[sequence]
        if length:
            similar.setdefault(length.bit_length(), []).append(sequence)
    groups = []
    for members in similar.values():
        index = torch.tensor(members, device=offsets.device)
        length = max(starts[sequence + 1] - starts[sequence] for sequence in members)
        row = offsets[index, None] + torch.arange(length, device=offsets.device)
        row = row.masked_fill(row >= offsets[index + 1, None], -1)
        groups.append(Group(index, row, tuple(row.shape)))
    return groups


def pairwise_sums(
    e: Tensor, earlier: Tensor, later: Tensor, form: str, margin: float | Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over the ordered pairs of (B, T) rows: the loss (B,), dE (B, T), dtau (B,) and the number of pairs (B,).

    `earlier` and `later` (B, T) are the steps of a row as the first and as the second one of a pair. A mask of 0 and 1
    is multiplied in, because that takes a tenth of the time of `masked_fill`.
    """

    def sums(chunks: Sequence[slice]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        as_first, others = [], None
        for first in chunks:
            is_pair = earlier[:, first, None] < later[:, None, :]
            is_pair = is_pair.view(torch.uint8).to(e.dtype)  # five times faster than from bool
            x = e[:, first, None] - e[:, None, :]
            if isinstance(margin, Tensor) or margin != 0:
                x += margin
            x *= is_pair  # before the division, after which a difference may be infinite
            if form == "hinge":
                loss = x.relu_()
                slope = loss.sign()
                by_temperature = e.new_zeros(e.shape[0])
            else:
                if isinstance(temperature, Tensor) or temperature != 1:
                    x /= temperature
                loss = F.softplus(x, threshold=LINEAR_FROM).mul_(is_pair)
                slope = x.sigmoid().mul_(is_pair)
                by_temperature = x.mul_(slope).sum((1, 2))
            as_first.append(slope.sum(2))
            part = loss.sum((1, 2)), is_pair.sum((1, 2)).long(), slope.sum(1), by_temperature
            others = part if others is None else added([others, part])
        return as_first, others

    as_first, others = zip(*in_threads(sums, pair_chunks(e)), strict=True)
    total, pairs, as_second, by_temperature = added(others)
    by_entropy = torch.cat([part for share in as_first for part in share], 1) - as_second
    if form == "hinge":
        return total, by_entropy, by_temperature, pairs
    return total, by_entropy / temperature, -by_temperature / temperature, pairs


def plackett_luce_sums(e: Tensor, steps: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the ranked rows of (B, T) rows: the loss (B,), dE (B, T) and dtau (B,).

    Each ranked row has one turn, in which it was chosen among its risk set, the rows of its step and of later steps.
    Entropies enter as their distance to the lowest one of the risk set: only differences matter, and the entropies
    themselves, divided by a small tau, would be too large for fp32.
    """
    is_ranked = steps >= 0

    def sums(turns: Sequence[slice]) -> tuple[Tensor, Tensor, Tensor]:
        total, by_temperature = e.new_zeros(e.shape[0]), e.new_zeros(e.shape[0])
        probabilities = torch.zeros_like(e)
        for turn in turns:
            is_turn = is_ranked[:, turn]
            at_risk = is_turn[:, :, None] & (steps[:, turn, None] <= steps[:, None, :])
            lowest = e[:, None, :].masked_fill(~at_risk, torch.inf).amin(2)
            distance = (e[:, None, :] - lowest[:, :, None]).masked_fill(~at_risk, torch.inf)
            probability = (-distance / temperature).exp()
            normalizer = probability.sum(2).masked_fill(~is_turn, 1.0)
            probability /= normalizer[:, :, None]
            probabilities += probability.sum(1)
            own = (e[:, turn] - lowest).masked_fill(~is_turn, 0.0)
            total += (own / temperature + normalizer.log()).sum(1)
            expected = (probability * distance.masked_fill(~at_risk, 0.0)).sum(2)
            by_temperature += (expected - own).sum(1) / temperature**2
        return total, probabilities, by_temperature

    total, probabilities, by_temperature = added(in_threads(sums, pair_chunks(e)))
    # A row's gradient is 1 for its own turn, minus its probability at each turn for which it was in the risk set. The
    # caller drops the gradients of padding.
    return total, (1 - probabilities) / temperature, by_temperature


def added(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The sums of the results of chunks or threads, always in the same order."""
    return parts[0] if len(parts) == 1 else tuple(sum(part) for part in zip(*parts, strict=True))


def count_ordered_pairs(steps: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(B,) int64 number of pairs (i, j) of each sequence with 0 <= s_i < s_j."""
    pairs = steps.new_zeros(cu_seqlens.shape[0] - 1, dtype=torch.int64)
    for group in groups_of_similar_length(cu_seqlens, steps.shape[0]):
        pairs[group.sequences] = count_pairs(group.take(steps, -1))
    return pairs


def count_pairs(steps: Tensor) -> Tensor:
    """(B,) number of ordered pairs of (B, T) steps, -1 = no row: each row is followed by those beyond its ties."""
    ordered = steps.sort(1).values
    ties_end = torch.searchsorted(ordered, ordered, right=True)
    return (ordered.shape[1] - ties_end).masked_fill_(ordered < 0, 0).sum(1)
