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
