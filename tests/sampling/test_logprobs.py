"""The log-probabilities that `collect` writes, against a replay of every state in fp64."""

import json

import pytest
import torch

from tabom.data.prompts import PromptSet
from tabom.data.trajectories import prompt_group, read_trajectories
from tabom.data.verifiers import Verdict
from tabom.models.layout import response_logits
from tabom.sampling.collect import collect
from tabom.sampling.config import CollectConfig, EngineConfig, SamplerConfig
from tabom.sampling.engine import sample
from tests.conftest import random_model
from tests.models.block_causal import SETTINGS, block_causal_model

PROMPTS = [[5, 6, 7], [9, 8], [4, 4, 5, 6, 7], [11, 12, 13, 10]]


def replayed_logprobs(model, prompt, completion, temperature):
    """(T,) by a forward of its own for each token, before the step that drew it."""
    order = torch.tensor(completion.decoding_order)
    masked = order >= order[:, None]
    if model.block_size is not None:
        blocks = (torch.arange(len(order)) + len(prompt)) // model.block_size
        masked &= blocks == blocks[:, None]  # what stands in later blocks is not seen
    rows = torch.eye(len(order), dtype=torch.bool)
    logits = response_logits(model, prompt, completion.token_ids, masked, rows).double()
    logits[:, model.mask_token_id] = -torch.inf
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None]).squeeze(1)


@pytest.mark.parametrize("logits_shift", [0, 1])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.5, "policy": "dream_entropy", "top_p": 0.9, "steps": 8},
        {"temperature": 0.3, "policy": "random", "steps": 4},
    ],
    ids=str,
)
def test_a_logprob_is_that_of_the_state_that_drew_the_token(options, logits_shift):
    """At the sampler's temperature, without filters, and without the mask token, which is never drawn."""
    model = random_model(3)
    model.model.double()
    object.__setattr__(model, "logits_shift", logits_shift)
    config = SamplerConfig(max_new_tokens=8, block_length=4, **options)
    completions = sample(model, PROMPTS, config, seeds=[1, 2, 3, 4], engine=EngineConfig(compute_budget=30))
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        expected = replayed_logprobs(model, prompt, completion, config.temperature)
        assert completion.logprob == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("kind", SETTINGS)
def test_with_block_causal_attention(tmp_path, kind):
    model = block_causal_model(tmp_path / "m", kind, seed=1)
    config = SamplerConfig(max_new_tokens=7, temperature=0.8)
    completions = sample(model, PROMPTS, config, seeds=[1, 2, 3, 4])
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        expected = replayed_logprobs(model, prompt, completion, 0.8)
        assert completion.logprob == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-5)


def test_greedy_tokens_have_none():
    (completion,) = sample(random_model(3), PROMPTS[:1], SamplerConfig(max_new_tokens=4))
    assert completion.logprob is None


def test_records_hold_reward_group_and_temperature(tmp_path):
    verdicts = iter([Verdict(True, "r"), Verdict(False, "w"), Verdict(None, "u")] * 2)
    prompts = PromptSet("p", ["1+1=", "2+2="], ["2", "4"], lambda *_: next(verdicts))
    model, output = random_model(0), tmp_path / "t.jsonl"
    sampler = SamplerConfig(max_new_tokens=3, temperature=2.0)
    collect(model, prompts, sampler, CollectConfig(str(output), samples_per_prompt=3))
    found = [json.loads(line) for line in output.read_text().splitlines()]
    found += [json.loads(line) for line in (tmp_path / "t.jsonl.rejected").read_text().splitlines()[1:]]
    assert sorted((r["correct"], r["reward"]) for r in found if r["correct"] is not None) == [
        *[(False, 0.0)] * 2,
        *[(True, 1.0)] * 2,
    ]
    assert sum(r["reward"] is None for r in found) == 2
    assert all(
        r["temperature"] == 2.0 and len(r["logprob"]) == 3 and r["group"] == prompt_group(r["prompt"]) for r in found
    )
    assert len({r["group"] for r in found}) == 2

    trajectories, _ = read_trajectories(output, model.tokenizer, len(model.tokenizer))
    wrong, invalid = read_trajectories(tmp_path / "t.jsonl.rejected", model.tokenizer, len(model.tokenizer))
    assert invalid == 0 and len(wrong) == 2 and {each.reward for each in wrong} == {0.0}
    assert {each.logprob is not None and each.temperature for each in trajectories} == {2.0}
