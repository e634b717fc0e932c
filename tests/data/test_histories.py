"""What other tools record of a decoding gives the orders that the sampler here recorded of the same."""

import json
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tabom import DiffusersRecorder, from_histories, from_step_map
from tabom.lab.model import character_tokenizer
from tabom.models.loading import SHIPPED_PATH, load
from tabom.sampling.completions import decode_response
from tabom.sampling.config import SamplerConfig
from tabom.sampling.sampler import denoise
from tests.models.block_causal import block_causal_model

PROMPTS = ["517-289=", "12+345=", "sort 4231="]
LENGTH = 8


@pytest.fixture(scope="module")
def diffusion_model():
    return load(SHIPPED_PATH)


def decodings(diffusion_model, **settings):
    """Of each prompt: its token ids, the canvases (1, T) before the first step and after every one, and the order."""
    for prompt in PROMPTS:
        prompt_ids = diffusion_model.tokenizer(prompt).input_ids
        states = [
            (state.tokens.clone(), state.decoding_order.clone())
            for state in denoise(diffusion_model, [prompt_ids], LENGTH, SamplerConfig(**settings))
        ]
        yield prompt_ids, [tokens for tokens, _ in states], states[-1][1][0].tolist()


@pytest.mark.parametrize("settings", [{}, {"tokens_per_step": 3}, {"block_length": 4, "policy": "margin"}])
def test_dllm_histories_of_a_batch(diffusion_model, settings):
    """Prompts of several lengths, left-aligned, each followed by its masks and then by end tokens, as in dLLM."""
    found = list(decodings(diffusion_model, **settings))
    width = max(len(prompt_ids) for prompt_ids, *_ in found) + LENGTH
    histories = torch.full((len(found[0][1]), len(PROMPTS), width), diffusion_model.tokenizer.eos_token_id)
    for row, (prompt_ids, canvases, _) in enumerate(found):
        histories[:, row, : len(prompt_ids)] = torch.tensor(prompt_ids)
        histories[:, row, len(prompt_ids) : len(prompt_ids) + LENGTH] = torch.cat(canvases)
    trajectories = from_histories(
        list(histories), PROMPTS, diffusion_model.tokenizer, method="margin", data_source="sums"
    )
    for trajectory, prompt, (_, canvases, order) in zip(trajectories, PROMPTS, found, strict=True):
        assert trajectory.decoding_order == order
        assert trajectory.response_token_ids == canvases[-1][0].tolist()
        assert trajectory.response == decode_response(diffusion_model, trajectory.response_token_ids)
        assert (trajectory.prompt, trajectory.method, trajectory.data_source) == (prompt, "margin", "sums")


def test_d3llm_records_lists_of_whole_canvases_after_every_step(diffusion_model):
    mask = diffusion_model.mask_token_id
    for prompt, (prompt_ids, canvases, order) in zip(
        PROMPTS, decodings(diffusion_model, tokens_per_step=2), strict=True
    ):
        record = {
            "question": prompt,
            "prompt_ids": prompt_ids,
            "trajectory": [prompt_ids + canvas[0].tolist() for canvas in canvases[1:]],
        }
        # as in docs/trajectories.md
        start = record["prompt_ids"] + [mask] * (len(record["trajectory"][0]) - len(record["prompt_ids"]))
        (trajectory,) = from_histories([start, *record["trajectory"]], [record["question"]], diffusion_model.tokenizer)
        assert trajectory.decoding_order == order and trajectory.response_token_ids == canvases[-1][0].tolist()


@pytest.mark.parametrize("first_step", [0, 1])
def test_step_maps_have_text_without_ids(diffusion_model, first_step):
    for prompt, (_, canvases, order) in zip(PROMPTS, decodings(diffusion_model, tokens_per_step=2), strict=True):
        text = diffusion_model.tokenizer.decode(canvases[-1][0], skip_special_tokens=False)
        step_map = [step + first_step for step in order]
        trajectory = from_step_map(prompt, text, step_map, diffusion_model.tokenizer, first_step=first_step)
        assert trajectory.decoding_order == order and trajectory.response_token_ids == canvases[-1][0].tolist()


def test_what_a_step_map_leaves_masked_was_never_unmasked():
    tokenizer = character_tokenizer()
    counted_from_1 = from_step_map("1=", "12<mask>3", [2, 1, 0, 0], tokenizer)
    assert counted_from_1.decoding_order == [1, 0, -1, -1]
    assert counted_from_1.response_token_ids[2] == tokenizer.pad_token_id
    assert from_step_map("1=", "12<mask>3", [2, 1, 0, 0], tokenizer, first_step=0).decoding_order == [2, 1, -1, 0]
    with pytest.raises(ValueError, match="step_map has 2 steps for 3 tokens"):
        from_step_map("1=", "123", [1, 2], tokenizer)


