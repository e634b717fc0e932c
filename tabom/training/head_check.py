"""Decides whether the head of a model computes the loss, by one comparison before the first loss.

The logits that follow from `logit_transforms.py`, and the cross-entropy of these logits, are compared with the model's
own. The outcome is kept as the head's `status`. Where they differ, the loss is computed from the model's own logits.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from tabom.training.head import HeadStatus, HeadWithLoss
from tabom.training.logit_transforms import logit_transform
from tabom_kernels import reference

logger = logging.getLogger(__name__)

CHECKED_TOKENS = 16
"""Length of the sequence that a model is checked on: its logits are held whole, for once."""

FULL_LENGTH = ("big_bird", "reformer")
"""Model types that are checked at the length of the batch. BigBird switches to full attention for good after a short
sequence, and Reformer is trained at one length only."""


def computes_loss(
    model: PreTrainedModel, forward: Callable[..., ModelOutput], like: Tensor, with_labels: bool = False
) -> bool:
    """Whether the head of the model computes the loss; compares it with the model's own logits if none did so before.

    Args:
        forward: the model's own.
        like: (B, L, ...) any input of the batch, for its length and device.
        with_labels: compares the model's own loss as well.
    """
    head = model.get_output_embeddings()
    status = getattr(head, "status", HeadStatus.UNCHECKED)
    replaced = not isinstance(head, HeadWithLoss) or "forward" in vars(head)
    if head is not None and (status is HeadStatus.UNCHECKED or (replaced and status is HeadStatus.IN_HEAD)):
        status = set_status(model, forward, like, with_labels, replaced)
    return status is HeadStatus.IN_HEAD


@torch.compiler.disable
def set_status(
    model: PreTrainedModel, forward: Callable[..., ModelOutput], like: Tensor, with_labels: bool, replaced: bool
) -> HeadStatus:
    """Checks the head once, and warns if the loss is not computed in it.

    A head that an adapter wraps or whose forward was replaced, as offloading does, computes logits only.
    """
    head = model.get_output_embeddings()
    if replaced:
        problem = f"its head is {type(head).__module__}.{type(head).__name__}, or has a forward of its own, and only a "
        problem += "plain torch.nn.Linear computes the loss"
    else:
        problem, head.label_shift = check_head(model, forward, like, with_labels)
    head.status = HeadStatus.IN_HEAD if problem is None else HeadStatus.FROM_LOGITS
    if problem is not None:
        kind = f"{type(model).__name__} (model type {model.config.get_text_config().model_type!r})"
        logger.warning("%s: the loss is computed from logits, and not in the head: %s", kind, problem)
    return head.status


@torch.inference_mode(False)  # which also makes a graph where the caller wants none
def check_head(
    model: PreTrainedModel, forward: Callable[..., ModelOutput], like: Tensor, with_labels: bool
) -> tuple[str | None, int | None]:
    """Compares our logits, and our loss, with the model's own on one sequence: what differs, and the labels' shift.

    The sequence is made up, not taken from the batch: every rank runs the model once, on the same tokens, and comes to
    the same decision, whatever its batch holds.
    """
    config, transform = model.config, logit_transform(model.config)
    if transform is None:
        return "what its type does to its logits is not known (tabom.training.logit_transforms.LOGIT_FIELDS)", None
    columns = transform.columns or model.get_output_embeddings().out_features
    length = like.shape[1] if config.model_type in FULL_LENGTH else CHECKED_TOKENS
    ids = (3 + torch.arange(length, device=like.device)) % columns
    labels = ids.index_fill(0, ids.new_tensor([2]), -100)[None]
    output, logits_of_head = run_with_logits(model, forward, ids, labels if with_labels else None)

    if [logits.shape[:-1] for logits in logits_of_head] != [labels.shape]:
        return "its output embeddings are not called once with one hidden state a position", None
    ours = reference.transformed(logits_of_head[0][..., :columns], transform.scale, transform.softcap)
    rounding = 4 * torch.finfo(output.logits.dtype).eps
    if output.logits.shape != ours.shape or not torch.allclose(output.logits.float(), ours, rtol=rounding, atol=0):
        return f"the model changes its logits after the head, and not as its config says: {transform}", None
    if output.logits.requires_grad:
        return "the model changes its logits after the head by parameters that are trained", None
    if not with_labels or output.loss is None:
        return None, None
    for shift in (0, 1):
        loss = F.cross_entropy(ours[0], shifted(labels, shift, -100)[0].to(ours.device))
        loss = add_auxiliary_loss(config, output, loss).to(output.loss.device)
        if torch.isclose(loss, output.loss.float(), rtol=max(1e-4, rounding)):
            return None, shift
    return "its own loss is not the cross-entropy of its labels", None


def run_with_logits(
    model: PreTrainedModel, forward: Callable[..., ModelOutput], ids: Tensor, labels: Tensor | None
) -> tuple[ModelOutput, list[Tensor]]:
    """Runs the model on one sequence; returns its output, and the logits of each call of its head, in fp32.

    The model gets the same logits: in fp32, so that a comparison is as exact in a model in bf16, and without a graph,
    so that logits which leave the model with one were made with parameters that come after the head. The logits of
    `ids` are lowered by 4 to 8 nats: in a new model, which finds all tokens equally likely, the losses of shifted, of
    unshifted and of smoothed labels would be the same. The random numbers of the training stay as they were.
    """
    found: list[Tensor] = []

    def lower(_head: torch.nn.Module, _args: Any, logits: Tensor) -> Tensor:
        logits = logits.detach().float()
        logits[..., ids.to(logits.device)] -= torch.linspace(4, 8, len(ids), device=logits.device)
        found.append(logits.clone())  # models may write to their logits
        return logits

    hook = model.get_output_embeddings().register_forward_hook(lower)
    devices = [] if ids.device.type == "cpu" else [ids.device]
    try:
        with torch.random.fork_rng(devices, device_type=ids.device.type):
            return forward(input_ids=ids[None], **{} if labels is None else {"labels": labels}), found
    finally:
        hook.remove()


def add_auxiliary_loss(config: PreTrainedConfig, output: ModelOutput, loss: Tensor, share: float = 1.0) -> Tensor:
    """Adds what mixtures of experts add to the loss of their labels, where their config has them compute it.

    Args:
        share: of this batch in a mean over several.
    """
    if output.get("aux_loss") is None:
        return loss
    config = config.get_text_config()
    coefficient = getattr(config, "router_aux_loss_coef", None)
    coefficient = config.aux_loss_coef if coefficient is None else coefficient  # JetMoE
    return loss + share * coefficient * output["aux_loss"].to(loss.device)


def shifted(x: Tensor, shift: int, fill: float) -> Tensor:
    """(B, L) what stands `shift` places further, and `fill` at the end."""
    return F.pad(x, (0, shift), value=fill)[:, shift:]
