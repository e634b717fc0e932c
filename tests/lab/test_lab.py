import pytest
import torch
from transformers import AutoModelForCausalLM

from tabom import SamplerConfig, load
from tabom.evaluation.responses import accuracy
from tabom.lab.experiment import STRONG_TASKS, WEAK_TASKS
from tabom.lab.pretrain import MIXTURE, PretrainConfig, pretrain
from tabom.models.loading import SHIPPED_PATH


def test_the_shipped_model_is_what_it_is_said_to_be():
    """About 1M parameters in bf16 under 4 MB; strong on the other tasks, weak but not hopeless on subtraction."""
    base = load(SHIPPED_PATH)
    assert 0.9e6 < base.model.num_parameters() < 1.2e6
    assert (SHIPPED_PATH / "model.safetensors").stat().st_size < 4e6
    assert AutoModelForCausalLM.from_pretrained(SHIPPED_PATH, dtype="auto").dtype == torch.bfloat16
    assert base.model.config.model_type == "llama" and base.model.config.is_causal is False
    for task in STRONG_TASKS:
        prompts = task.prompt_set(60, "test", 9)
        assert accuracy(base, prompts, SamplerConfig(max_new_tokens=task.response_length)).mean() > 0.85, task
    for task in WEAK_TASKS.values():
        prompts = task.prompt_set(200, "test", 9)
        fast = SamplerConfig(max_new_tokens=task.response_length, tokens_per_step=4)
        assert 0.1 < accuracy(base, prompts, fast).mean() < 0.9, task


def test_attention_is_bidirectional():
    base = load(SHIPPED_PATH)
    ids = torch.tensor([base.tokenizer("sort 12345678=").input_ids])
    changed = ids.clone()
    changed[0, -2] += 1
    difference = base.model(input_ids=ids).logits - base.model(input_ids=changed).logits
    assert (difference[0, 0].abs() > 0).any()


@pytest.mark.parametrize("block_size", [None, 4])
def test_pretraining_runs_and_is_reproducible(tmp_path, block_size):
    weights = []
    for name in ("a", "b"):
        settings = {"max_steps": 2, "warmup_steps": 1, "block_size": block_size}
        model = load(pretrain(PretrainConfig(output_dir=str(tmp_path / name), **settings)))
        assert model.block_size == block_size
        weights.append(model.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert sum(MIXTURE.values()) == 128


def test_a_block_has_tokens():
    with pytest.raises(ValueError, match="block_size=0: expected at least 1"):
        PretrainConfig(block_size=0)
