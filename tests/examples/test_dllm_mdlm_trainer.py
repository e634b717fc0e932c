"""The example's loss and gradients against the formula of dLLM's MDLMTrainer, which is not installed here.

`OriginalTrainer` is that formula (arXiv 2406.07524 and 2502.09992), with the methods that the example overrides or
calls, in the order in which the original draws its random numbers.
"""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

MASK = 49


class OriginalTrainer:
    def __init__(self, model, loss_norm_type, right_shift_logits, loss_weight_type="scheduler"):
        self.model, self.loss_norm_type, self.right_shift_logits = model, loss_norm_type, right_shift_logits
        self.time_epsilon, self.loss_weight_type = 1e-3, loss_weight_type
        self.scheduler = lambda t: 1 - t
        self.processing_class = SimpleNamespace(mask_token_id=MASK)
        self.accelerator = SimpleNamespace(unwrap_model=lambda model: model)
        self.logged = []
        self.meter = SimpleNamespace(update=lambda split, value, weight: self.logged.append((value * weight).sum()))

    def _preprocess_inputs(self, inputs):
        return inputs

    def _compute_loss_weights(self, t, inputs, **_):
        if self.loss_weight_type == "uniform":
            return torch.ones_like(inputs["input_ids"])
        return (1 / t)[:, None].repeat(1, inputs["input_ids"].shape[1])

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        input_ids, maskable = inputs["input_ids"], inputs["labels"] != -100
        t = self.time_epsilon + (1 - self.time_epsilon) * torch.rand(len(input_ids))
        masked = (torch.rand(input_ids.shape) < (1 - self.scheduler(t))[:, None]) & maskable
        noised = torch.where(masked, MASK, input_ids)
        logits = model(input_ids=noised, attention_mask=inputs["attention_mask"]).logits
        if self.right_shift_logits:
            logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
        nll = F.cross_entropy(logits.transpose(1, 2), input_ids, reduction="none")
        nll = nll * self._compute_loss_weights(t, inputs) * masked
        self.meter.update(split="train", value=nll.detach(), weight=maskable)
        lengths = maskable.sum(1, keepdim=True)
        divisors = {"token": lengths.sum(), "sequence": lengths * len(input_ids), "batch": len(input_ids)}
        return (nll / divisors[self.loss_norm_type]).sum()


@pytest.fixture
def fused_trainer(monkeypatch):
    trainers = ModuleType("dllm.core.trainers")
    trainers.MDLMTrainer = OriginalTrainer
    for module in (ModuleType("dllm"), ModuleType("dllm.core"), trainers):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "examples.dllm_mdlm_trainer", raising=False)
    return importlib.import_module("examples.dllm_mdlm_trainer").FusedMDLMTrainer


@pytest.mark.parametrize("right_shift", [False, True])
@pytest.mark.parametrize("norm", ["token", "sequence", "batch"])
def test_loss_and_gradients_are_those_of_the_original(seed, rng, fused_trainer, norm, right_shift):
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, is_causal=False
    )
    model = LlamaForCausalLM(config).train()
    input_ids = torch.randint(MASK, (3, 9))
    labels = input_ids.clone()
    for row, prompt in enumerate((1, 3, 5)):
        labels[row, :prompt] = -100
    inputs = {"input_ids": input_ids, "labels": labels, "attention_mask": torch.ones_like(input_ids)}

    def loss_and_gradients(trainer_class):
        trainer = trainer_class(model, norm, right_shift)
        torch.manual_seed(seed)
        model.zero_grad()
        loss = trainer.compute_loss(model, inputs)
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}, trainer.logged

    loss, grads, logged = loss_and_gradients(OriginalTrainer)
    fused_loss, fused_grads, fused_logged = loss_and_gradients(fused_trainer)
    torch.testing.assert_close(fused_loss, loss)
    torch.testing.assert_close(fused_grads, grads)
    if norm != "sequence":
        torch.testing.assert_close(fused_logged, logged)
    assert getattr(type(model), "own_class", None) is LlamaForCausalLM, "it was fused"


def test_another_norm_is_refused(rng, fused_trainer):
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    trainer = fused_trainer(model, "words", False)
    ids = torch.randint(MASK, (2, 4))
    with pytest.raises(ValueError, match="loss_norm_type='words': expected token, sequence or batch"):
        trainer.compute_loss(model.train(), {"input_ids": ids, "labels": ids})
