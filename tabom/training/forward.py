"""The loss inside the model's own forward, so that DDP, FSDP and LoRA hooks fire around it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
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


def add_loss_to_forward(model: PreTrainedModel, *, fused_linear: bool = True, **loss_settings: Any) -> None:
    """Lets `model(**batch)` take a batch of `TrajectoryCollator` and return a `LossOutput`.

    Without `rows` among its arguments the model's forward is what it was. With them, the head is computed together
    with the loss and the logits are never whole, if the head is a plain linear layer; a head of another kind, such as
    one with a LoRA adapter, gives the logits of the rows.

    Args:
        model: any transformers model with output embeddings; its `forward` is replaced on this instance.
        fused_linear: False: the logits of the rows for any head, and whatever the model does to them afterwards.
        loss_settings: passed on to `tabom_kernels`: rank_weight, form, margin, temperature, backend.
    """
    plain_forward = model.forward

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
        token_weights: Tensor | None = None,
        num_tokens: Tensor | None = None,
        num_sequences: Tensor | None = None,
        return_entropy: bool = False,
        **inputs: Tensor,
    ) -> LossOutput:
        batch = {"labels": labels, "steps": steps, "cu_seqlens": cu_seqlens}
        options = {"token_weights": token_weights, "num_tokens": num_tokens, "num_sequences": num_sequences}
        options |= loss_settings
        if fused_linear and is_plain_linear(model.get_output_embeddings()):
            loss, entropy = loss_in_head(model, rows, batch | options, plain_forward, inputs)
        else:
            logits = logits_at(model, rows, forward=plain_forward, **inputs)
            loss = tabom_loss(logits, **batch, **options)
            entropy = softmax_entropy(logits.detach()) if return_entropy else None
        return LossOutput(*loss, entropy if return_entropy else None)

    model.forward = forward


def is_plain_linear(head: torch.nn.Module) -> bool:
    """Whether the head computes what a linear layer does; adapters, quantised and offloaded layers do not."""
    return type(head).forward is torch.nn.Linear.forward and "forward" not in vars(head)


def loss_in_head(
    model: PreTrainedModel,
    rows: Tensor,
    arguments: dict[str, Any],
    forward: Callable[..., Any],
    inputs: dict[str, Tensor],
) -> tuple[TabomLoss, Tensor]:
    """Runs the model with a head that gathers the rows and returns their loss in place of logits.

    Raises:
        ValueError: the model changes its logits after the head, which the loss would then miss.
    """
    head = model.get_output_embeddings()
    result: list[tuple[TabomLoss, Tensor]] = []

    def loss_of_rows(hidden: Tensor) -> Tensor:
        chosen = hidden.reshape(-1, hidden.shape[-1])[rows]
        result.append(fused_linear_tabom_loss(chosen, head.weight, bias=head.bias, return_entropy=True, **arguments))
        return result[0][0].loss

    head.forward = loss_of_rows
    try:
        output = forward(**inputs)
    finally:
        del head.forward
    [(loss, entropy)] = result
    if output.logits is not loss.loss:
        raise ValueError(
            f"model type {model.config.model_type!r} changes its logits after the head (by scaling or soft-capping): "
            "set fused_linear=False, and the logits of the selected rows are computed"
        )
    return loss, entropy
