"""The loss in the head: the model's own forward runs as it is, and its head computes a loss instead of logits.

So hooks of FSDP, LoRA and offloading fire on the body and on the head, and whatever a model does between the two is its
own code. Calling the body and then the head would be simpler, but would not train BERT and its kin, which have a dense
layer and a norm between them, nor MiniCPM3, which scales the hidden states.

`logit_transforms.py` lists what models do to the logits after the head, and `head_check.py` compares the result with
the model's own logits before the first loss.
"""

from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from tabom.training.logit_transforms import logit_transform


class HeadLoss(NamedTuple):
    """The scalar loss that is differentiated, and what else was computed with it."""

    loss: Tensor
    details: Any = None


LossOfHidden = Callable[[Tensor, Tensor, Tensor | None], HeadLoss]
"""Computes a loss from the hidden states (N, D) of all positions, and the weight (V, D) and bias (V,) of the head."""


class HeadStatus(Enum):
    """Where the loss of a model is computed."""

    UNCHECKED = "not yet compared with the model's own logits"
    IN_HEAD = "in the head"
    FROM_LOGITS = "from logits"


class HeadWithLoss(torch.nn.Linear):
    """A linear head that returns logits, or, while `loss_of_hidden` is set, computes that and returns a row of zeros.

    It takes the place of a linear layer's class, not of its `forward`, so that copies, casts, wrappers and
    torch.compile treat it as the layer that it is.
    """

    loss_of_hidden: LossOfHidden | None = None
    computed: HeadLoss | None = None
    status = HeadStatus.UNCHECKED
    label_shift: int | None = None  # by how many places the model's own loss shifts its labels
    gathered_logits: Callable[[Tensor], Tensor] | None = None  # of a head that is sharded over the vocabulary

    def forward(self, hidden: Tensor) -> Tensor:
        if self.loss_of_hidden is None:
            return (self.gathered_logits or super().forward)(hidden)
        self.computed = self.loss_of_hidden(hidden.flatten(0, -2), self.weight, self.bias)
        zero = 0 * self.computed.loss
        return zero.expand(*[1] * (hidden.dim() - 1), self.out_features).clone()  # models may write to their logits


def loss_in_head(
    model: PreTrainedModel, loss_of_hidden: LossOfHidden, forward: Callable[..., ModelOutput], inputs: dict[str, Any]
) -> tuple[HeadLoss, ModelOutput]:
    """Runs the model's forward with a loss in its head; returns the loss, and the model's output without logits.

    The loss leaves the head by the side, in the fp32 that it was computed in, because wrappers such as FSDP2's mixed
    precision cast what a module returns. What the head returns instead is added to it times zero, so that a
    gradient of zero passes through the wrappers, whose backward hooks sit there; a scaled one would overflow in fp16.
    """
    head, transform = model.get_output_embeddings(), logit_transform(model.config)

    def of_columns(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> HeadLoss:
        if transform.columns is not None:
            weight, bias = weight[: transform.columns], None if bias is None else bias[: transform.columns]
        return loss_of_hidden(hidden, weight, bias)

    head.loss_of_hidden = of_columns
    try:
        output = forward(**inputs)
        loss, details = head.computed
    finally:
        head.loss_of_hidden = head.computed = None
    # Not in the head: there inductor drops the sum, and gives the loss back as a view.
    loss = loss + 0 * output.logits.flatten()[0].to(loss.dtype)
    return HeadLoss(loss, details), type(output)(**{name: x for name, x in output.items() if name != "logits"})
