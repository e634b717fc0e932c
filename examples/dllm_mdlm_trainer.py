"""dLLM's MDLMTrainer (https://github.com/ZHZisZZ/dllm) with the fused loss: the logits of a batch are never held.

    from dllm_mdlm_trainer import FusedMDLMTrainer      # in place of dllm.core.trainers.MDLMTrainer

Needs dllm. The loss and its gradients are those of the original, for all three values of `loss_norm_type`, with the
same random numbers; only masked positions reach the head. Evaluation, which may want logits, is the original's. The NLL
that it logs in training is the mean over tokens; under `loss_norm_type="sequence"` it is the mean over sequences of
theirs, which is the loss.
"""

from typing import Any

import torch
from dllm.core.trainers import MDLMTrainer
from torch import Tensor

from tabom import patch


class FusedMDLMTrainer(MDLMTrainer):
    """MDLMTrainer of any transformers model with a plain linear head; see `tabom.patch`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        patch(self.accelerator.unwrap_model(self.model))

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **options: Any
    ) -> Any:
        """As the original, step by step, up to its logits."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, **options)
        inputs = self._preprocess_inputs(inputs)
        input_ids, labels = inputs["input_ids"], inputs["labels"]
        maskable = labels != -100
        t = self.time_epsilon + (1 - self.time_epsilon) * torch.rand(len(input_ids), device=input_ids.device)
        p_mask = 1 - self.scheduler(t)[:, None].expand_as(input_ids)
        masked = (torch.rand(input_ids.shape, device=input_ids.device) < p_mask) & maskable
        noised = torch.where(masked, self.processing_class.mask_token_id, input_ids)

        weights = self._compute_loss_weights(t=t, inputs=inputs, masked_mask=masked) / self.normalizer(maskable)
        targets = input_ids.masked_fill(~masked, -100)
        if self.right_shift_logits:  # the logits of a token stand one to its left
            targets, weights = (x.roll(-1, dims=1) for x in (targets, weights))
            targets[:, -1] = -100
        outputs = model(
            input_ids=noised,
            attention_mask=inputs.get("attention_mask"),
            labels=labels,
            shift_labels=targets,
            token_weights=weights,
            num_items_in_batch=1,
        )
        mean = outputs.loss.detach()
        if self.loss_norm_type == "batch":
            mean = mean * len(input_ids) / maskable.sum().clamp_min(1)
        self.meter.update(split="train", value=mean, weight=maskable.sum())
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def normalizer(self, maskable: Tensor) -> Tensor:
        """() or (B, 1) that the weighted cross-entropy of each of the (B, L) tokens is divided by."""
        match self.loss_norm_type:
            case "token":
                return maskable.sum().clamp_min(1)
            case "sequence":
                return maskable.sum(1, keepdim=True).clamp_min(1) * len(maskable)
            case "batch":
                return torch.tensor(len(maskable), device=maskable.device)
        raise ValueError(f"loss_norm_type={self.loss_norm_type!r}: expected token, sequence or batch")
