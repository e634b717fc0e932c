"""The terms of the loss that the trainer logs, summed over the micro-batches and ranks since the last log."""

from collections import defaultdict

import torch
from accelerate import Accelerator
from torch import Tensor

from tabom.evaluation.metrics import count_pairs_in_order
from tabom.training.forward import LossOutput

TERMS = ("cross_entropy", "policy", "rank")
"""The terms of a `LossOutput`."""


class LossTerms:
    """Sums on the device, which the host reads once a log, so that no step waits for them."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor | float] = defaultdict(float)

    def add_loss(self, output: LossOutput, share: float | Tensor, steps: float) -> None:
        """Adds the terms of a micro-batch.

        Args:
            share: factor that makes the terms of all micro-batches and ranks of a step add up to the step's.
            steps: the part of an optimizer step that this micro-batch is.
        """
        self.sums["steps"] += steps
        for name in TERMS:
            if (term := getattr(output, name)) is not None:
                self.sums[name] += term * share

    def add_ratios(self, logprobs: Tensor, batch: dict[str, Tensor], clip: tuple[float, float]) -> None:
        """Adds how far the policy of a micro-batch is from the one that sampled its tokens.

        Over the tokens: the mean `ratio` of their probabilities, the `clip_share` of those whose ratio has left the
        limits in the direction of the advantage and so has no gradient, and the `kl` of the old policy to the new one
        (nats, the estimator r - 1 - log r).

        Args:
            logprobs: (N,) nats, of the policy as it is.
            clip: how far a ratio may be below and above 1.
        """
        is_token, advantages = batch["labels"] >= 0, batch["advantages"]
        log_ratio = (logprobs - batch["old_logprobs"]).where(is_token, 0.0)
        ratio, (below, above) = log_ratio.exp(), clip
        is_clipped = ((ratio > 1 + above) & (advantages > 0)) | ((ratio < 1 - below) & (advantages < 0))
        self.sums["tokens"] += is_token.sum()
        self.sums["ratio"] += (ratio * is_token).sum()
        self.sums["clip_share"] += is_clipped.sum()
        self.sums["kl"] += (log_ratio.expm1() - log_ratio).sum()

    def add_entropy(self, entropy: Tensor, steps: Tensor, cu_seqlens: Tensor) -> None:
        """Adds the entropies (N,) of a micro-batch, in nats, and how many of its pairs they order as the steps do."""
        in_order, pairs = count_pairs_in_order(entropy, steps, cu_seqlens)
        self.sums["entropy"] += entropy.sum()
        self.sums["rows"] += len(entropy)
        self.sums["in_order"] += in_order
        self.sums["pairs"] += pairs

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over the steps since the last call, on every rank alike, and a new start at zero.

        The terms of the loss are per step, and the figures of `add_ratios` per token. `entropy` is the mean over the
        rows and `order_accuracy` the share of the pairs in order; both are left out if no entropies were added.
        """
        names = list(self.sums)
        sums = torch.stack([torch.as_tensor(self.sums[name], device=accelerator.device).double() for name in names])
        total = dict(zip(names, accelerator.reduce(sums, reduction="sum").tolist(), strict=True))
        self.sums.clear()
        steps = total["steps"] / accelerator.num_processes
        terms = {name: total[name] / steps for name in TERMS if name in total}
        if total.get("tokens"):
            terms |= {name: total[name] / total["tokens"] for name in ("ratio", "clip_share", "kl")}
        if total.get("rows"):
            terms["entropy"] = total["entropy"] / total["rows"]
        if total.get("pairs"):
            terms["order_accuracy"] = total["in_order"] / total["pairs"]
        return terms