@pytest.mark.parametrize("prompt_length", [1, 4, 6, 11])
def test_step_maps_of_engines_that_decode_blocks(tmp_path, rng, prompt_length):
    """SGLang's begin anew in every block, JetEngine's count on; both begin with 1."""
    model = block_causal_model(tmp_path / "m", "sdar", seed=prompt_length)
    prompt = "".join(rng.choices("0123456789", k=prompt_length))
    config = SamplerConfig(policy="confidence", tokens_per_step=rng.choice([1, 2, 3]))
    *_, state = denoise(model, [model.tokenizer(prompt).input_ids], 14, config)
    order = state.decoding_order[0].tolist()
    blocks = [(prompt_length + i) // 4 for i in range(len(order))]
    first = {block: min(s for s, b in zip(order, blocks, strict=True) if b == block) for block in blocks}
    in_block = [step - first[block] + 1 for step, block in zip(order, blocks, strict=True)]
    assert max(in_block) < max(order), "the steps of the engine do begin anew"
    text = "".join(rng.choices("0123456789", k=len(order)))
    for options in ({"block_size": 4, "prompt_length": prompt_length}, {"block_size": 4}):
        assert from_step_map(prompt, text, in_block, model.tokenizer, **options).decoding_order == order
    counting_on = [step + 1 for step in order]
    assert from_step_map(prompt, text, counting_on, model.tokenizer).decoding_order == order


def test_a_block_begins_after_the_last_step_of_the_block_before_it():
    """Blocks of 3 behind a prompt of 2 tokens: 1, 3 and 2 tokens; the middle one has a tie and a token left masked."""
    tokenizer = character_tokenizer()
    found = from_step_map("1=", "123456", [1, 2, 0, 2, 2, 1], tokenizer, block_size=3)
    assert found.decoding_order == [0, 2, -1, 2, 4, 3]
    for options, problem in (
        ({"prompt_length": 2}, "^prompt_length=2 without block_size: give"),
        ({"block_size": 0}, "^block_size=0: expected at least 1"),
    ):
        with pytest.raises(ValueError, match=problem):
            from_step_map("1=", "123", [1, 1, 1], tokenizer, **options)


@pytest.mark.parametrize("form", [torch.tensor, np.array])
def test_the_steps_of_a_tensor_are_numbers_that_json_holds(form):
    record = from_step_map("1=", "123", form([2, 1, 0]), character_tokenizer()).to_record()
    assert json.loads(json.dumps(record))["decoding_order"] == [1, 0, -1]


def play_to(recorder, prompt_ids, canvases, block_length, mask):
    """Calls back as diffusers' LLaDA2Pipeline does: blocks from the front of the prompt, a canvas up to the block."""
    width = -(-(len(prompt_ids) + LENGTH) // block_length) * block_length
    canvas = torch.full((1, width), mask)
    canvas[0, : len(prompt_ids)] = torch.tensor(prompt_ids)
    for step, (before, after) in enumerate(pairwise(canvases)):
        written = int((before != after).nonzero()[-1, 1]) + len(prompt_ids)
        end = (written // block_length + 1) * block_length
        was_masked = canvas[:, end - block_length : end] == mask
        canvas[:, len(prompt_ids) : len(prompt_ids) + LENGTH] = after
        tensors = {"block_x": canvas[:, :end], "active_block": was_masked}
        assert {name: tensors[name] for name in recorder.tensor_inputs} == tensors
        assert recorder(SimpleNamespace(), step, step, tensors)["block_x"] is tensors["block_x"]


def test_diffusers_recorder(diffusion_model):
    """Blocks that begin inside the prompt and end behind the response, one token a step in each block."""
    mask, block_length = diffusion_model.mask_token_id, 6
    for prompt in PROMPTS:
        prompt_ids = diffusion_model.tokenizer(prompt).input_ids
        edges = [0, *(-len(prompt_ids) % block_length + block_length * i for i in range(3))]
        blocks = [range(low, min(high, LENGTH)) for low, high in pairwise(edges)]
        order = [i for block in blocks for i in reversed(block)]
        tokens = torch.arange(10, 10 + LENGTH)
        canvases = [torch.full((1, LENGTH), mask)]
        for position in order:
            canvases.append(canvases[-1].clone())
            canvases[-1][0, position] = tokens[position]
        recorder = DiffusersRecorder(mask)
        play_to(recorder, prompt_ids, canvases, block_length, mask)
        (trajectory,) = from_histories(recorder.histories, [prompt], diffusion_model.tokenizer, max_new_tokens=LENGTH)
        assert trajectory.decoding_order == [order.index(i) for i in range(LENGTH)]
        assert trajectory.response_token_ids == tokens.tolist()


def test_a_step_is_when_a_position_was_last_written():
    """One position is masked again and unmasked later, one overwritten, one never unmasked, one masked at the end."""
    tokenizer = character_tokenizer()
    _, prompt = tokenizer.mask_token_id, tokenizer("1=").input_ids
    canvases = [[_, _, _, _], [5, _, _, 8], [_, 6, _, 8], [5, 7, _, _]]
    (trajectory,) = from_histories([prompt + canvas for canvas in canvases], ["1="], tokenizer)
    assert trajectory.decoding_order == [2, 2, -1, -1]
    assert trajectory.response_token_ids == [5, 7, tokenizer.pad_token_id, tokenizer.pad_token_id]


def test_what_is_wrong_is_named():
    tokenizer = character_tokenizer()
    mask, prompt = tokenizer.mask_token_id, tokenizer("1=").input_ids
    with pytest.raises(ValueError, match="masks nothing in row 0"):
        from_histories([[*prompt, 5], [*prompt, 5]], ["1="], tokenizer)
    with pytest.raises(ValueError, match=r"prompts\[0\] has 2 tokens that are not what stands before the response"):
        from_histories([[*prompt, mask], [*prompt, 5]], ["2="], tokenizer)
    with pytest.raises(ValueError, match="histories: 1 canvases; expected the one before the first step"):
        from_histories([[*prompt, mask]], ["1="], tokenizer)
    with pytest.raises(ValueError, match="2 for canvases of 1 rows"):
        from_histories([[*prompt, mask], [*prompt, 5]], ["1=", "2="], tokenizer)
