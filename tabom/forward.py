"""The loss inside the model's own forward, so that DDP, FSDP and LoRA hooks fire around it."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from tabom.models import logits_at
from tabom_kernels import softmax_entropy, tabom_loss


@dataclass
class LossOutput(ModelOutput):
    """Scalars in nats; `cross_entropy` and `rank` are detached. `entropy` (N,), detached, only when asked for."""

    loss: Tensor | None = None
    cross_entropy: Tensor | None = None
    rank: Tensor | None = None
    entropy: Tensor | None = None


def add_loss_to_forward(model: PreTrainedModel, **loss_settings: Any) -> None:
    """Lets `model(**batch)` take a batch of `TrajectoryCollator` and return a `LossOutput`.

    Without `rows` among its arguments the model's forward is what it was.

    Args:
        model: any transformers model with output embeddings; its `forward` is replaced on this instance.
        loss_settings: passed on to `tabom_kernels.tabom_loss`: rank_weight, form, margin, temperature, backend.
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
        logits = logits_at(model, rows, forward=plain_forward, **inputs)
        loss = tabom_loss(
            logits,
            labels,
            steps,
            cu_seqlens,
            token_weights=token_weights,
            num_tokens=num_tokens,
            num_sequences=num_sequences,
            **loss_settings,
        )
        entropy = softmax_entropy(logits.detach()) if return_entropy else None
        return LossOutput(loss.loss, loss.cross_entropy, loss.rank, entropy)

    model.forward = forward
