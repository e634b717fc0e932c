"""The fused cross-entropy in any transformers model, for `transformers.Trainer` or a loop of one's own."""

from functools import wraps
from inspect import signature, unwrap
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from tabom.training.forward import HeadLoss, LinearWithLoss, computes_loss, logit_transform, loss_in_head
from tabom_kernels import fused_linear_cross_entropy

SHIFTS = {"ForCausalLM": True, "ForMaskedLM": False, None: True}
"""Whether the loss of transformers shifts the labels, by the `loss_type` of a model; without one it does."""


def patch(model: PreTrainedModel) -> PreTrainedModel:
    """Gives a causal or masked language model the fused loss when it is trained with `labels`; `unpatch` undoes it.

    `model(**inputs, labels=labels)` in training mode then returns the loss of the model's own loss function without
    ever holding the logits: of the positions with a label, shifted by one if the model's own are, divided by
    `num_items_in_batch` where `transformers.Trainer` passes it. The output has no `logits`. Without labels, or in
    evaluation mode, where metrics may want logits, the model is what it was.

    Two arguments more than the model's own: `shift_labels` (B, L), as transformers' losses take them, labels that
    already stand where their logits are; and `token_weights` (B, L), which scale the cross-entropy of the label at the
    same place (NELBO's 1/t), in evaluation mode too.

    A model that changes its logits after the head in a way that its config does not say keeps its own loss, which is
    found, and logged, when it is first run with labels.

    It lives here, and not in `tabom_kernels`, because it knows transformers: what a model does to its logits, and
    which loss it means. The model's class is replaced, not its `forward`, so that copies and wrappers stay whole.

    Args:
        model: a transformers model whose head is a plain linear layer, or a peft model around it. Changed in place.

    Returns:
        The model.

    Raises:
        TypeError: it is no transformers model.
        ValueError: its head or its loss is of another kind.
    """
    base = base_of(model)
    head, loss_type = base.get_output_embeddings(), getattr(base, "loss_type", None)
    if isinstance(head, LinearWithLoss):
        raise ValueError(f"model: the head of this {type(base).__name__} computes a loss already; unpatch it first")
    if type(head) is not torch.nn.Linear:
        raise ValueError(
            f"model: the head of this {type(base).__name__} is {type(head).__module__}.{type(head).__name__}, and only "
            "a plain torch.nn.Linear can be fused; leave it out of LoRA's target_modules and of quantisation"
        )
    if loss_type not in SHIFTS or hasattr(base, "_loss_function"):
        raise ValueError(
            f"model: the loss of this {type(base).__name__} is {getattr(base, '_loss_function', loss_type)!r}; "
            "expected that of a causal or masked language model"
        )
    head.__class__, base.__class__ = LinearWithLoss, with_fused_loss(type(base), shift_of(type(base), loss_type))
    return model


def unpatch(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes `patch`, also while wrappers of the patched forward are still there.

    Raises:
        ValueError: the model is not patched.
    """
    base = base_of(model)
    if not hasattr(type(base), "plain_class"):
        raise ValueError(f"model: this {type(base).__name__} is not patched")
    base.get_output_embeddings().__class__, base.__class__ = torch.nn.Linear, type(base).plain_class
    return model


def base_of(model: Any) -> PreTrainedModel:
    """The transformers model, inside peft's where there is one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
    return base


def shift_of(plain: type[PreTrainedModel], loss_type: str | None) -> bool | None:
    """Whether the model's own loss shifts the labels; None: only its code knows."""
    is_of_transformers = "loss_function" in unwrap(plain.forward).__code__.co_names
    return SHIFTS[loss_type] if is_of_transformers or not SHIFTS[loss_type] else None


def with_fused_loss(plain: type[PreTrainedModel], shift: bool | None) -> type[PreTrainedModel]:
    """A class like `plain`, of the same name, whose forward computes the loss in its head."""

    @wraps(plain.forward)  # transformers.Trainer reads from the signature which columns a model takes
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> ModelOutput:
        labels, weights = kwargs.get("labels"), kwargs.pop("token_weights", None)
        head = self.get_output_embeddings()
        if labels is None or not (self.training or weights is not None):
            return plain.forward(self, *args, **kwargs)
        if computes_loss(head):
            if shift is None and kwargs.get("shift_labels") is None:
                raise ValueError(
                    f"labels: {plain.__name__} computes its loss in code of its own, which may shift the labels or "
                    "not: pass shift_labels too, labels that stand where their logits are"
                )
            names = list(signature(plain.forward).parameters)[1:]
            positional = dict(zip(names, args, strict=False))
            output = forward_with_loss(self, plain, head, shift, weights, **positional, **kwargs)
            if output is not None:
                return output
        if weights is not None:
            raise ValueError(f"token_weights: the head of this {plain.__name__} does not compute the loss")
        return plain.forward(self, *args, **kwargs)

    return type(plain.__name__, (plain,), {"forward": forward, "plain_class": plain, "__module__": plain.__module__})


def forward_with_loss(
    model: PreTrainedModel,
    plain: type[PreTrainedModel],
    head: LinearWithLoss,
    shift: bool | None,
    token_weights: Tensor | None,
    *,
    labels: Tensor,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    **inputs: Any,
) -> ModelOutput | None:
    """The output of the plain forward with the loss, and without the logits; None if its head does not fit."""
    targets = labels if shift_labels is None else shift_labels
    if shift_labels is None and shift:
        targets, token_weights = (
            x if x is None else F.pad(x, (0, 1), value=fill)[..., 1:]
            for x, fill in ((labels, ignore_index), (token_weights, 0.0))
        )
    targets = targets.flatten()
    # Before the body, where the wait for the number of labels costs least.
    rows = slice(None) if torch.compiler.is_compiling() else (targets != ignore_index).nonzero().squeeze(1)
    transform = logit_transform(model.config)

    def of_rows(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> HeadLoss:
        loss = fused_linear_cross_entropy(
            hidden[rows],
            weight,
            targets[rows].to(hidden.device),
            bias=bias,
            token_weights=None if token_weights is None else token_weights.flatten()[rows].to(hidden.device),
            num_tokens=num_items_in_batch,
            ignore_index=ignore_index,
            **transform,
        )
        return HeadLoss(loss)

    answer, output = loss_in_head(head, of_rows, model.config, lambda **inputs: plain.forward(model, **inputs), inputs)
    if answer is None:
        return None
    output["loss"] = answer.loss
    if output.get("aux_loss") is not None:  # mixtures of experts add it to the loss of their labels
        output["loss"] = answer.loss + model.router_aux_loss_coef * output["aux_loss"].to(answer.loss.device)
    return output
