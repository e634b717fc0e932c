from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.decoders import WordPiece
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from tabom.models.diffusion_model import logits_at
from tabom.sampling.completions import decode_response, guaranteed_text
from tabom.sampling.config import SamplerConfig
from tabom.sampling.engine import sample
from tabom.sampling.sampler import denoise
from tests.conftest import random_model

PROMPTS = ["1+2=", "sort 9876543=", "abc"]
LENGTH = 6


def encode(model, prompts=PROMPTS):
    return [model.tokenizer(prompt).input_ids for prompt in prompts]


def brute_force(model, prompt, policy, tokens_per_step=1, block_length=LENGTH):
    """One prompt, no padding, all logits of all positions, one greedy step after the other."""
    tokens = torch.tensor(prompt + [model.mask_token_id] * LENGTH)
    order = torch.full((LENGTH,), -1)
    while (order < 0).any():
        logits = model.model(input_ids=tokens[None]).logits[0, len(prompt) :].detach()
        logits[:, model.mask_token_id] = -torch.inf
        p = logits.softmax(-1)
        top = p.topk(2).values
        score = {
            "entropy": torch.special.entr(p).sum(-1).neg(),
            "confidence": top[:, 0],
            "margin": top[:, 0] - top[:, 1],
        }[policy]
        block = (order < 0).nonzero()[0].item() // block_length
        in_block = torch.arange(LENGTH) // block_length == block
        best = score.masked_fill((order >= 0) | ~in_block, -torch.inf).topk(min(tokens_per_step, LENGTH)).indices
        best = [i for i in best.tolist() if order[i] < 0 and in_block[i]]
        tokens[[len(prompt) + i for i in best]] = p.argmax(-1)[best]
        order[best] = order.max() + 1
    return tokens[len(prompt) :].tolist(), order.tolist()


@pytest.mark.parametrize("policy", ["entropy", "confidence", "margin"])
@pytest.mark.parametrize("tokens_per_step, block_length", [(1, 6), (2, 6), (4, 6), (1, 2), (2, 3)])
def test_greedy_decoding_against_brute_force(model, policy, tokens_per_step, block_length):
    model.model.double()  # in fp32 a batch rounds differently from a prompt alone, and turns near ties
    config = SamplerConfig(
        max_new_tokens=LENGTH, policy=policy, tokens_per_step=tokens_per_step, block_length=block_length
    )
    for prompt, completion in zip(encode(model), sample(model, encode(model), config), strict=True):
        expected = brute_force(model, prompt, policy, tokens_per_step, block_length)
        assert (completion.token_ids, completion.decoding_order) == expected


@pytest.mark.parametrize("temperature, top_k, top_p", [(0.0, None, None), (1.0, None, None), (0.7, 5, 0.9)])
@pytest.mark.parametrize("policy", ["entropy", "random"])
def test_the_seed_decides_the_answer_whatever_the_batch(model, temperature, top_k, top_p, policy):
    config = SamplerConfig(policy=policy, temperature=temperature, top_k=top_k, top_p=top_p, seed=3)
    prompts = encode(model)
    together = sample(model, prompts, config, seeds=[1, 2, 3])
    alone = [sample(model, [p], config, seeds=[s])[0] for p, s in zip(prompts, [1, 2, 3], strict=True)]
    swapped = sample(model, prompts[::-1], config, seeds=[3, 2, 1])[::-1]
    for a, b, c in zip(together, alone, swapped, strict=True):
        assert a.token_ids == b.token_ids == c.token_ids
        assert a.decoding_order == b.decoding_order == c.decoding_order
    assert sample(model, prompts, config, seeds=[1, 2, 3]) == together


def test_other_seeds_give_other_answers_and_other_random_orders(model):
    [prompt] = encode(model, ["1+2="])
    config = SamplerConfig(temperature=2.0, policy="random")
    completions = sample(model, [prompt] * 8, config, seeds=range(8))
    assert len({tuple(c.token_ids) for c in completions}) > 1
    assert len({tuple(c.decoding_order) for c in completions}) > 1


def test_padding_changes_no_logits(model):
    short, long = encode(model, ["12", "sort 98765="])
    config = SamplerConfig(max_new_tokens=4)
    for alone, padded in zip(sample(model, [short], config), sample(model, [short, long], config), strict=False):
        assert torch.tensor(alone.entropy).allclose(torch.tensor(padded.entropy), atol=1e-5)


def test_only_masked_positions_of_the_active_block_go_through_the_head(model):
    seen = []
    head = model.model.get_output_embeddings()
    head.register_forward_hook(lambda _head, _args, logits: seen.append(logits.shape[:-1].numel()))
    sample(model, encode(model), SamplerConfig(max_new_tokens=4, tokens_per_step=1, block_length=2))
    assert seen == [3 * 2, 3 * 1, 3 * 2, 3 * 1]


