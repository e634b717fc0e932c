"""Whether the loss that a model computes of `labels` shifts them: read from its class, or seen at one sequence."""

from inspect import unwrap
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

SHIFTS = {"ForCausalLM": True, "ForConditionalGeneration": True, "ForMaskedLM": False, None: True}
"""Whether a loss of transformers shifts the labels, by the `loss_type` of a model; without one it is a causal LM's."""

GAPS = {False: 8.0, True: 4.0}
"""By how much the logits of labels, shifted or not, are lowered where the two losses are told apart."""


def shifted(x: Tensor, fill: float) -> Tensor:
    """(B, L) what stands one place further, and `fill` at the end."""
    return F.pad(x, (0, 1), value=fill)[..., 1:]


def shift_of_class(cls: type[PreTrainedModel], loss_type: str | None) -> bool | None:
    """Whether the loss shifts the labels, if it is one of transformers'; None: only the model's own code knows."""
    return SHIFTS[loss_type] if "loss_function" in unwrap(cls.forward).__code__.co_names else None


@torch.compiler.disable
@torch.no_grad()
def shifts_seen(model: PreTrainedModel, plain: type[PreTrainedModel], labels: Tensor, **inputs: Any) -> list[bool]:
    """By which shifts the cross-entropy is the model's own loss, at the sequence of the batch with the most labels.

    None of the two: it is another loss. Both: this sequence cannot tell, for it has no labels.
    The logits of labels are lowered, more at their own places than one before, which parts the two losses by some nats,
    and both from what smoothing adds, also in a model that knows nothing yet. One sequence, as its logits are held
    whole. Random numbers stay as they were.

    Raises:
        ValueError: the model computes no loss.
    """
    longest = int((labels != -100).sum(1).argmax())
    one = {
        name: x[longest : longest + 1] if isinstance(x, Tensor) and x.dim() and len(x) == len(labels) else x
        for name, x in (inputs | {"labels": labels}).items()
    }
    labels = one["labels"]
    targets = {False: labels, True: shifted(labels, -100)}

    def lower(_: torch.nn.Module, __: Any, logits: Tensor) -> Tensor | None:
        if logits.shape[:-1] != labels.shape:
            return None
        for shift, columns in targets.items():
            gap = logits.new_full((*labels.shape, 1), -GAPS[shift])
            logits = logits.scatter_add(-1, columns.clamp(min=0)[..., None].to(logits.device), gap)
        return logits

    hook = model.get_output_embeddings().register_forward_hook(lower)
    device = model.device
    devices = [] if device.type == "cpu" else [device]
    try:
        with torch.random.fork_rng(devices, device_type=device.type):
            output = plain.forward(model, **one)
    finally:
        hook.remove()
    if output.loss is None:
        raise ValueError(
            f"labels: {plain.__name__} computes no loss of them, so nothing says whether it shifts them: pass "
            "shift_labels too, labels that stand where their logits are"
        )
    if output.logits.shape[:-1] != labels.shape:
        return []
    logits, rounding = output.logits.flatten(0, 1), max(1e-4, 4 * torch.finfo(output.logits.dtype).eps)

    def is_own(shift: bool) -> Tensor:
        expected = F.cross_entropy(logits.float(), targets[shift].flatten().to(logits.device))
        return torch.isclose(expected, output.loss.float(), rtol=rounding, equal_nan=True)

    return [shift for shift in targets if is_own(shift)]
