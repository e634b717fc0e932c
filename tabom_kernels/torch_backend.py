"""Closed forms in PyTorch, without autograd: for the CPU and every other device.

The vocabulary is read a chunk of rows at a time, in buffers that are used again, so that the fp32 copies of a chunk
stay in the cache; on a CPU each thread has chunks of its own. With d = z - max z, S' = sum exp(d) without the best
token and U = sum exp(d) * d of a row z,

    lse = max z + log1p(S')        E = log1p(S') - U / (1 + S')        ce = log1p(S') - d_y
    dz  = p * (a - g * (log p + E)) - a * [column == y]        for a = dL/dce, g = dL/dE.

`max` and `log1p(S')` are kept apart: at |z| ~ 1e4 their fp32 sum has lost three digits. S' is a sum of its own where it
is small, as the difference of 1 + 1e-12 and 1 is nothing in fp32.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tabom_kernels.reference import draw, working_dtype
from tabom_kernels.threads import in_threads, thread_count

CHUNK_ELEMENTS = 2**19
"""Of a chunk of logits, or of pairs, for each core: two fp32 buffers take 4 MiB, still in a cache; with smaller ones
threads would wait for the GIL as long as they compute."""

NUCLEUS = 1024
"""Of the most probable tokens, how many top-p looks at before it sorts them all."""

CERTAIN = 1 / 16
"""Below this, S' is added up by itself; above, 1 + S' less 1 has six digits left in fp32."""

LOWEST = -1e4
"""Stands for d = -inf: exp(LOWEST) is exactly 0 in every dtype, and 0 * LOWEST is not NaN."""


class VocabularyStatistics(NamedTuple):
    """Per row (N,), nats. `cross_entropy` is None without labels; the last two are what the gradient needs."""

    cross_entropy: Tensor | None
    entropy: Tensor
    maximum: Tensor
    log_sum: Tensor


class LogitTransform(NamedTuple):
    """softcap * tanh(scale * z / softcap), or scale * z, of every logit z as it is read: it rises with z."""

    scale: float = 1.0
    softcap: float | None = None

    def apply_(self, z: Tensor, derivative: Tensor | None = None) -> Tensor:
        """Over z; `derivative`, of the same shape, is written."""
        if self.softcap is None:
            if derivative is not None:
                derivative.fill_(self.scale)
            return z.mul_(self.scale)
        z.mul_(self.scale / self.softcap).tanh_()
        if derivative is not None:
            torch.mul(z, z, out=derivative).neg_().add_(1.0).mul_(self.scale)
        return z.mul_(self.softcap)


def vocabulary_statistics(
    logits: Tensor, labels: Tensor | None, ignore_index: int, transform: LogitTransform | None = None
) -> VocabularyStatistics:
    """Reads (N, V) logits once; with a `transform` the statistics are those of the transformed logits."""
    rows, dtype = logits.shape[0], working_dtype(logits.dtype)
    maximum, rest, weighted, below_best = (logits.new_empty(rows, dtype=dtype) for _ in range(4))
    label = None if labels is None else labels.masked_fill(labels == ignore_index, 0)

    def read(chunks: Iterator[RowChunk]) -> None:
        for chunk, d, p in chunks:
            d.copy_(logits[chunk])
            if transform is not None:
                transform.apply_(d)
            torch.amax(d, -1, out=maximum[chunk])
            d.sub_(maximum[chunk, None])
            if label is not None:
                below_best[chunk] = d.gather(1, label[chunk, None]).squeeze(1)
            torch.exp(d.clamp_(min=LOWEST), out=p)
            total = p.sum(-1) - 1
            certain = total < CERTAIN
            if not logits.is_cpu or certain.any():  # another device would wait for the host
                total = torch.where(certain, p.masked_fill_(d == 0, 0.0).sum(-1), total)
            rest[chunk] = total
            torch.sum(p.mul_(d), -1, out=weighted[chunk])

    in_threads(read, row_chunks(logits))
    log_sum = rest.log1p()
    entropy = log_sum - weighted / (1 + rest)
    if labels is None:
        return VocabularyStatistics(None, entropy, maximum, log_sum)
    ce = (log_sum - below_best).masked_fill_(labels == ignore_index, 0.0)
    return VocabularyStatistics(ce, entropy, maximum, log_sum)


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
    """Reads (N, V) logits once and writes dL/dlogits to `out` (N, V) once; `out` may be `logits` itself.

    Args:
        grad_ce, grad_entropy: (N,) dL/dce and dL/dE of any stride, None for zero.
        upstream: () that multiplies both.
        transform: the one of the statistics; the gradient is by the logits before it.
    """
    a = torch.zeros_like(statistics.entropy) if grad_ce is None else grad_ce.clone()
    g = torch.zeros_like(statistics.entropy) if grad_entropy is None else grad_entropy
    if upstream is not None:
        a, g = a * upstream, g * upstream
    if labels is not None:
        a.masked_fill_(labels == ignore_index, 0.0)
        label = labels.masked_fill(labels == ignore_index, 0)
        # p - 1 of a certain label is lost when p is rounded: its column is computed by itself and written last.
        z, derivative = logits.gather(1, label[:, None]).squeeze(1).to(a.dtype), torch.ones_like(a)
        if transform is not None:
            transform.apply_(z, derivative)
        log_p = (z - statistics.maximum - statistics.log_sum).clamp(min=LOWEST)
        dz_label = (a * log_p.expm1() - g * log_p.exp() * (log_p + statistics.entropy)) * derivative
    slope, at_zero = -g, a - g * statistics.entropy

    def write(chunks: Iterator[RowChunk]) -> None:
        for chunk, log_p, dz, *derivative in chunks:
            log_p.copy_(logits[chunk])
            if transform is not None:
                transform.apply_(log_p, *derivative)
            log_p.sub_(statistics.maximum[chunk, None]).sub_(statistics.log_sum[chunk, None])
            torch.exp(log_p.clamp_(min=LOWEST), out=dz)
            dz.mul_(log_p.mul_(slope[chunk, None]).add_(at_zero[chunk, None]))
            if transform is not None:
                dz.mul_(*derivative)
            if labels is not None:
                dz.scatter_(1, label[chunk, None], dz_label[chunk, None])
            out[chunk] = dz

    in_threads(write, row_chunks(logits, buffers=2 if transform is None else 3))
    unused = (a == 0) & (g == 0)
    return out.index_fill_(0, unused.nonzero().squeeze(1), 0.0)  # their logits may be NaN


class RankLoss(NamedTuple):
    """(B,) loss and ordered pairs of each sequence; its gradient by the entropies of its rows (N,), by tau (B,)."""

    loss: Tensor
    pairs: Tensor
    grad_entropy: Tensor
    grad_temperature: Tensor


def trajectory_rank_loss(
    entropy: Tensor, steps: Tensor, cu_seqlens: Tensor, form: str, margin: float | Tensor, temperature: float | Tensor
) -> RankLoss:
    """Loss and gradients over the pairs of ranked rows, sequences of similar length together."""
    pairs = count_ordered_pairs(steps, cu_seqlens)
    loss, grad_temperature = (torch.zeros_like(pairs, dtype=entropy.dtype) for _ in range(2))
    grad_entropy = torch.zeros_like(entropy, memory_format=torch.contiguous_format)
    sums = plackett_luce_sums if form == "plackett_luce" else pairwise_sums
    for sequences, rows in sequences_alike(steps, cu_seqlens, pairs):
        is_row = rows >= 0
        padded = entropy[rows].masked_fill(~is_row, 0.0), steps[rows].masked_fill(~is_row, -1)
        total, by_entropy, by_temperature, terms = sums(*padded, form, margin, temperature)
        loss[sequences] = total / terms
        grad_entropy[rows[is_row]] = (by_entropy / terms[:, None])[is_row]
        grad_temperature[sequences] = by_temperature / terms
    return RankLoss(loss, pairs, grad_entropy, grad_temperature)


class WeightedLoss(NamedTuple):
    """Scalars, nats: the whole loss and its two terms; its gradients by ce (N,), E (N,) or None, and tau ()."""

    loss: Tensor
    cross_entropy: Tensor
    rank: Tensor
    grad_ce: Tensor
    grad_entropy: Tensor | None
    grad_temperature: Tensor


def weighted_loss(
    cross_entropy: Tensor,
    entropy: Tensor,
    labels: Tensor,
    ignore_index: int,
    token_weights: Tensor | None,
    num_tokens: float | Tensor | None,
    steps: Tensor,
    cu_seqlens: Tensor,
    form: str,
    margin: float | Tensor,
    temperature: float | Tensor,
    rank_weight: float | Tensor | None,
    num_sequences: float | Tensor | None,
) -> WeightedLoss:
    """Both means and their sum, CE alone without a `rank_weight`. A denominator of None is counted, 0 counts as 1."""
    is_used = labels != ignore_index
    weights = cross_entropy.new_ones(()) if token_weights is None else token_weights.to(cross_entropy.dtype)
    weights = weights.expand_as(cross_entropy).masked_fill(~is_used, 0.0)
    tokens = denominator(is_used.sum().to(cross_entropy.dtype) if num_tokens is None else num_tokens)
    mean = (cross_entropy * weights).sum() / tokens
    grad_ce = weights / tokens
    if rank_weight is None:
        return WeightedLoss(mean.clone(), mean, torch.zeros_like(mean), grad_ce, None, torch.zeros_like(mean))
    rank = trajectory_rank_loss(entropy, steps, cu_seqlens, form, margin, temperature)
    sequences = denominator((rank.pairs > 0).sum().to(mean.dtype) if num_sequences is None else num_sequences)
    rank_mean, factor = rank.loss.sum() / sequences, rank_weight / sequences
    grads = (grad_ce, rank.grad_entropy * factor, rank.grad_temperature.sum() * factor)
    return WeightedLoss(mean + rank_weight * rank_mean, mean, rank_mean, *grads)


def denominator(count: float | Tensor) -> float | Tensor:
    """What to divide a sum by that is 0 when `count` is 0."""
    return count.masked_fill(count == 0, 1) if isinstance(count, Tensor) else count or 1


def sequences_alike(steps: Tensor, cu_seqlens: Tensor, pairs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Sequences (b,) that have a pair, and their ranked rows (b, T), -1 in the padding.

    The numbers of ranked rows of those that come together have the same power of 2 below them: padding makes at most
    four times the pairs that exist, however uneven the batch is.
    """
    ranked = steps >= 0
    rows = ranked.nonzero().squeeze(1)
    offsets = F.pad(ranked.cumsum(0), (1, 0))[cu_seqlens.long()]
    power = offsets.diff().double().frexp().exponent.masked_fill(pairs == 0, 0)
    for exponent in power.unique().tolist():
        if exponent > 0:
            sequences = (power == exponent).nonzero().squeeze(1)
            index = offsets[sequences, None] + torch.arange(2**exponent, device=steps.device)
            padding = index >= offsets[sequences + 1, None]
            padded = rows[index.masked_fill(padding, 0)].masked_fill(padding, -1)
            yield sequences, padded[:, : int((~padding).sum(1).max())]


