"""The specification: naive PyTorch under autograd, in the dtype of its input (half precision in fp32).

This code is simple and not fast. Every other backend is tested against it, in fp64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tabom_kernels.noise import SEGMENT, exponential_noise


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the computation: fp64 for fp64, and fp32 for every other dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def softmax_entropy(logits: Tensor) -> Tensor:
    """(N,) Shannon entropy (nats) of the softmax of (N, V) logits; a logit of -inf contributes 0."""
    d, log_sum = shifted(logits)
    return log_sum - (d.exp() * d.masked_fill(d == -torch.inf, 0.0)).sum(-1) / log_sum.exp()


def cross_entropy_with_entropy(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(N,) cross-entropy (nats), 0 where the label is `ignore_index`, and (N,) entropy (nats)."""
    d, log_sum = shifted(logits)
    ignored = labels == ignore_index
    ce = log_sum - d.gather(1, labels.masked_fill(ignored, 0)[:, None]).squeeze(1)
    return ce.masked_fill(ignored, 0.0), softmax_entropy(logits)


def shifted(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(N, V) logits minus the largest logit of their row, and (N,) the logarithm of the sum of their exponentials.

    log1p of the sum without the largest one keeps rows exact that are certain to 1e-12, which log_softmax does not.
    Rows of -inf alone and rows with inf have no softmax and give NaN.
    """
    logits = logits.to(working_dtype(logits.dtype))
    best, token = logits.max(-1, keepdim=True)
    is_best = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, token, True)
    d = logits - torch.where(best.isinf(), torch.nan, best)
    d = torch.where(is_best, d.detach(), d)  # it is always 0, so no gradient flows through it
    return d, d.exp().masked_fill(is_best, 0.0).sum(-1).log1p()


def transformed(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """softcap * tanh(scale * logits / softcap), or scale * logits without a soft-cap; some models do this."""
    if (scale, softcap) == (1.0, None):
        return logits
    logits = logits.to(working_dtype(logits.dtype)) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def count_ordered_pairs(steps: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(B,) int64 number of pairs (i, j) of each sequence with 0 <= s_i < s_j."""
    counts = [earlier_than(s).sum() for s in sequences(steps, cu_seqlens)]
    return torch.stack(counts) if counts else cu_seqlens.new_zeros(0, dtype=torch.int64)


def trajectory_rank_loss(
    entropy: Tensor, steps: Tensor, cu_seqlens: Tensor, form: str, margin: float, temperature: float | Tensor
) -> Tensor:
    """(B,) rank loss of each sequence (arXiv 2605.11854), 0 where it has no ordered pair.

    Mean over the ordered pairs of softplus((E_i - E_j + margin) / tau) or relu(E_i - E_j + margin); or mean over the
    ranked rows i of E_i / tau + log sum_{j: s_j >= s_i} exp(-E_j / tau), Plackett-Luce with Breslow's ties.
    """
    losses = []
    for e, s in zip(sequences(entropy, cu_seqlens), sequences(steps, cu_seqlens), strict=True):
        first, second = torch.nonzero(earlier_than(s), as_tuple=True)
        if len(first) == 0:
            losses.append(e[:0].sum())
        elif form == "hinge":
            losses.append(F.relu(e[first] - e[second] + margin).mean())
        elif form == "logistic":
            losses.append(-F.logsigmoid(-(e[first] - e[second] + margin) / temperature).mean())
        else:
            ranked = s >= 0
            score, s = -e[ranked] / temperature, s[ranked]
            risk_set = s[:, None] <= s
            log_sum = torch.where(risk_set, score, -torch.inf).logsumexp(-1)
            losses.append((log_sum - score).mean())
    return torch.stack(losses) if losses else entropy[:0]


def unmask_statistics(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, keys: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token, probability, margin and entropy, each (N,); see `tabom_kernels.unmask_statistics`."""
    logits = logits.to(working_dtype(logits.dtype))
    d, log_sum = shifted(logits)
    p = (d - log_sum[:, None]).exp()
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        token = draw(filter_logits(logits / temperature, top_k, top_p).softmax(-1), keys)
    top = F.pad(p, (0, 1)).topk(2).values
    probability = p.gather(1, token[:, None]).squeeze(1)
    return token, probability, top[:, 0] - top[:, 1], softmax_entropy(logits)


def draw(weights: Tensor, keys: Tensor) -> Tensor:
    """(N,) columns, drawn with the probabilities weights / sum weights, (N, V), as the keys (N,) decide.

    Exponential noise / weight is smallest with a probability proportional to the weight. So the smallest one of the
    segments of 256 columns is chosen, and then the smallest one of its columns. Column k uses the number k + 1 of its
    key's noise, and segment s the number -s.
    """
    columns = torch.arange(SEGMENT, device=keys.device)
    segments = F.pad(weights, (0, -weights.shape[1] % SEGMENT)).unflatten(1, (-1, SEGMENT))
    counters = -torch.arange(segments.shape[1], device=keys.device)
    winner = (exponential_noise(keys, counters) / segments.sum(-1)).argmin(-1, keepdim=True)
    inside = segments.gather(1, winner[:, :, None].expand(-1, 1, SEGMENT)).squeeze(1)
    columns = winner * SEGMENT + columns
    return columns.gather(1, (exponential_noise(keys, columns + 1) / inside).argmin(-1, keepdim=True)).squeeze(1)


def filter_logits(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits that are -inf outside top-k, and then outside top-p.

    Top-p keeps the smallest set of the largest logits that has at least `top_p` of the remaining mass. Logits that tie
    with the last one that is kept are kept.
    """
    if top_k is not None:
        worst_kept = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < worst_kept, -torch.inf)
    if top_p is not None and top_p < 1:  # at 1 the rounding of the sums would cut off the tail
        ordered = logits.sort(descending=True).values
        weight = (ordered - ordered[:, :1]).exp()
        mass_before = weight.cumsum(-1) - weight
        dropped = mass_before >= top_p * weight.sum(-1, keepdim=True)
        worst_kept = ordered.masked_fill(dropped, torch.inf).amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < worst_kept, -torch.inf)
    return logits


def sequences(rows: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    """The packed rows of each sequence."""
    return list(rows.split(cu_seqlens.diff().tolist()))


def earlier_than(steps: Tensor) -> Tensor:
    """(T, T) whether (i, j) is an ordered pair: 0 <= s_i < s_j."""
    return (steps[:, None] >= 0) & (steps[:, None] < steps)
