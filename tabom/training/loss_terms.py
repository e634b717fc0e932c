"""The terms of the loss that the trainer logs, summed over the micro-batches and ranks since the last log."""

from collections import defaultdict

import torch
from accelerate import Accelerator
from torch import Tensor

from tabom.evaluation.metrics import count_pairs_in_order
from tabom.training.forward import LossOutput


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
        self.sums["cross_entropy"] += output.cross_entropy * share
        self.sums["rank"] += output.rank * share

    def add_entropy(self, entropy: Tensor, steps: Tensor, cu_seqlens: Tensor) -> None:
        """Adds the entropies (N,) of a micro-batch, in nats, and how many of its pairs they order as the steps do."""
        in_order, pairs = count_pairs_in_order(entropy, steps, cu_seqlens)
        self.sums["entropy"] += entropy.sum()
        self.sums["rows"] += len(entropy)
        self.sums["in_order"] += in_order
        self.sums["pairs"] += pairs

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over the steps since the last call, on every rank alike, and a new start at zero.

        `cross_entropy` and `rank` are per step. `entropy` is the mean over the rows and `order_accuracy` the share of
        the pairs in order; both are left out if no entropies were added.
        """
        names = list(self.sums)
        sums = torch.stack([torch.as_tensor(self.sums[name], device=accelerator.device).double() for name in names])
        total = dict(zip(names, accelerator.reduce(sums, reduction="sum").tolist(), strict=True))
        self.sums.clear()
        steps = total["steps"] / accelerator.num_processes
        terms = {"cross_entropy": total["cross_entropy"] / steps, "rank": total["rank"] / steps}
        if total.get("rows"):
            terms["entropy"] = total["entropy"] / total["rows"]
        if total.get("pairs"):
            terms["order_accuracy"] = total["in_order"] / total["pairs"]
        return terms
