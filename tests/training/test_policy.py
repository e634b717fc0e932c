"""The objective `policy`: group-relative advantages, and the clipped loss of the tokens that were sampled."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tabom.data.prompts import PromptSet
from tabom.sampling.collect import collect
from tabom.sampling.config import CollectConfig, SamplerConfig
from tabom.training.advantages import group_advantages
from tabom.training.collator import TrajectoryCollator
from tabom.training.examples import TrajectoryDataset
from tabom.training.forward import add_loss_to_forward
from tabom.training.objectives import ObjectiveSettings
from tabom.training.trainer import TabomTrainer
from tests.conftest import random_model
from tests.models.block_causal import SETTINGS, block_causal_model
from tests.training.test_trainer import assert_same, config, train, weights

PROMPTS = ["1+1=", "22+2=", "3=", "4+44="]
TEMPERATURE = 0.7


def rollouts(model, folder, **options):
    """Records of right and wrong responses: those whose text has an even length are right."""
    prompts = PromptSet("p", PROMPTS, ["x"] * 4, lambda _prompt, _answer, response: len(response) % 2 == 0)
    sampler = SamplerConfig(**{"max_new_tokens": 7, "temperature": TEMPERATURE, **options})
    collect(model, prompts, sampler, CollectConfig(str(folder / "t.jsonl"), samples_per_prompt=6))
    lines = (folder / "t.jsonl").read_text().splitlines()
    lines += (folder / "t.jsonl.rejected").read_text().splitlines()[1:]
    records = [json.loads(line) for line in lines]
    assert {record["reward"] for record in records} == {0.0, 1.0}
    return records


@pytest.fixture(params=["full", "shifted", *SETTINGS])
def model(request, tmp_path):
    if request.param in SETTINGS:
        return block_causal_model(tmp_path / "m", request.param, seed=1)
    model = random_model(3)
    object.__setattr__(model, "logits_shift", int(request.param == "shifted"))
    return model


def collate(model, records, **settings):
    settings = ObjectiveSettings("policy", **{"supervised_window": 1, **settings}, block_size=model.block_size)
    dataset = TrajectoryDataset(records, model.tokenizer, settings, seed=5)
    examples = dataset.__getitems__([(0, i) for i in range(len(dataset))])
    collator = TrajectoryCollator(
        *(model.mask_token_id, model.pad_token_id, model.logit_rows, model.block_size), temperature=dataset.temperature
    )
    return collator(examples), dataset


@pytest.mark.parametrize(
    "rewards, groups, group, none",
    [
        ([1, 0], "aa", [0.5**0.5, -(0.5**0.5)], [0.5, -0.5]),
        ([1, 1, 1, 0], "aaaa", [0.5, 0.5, 0.5, -1.5], [0.25, 0.25, 0.25, -0.75]),
        ([1, 0, 1, 1], "abab", [0, -(0.5**0.5), 0, 0.5**0.5], [0, -0.5, 0, 0.5]),
        ([1, 0.3], "ab", [0, 0], [0, 0]),
        ([3, 1, 2], "aaa", [1, -1, 0], [1, -1, 0]),
    ],
)
def test_advantages(rewards, groups, group, none):
    rewards, groups = np.array(rewards, dtype=float), np.array(list(groups))
    np.testing.assert_allclose(group_advantages(rewards, groups, "group"), group, atol=1e-12)
    np.testing.assert_allclose(group_advantages(rewards, groups, "none"), none, atol=1e-12)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(-5, 5)), min_size=1, max_size=20), st.randoms())
def test_advantages_sum_to_zero_and_know_no_order(pairs, random):
    groups, rewards = map(np.array, zip(*pairs, strict=True))
    order = np.array(random.sample(range(len(pairs)), len(pairs)))
    for scale in ("group", "none"):
        advantages = group_advantages(rewards, groups, scale)
        for name in set(groups):
            assert abs(advantages[groups == name].sum()) < 1e-6
        np.testing.assert_allclose(group_advantages(rewards[order], groups[order], scale), advantages[order], atol=1e-6)


@pytest.mark.parametrize("every_cut", [False, True])
def test_at_first_every_ratio_is_one(model, tmp_path, every_cut):
    """M = 1 is the behaviour policy exactly: the loss reads the log-probabilities that the sampler wrote."""
    if every_cut and model.block_size is None:
        return  # needs block-causal attention
    batch, _ = collate(model, rollouts(model, tmp_path), every_cut=every_cut)
    assert {x for x in batch["advantages"].sign().tolist()} >= {-1.0, 1.0}
    add_loss_to_forward(model.model, rank_weight=0.0, clip=(0.2, 0.2))
    output = model.model(**batch)
    assert (batch["labels"] >= 0).all() and len(batch["labels"]) == batch["num_tokens"] >= 24
    torch.testing.assert_close(output.logprobs, batch["old_logprobs"], rtol=1e-3, atol=2e-5)
    expected = -batch["advantages"].double().mean()
    torch.testing.assert_close(output.policy.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("window, unit, rank_weight", [(1, "steps", 0.0), (1, "steps", 0.6), (3, "steps", 0.0)])
def test_loss_and_gradient_are_those_of_the_formula(tmp_path, window, unit, rank_weight):
    """Against autograd in fp64, with weights that have moved since the sampling, so that ratios are clipped."""
    model = random_model(3)
    records = rollouts(model, tmp_path)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.model.double()
    settings = {"supervised_window": window, "window_unit": unit, "rank_weight": rank_weight}
    batch, _ = collate(model, records, rank_window="all", **settings)
    if window != 1:
        del batch["old_logprobs"]

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model.model(**inputs).logits.flatten(0, 1)[batch["rows"]] / TEMPERATURE
    keep = torch.arange(logits.shape[1]) != model.mask_token_id
    log_p = logits.masked_fill(~keep, -torch.inf).log_softmax(-1)
    is_token, advantages = batch["labels"] >= 0, batch["advantages"].double()
    own = log_p.gather(1, batch["labels"].clamp(min=0)[:, None]).squeeze(1)
    ratio = (own - batch.get("old_logprobs", own.detach())).exp()
    clipped = ratio.clamp(0.9, 1.3)
    if window == 1:
        assert ((ratio != clipped) & is_token).float().mean() > 0.1
    expected = -torch.minimum(ratio * advantages, clipped * advantages)[is_token].sum() / batch["num_tokens"]
    if rank_weight:
        p = log_p.exp()
        entropy = -(p * log_p.where(keep, 0.0)).sum(-1)
        ranks = []
        for start, end in zip(batch["cu_seqlens"][:-1], batch["cu_seqlens"][1:], strict=True):
            e, s = entropy[start:end], batch["steps"][start:end]
            pairs = (s[:, None] >= 0) & (s[:, None] < s)
            if pairs.any():
                assert (advantages[start:end] > 0).all(), "only good responses are ranked"
                ranks.append(torch.nn.functional.softplus(e[:, None] - e)[pairs].mean())
        assert len(ranks) == batch["num_sequences"] > 1
        expected = expected + rank_weight * torch.stack(ranks).mean()
    parameters = list(model.model.parameters())
    by_hand = torch.autograd.grad(expected, parameters)

    add_loss_to_forward(model.model, rank_weight=rank_weight, clip=(0.1, 0.3))
    output = model.model(**batch)
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=1e-9)
    for ours, theirs in zip(torch.autograd.grad(output.loss, parameters), by_hand, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def policy_config(folder, **changes):
    settings = {"objective": "policy", "supervised_window": None, "rank_window": "all", "learning_rate": 3e-3}
    return config(folder, **settings | changes)


def test_training_makes_good_responses_likelier(tmp_path):
    records = rollouts(random_model(3), tmp_path)
    args = policy_config(tmp_path / "out", num_train_epochs=40, per_device_train_batch_size=24, learning_rate=2e-5)
    trainer = train(random_model(3), records, args)
    logs = [log for log in trainer.state.log_history if "policy" in log]
    assert len(logs) == 40
    assert logs[0]["ratio"] == pytest.approx(1, abs=1e-3) and logs[0]["kl"] < 1e-6 and logs[0]["clip_share"] == 0
    assert logs[-1]["kl"] > 1e-3 and logs[-1]["clip_share"] > 0
    assert "cross_entropy" not in logs[0] and "entropy" in logs[0]
    collator, dataset = trainer.data_collator, trainer.train_dataset
    batch = collator(dataset.__getitems__([(epoch, i) for epoch in range(90, 98) for i in range(len(dataset))]))
    with torch.no_grad():
        change = trainer.model(**batch).logprobs - batch["old_logprobs"]
    assert (change * batch["advantages"]).mean() > 0.02, "on states that were not drawn in training"


def test_accumulation_does_not_change_the_loss(tmp_path):
    records = rollouts(random_model(3), tmp_path)
    settings = {"max_steps": 3, "rank_weight": 0.5, "optim": "sgd", "learning_rate": 1e-3}
    whole = train(random_model(3), records, policy_config(tmp_path / "a", per_device_train_batch_size=8, **settings))
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    parts = train(random_model(3), records, policy_config(tmp_path / "b", **split, **settings))
    assert_same(weights(whole), weights(parts), rtol=1e-4, atol=1e-6)
    for a, b in zip(whole.state.log_history, parts.state.log_history, strict=True):
        for name in {"policy", "rank", "ratio", "kl", "clip_share"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-6), name


def test_evaluation_and_several_updates_at_once_windows(tmp_path):
    """With M > 1 there are no ratios: the gradient is that of A log p."""
    records = rollouts(random_model(3), tmp_path)
    args = policy_config(tmp_path / "out", supervised_window=3, max_steps=2)
    trainer = train(random_model(3), records, args, eval_dataset=records)
    assert "ratio" not in trainer.state.log_history[0]
    assert np.isfinite(trainer.evaluate()["eval_loss"])


def test_records_that_no_policy_can_learn_from(tmp_path, caplog):
    records = rollouts(random_model(3), tmp_path)

    def refused(changed, match, **settings):
        with pytest.raises(ValueError, match=match):
            train(random_model(3), changed, policy_config(tmp_path / "out", **settings))

    without = [{name: value for name, value in r.items() if name not in ("reward", "correct")} for r in records]
    refused(without, "none of the records has a reward")
    refused([r | {"temperature": 0.0} for r in records], "no `temperature` above 0")
    refused([records[0] | {"temperature": 0.2}, *records[1:]], r"temperatures 0\.2, 0\.7; expected one")
    refused([records[0] | {"logprob": None}, *records[1:]], "a record has no `logprob`")
    with pytest.raises(ValueError, match="another temperature than train_dataset"):
        evaluated = [r | {"temperature": 0.2} for r in records]
        train(random_model(3), records, policy_config(tmp_path / "out"), eval_dataset=evaluated)
    trainer = TabomTrainer(
        random_model(3).model,
        policy_config(tmp_path / "out"),
        [*without[:2], *records],
        processing_class=random_model(3).tokenizer,
    )
    assert len(trainer.train_dataset) == len(records) and "2 of 26 records have no reward" in caplog.text


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"epsilon": 0.1, "supervised_window": 2}, "epsilon=0.1 with supervised_window=2"),
        ({"epsilon_high": 0.1, "supervised_window": 1, "window_unit": "tokens"}, "epsilon_high=0.1"),
        ({"epsilon": -0.1}, "epsilon=-0.1"),
        ({"fused_linear": False}, "fused_linear=False with objective='policy'"),
        ({"objective": "tabom", "epsilon": 0.1}, "epsilon=0.1 with objective='tabom'"),
        ({"objective": "tabom", "scale_rewards": "none"}, "scale_rewards='none' with objective='tabom'"),
        ({"mask_ratio": 0.0}, "mask_ratio"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path, settings, match):
    with pytest.raises(ValueError, match=match):
        policy_config(tmp_path, **settings)


def test_a_stream_is_refused(tmp_path):
    import datasets

    records = rollouts(random_model(3), tmp_path)
    stream = datasets.Dataset.from_list(records).to_iterable_dataset()
    with pytest.raises(ValueError, match="objective='policy' with a streaming train_dataset"):
        train(random_model(3), stream, policy_config(tmp_path / "out", max_steps=1))
