"""What a sampler step needs of each row, in PyTorch: a token, its probability, the margin and the entropy."""

import torch
from torch import Tensor

from tabom_kernels.backends.reference import draw, working_dtype
from tabom_kernels.backends.torch.chunks import map_row_chunks
from tabom_kernels.backends.torch.statistics import LOWEST

NUCLEUS = 1024
"""The most probable tokens that top-p sorts first; it sorts all tokens only if these have too little mass."""


def unmask_statistics(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, keys: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token, probability, margin and entropy, each (N,).

    At temperature 0 the logits are read once and the keys are not used.
    """

    def statistics_of(logits: Tensor, keys: Tensor | None, d: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        best, best_token = d.copy_(logits).max(-1, keepdim=True)
        token = best_token
        if temperature > 0:
            weight = torch.exp(torch.sub(d, best, out=p).div_(temperature), out=p)
            thresholds = filter_thresholds(d, temperature, top_k, top_p)
            if thresholds is not None:
                weight.masked_fill_(d < thresholds[:, None], 0.0)
            token = draw(weight, keys)[:, None]
        torch.exp(d.sub_(best).clamp_(min=LOWEST), out=p)
        sum_without_max = p.scatter_(1, best_token, 0.0).sum(-1, keepdim=True)
        total = 1 + sum_without_max
        second = p.amax(-1, keepdim=True)  # relative to the best
        probability = d.gather(1, token).exp_() / total
        entropy = sum_without_max.log1p() - p.mul_(d).sum(-1, keepdim=True) / total
        return token, probability, (1 - second) / total, entropy

    parts = map_row_chunks(statistics_of, 2, logits, keys)
    return tuple(torch.cat(part).squeeze(1) for part in zip(*parts, strict=True))


def filter_thresholds(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor | None:
    """(N,) the lowest logit that top-k (below V) and then top-p (below 1) keep in each row; None without filters."""
    if top_p is None:
        return None if top_k is None else logits.topk(top_k).values[:, -1]
    ordered = logits.topk(min(max(top_k or 0, NUCLEUS), logits.shape[1])).values
    best, worst_kept = ordered[:, :1], -torch.inf if top_k is None else ordered[:, top_k - 1, None]

    def weights(z: Tensor) -> Tensor:
        d = z.to(working_dtype(z.dtype)) - best
        return d.div_(temperature).exp_().masked_fill_(z < worst_kept, 0.0)

    # The tokens that are kept are mostly a small part of the vocabulary. All are sorted only if NUCLEUS are too few.
    mass = top_p * weights(logits).sum(-1, keepdim=True)
    if (weights(ordered).sum(-1, keepdim=True) < mass).any():
        ordered = logits.sort(descending=True).values
    weight = weights(ordered)
    dropped = (weight.cumsum(-1) - weight >= mass) | (ordered < worst_kept)
    return ordered.masked_fill(dropped, torch.inf).amin(-1)
