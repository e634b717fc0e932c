"""Decoding with block-causal attention, against a plain loop over one block at a time behind transformers' cache."""

import pytest
import torch

from benchmarks.blocks import authors_loop, floor
from tabom.sampling.config import FINDS_ITS_PACE, SamplerConfig
from tabom.sampling.engine import Engine, EngineConfig, Request
from tabom.sampling.sampler import denoise
from tests.models.block_causal import SETTINGS, block_causal_model

TYPES = list(SETTINGS)


@pytest.fixture(scope="module", params=TYPES)
def block_model(request, tmp_path_factory):
    return block_causal_model(tmp_path_factory.mktemp("model") / "m", request.param, seed=TYPES.index(request.param))


def static(size, steps):
    """SDAR's static rule: so many of the most probable tokens in every step."""

    def choose(p, masked, index):
        pace = size // steps + (index < size % steps)
        return ranking(p, masked)[: min(pace, masked.sum())]

    return choose


def dynamic(size, steps):
    """SDAR's dynamic rule, which is LLaDA2.0's: all above the threshold, or at least the pace."""

    def choose(p, masked, index):
        above = int((p[masked] > 0.3).sum())
        return ranking(p, masked)[: min(max(above, size // steps + (index < size % steps)), masked.sum())]

    return choose


def sequential(size, steps):
    """SDAR's sequential rule: from the first mask on."""

    def choose(p, masked, index):
        return masked.nonzero()[:, 0][: size // steps + (index < size % steps)]

    return choose


def fast_dllm(size, _steps):
    """Fast-dLLM v2: in the first part of 8 that has masks, all above the threshold and the most probable one."""

    def choose(p, masked, index):
        start = int(masked.nonzero()[0]) // 8 * 8
        part = masked.clone()
        part[:start], part[start + 8 :] = False, False
        return ranking(p, part)[: max(1, int((p[part] > 0.3).sum()))]

    return choose


def ranking(p, masked):
    """Positions in falling order of their probabilities, the masked ones first."""
    return p.masked_fill(~masked, -1).sort(descending=True, stable=True).indices


RULES = {
    "sdar_static": static,
    "sdar_dynamic": dynamic,
    "sdar_sequential": sequential,
    "llada2": dynamic,
    "fast_dllm": fast_dllm,
}


@pytest.mark.parametrize("name", RULES)
def test_the_engine_decodes_as_the_loop_of_the_authors_does(block_model, rng, name):
    if name == "fast_dllm" and block_model.logits_shift == 0:
        with pytest.raises(ValueError, match="policy='fast_dllm': expected a block-causal model with logits_shift=1"):
            Engine(block_model, SamplerConfig(policy=name))
        return
    lengths = [1, 3, 4, 5, 9, 16, 17, 30]
    prompts = [[rng.randrange(5, 15) for _ in range(length)] for length in lengths]
    requests = [Request(prompt, rng.choice([1, 4, 7, 20]), 0) for prompt in prompts]
    steps = max(1, block_model.block_size // 3) if name != "fast_dllm" else None
    config = SamplerConfig(policy=name, threshold=0.3, steps=steps)
    found = dict(Engine(block_model, config).run(requests))
    for number, request in enumerate(requests):
        choose = RULES[name](block_model.block_size, steps)
        tokens, order, cost = authors_loop(block_model, *request[:2], choose, first_token=name == "fast_dllm")
        assert (found[number].token_ids, found[number].decoding_order) == (tokens, order)
        spent = found[number].positions
        assert spent <= cost if block_model.logits_shift == 0 else spent <= cost + max(order)


@pytest.mark.parametrize("policy", ["sdar_sequential", "threshold", "entropy", "random"])
def test_the_engine_decodes_as_denoise_does(block_model, rng, policy):
    settings = {} if policy in FINDS_ITS_PACE else {"tokens_per_step": 2}
    config = SamplerConfig(policy=policy, threshold=0.3, seed=3, **settings)
    prompts = [[rng.randrange(5, 15) for _ in range(length)] for length in (1, 6, 13)]
    found = dict(Engine(block_model, config).run(Request(prompt, 9, 3) for prompt in prompts))
    for number, prompt in enumerate(prompts):
        *_, state = denoise(block_model, [prompt], 9, config)
        assert found[number].token_ids == state.tokens[0].tolist()
        assert found[number].decoding_order == state.decoding_order[0].tolist()
        assert found[number].entropy == pytest.approx(state.entropy[0].tolist(), rel=1e-3, abs=1e-5)


def decode_with_editing(model, prompt, length, config):
    """LLaDA2.1's loop: no cache; decided tokens are replaced until a block has no mask and nothing changes."""
    size, given = model.block_size, len(prompt) % model.block_size
    blocks = -(-(len(prompt) + length) // size)
    x = torch.tensor([*prompt, *[model.mask_token_id] * (blocks * size - len(prompt))])
    order, step, edits = torch.full_like(x, -1), 0, 0
    for start in range(len(prompt) - given, blocks * size, size):
        end, post = start + size, 0
        while True:
            masked = x[start:end] == model.mask_token_id
            post += not masked.any()
            if post > config.max_post_steps:
                break
            with torch.no_grad():
                logits = model.model(**model.inputs(x[None, :end])).logits[0]
            logits = logits[(torch.arange(start, end) - model.logits_shift).clamp(min=0)]
            logits[:, model.mask_token_id] = -torch.inf
            p, best = logits.softmax(-1).max(-1)
            high = masked & (p > config.threshold)
            if masked.any() and not high.any():
                high[p.masked_fill(~masked, -1).argmax()] = True
            is_response = torch.arange(start, end) >= len(prompt)
            change = ~masked & is_response & (p > config.editing_threshold) & (best != x[start:end])
            x[start:end] = torch.where(high | change, best, x[start:end])
            order[start:end][high | change] = step
            step, edits = step + 1, edits + int(change.sum())
            if not masked.any() and not change.any():
                break
    return x[len(prompt) :].tolist(), order[len(prompt) :].tolist(), edits


@pytest.mark.parametrize("max_post_steps", [1, 16])
def test_decided_tokens_are_edited_as_in_the_loop_of_llada2(block_model, rng, max_post_steps):
    settings = {"threshold": 0.4, "editing_threshold": 0.2, "max_post_steps": max_post_steps}
    config = SamplerConfig(policy="llada2_edit", **settings)
    prompts = [[rng.randrange(5, 15) for _ in range(length)] for length in (16, 3, 21, 33)]
    found = dict(Engine(block_model, config).run(Request(prompt, 30, 0) for prompt in prompts))
    edits = 0
    for number, prompt in enumerate(prompts):
        tokens, order, count = decode_with_editing(block_model, prompt, 30, config)
        assert (found[number].token_ids, found[number].decoding_order) == (tokens, order)
        assert found[number].edits == count
        *_, state = denoise(block_model, [prompt], 30, config)
        assert (state.tokens[0].tolist(), state.decoding_order[0].tolist()) == (tokens, order)
        edits += count
    assert edits > 0


def test_settings_of_editing_are_refused_where_nothing_is_edited(block_model):
    for name, value in {"editing_threshold": 0.5, "max_post_steps": 3}.items():
        with pytest.raises(ValueError, match=f"{name}={value} with policy='llada2': only llada2_edit edits"):
            SamplerConfig(policy="llada2", **{name: value})
    with pytest.raises(ValueError, match="give_up=True with policy='llada2_edit'"):
        Engine(block_model, SamplerConfig(policy="llada2_edit"), is_hopeless=lambda number, tokens: False)
    for settings, message in (
        ({"cache": "prefix"}, "cache='prefix' with block-causal attention"),
        ({"policy": "dream_entropy"}, "policy='dream_entropy' with block-causal attention"),
        ({"steps": 99}, "steps=99: expected at most"),
    ):
        with pytest.raises(ValueError, match=message):
            list(Engine(block_model, SamplerConfig(**settings)).run([Request([5, 6], 4, 0)]))
    with pytest.raises(ValueError, match="look_every=2 with block-causal attention"):
        Engine(block_model, SamplerConfig(), EngineConfig(look_every=2))


def test_a_position_is_computed_again_in_the_active_block_only(block_model, rng):
    """The floor counts a last run of the last block, which the engine does not need."""
    requests = [Request([5] * rng.randrange(1, 40), rng.randrange(1, 60), 0) for _ in range(6)]
    for number, completion in Engine(block_model, SamplerConfig(policy="confidence")).run(requests):
        request, size = requests[number], block_model.block_size
        most = floor(request, size) - size
        whole = len(completion.token_ids) // size  # blocks that the response begins, whose first token is predicted
        assert completion.positions <= most + block_model.logits_shift * whole * (size - 1)


def test_no_position_is_computed_again_where_the_first_token_is_decided_alone(block_model, rng):
    """Counted step by step: a block that begins with such a token stores the block before it in a step of its own."""
    if block_model.logits_shift == 0:
        pytest.skip("the policy is for shifted logits")
    config, size = SamplerConfig(policy="fast_dllm", threshold=1.0), block_model.block_size
    requests = [Request([5] * length, rng.randrange(1, 60), 0) for length in (1, size - 1, size, size + 1, 40)]
    for number, completion in Engine(block_model, config).run(requests):
        prompt = len(requests[number].prompt)
        given, whole = prompt % size, len(completion.token_ids) // size
        first = prompt - given + size + (size - given - 1) * size if given else prompt - size
        assert completion.positions == first + whole * size**2
