"""The code of "One line in your own loop" in docs/loss.md runs, and computes what it says."""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM


def test_one_line_in_your_own_loop(rng):
    text = (Path(__file__).parents[1] / "docs" / "loss.md").read_text()
    section = text.partition("## One line in your own loop")[2].partition("\n## ")[0]
    cross_entropy, patched = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    config = LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).train()
    hidden, labels, t = torch.randn(7, 16), torch.randint(30, (7,)), torch.rand(7) + 0.1
    names = {"hidden": hidden, "lm_head": model.lm_head, "labels": labels, "t": t}
    exec(cross_entropy, names)
    each = F.cross_entropy(model.lm_head(hidden), labels, reduction="none")
    torch.testing.assert_close(names["loss"], (each / t).mean())

    input_ids = torch.randint(30, (2, 8))
    names = {"model": model, "input_ids": input_ids}
    exec(patched, names)
    torch.testing.assert_close(names["loss"], model(input_ids=input_ids, labels=input_ids).loss)


def test_the_policy_loss_of_the_page_runs(rng):
    text = (Path(__file__).parents[1] / "docs" / "loss.md").read_text()
    [policy] = re.findall(
        r"```python\n(.*?)```", text.partition("## A policy loss")[2].partition("\n## ")[0], re.DOTALL
    )
    hidden, lm_head = torch.randn(7, 16), torch.nn.Linear(16, 30, bias=False)
    labels, advantages, temperature = torch.randint(30, (7,)), torch.randn(7), 0.7
    logits = lm_head(hidden) / temperature
    logprobs = -F.cross_entropy(logits, labels, reduction="none").detach()
    names = {"old_logprobs": logprobs, "ref_logprobs": logprobs - 0.1, "advantages": advantages}
    names |= {"hidden": hidden, "lm_head": lm_head, "labels": labels, "temperature": temperature}
    exec(policy, names)
    kl = 0.04 * (torch.tensor(-0.1).exp() + 0.1 - 1)
    torch.testing.assert_close(names["result"].loss, kl - advantages.mean())
    assert lm_head.weight.grad.isfinite().all()
