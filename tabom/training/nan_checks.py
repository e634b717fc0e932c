"""Stops training at a loss, gradient or weight that is not finite, so that no NaN is saved."""

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from tabom.models.nan_checks import own_part


def check_step(
    losses: Sequence[Tensor],
    grad_norm: Tensor | float,
    step: int,
    records: Callable[[int], list[int]],
    accelerator: Accelerator,
) -> None:
    """Checks losses and gradient before the optimizer's step. All ranks raise the same error.

    Waits for the device once.

    With a gradient scaler (fp16) the norm may overflow, because the scaler skips such a step.

    Args:
        losses: scalars of this rank's micro-batches.
        records: gives the indices of a rank's records in this step, for the error.

    Raises:
        FloatingPointError: a loss or the norm is not finite; names step, ranks and records.
    """
    loss = torch.stack([loss.detach().float() for loss in losses]).sum()
    norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else torch.as_tensor(grad_norm)
    mine = torch.stack([loss, norm.to(loss.device, torch.float32)])
    finite = accelerator.gather(mine[None]).isfinite().tolist()
    if all(loss and (norm or accelerator.scaler is not None) for loss, norm in finite):
        return
    ranks = [rank for rank, (loss, _) in enumerate(finite) if not loss]
    what = "loss" if ranks else "gradient"
    where = "; ".join(f"rank {rank}, records {records(rank)}" for rank in ranks or range(len(finite)))
    raise FloatingPointError(
        f"step {step}: the {what} is not finite ({where}; counted from 0 in the order of the data). The step was not "
        "taken, and nothing of it is saved: lower learning_rate or max_grad_norm, or look at these records"
    )


def check_weights(model: torch.nn.Module, accelerator: Accelerator) -> None:
    """Checks all trained weights before they are saved; must be called on every rank of a sharded model.

    Raises:
        FloatingPointError: a weight is not finite; names it.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        return
    local = [own_part(p) for p in trained.values()]
    bad = torch.stack([~part.isfinite().all() for part in local]).int()
    if any(part is not p for part, p in zip(local, trained.values(), strict=True)):
        bad = accelerator.reduce(bad, reduction="sum")
    for name, count in zip(trained, bad.tolist(), strict=True):
        if count:
            raise FloatingPointError(
                f"{name} is not finite: not saved; lower learning_rate, or continue from a checkpoint"
            )
