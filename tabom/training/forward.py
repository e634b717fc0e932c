"""The loss inside the model's own forward, so that DDP, FSDP and LoRA hooks fire around it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from tabom.models.diffusion_model import logits_at
from tabom_kernels import TabomLoss, fused_linear_tabom_loss, softmax_entropy, tabom_loss


@dataclass
class LossOutput(ModelOutput):
    """Scalars in nats; `cross_entropy` and `rank` are detached. `entropy` (N,), detached, only when asked for."""

    loss: Tensor | None = None
    cross_entropy: Tensor | None = None
    rank: Tensor | None = None
    entropy: Tensor | None = None


class LinearWithLoss(torch.nn.Linear):
    """A head that gives logits, or the loss of the rows once `forward_with_loss` has left a `request`.

    It takes the place of a linear layer's class, not of its `forward`, so that copies, casts, wrappers and
    torch.compile treat it as the layer that it is.
    """

    request: dict[str, Any] | None = None
    answer: tuple[TabomLoss, Tensor] | None = None
    logits_are_final = False  # whether the model was seen to leave them as they are
    gathered_logits: Callable[[Tensor], Tensor] | None = None  # of a head that is sharded over the vocabulary

    def forward(self, hidden: Tensor) -> Tensor:
        if self.request is None:
            return (self.gathered_logits or super().forward)(hidden)
        rows, arguments = self.request["rows"], self.request["arguments"]
        chosen = hidden.reshape(-1, hidden.shape[-1])[rows]
        self.answer = fused_linear_tabom_loss(chosen, self.weight, bias=self.bias, return_entropy=True, **arguments)
        loss = self.answer[0].loss
        return torch.cat([loss[None], loss.new_tensor(PROBE)])


PROBE = (-16384.0, 0.0, 1.0, 16384.0)
"""Logits that every half precision holds exactly: what scales, caps or moves logits changes one of them."""


def add_loss_to_forward(model: PreTrainedModel, *, fused_linear: bool = True, **loss_settings: Any) -> None:
    """Lets `model(**batch)` take a batch of `TrajectoryCollator` and return a `LossOutput`.

    Without `rows` among its arguments the model's forward is what it was. With them, the head is computed together
    with the loss and the logits are never whole, if the head is a plain linear layer; a head of another kind, such as
    one with a LoRA adapter, gives the logits of the rows.

    Args:
        model: any transformers model with output embeddings; its `forward` is replaced on this instance, and a linear
            head becomes a `LinearWithLoss`.
        fused_linear: False: the logits of the rows for any head, and whatever the model does to them afterwards.
        loss_settings: passed on to `tabom_kernels`: rank_weight, form, margin, temperature, backend.
    """
    plain_forward = model.forward
    head = model.get_output_embeddings()
    if fused_linear and type(head) is torch.nn.Linear:
        head.__class__ = LinearWithLoss
        if isinstance(head.weight, DTensor) and "forward" in vars(head):  # so does transformers' tp_plan shard it
            head.gathered_logits = vars(head).pop("forward")

    def forward(*args: Any, rows: Tensor | None = None, **kwargs: Any) -> ModelOutput:
        if rows is None:
            return plain_forward(*args, **kwargs)
        return forward_with_loss(rows=rows, **kwargs)

    def forward_with_loss(
        *,
        rows: Tensor,
        labels: Tensor,
        steps: Tensor,
        cu_seqlens: Tensor,
        lengths: Sequence[int] | None = None,
        token_weights: Tensor | None = None,
        num_tokens: Tensor | None = None,
        num_sequences: Tensor | None = None,
        return_entropy: bool = False,
        **inputs: Tensor,
    ) -> LossOutput:
        batch = {"labels": labels, "steps": steps, "cu_seqlens": cu_seqlens}
        options = {"token_weights": token_weights, "num_tokens": num_tokens, "num_sequences": num_sequences}
        options |= loss_settings
        head = model.get_output_embeddings()
        if computes_loss(head):
            if torch.compiler.is_compiling():
                lengths = None  # numbers would be compiled for
            arguments = batch | options | {"lengths": lengths}
            loss, entropy = loss_in_head(head, rows, arguments, plain_forward, inputs)
        else:
            logits = logits_at(model, rows, forward=plain_forward, **inputs)
            loss = tabom_loss(logits, **batch, **options)
            entropy = softmax_entropy(logits.detach()) if return_entropy else None
        return LossOutput(*loss, entropy if return_entropy else None)

    model.forward = forward


def computes_loss(head: torch.nn.Module) -> bool:
    """Whether the head is a `LinearWithLoss` itself: adapters hide it, and offloading replaces its forward."""
    return isinstance(head, LinearWithLoss) and "forward" not in vars(head)


def loss_in_head(
    head: LinearWithLoss,
    rows: Tensor,
    arguments: dict[str, Any],
    forward: Callable[..., Any],
    inputs: dict[str, Tensor],
) -> tuple[TabomLoss, Tensor]:
    """Runs the model with a head that gathers the rows, and returns their loss and entropies.

    The loss leaves the head by the side, in the fp32 that it was computed in, as wrappers (FSDP2's mixed precision)
    cast what a module returns. What the head returns, once it is through the model, tells whether the model changes
    its logits; and it keeps a gradient of zero flowing through the wrappers, whose backward hooks sit there.

    Raises:
        ValueError: the model changes its logits after the head, which the loss would then miss.
    """
    head.request = {"rows": rows, "arguments": arguments}
    try:
        logits = forward(**inputs).logits
        loss, entropy = head.answer
    finally:
        head.request = head.answer = None
    if not head.logits_are_final:
        check_probe(logits[1:])
        head.logits_are_final = True
    return loss._replace(loss=loss.loss + 0 * logits[0]), entropy


@torch.compiler.disable
def check_probe(logits: Tensor) -> None:
    """Compares values on the host, which waits for the device: once for a model is enough."""
    if logits.tolist() != list(PROBE):
        raise ValueError(
            "this model changes its logits after the head (by scaling or soft-capping): set fused_linear=False, and "
            "the logits of the selected rows are computed"
        )
