"""Training stops where a number is not finite and says where: a NaN must show, and must not be saved."""

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor


def check_step(
    losses: Sequence[Tensor],
    grad_norm: Tensor | float,
    step: int,
    records: Callable[[int], list[int]],
    accelerator: Accelerator,
) -> None:
    """Looks at a step before the optimizer takes it; waits for the device once. Every rank raises the same error.

    With a gradient scaler (fp16) the norm may overflow: the scaler leaves such a step out.

    Args:
        losses: of this rank's micro-batches, scalars.
        records: those of a rank in this step, to be named.

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
    """Looks at all that is trained, before it is saved; every rank of a sharded model takes part.

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
                f"{name} is not finite: not saved; lower learning_rate, or go on from a checkpoint"
            )


def own_part(parameter: Tensor) -> Tensor:
    """What this rank has of a parameter: a shard of FSDP2's, a partition of DeepSpeed's ZeRO-3, or all of it."""
    if isinstance(parameter, DTensor):
        return parameter.detach().to_local()
    return getattr(parameter, "ds_tensor", parameter)
