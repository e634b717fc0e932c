"""Likelihoods against exact enumeration."""

from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
import torch

from tabom import SamplerConfig, sample
from tabom.data.encoding import encode_prompt
from tabom.evaluation.likelihood import nelbo_log_likelihood, trajectory_log_likelihood
from tests.conftest import random_model
from tests.models.block_causal import block_causal_model


def log_probabilities(model, prompt, shown):
    """(L, V) of a response with mask tokens in it."""
    with torch.no_grad():
        logits = model.model(input_ids=torch.tensor([prompt + shown])).logits[0].double()
    return logits.roll(model.logits_shift, 0)[len(prompt) :].log_softmax(-1)


def exact_bound(model, prompt, response):
    """The expectation over all k and all sets of k masked positions."""
    length, total = len(response), 0.0
    for k in range(1, length + 1):
        terms = []
        for masked in combinations(range(length), k):
            shown = [model.mask_token_id if i in masked else token for i, token in enumerate(response)]
            log_p = log_probabilities(model, prompt, shown)
            terms.append(length / k * sum(log_p[i, response[i]].item() for i in masked))
        total += np.mean(terms) / length
    return total


@pytest.mark.parametrize("shift", [0, 1])
def test_the_bound_is_unbiased(seed, rng, shift):
    model = random_model(seed, logits_shift=shift)
    prompt, response = encode_prompt(model.tokenizer, "1+2="), [rng.randrange(4, 45) for _ in range(3)]
    estimates = [nelbo_log_likelihood(model, prompt, response, samples=6, seed=i) for i in range(150)]
    error = np.std(estimates, ddof=1) / len(estimates) ** 0.5
    assert abs(np.mean(estimates) - exact_bound(model, prompt, response)) < 5 * error + 1e-4


def test_the_bound_of_one_token_is_its_likelihood(model):
    prompt = encode_prompt(model.tokenizer, "1+2=")
    expected = log_probabilities(model, prompt, [model.mask_token_id])[0, 9].item()
    assert nelbo_log_likelihood(model, prompt, [9], samples=3) == pytest.approx(expected, rel=1e-4)


def test_likelihoods_along_the_decoding_add_up_to_one(seed):
    model = random_model(seed, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    prompt = encode_prompt(model.tokenizer, "1=")
    vocabulary = [token for token in range(model.model.config.vocab_size) if token != model.mask_token_id]
    total = sum(
        np.exp(trajectory_log_likelihood(model, prompt, list(pair), SamplerConfig())[0])
        for pair in product(vocabulary, repeat=2)
    )
    assert total == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "policy, per_step",
    [("entropy", 1), ("confidence", 1), ("margin", 2), ("dream_entropy", None), ("dream_origin", None)],
)
def test_a_greedy_answer_is_greedy_and_another_is_not(model, policy, per_step):
    config = SamplerConfig(max_new_tokens=5, policy=policy, tokens_per_step=per_step)
    prompt = encode_prompt(model.tokenizer, "sort 312=")
    [completion] = sample(model, [prompt], config)
    total, is_greedy = trajectory_log_likelihood(model, prompt, completion.token_ids, config)
    assert is_greedy
    expected = 0.0
    for step in range(max(completion.decoding_order) + 1):
        shown = [
            token if order < step else model.mask_token_id
            for token, order in zip(completion.token_ids, completion.decoding_order, strict=True)
        ]
        log_p = log_probabilities(model, prompt, shown)
        log_p -= torch.log1p(-log_p[:, [model.mask_token_id]].exp())  # the sampler never chooses the mask
        expected += sum(
            log_p[i, completion.token_ids[i]].item() for i, s in enumerate(completion.decoding_order) if s == step
        )
    assert total == pytest.approx(expected, rel=1e-3, abs=1e-4)
    other = list(completion.token_ids)
    other[2] = 4 + (other[2] + 1 - 4) % 41
    _, is_greedy = trajectory_log_likelihood(model, prompt, other, config)
    assert not is_greedy


TYPES = ["sdar", "llada2_moe", "Fast_dLLM_Qwen"]


def of_block(model, before, shown):
    """(b, V) fp64 log-probabilities of the last block of a sequence, which is `shown` behind clean text."""
    ids = torch.tensor(before + shown)
    block = torch.arange(len(ids)) // model.block_size
    bias = torch.zeros(len(ids), len(ids), dtype=torch.float64).masked_fill_(block > block[:, None], -1e30)
    with torch.no_grad():
        logits = model.model(input_ids=ids[None], attention_mask=bias[None, None]).logits[0]
    return logits.roll(model.logits_shift, 0)[len(before) :].double().log_softmax(-1)


