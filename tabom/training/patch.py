"""The fused cross-entropy in any transformers model, for `transformers.Trainer` or a loop of one's own."""

from functools import partial, wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from tabom.training.head import HeadLoss, HeadWithLoss, loss_in_head
from tabom.training.head_check import add_auxiliary_loss, computes_loss, shifted
from tabom.training.logit_transforms import logit_transform
from tabom_kernels import fused_linear_cross_entropy


def patch(model: PreTrainedModel) -> PreTrainedModel:
    """Gives a causal or masked language model the fused loss when it is trained with `labels`; `unpatch` undoes it.

    `model(**inputs, labels=labels)` in training mode then returns the loss of the model's own loss function without
    holding the logits: the cross-entropy of the positions with a label, shifted by one if the model's own loss is,
    divided by `num_items_in_batch` where `transformers.Trainer` passes it. The output has no `logits`. Without labels,
    or in evaluation mode, where metrics may want logits, the model behaves as before.

    Before its first loss the model is run once on a short sequence with labels (`training.head_check.check_head`),
    which shows whether its loss is the cross-entropy of its logits, and whether it shifts the labels. A model with
    another loss, or that changes its logits in a way that is not known, keeps its own loss, and a warning says why. So
    does a model whose head is later wrapped, by LoRA or by `modules_to_save`.

    The patched model takes two more arguments beside `labels`, also in evaluation mode. `shift_labels` (B, L) are
    labels that are already aligned with their logits, as transformers' losses take them. `token_weights` (B, L) scale
    the cross-entropy of the label at the same position (NELBO's 1/t).

    Two results differ from transformers' on purpose. A batch without a single label gives a loss of 0, where the mean
    over no labels is NaN. Models with a loss in code of their own (BERT and its kin) ignore `num_items_in_batch`, so
    that under gradient accumulation `transformers.Trainer` adds up the means of their micro-batches; patched, the loss
    is the mean over all labels of a step.

    The function is in `tabom`, and not in `tabom_kernels`, because it knows transformers. The model's class is
    replaced, not its `forward`, so that copies and wrappers stay whole.

    Args:
        model: a transformers model whose head is a plain linear layer, or a peft model around it. Changed in place.

    Returns:
        The model.

    Raises:
        TypeError: the model is not a transformers model.
        ValueError: its head is not a plain linear layer, or it is an encoder-decoder.
    """
    base = base_of(model)
    head = base.get_output_embeddings()
    if isinstance(head, HeadWithLoss):
        raise ValueError(f"model: the head of this {type(base).__name__} computes a loss already; unpatch it first")
    if type(head) is not torch.nn.Linear:
        raise ValueError(
            f"model: the head of this {type(base).__name__} is {type(head).__module__}.{type(head).__name__}, and only "
            "a plain torch.nn.Linear can be fused; leave it out of LoRA's target_modules and of quantisation"
        )
    if base.config.is_encoder_decoder:
        raise ValueError(
            f"model: {type(base).__name__} is an encoder-decoder, which makes the input of its decoder from "
            "labels; call tabom_kernels.fused_linear_cross_entropy with its last hidden states"
        )
    head.__class__, base.__class__ = HeadWithLoss, with_fused_loss(type(base))
    return model


def unpatch(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes `patch`, also while wrappers of the patched forward are still there.

    Raises:
        ValueError: the model is not patched.
    """
    base = base_of(model)
    if not hasattr(type(base), "own_class"):
        raise ValueError(f"model: this {type(base).__name__} is not patched")
    base.__class__ = type(base).own_class
    for module in base.modules():  # a wrapper may hold the head, and copies of it
        if isinstance(module, HeadWithLoss):
            module.__class__ = torch.nn.Linear
            for name in ("status", "label_shift", "loss_of_hidden", "computed"):
                vars(module).pop(name, None)
    return model


def base_of(model: Any) -> PreTrainedModel:
    """The transformers model itself, taken out of a peft model if it is inside one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
    return base


def with_fused_loss(own: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A class like `own`, of the same name, whose forward computes the loss in its head."""
    names = list(signature(own.forward).parameters)[1:]

    @can_return_tuple
    @wraps(own.forward)  # transformers.Trainer reads from the signature which columns a model takes
    def forward(self: PreTrainedModel, *args: Any, token_weights: Tensor | None = None, **kwargs: Any) -> ModelOutput:
        inputs, own_forward = dict(zip(names, args, strict=False)) | kwargs, partial(own.forward, self)
        labels, shift_labels = inputs.get("labels"), inputs.get("shift_labels")
        extra = {"token_weights": token_weights, "shift_labels": shift_labels}
        given = next((name for name, x in extra.items() if x is not None), None)
        if labels is None and given is not None:
            raise ValueError(f"{given}: without labels no loss is computed; pass labels as well, of the same shape")
        if labels is None or not (self.training or given):
            return own_forward(*args, **kwargs)
        if computes_loss(self, own_forward, labels, with_labels=True):
            return forward_with_loss(self, own_forward, token_weights, **inputs)
        if given is not None:
            raise ValueError(f"{given}: the head of this {own.__name__} does not compute the loss; leave it out")
        return own_forward(*args, **kwargs)

    def set_output_embeddings(self: PreTrainedModel, new: torch.nn.Module) -> None:
        """Replaces the head, as `resize_token_embeddings` does; a linear layer becomes a `HeadWithLoss`."""
        own.set_output_embeddings(self, new)
        if type(new) is torch.nn.Linear:
            new.__class__ = HeadWithLoss

    replaced = {"forward": forward, "set_output_embeddings": set_output_embeddings}
    return type(own.__name__, (own,), replaced | {"own_class": own, "__module__": own.__module__})


def forward_with_loss(
    model: PreTrainedModel,
    own_forward: Any,
    token_weights: Tensor | None,
    *,
    labels: Tensor,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    **inputs: Any,
) -> ModelOutput:
    """The output of the model's own forward with the loss, and without the logits."""
    shift = model.get_output_embeddings().label_shift
    if shift_labels is not None:
        labels, shift = shift_labels, 0
    if shift is None:
        raise ValueError(
            f"labels: {type(model).__name__} has no loss of its own, so it is not known whether it shifts labels: "
            "pass shift_labels, which are already aligned with the logits"
        )
    targets = shifted(labels, shift, ignore_index).flatten()
    if token_weights is not None:
        token_weights = shifted(token_weights, shift, 0.0).flatten()
    # Before the body, where the wait for the number of labels costs least.
    rows = slice(None) if torch.compiler.is_compiling() else (targets != ignore_index).nonzero().squeeze(1)
    transform = logit_transform(model.config)

    def loss_of_rows(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> HeadLoss:
        if len(hidden) != len(targets):
            raise ValueError(f"labels: {tuple(labels.shape)}, and the model has logits of {len(hidden)} positions")
        loss = fused_linear_cross_entropy(
            hidden[rows],
            weight,
            targets[rows].to(hidden.device),
            bias=bias,
            token_weights=None if token_weights is None else token_weights[rows].to(hidden.device),
            num_tokens=num_items_in_batch,
            ignore_index=ignore_index,
            logit_scale=transform.scale,
            softcap=transform.softcap,
        )
        return HeadLoss(loss)

    (loss, _), output = loss_in_head(model, loss_of_rows, own_forward, inputs)
    loss = add_auxiliary_loss(model.config, output, loss)
    return type(output)(loss=loss, **output)  # first, as in a tuple
