import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tabom import SamplerConfig, load
from tabom.evaluation.answers import accuracy
from tabom.lab.model import BASE_PATH
from tabom.lab.pretrain import MIXTURE, PretrainConfig, pretrain
from tabom.lab.quickstart import OTHER_TASKS, WEAK_TASK, QuickstartConfig, quickstart
from tabom.lab.report import verdict


def test_the_shipped_model_is_what_it_is_said_to_be():
    """About 1M parameters in bf16 under 4 MB; strong on the other tasks, weak but not hopeless on subtraction."""
    base = load(BASE_PATH)
    assert 0.9e6 < base.model.num_parameters() < 1.2e6
    assert (BASE_PATH / "model.safetensors").stat().st_size < 4e6
    assert AutoModelForCausalLM.from_pretrained(BASE_PATH, dtype="auto").dtype == torch.bfloat16
    assert base.model.config.model_type == "llama" and base.model.config.is_causal is False
    for task in OTHER_TASKS:
        prompts = task.prompt_set(60, "test", 9)
        assert accuracy(base, prompts, SamplerConfig(max_new_tokens=task.response_length)).mean() > 0.85, task
    weak = WEAK_TASK.prompt_set(200, "test", 9)
    assert 0.1 < accuracy(base, weak, SamplerConfig(max_new_tokens=WEAK_TASK.response_length)).mean() < 0.9


def test_attention_is_bidirectional():
    base = load(BASE_PATH)
    ids = torch.tensor([base.tokenizer("sort 12345678=").input_ids])
    changed = ids.clone()
    changed[0, -2] += 1
    difference = base.model(input_ids=ids).logits - base.model(input_ids=changed).logits
    assert (difference[0, 0].abs() > 0).any()


def test_pretraining_runs_and_is_reproducible(tmp_path):
    weights = []
    for name in ("a", "b"):
        folder = pretrain(PretrainConfig(output_dir=str(tmp_path / name), max_steps=2, warmup_steps=1))
        weights.append(load(folder).model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert sum(MIXTURE.values()) == 128


def test_verdicts():
    coin = np.random.default_rng(0).integers(0, 2, 1000)
    assert verdict(coin, coin) == "no clear difference"
    assert verdict(np.ones(100), np.zeros(100)) == "higher"
    assert verdict(coin * 0.5, coin) == "lower"
    assert verdict(coin, np.roll(coin, 1)) == "no clear difference"


def test_the_quickstart_end_to_end(tmp_path, capsys):
    config = QuickstartConfig(
        output_dir=str(tmp_path),
        num_prompts=60,
        num_problems=30,
        num_other_problems=4,
        num_pass_problems=3,
        max_steps=2,
        batch_size=8,
    )
    results = quickstart(config)
    assert list(results) == ["base", "NELBO, ground truth", "NELBO, trajectories", "window CE", "TABOM"]
    for name in ("results.json", "accuracy_retention.png", "entropy_by_step.png", "trajectories.jsonl"):
        assert (tmp_path / name).stat().st_size > 0
    out = capsys.readouterr().out
    assert "TABOM against NELBO, trajectories" in out and "two standard errors" in out
