"""The TABOM loss inside the model's own forward, so that hooks of DDP, FSDP and LoRA fire around it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from tabom.models.diffusion_model import logits_at
from tabom.models.layout import forward_of_blocks
from tabom.training.head import HeadLoss, HeadWithLoss, loss_in_head
from tabom.training.head_check import add_auxiliary_loss, computes_loss
from tabom.training.logit_transforms import logit_transform
from tabom_kernels import fused_linear_policy_loss, fused_linear_tabom_loss, softmax_entropy, tabom_loss


@dataclass
class LossOutput(ModelOutput):
    """Scalars in nats; all but `loss` are detached.

    A policy loss has a `policy` term instead of `cross_entropy`, and `logprobs` (N,) of the tokens. `entropy` (N,) is
    there only when asked for.
    """

    loss: Tensor | None = None
    cross_entropy: Tensor | None = None
    rank: Tensor | None = None
    entropy: Tensor | None = None
    policy: Tensor | None = None
    logprobs: Tensor | None = None


def check_has_no_auxiliary_loss(config: PreTrainedConfig) -> None:
    """Raises a ValueError where experts have an auxiliary loss, which is added to a loss in the head only."""
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            "output_router_logits=True: the auxiliary loss of the experts is added to a loss in the head, and here the "
            "loss is computed from logits; set it to false in the config, or train with fused_linear and a plain head"
        )


def add_loss_to_forward(model: PreTrainedModel, *, fused_linear: bool = True, **loss_settings: Any) -> None:
    """Lets `model(**batch)` take a batch of `TrajectoryCollator` and return a `LossOutput`.

    Without `rows` among its arguments the model's forward is what it was. With them, a head that is a plain linear
    layer computes the loss, and the logits are never whole. Before the first loss the head is checked on one short
    sequence (`check_head`). If it fails the check, or an adapter wraps it, the logits of the rows are computed, and a
    warning says why.

    Args:
        model: any transformers model with output embeddings; its `forward` is replaced on this instance, and a linear
            head becomes a `HeadWithLoss`.
        fused_linear: False computes the logits of the rows for any head.
        loss_settings: passed on to `tabom_kernels`: rank_weight, form, margin, temperature, backend; and clip, which
            makes the loss a policy loss.

    Raises:
        ValueError: (from the forward) a policy loss with a head that computes logits only.
    """
    own_forward = model.forward
    head = model.get_output_embeddings()
    if fused_linear and type(head) is torch.nn.Linear:
        head.__class__ = HeadWithLoss
        if isinstance(head.weight, DTensor) and "forward" in vars(head):  # so does transformers' tp_plan shard it
            head.gathered_logits = vars(head).pop("forward")

    def forward(*args: Any, rows: Tensor | None = None, **kwargs: Any) -> ModelOutput:
        if rows is None:
            return own_forward(*args, **kwargs)
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
        sequence_weights: Tensor | None = None,
        is_noisy: Tensor | None = None,
        advantages: Tensor | None = None,
        old_logprobs: Tensor | None = None,
        sampling_temperature: float = 1.0,
        mask_token_id: int | None = None,
        auxiliary_share: float = 1.0,
        return_entropy: bool = False,
        **inputs: Tensor,
    ) -> LossOutput:
        options = {"token_weights": token_weights, "num_tokens": num_tokens, "num_sequences": num_sequences}
        options |= {"sequence_weights": sequence_weights, **loss_settings}
        run = own_forward
        if is_noisy is not None:
            run = partial(forward_of_blocks, model, own_forward, model.config.block_size, is_noisy)
        ids = inputs["input_ids" if inputs.get("input_ids") is not None else "inputs_embeds"]
        if not fused_linear or not computes_loss(model, own_forward, ids):
            if advantages is not None:
                raise ValueError(
                    "objective='policy': the head of this model computes logits only, and the loss is computed in the "
                    "head; use a model with a plain linear head and no adapter on it"
                )
            check_has_no_auxiliary_loss(model.config)
            logits = logits_at(model, rows, forward=run, **inputs)
            loss = tabom_loss(logits, labels, steps, cu_seqlens, **options)
            return LossOutput(*loss, softmax_entropy(logits.detach()) if return_entropy else None)
        transform = logit_transform(model.config)

        options["lengths"] = None if torch.compiler.is_compiling() else lengths  # numbers would be compiled for

        def tabom_of_rows(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> HeadLoss:
            options.update(bias=bias, logit_scale=transform.scale, softcap=transform.softcap)
            result, entropy = fused_linear_tabom_loss(
                hidden[rows], weight, labels, steps, cu_seqlens, return_entropy=True, **options
            )
            return HeadLoss(result.loss, {**result._asdict(), "entropy": entropy})

        def policy_of_rows(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> HeadLoss:
            softcap = None if transform.softcap is None else transform.softcap / sampling_temperature
            options.update(logit_scale=transform.scale / sampling_temperature, softcap=softcap)
            options.update(steps=steps, bias=without_token(mask_token_id, weight, bias))
            result = fused_linear_policy_loss(
                hidden[rows], weight, labels, old_logprobs, advantages, cu_seqlens, **options
            )
            return HeadLoss(result.loss, {name: x for name, x in result._asdict().items() if name != "kl"})

        loss_of_rows = tabom_of_rows if advantages is None else policy_of_rows
        (loss, details), output = loss_in_head(model, loss_of_rows, run, inputs)
        details["loss"] = add_auxiliary_loss(model.config, output, loss, auxiliary_share)
        if not return_entropy:
            del details["entropy"]
        return LossOutput(**details)

    model.forward = forward


def without_token(token_id: int, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The bias (V,) of a head (V, D) whose softmax gives this token no probability."""
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    return bias.index_fill(0, torch.full((1,), token_id, device=weight.device), -torch.inf)