def test_logits_at_equals_the_rows_of_all_logits(model, rng):
    input_ids = torch.randint(4, 40, (3, 7))
    rows = torch.randperm(21)[:9]
    everything = model.model(input_ids=input_ids).logits.flatten(0, 1)
    torch.testing.assert_close(logits_at(model.model, rows, input_ids=input_ids), everything[rows])
    assert model.model(input_ids=input_ids).logits.shape == (3, 7, everything.shape[1])  # the hook is gone


def test_a_model_without_logits_of_each_position_is_refused(model):
    """As Perceiver, which has those of its longest input."""

    def forward(input_ids):
        return SimpleNamespace(logits=torch.zeros(3, 128, 40))

    with pytest.raises(ValueError, match=r"expected those of \(3, 7\) positions, got \(3, 128, 40\)"):
        logits_at(model.model, torch.arange(4), forward=forward, input_ids=torch.zeros(3, 7, dtype=torch.int64))


def test_the_mask_token_is_never_chosen(model):
    with torch.no_grad():
        model.model.lm_head.weight[model.mask_token_id] = 100 * model.model.lm_head.weight.abs().max()
    for completion in sample(model, encode(model), SamplerConfig(temperature=5.0)):
        assert model.mask_token_id not in completion.token_ids
        assert torch.tensor(completion.entropy).isfinite().all()


@pytest.mark.parametrize(
    "config, schedule",
    [
        (SamplerConfig(), [[1] * 8]),
        (SamplerConfig(tokens_per_step=3), [[3, 3, 2]]),
        (SamplerConfig(steps=3), [[3, 3, 2]]),
        (SamplerConfig(steps=4, block_length=4), [[2, 2], [2, 2]]),
        (SamplerConfig(tokens_per_step=3, block_length=4), [[3, 1], [3, 1]]),
    ],
)
def test_schedules(model, config, schedule):
    [prompt] = encode(model, ["1+2="])
    config.max_new_tokens = 8
    [completion] = sample(model, [prompt], config)
    counts = torch.tensor(completion.decoding_order).bincount().tolist()
    assert counts == [count for block in schedule for count in block]


@pytest.mark.parametrize(
    "settings, argument",
    [
        ({"steps": 9}, "steps=9"),
        ({"steps": 3, "block_length": 4}, "steps=3"),
        ({"block_length": 3}, "block_length=3"),
        ({"steps": 2, "tokens_per_step": 2}, "tokens_per_step=2"),
        ({"tokens_per_step": 0}, "tokens_per_step=0"),
        ({"policy": "best"}, "policy='best'"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
    ],
)
def test_contradictory_settings_are_refused_by_name(settings, argument):
    with pytest.raises(ValueError, match=argument):
        SamplerConfig(**settings).plan(8)


def test_states_show_one_more_step_each(model):
    states = [s.decoding_order.clone() for s in denoise(model, encode(model), 4, SamplerConfig(tokens_per_step=2))]
    assert [(order >= 0).sum().item() for order in states] == [0, 6, 12]


def test_shifted_logits_stand_one_to_the_left(seed):
    model = random_model(seed)
    shifted = random_model(seed)
    object.__setattr__(shifted, "logits_shift", 1)
    [prompt] = encode(model, ["abc"])
    state = next(denoise(shifted, [prompt], 1, SamplerConfig()))
    input_ids = torch.tensor([[*prompt, model.mask_token_id]])
    expected = model.model(input_ids=input_ids).logits[0, len(prompt) - 1].clone()
    expected[model.mask_token_id] = -torch.inf
    *_, state = denoise(shifted, [prompt], 1, SamplerConfig())
    assert state.tokens.item() == expected.argmax().item()


def test_a_response_ends_at_its_first_end_token(model):
    ids = [*model.tokenizer("ab").input_ids, model.eos_token_id, *model.tokenizer("c").input_ids]
    assert decode_response(model, ids) == "ab"


def test_the_guaranteed_text_of_a_beginning_begins_the_whole_text():
    """Byte by byte, where a character may end in the middle of a beginning; a tokenizer that tidies is not trusted."""
    backend = Tokenizer(BPE({character: i for i, character in enumerate(ByteLevel.alphabet())}, []))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    model = SimpleNamespace(tokenizer=PreTrainedTokenizerFast(tokenizer_object=backend))
    text = " naïve 数 🙂 do n't ."
    ids = model.tokenizer(text).input_ids
    certain = [guaranteed_text(model, ids[:count]) for count in range(len(ids) + 1)]
    assert len(ids) > len(text) and certain[-1] == text and all(text.startswith(each) for each in certain)
    backend.decoder = WordPiece()
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert guaranteed_text(model, ids) == ""


def test_positions_count_from_the_first_real_token(model):
    """Rotary models do not care, models with absolute positions do."""
    seen = []
    model.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    short, long = encode(model, ["12", "sort 98765="])
    list(denoise(model, [short, long], 1, SamplerConfig()))
    padding = len(long) - len(short)
    assert seen[0]["position_ids"][0, padding:].tolist() == list(range(len(short) + 1))
    assert seen[0]["position_ids"][1].tolist() == list(range(len(long) + 1))
    assert seen[0]["attention_mask"][0].tolist() == [0] * padding + [1] * (len(short) + 1)
