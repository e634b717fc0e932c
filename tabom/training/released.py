"""The loss as the authors' release computes it, for comparison; nothing trains with it."""

import torch
import torch.nn.functional as F
from torch import Tensor


def released_loss(
    logits: Tensor,
    rows: Tensor,
    labels: Tensor,
    steps: Tensor,
    cu_seqlens: Tensor,
    *,
    margin: float,
    rank_weight: float,
) -> Tensor:
    """Computes fp32 logits and log(p + 1e-10) of all positions, and the hinge sequence by sequence, under autograd.

    Args:
        logits: (B, L, V), of all positions.
        rows, labels, steps, cu_seqlens: those of `TrajectoryCollator`; (N,), (N,), (N,), (B + 1,).
    """
    logits = logits.float().flatten(0, 1)
    all_labels = torch.full((len(logits),), -100, device=logits.device).index_put((rows,), labels)
    cross_entropy = F.cross_entropy(logits, all_labels)
    p = torch.softmax(logits, dim=-1)
    entropy = -(p * torch.log(p + 1e-10)).sum(-1)
    terms = []
    for start, end in cu_seqlens.unfold(0, 2, 1).tolist():
        e, s = entropy[rows[start:end]], steps[start:end]
        first, second = torch.nonzero((s[:, None] >= 0) & (s[:, None] < s), as_tuple=True)
        if len(first):
            terms.append(F.relu(e[first] - e[second] + margin).mean())
    return cross_entropy + (rank_weight * torch.stack(terms).mean() if terms else 0.0)
