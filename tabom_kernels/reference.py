"""The specification: naive PyTorch under autograd, in the dtype of its input (half precision in fp32).

Nothing here is clever or fast. Every other backend is tested against it, in fp64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tabom_kernels.noise import gumbel_noise


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays; everything else is computed in fp32."""
    return torch.promote_types(dtype, torch.float32)


def softmax_entropy(logits: Tensor) -> Tensor:
    """(N,) Shannon entropy (nats) of the softmax of (N, V) logits; a logit of -inf contributes 0."""
    log_p = F.log_softmax(logits.to(working_dtype(logits.dtype)), dim=-1)
    return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)


def cross_entropy_with_entropy(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(N,) cross-entropy (nats), 0 where the label is `ignore_index`, and (N,) entropy (nats)."""
    ce = F.cross_entropy(logits.to(working_dtype(logits.dtype)), labels, ignore_index=ignore_index, reduction="none")
    return ce, softmax_entropy(logits)


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
    p = logits.softmax(-1)
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        kept = filter_logits(logits / temperature, top_k, top_p)
        token = (kept + gumbel_noise(keys, logits.shape[1])).argmax(-1)
    top = F.pad(p, (0, 1)).topk(2).values
    probability = p.gather(1, token[:, None]).squeeze(1)
    return token, probability, top[:, 0] - top[:, 1], softmax_entropy(logits)


def filter_logits(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """-inf outside the k best logits, then outside the smallest set of best logits with mass >= top_p.

    Logits that tie with the last one kept are kept.
    """
    if top_k is not None:
        worst_kept = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < worst_kept, -torch.inf)
    if top_p is not None and top_p < 1:  # at 1 the rounding of the sums would cut the tail
        ordered = logits.sort(descending=True).values
        p = ordered.softmax(-1)
        mass_before = p.cumsum(-1) - p
        worst_kept = ordered.masked_fill(mass_before >= top_p, torch.inf).min(-1, keepdim=True).values
        logits = logits.masked_fill(logits < worst_kept, -torch.inf)
    return logits


def sequences(rows: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    """The packed rows of each sequence."""
    return list(rows.split(cu_seqlens.diff().tolist()))


def earlier_than(steps: Tensor) -> Tensor:
    """(T, T) whether (i, j) is an ordered pair: 0 <= s_i < s_j."""
    return (steps[:, None] >= 0) & (steps[:, None] < steps)