def pairwise_sums(
    e: Tensor, steps: Tensor, form: str, margin: float | Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over the ordered pairs: loss (B,), dE (B, T), dtau (B,) and the number of pairs (B,)."""

    def sums(chunks: Sequence[slice]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        total, grad_temperature = e.new_zeros(e.shape[0]), e.new_zeros(e.shape[0])
        count = torch.zeros(e.shape[0], dtype=torch.int64, device=e.device)
        grad = torch.zeros_like(e)
        for first in chunks:
            is_pair = ordered_pairs(steps, first)
            x = e[:, first, None] - e[:, None, :] + margin
            if form == "hinge":
                loss, slope = x.relu(), (x > 0).to(e.dtype)
            else:
                loss, slope = -F.logsigmoid(-x / temperature), (x / temperature).sigmoid() / temperature
                grad_temperature -= (slope * x).masked_fill(~is_pair, 0.0).sum((1, 2)) / temperature
            slope = slope.masked_fill(~is_pair, 0.0)
            total += loss.masked_fill(~is_pair, 0.0).sum((1, 2))
            grad[:, first] += slope.sum(2)
            grad -= slope.sum(1)
            count += is_pair.sum((1, 2))
        return total, grad, grad_temperature, count

    return added(in_threads(sums, pair_chunks(e)))


def plackett_luce_sums(
    e: Tensor, steps: Tensor, form: str, margin: float | Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over the ranked rows: loss (B,), dE (B, T), dtau (B,) and the number of rows (B,).

    Entropies enter as their distance to the lowest one at risk: over a small tau they are too large for fp32, and only
    their differences matter.
    """
    ranked = steps >= 0

    def sums(turns: Sequence[slice]) -> tuple[Tensor, Tensor, Tensor]:
        total, grad_temperature = e.new_zeros(e.shape[0]), e.new_zeros(e.shape[0])
        probabilities = torch.zeros_like(e)
        for turn in turns:
            is_turn = ranked[:, turn]
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
            grad_temperature += (expected - own).sum(1) / temperature**2
        return total, probabilities, grad_temperature

    total, probabilities, grad_temperature = added(in_threads(sums, pair_chunks(e)))
    # 1 for each row's own turn, less its probability at every turn it could have had
    return total, (ranked.to(e.dtype) - probabilities) / temperature, grad_temperature, ranked.sum(1)


def added(parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The sums of threads as one, always in the same order."""
    return tuple(sum(of_threads) for of_threads in zip(*parts, strict=True))


def count_ordered_pairs(steps: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(B,) int64: sorted by sequence and step, a row comes before all that follow its ties."""
    rows = torch.arange(steps.shape[0], device=steps.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), rows.to(cu_seqlens.dtype), right=True)
    order = steps.argsort()
    order = order[sequence[order].argsort(stable=True)]
    s = steps[order]
    begins = F.pad((s.diff() != 0) | (sequence.diff() != 0), (1, 0), value=True)
    ties_begin = begins.nonzero().squeeze(1)
    ties_end = F.pad(ties_begin[1:], (0, 1), value=steps.shape[0])[begins.cumsum(0) - 1]
    later = (cu_seqlens[1:].long()[sequence] - ties_end).masked_fill(s < 0, 0)
    return F.pad(later.cumsum(0), (1, 0))[cu_seqlens.long()].diff()


def unmask_statistics(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, keys: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token, probability, margin and entropy, each (N,); greedy reads the logits once, and keys are not used."""
    rows, dtype = logits.shape[0], working_dtype(logits.dtype)
    token = logits.new_empty(rows, dtype=torch.int64)
    probability, margin, entropy = (logits.new_empty(rows, dtype=dtype) for _ in range(3))

    def read(chunks: Iterator[RowChunk]) -> None:
        for chunk, d, p in chunks:
            best, best_token = d.copy_(logits[chunk]).max(-1, keepdim=True)
            token[chunk] = best_token.squeeze(1)
            if temperature > 0:
                weight = torch.exp(torch.sub(d, best, out=p).div_(temperature), out=p)
                thresholds = filter_thresholds(d, temperature, top_k, top_p)
                if thresholds is not None:
                    weight.masked_fill_(d < thresholds[:, None], 0.0)
                token[chunk] = draw(weight, keys[chunk])
            torch.exp(d.sub_(best).clamp_(min=LOWEST), out=p)
            rest = p.scatter_(1, best_token, 0.0).sum(-1)
            second = p.amax(-1)  # relative to the best
            margin[chunk] = (1 - second) / (1 + rest)
            probability[chunk] = d.gather(1, token[chunk, None]).squeeze(1).exp_() / (1 + rest)
            entropy[chunk] = rest.log1p() - p.mul_(d).sum(-1) / (1 + rest)

    in_threads(read, row_chunks(logits))
    return token, probability, margin, entropy


def filter_thresholds(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor | None:
    """(N,) the lowest logit of each row that top-k (below V), and then top-p (below 1), keeps; None without filters."""
    if top_p is None:
        return None if top_k is None else logits.topk(top_k).values[:, -1]
    ordered = logits.topk(min(max(top_k or 0, NUCLEUS), logits.shape[1])).values
    best, worst_kept = ordered[:, :1], -torch.inf if top_k is None else ordered[:, top_k - 1, None]

    def weights(z: Tensor) -> Tensor:
        d = z.to(working_dtype(z.dtype)) - best
        return d.div_(temperature).exp_().masked_fill_(z < worst_kept, 0.0)

    # What is kept is mostly a small part of the vocabulary: only if the best are not enough, all are sorted.
    mass = top_p * weights(logits).sum(-1, keepdim=True)
    if (weights(ordered).sum(-1, keepdim=True) < mass).any():
        ordered = logits.sort(descending=True).values
    weight = weights(ordered)
    dropped = (weight.cumsum(-1) - weight >= mass) | (ordered < worst_kept)
    return ordered.masked_fill(dropped, torch.inf).amin(-1)


RowChunk = tuple[slice | Tensor, ...]
"""Rows, and buffers of the working dtype for them."""


def row_chunks(logits: Tensor, buffers: int = 2) -> list[Iterator[RowChunk]]:
    """The chunks of (N, V) logits, for each thread: each takes the next one, in the same memory every time."""
    rows, columns = logits.shape
    threads = threads_for(logits.device, logits.numel(), rows)
    size = max(1, min(round(chunk_elements(logits.device, threads) / columns), ceil_div(rows, threads)))
    starts = iter(range(0, rows, size))

    def chunks(*memory: Tensor) -> Iterator[RowChunk]:
        for start in starts:
            stop = min(start + size, rows)
            yield slice(start, stop), *(buffer[: stop - start] for buffer in memory)

    def buffer() -> Tensor:
        return logits.new_empty(min(size, rows), columns, dtype=working_dtype(logits.dtype))

    return [chunks(*(buffer() for _ in range(buffers))) for _ in range(threads)]


def pair_chunks(padded: Tensor) -> list[list[slice]]:
    """Slices of the first index of the (B, T, T) pairs, for each thread its own."""
    rows = padded.shape[1]
    threads = threads_for(padded.device, padded.numel() * rows, rows)
    size = max(1, chunk_elements(padded.device, threads) // max(padded.numel(), 1))
    bounds = [rows * i // threads for i in range(threads + 1)]
    return [
        [slice(start, min(start + size, end)) for start in range(begin, end, size)] for begin, end in pairwise(bounds)
    ]


def threads_for(device: torch.device, elements: int, rows: int) -> int:
    """How many threads take chunks of their own; one off the CPU, and for little work, whose ops all cores share.

    To wake them takes 150 µs, as long as the ops of 2^17 elements do.
    """
    is_much = device.type == "cpu" and elements > CHUNK_ELEMENTS // 2 and rows >= thread_count()
    return thread_count() if is_much else 1


def chunk_elements(device: torch.device, threads: int) -> int:
    """Of a chunk for one of so many threads: what suits its cores' caches on a CPU, and 64 MiB of fp32 elsewhere."""
    return CHUNK_ELEMENTS * (torch.get_num_threads() // threads) if device.type == "cpu" else 2**24


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def ordered_pairs(steps: Tensor, first: slice) -> Tensor:
    """(B, t, T) whether (i, j) is an ordered pair: 0 <= s_i < s_j, for i in `first`."""
    earlier = steps[:, first, None]
    return (earlier >= 0) & (earlier < steps[:, None, :])
