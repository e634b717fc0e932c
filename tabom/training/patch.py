"""The fused cross-entropy in any transformers model, for `transformers.Trainer` or a loop of one's own."""

import logging
from functools import partial, wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from tabom.training.forward import HeadLoss, LinearWithLoss, computes_loss, logit_transform, loss_in_head
from tabom.training.own_loss import SHIFTS, shift_of_class, shifted, shifts_seen
from tabom_kernels import fused_linear_cross_entropy

logger = logging.getLogger(__name__)


def patch(model: PreTrainedModel) -> PreTrainedModel:
    """Gives a causal or masked language model the fused loss when it is trained with `labels`; `unpatch` undoes it.

    `model(**inputs, labels=labels)` in training mode then returns the loss of the model's own loss function without
    holding the logits: of the positions with a label, shifted by one if the model's own are, divided by
    `num_items_in_batch` where `transformers.Trainer` passes it. The output has no `logits`. Without labels, or in
    evaluation mode, where metrics may want logits, the model is what it was.

    A model that does not call transformers' loss functions, but computes a cross-entropy in code of its own (BERT,
    BART's decoder, XLNet), shows at its first batch with labels whether it shifts them: one sequence is run with its
    logits, without a gradient.

    Two arguments more than the model's own: `shift_labels` (B, L), as transformers' losses take them, labels that
    already stand where their logits are; and `token_weights` (B, L), which scale the cross-entropy of the label at the
    same place (NELBO's 1/t), in evaluation mode too.

    A model with another loss than cross-entropy, or that changes its logits after the head in a way that its config
    does not say, keeps its own loss, which is found, and logged, when it is first run with labels.

    It lives here, and not in `tabom_kernels`, because it knows transformers: what a model does to its logits, and
    which loss it means. The model's class is replaced, not its `forward`, so that copies and wrappers stay whole.

    Args:
        model: a transformers model whose head is a plain linear layer, or a peft model around it. Changed in place.

    Returns:
        The model.

    Raises:
        TypeError: it is no transformers model.
        ValueError: its head or its loss is of another kind, or it is an encoder-decoder.
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
    if base.config.is_encoder_decoder:
        raise ValueError(
            f"model: {type(base).__name__} is an encoder-decoder, which makes its decoder's input of labels; call "
            "tabom_kernels.fused_linear_cross_entropy with its last hidden states"
        )
    if loss_type not in SHIFTS or hasattr(base, "_loss_function"):
        raise ValueError(
            f"model: the loss of this {type(base).__name__} is {getattr(base, '_loss_function', loss_type)!r}; "
            "expected that of a causal or masked language model"
        )
    base.shifts_labels = shift_of_class(type(base), loss_type)
    head.__class__, base.__class__ = LinearWithLoss, with_fused_loss(type(base))
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
    del base.shifts_labels
    return model


def base_of(model: Any) -> PreTrainedModel:
    """The transformers model, inside peft's where there is one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
    return base


def with_fused_loss(plain: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A class like `plain`, of the same name, whose forward computes the loss in its head."""
    names = list(signature(plain.forward).parameters)[1:]

    @can_return_tuple
    @wraps(plain.forward)  # transformers.Trainer reads from the signature which columns a model takes
    def forward(self: PreTrainedModel, *args: Any, token_weights: Tensor | None = None, **kwargs: Any) -> ModelOutput:
        inputs = dict(zip(names, args, strict=False)) | kwargs
        head = self.get_output_embeddings()
        if inputs.get("labels") is None or not (self.training or token_weights is not None):
            return plain.forward(self, *args, **kwargs)
        if computes_loss(head) and (inputs.get("shift_labels") is not None or knows_shift(self, plain, head, inputs)):
            output = forward_with_loss(self, plain, head, token_weights, **inputs)
            if output is not None:
                return output
        if token_weights is None:
            return plain.forward(self, *args, **kwargs)
        if computes_loss(head):
            raise ValueError(
                f"token_weights: it is not yet known whether {plain.__name__} shifts its labels, and a batch without "
                "labels does not show it: pass shift_labels, labels that stand where their logits are"
            )
        raise ValueError(f"token_weights: the head of this {plain.__name__} does not compute the loss")

    def set_output_embeddings(self: PreTrainedModel, new: torch.nn.Module) -> None:
        """As `resize_token_embeddings` does, with a new layer."""
        plain.set_output_embeddings(self, new)
        if type(new) is torch.nn.Linear:
            new.__class__ = LinearWithLoss

    replaced = {"forward": forward, "set_output_embeddings": set_output_embeddings}
    return type(plain.__name__, (plain,), replaced | {"plain_class": plain, "__module__": plain.__module__})


def knows_shift(
    model: PreTrainedModel, plain: type[PreTrainedModel], head: LinearWithLoss, inputs: dict[str, Any]
) -> bool:
    """Whether it is known if the model's own loss shifts the labels; a loss of its own code shows it in a batch."""
    if model.shifts_labels is None:
        seen = shifts_seen(model, plain, **{name: x for name, x in inputs.items() if name != "num_items_in_batch"})
        if len(seen) == 1:
            model.shifts_labels = seen[0]
        if not seen:
            head.fits = False
            logger.warning("%s keeps its own loss, which is not the cross-entropy of its labels", plain.__name__)
    return model.shifts_labels is not None


def forward_with_loss(
    model: PreTrainedModel,
    plain: type[PreTrainedModel],
    head: LinearWithLoss,
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
    if shift_labels is None and model.shifts_labels:
        targets = shifted(labels, ignore_index)
        token_weights = None if token_weights is None else shifted(token_weights, 0.0)
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

    plain_forward = partial(plain.forward, model)
    answer, output = loss_in_head(head, of_rows, model.config, plain_forward, inputs, len(targets))
    if answer is None:
        return None
    loss = answer.loss
    if output.get("aux_loss") is not None:  # mixtures of experts add it to the loss of their labels
        loss = loss + model.router_aux_loss_coef * output["aux_loss"].to(loss.device)
    return type(output)(loss=loss, **output)  # first, as in a tuple