def exact_block_bound(model, prompt, response):
    """The sum over blocks of the expectation over all k and all sets of k masked tokens of the block."""
    size, total = model.block_size, 0.0
    text = prompt + response
    for start in range(len(prompt) // size * size, len(text), size):
        own = range(max(start, len(prompt)), min(start + size, len(text)))
        for k in range(1, len(own) + 1):
            terms = []
            for masked in combinations(own, k):
                shown = [model.mask_token_id if i in masked else token for i, token in enumerate(text)]
                shown += [model.mask_token_id] * size
                log_p = of_block(model, text[:start], shown[start : start + size])
                terms.append(len(own) / k * sum(log_p[i - start, text[i]].item() for i in masked))
            total += np.mean(terms) / len(own)
    return total


@pytest.fixture(scope="module", params=TYPES)
def block_model(request, tmp_path_factory):
    model = block_causal_model(tmp_path_factory.mktemp("model") / "m", request.param, seed=3)
    model.model.double().config._experts_implementation = "eager"  # grouped products know no fp64
    return replace(model, block_size=4)


@pytest.mark.parametrize("prompt_length, length", [(4, 6), (5, 7), (3, 1), (2, 3)])
def test_the_bound_of_blocks_is_unbiased(block_model, rng, prompt_length, length):
    prompt, response = ([rng.randrange(5, 15) for _ in range(n)] for n in (prompt_length, length))
    exact = exact_block_bound(block_model, prompt, response)
    estimates = [nelbo_log_likelihood(block_model, prompt, response, samples=12, seed=i, batch=5) for i in range(60)]
    error = np.std(estimates, ddof=1) / len(estimates) ** 0.5
    assert abs(np.mean(estimates) - exact) < 5 * error + 1e-5 * abs(exact)


def test_the_bound_of_blocks_of_one_token_is_their_likelihood(block_model, rng):
    model = replace(block_model, block_size=1)
    prompt, response = ([rng.randrange(5, 15) for _ in range(n)] for n in (3, 9))
    expected = exact_block_bound(model, prompt, response)
    assert nelbo_log_likelihood(model, prompt, response, samples=1) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("block_length", [2, 4])
def test_likelihoods_of_blocks_along_the_decoding_add_up_to_one(block_model, block_length):
    """Three tokens of the vocabulary are left; the response crosses blocks, and ends inside one of four."""
    vocabulary, prompt = [5, 6, 7], [8, 9, 5]
    head = block_model.model.get_output_embeddings()
    others = [token for token in range(len(head.weight)) if token not in vocabulary]
    hook = head.register_forward_hook(lambda _head, _args, logits: logits.index_fill(-1, torch.tensor(others), -1e4))
    config = SamplerConfig(block_length=block_length)
    total = sum(
        np.exp(trajectory_log_likelihood(block_model, prompt, list(response), config)[0])
        for response in product(vocabulary, repeat=3)
    )
    hook.remove()
    assert total == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("policy", ["entropy", "random", "sdar_dynamic", "llada2", "threshold"])
def test_a_greedy_answer_in_blocks_is_greedy_and_another_is_not(block_model, rng, policy):
    model = block_model
    config = SamplerConfig(max_new_tokens=10, policy=policy, threshold=0.5)
    prompt = [rng.randrange(5, 15) for _ in range(6)]
    [completion] = sample(model, [prompt], config)
    response = completion.token_ids
    assert len(response) == 10
    total, is_greedy = trajectory_log_likelihood(model, prompt, response, config)
    assert is_greedy
    expected, text = 0.0, prompt + response
    for step in range(max(completion.decoding_order) + 1):
        now = [len(prompt) + i for i, s in enumerate(completion.decoding_order) if s == step]
        start = now[0] // 4 * 4
        shown = [
            text[i] if i < len(prompt) or completion.decoding_order[i - len(prompt)] < step else model.mask_token_id
            for i in range(start, start + 4)
        ]
        log_p = of_block(model, text[:start], shown)
        log_p -= torch.log1p(-log_p[:, [model.mask_token_id]].exp())  # the sampler never chooses the mask
        expected += sum(log_p[i - start, text[i]].item() for i in now)
    assert total == pytest.approx(expected, rel=1e-4, abs=1e-5)
    other = list(response)
    other[7] = 5 + (other[7] - 4) % 10
    assert not trajectory_log_likelihood(model, prompt, other, config)[1]
