import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tabom.lab.evaluate import PASS_AT, accuracy, entropy_by_step, order_accuracy, pass_at_k
from tabom.lab.model import BASE_PATH
from tabom.lab.pretrain import MIXTURE, PretrainConfig, pretrain
from tabom.lab.quickstart import OTHER_TASKS, WEAK_TASK, QuickstartConfig, quickstart
from tabom.lab.report import verdict
from tabom.lab.tasks import Addition, Sorting
from tabom.models import load
from tabom.sampler import Completion, SamplerConfig
from tabom.trajectories import Trajectory


def test_the_shipped_model_is_what_it_is_said_to_be():
    """About 1M parameters in bf16 under 4 MB; strong on the other tasks, weak but not hopeless on subtraction."""
    base = load(BASE_PATH)
    assert 0.9e6 < base.model.num_parameters() < 1.2e6
    assert (BASE_PATH / "model.safetensors").stat().st_size < 4e6
    assert AutoModelForCausalLM.from_pretrained(BASE_PATH, dtype="auto").dtype == torch.bfloat16
    assert base.model.config.model_type == "llama" and base.model.config.is_causal is False
    for task in OTHER_TASKS:
        assert accuracy(base, task, task.problems(60, "test", 9), SamplerConfig()).mean() > 0.85, task
    weak = accuracy(base, WEAK_TASK, WEAK_TASK.problems(200, "test", 9), SamplerConfig()).mean()
    assert 0.1 < weak < 0.9


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


def test_pass_at_k_against_the_definition(monkeypatch, model):
    """With c right of n samples, pass@k is the share of k-subsets that hold a right one."""
    right = np.array([[1, 0, 0], [0, 0, 0]] + [[1, 1, 0]] * 2 + [[0, 1, 0]] * 12)  # (samples, problems)
    monkeypatch.setattr("tabom.lab.evaluate.accuracy", lambda model, task, problems, config: right[config.seed])
    estimates = pass_at_k(model, Addition(), range(3), 1.0, lambda: None)
    assert list(estimates) == list(PASS_AT)
    rng = np.random.default_rng(0)
    for k in PASS_AT:
        subsets = np.array([rng.choice(16, k, replace=False) for _ in range(4000)])
        assert estimates[k] == pytest.approx(right[subsets].any(1).mean(0), abs=0.04)


def test_order_accuracy_of_a_trajectory_and_its_reverse_add_up_to_one(model, rng):
    problems = Sorting().problems(4, "train", 0)
    trajectories = [
        Trajectory(p.prompt, p.answer, model.tokenizer(p.answer).input_ids, [0, 1], None)
        for p in (problem._replace(answer=problem.answer[:2]) for problem in problems)
    ]
    backwards = [Trajectory(t.prompt, t.response, t.response_token_ids, [1, 0]) for t in trajectories]
    assert (order_accuracy(model, trajectories) + order_accuracy(model, backwards) == 1).all()


def test_entropy_by_step():
    completions = [Completion([1, 2], [1, 0], [0.5, 0.1]), Completion([1, 2], [0, 0], [0.3, 0.2])]
    assert entropy_by_step(completions) == pytest.approx([0.2, 0.5])


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
