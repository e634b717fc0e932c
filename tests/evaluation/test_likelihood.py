"""Likelihoods against exact enumeration."""

from itertools import combinations, product

import numpy as np
import pytest
import torch

from tabom import SamplerConfig, sample
from tabom.data.encoding import encode_prompt
from tabom.evaluation.likelihood import nelbo_log_likelihood, trajectory_log_likelihood
from tests.conftest import random_model


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
