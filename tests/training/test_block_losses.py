"""The losses of the authors' trainers of block-causal models, written here from their formulas, by settings of ours.

SDAR, dFactory and Fast-dLLM v2 double the whole sequence, [noisy | clean], prompt included. TraceRL masks in every
block the tokens from one of its steps on.
"""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from tabom.cli.arguments import parse_arguments
from tabom.cli.commands import AdapterArguments, DataArguments, ModelArguments
from tabom.data.trajectories import Trajectory
from tabom.training.collator import TrajectoryCollator
from tabom.training.config import TabomConfig
from tabom.training.examples import ExampleReader
from tabom.training.forward import add_loss_to_forward
from tabom.training.windows import example_rng
from tests.models.block_causal import block_causal_model

SEED = 11
SDAR = {"objective": "nelbo", "drawn_per": "response", "min_mask_rate": 1e-3, "pad_last_block": True}
DFACTORY = {"objective": "random_ratio", "drawn_per": "response", "min_mask_rate": 0.3, "max_mask_rate": 0.8}


@pytest.mark.parametrize("recipe, settings", [("sdar_sft", SDAR), ("llada2_sft", DFACTORY)])
def test_the_recipes_have_these_settings(recipe, settings):
    *_, args = read_recipe(recipe)
    assert {name: getattr(args, name) for name in settings} == settings
    args.check_attention(block_size=4, logits_shift=0)


@pytest.mark.parametrize("recipe, model_type", [("sdar_tabom", "sdar"), ("llada2_tabom", "llada2_moe")])
def test_the_recipes_adapt_layers_that_are_there(tmp_path, recipe, model_type):
    _, adapter, _, args = read_recipe(recipe)
    args.check_attention(block_size=4, logits_shift=0)
    model = block_causal_model(tmp_path / "m", model_type).model
    linear = {name.split(".")[-1] for name, layer in model.named_modules() if type(layer) is torch.nn.Linear}
    assert set(adapter.lora_target_modules) <= linear


def read_recipe(recipe):
    types = (DataArguments, AdapterArguments, ModelArguments, TabomConfig)
    return parse_arguments(types, ["--recipe", recipe], "tabom train", "", takes_recipe=True)


@pytest.fixture
def block_model(tmp_path, request, seed):
    model = block_causal_model(tmp_path / "m", request.param, seed)
    model.model.double().config._experts_implementation = "eager"  # grouped products know no fp64
    return model


def make_trajectories(rng, lengths):
    def order(length):
        return [rng.randrange(5) for _ in range(length)]

    tokens = [(rng.choices("0123456789", k=n), rng.choices(range(4, 40), k=length)) for n, length in lengths]
    return [Trajectory("".join(prompt), "", response, order(len(response))) for prompt, response in tokens]


def our_loss(tmp_path, model, trajectories, **settings):
    """The loss of one batch under the settings of a run, and its gradients."""
    args = TabomConfig(output_dir=str(tmp_path), seed=SEED, rank_weight=0.0, use_cpu=True, report_to="none", **settings)
    args.check_attention(model.block_size, model.logits_shift)
    examples = ExampleReader(args, model, model.tokenizer).train(trajectories)
    batch = TrajectoryCollator(
        model.mask_token_id, model.pad_token_id, model.logit_rows, model.block_size, args.first_token_logits
    )(examples.__getitems__([(0, i) for i in range(len(trajectories))]))
    add_loss_to_forward(model.model, **args.loss_settings)
    loss = model.model(**batch).loss
    loss.backward()
    return loss.detach(), taken_gradients(model)


def taken_gradients(model):
    found = {name: p.grad.clone() for name, p in model.model.named_parameters() if p.grad is not None}
    model.model.zero_grad()
    return found


def logits_of_noisy_half(model, clean, noisy):
    """(L, V) with the doubled sequence and its mask, in the order of the authors."""
    length, size = len(clean), model.block_size
    is_clean = torch.arange(2 * length) >= length
    position = torch.arange(2 * length) % length
    block = position // size
    allowed = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    for q in range(2 * length):
        own_noisy = ~is_clean & (block == block[q]) & ~is_clean[q]
        before = is_clean & (block < block[q])
        causal = is_clean & (block <= block[q]) & is_clean[q]
        allowed[q] = own_noisy | before | causal
    bias = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill_(~allowed, -1e30)
    ids = torch.cat([noisy, clean])[None]
    output = model.model(input_ids=ids, position_ids=position[None], attention_mask=bias[None, None])
    return output.logits[0, :length]


def assert_same_loss(model, ours, expected):
    loss, gradients = ours
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=1e-8)
    wanted = taken_gradients(model)
    for name, gradient in gradients.items():  # the routers compute in fp32
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("block_model", ["sdar", "sdar_moe"], indirect=True)
def test_sdar(tmp_path, rng, block_model):
    """One t a sample, p = (1 - eps) t + eps, sum of CE / p over the masked tokens, over the number of labels.

    The last block is filled with padding, which has labels.
    """
    lengths = [(3, 9), (8, 8), (5, 2)]
    trajectories = make_trajectories(rng, lengths)
    ours = our_loss(tmp_path, block_model, trajectories, **SDAR)
    total, labels = 0.0, 0
    for index, trajectory in enumerate(trajectories):
        prompt = block_model.tokenizer(trajectory.prompt).input_ids
        pads = -(len(prompt) + len(trajectory.response_token_ids)) % 4
        response = torch.tensor(trajectory.response_token_ids + [block_model.pad_token_id] * pads)
        draws = example_rng(SEED, 0, index)
        p = (1 - 1e-3) * draws.random() + 1e-3
        masked = torch.from_numpy(draws.random(len(response)) < p)
        clean = torch.cat([torch.tensor(prompt), response])
        noisy = torch.cat([torch.tensor(prompt), response.where(~masked, block_model.mask_token_id)])
        logits = logits_of_noisy_half(block_model, clean, noisy)[len(prompt) :]
        total = total + cross_entropy(logits[masked], response[masked], reduction="sum") / p
        labels += len(response)
    assert_same_loss(block_model, ours, total / labels)


@pytest.mark.parametrize("block_model", ["llada2_moe"], indirect=True)
def test_dfactory(tmp_path, rng, block_model):
    """A rate ~ U(0.3, 0.8) for each sequence, and the plain mean over the masked tokens of the batch."""
    trajectories = make_trajectories(rng, [(3, 13), (8, 8), (5, 19)])
    ours = our_loss(tmp_path, block_model, trajectories, **DFACTORY)
    losses = []
    for index, trajectory in enumerate(trajectories):
        prompt = torch.tensor(block_model.tokenizer(trajectory.prompt).input_ids)
        response, draws = torch.tensor(trajectory.response_token_ids), example_rng(SEED, 0, index)
        rate = 0.3 + (0.8 - 0.3) * draws.random()
        masked = torch.from_numpy(draws.random(len(response)) < rate)
        noisy = torch.cat([prompt, response.where(~masked, block_model.mask_token_id)])
        logits = logits_of_noisy_half(block_model, torch.cat([prompt, response]), noisy)[len(prompt) :]
        losses.append(cross_entropy(logits[masked], response[masked], reduction="none"))
    assert_same_loss(block_model, ours, torch.cat(losses).mean())


@pytest.mark.parametrize("block_model", ["Fast_dLLM_Qwen"], indirect=True)
def test_fast_dllm_v2(tmp_path, rng, block_model):
    """t a block, every row twice with complementary masks, labels shifted by one in the noisy half, plain mean."""
    trajectories = make_trajectories(rng, [(3, 29), (16, 32), (17, 15)])
    settings = {"objective": "random_ratio", "min_mask_rate": 1e-3, "complementary_masks": True}
    ours = our_loss(tmp_path, block_model, trajectories, first_token_logits="noisy", **settings)
    losses = []
    for index, trajectory in enumerate(trajectories):
        prompt = torch.tensor(block_model.tokenizer(trajectory.prompt).input_ids)
        response, draws = torch.tensor(trajectory.response_token_ids), example_rng(SEED, 0, index)
        clean, masked = torch.cat([prompt, response]), []
        for block in range(len(prompt) // 16, len(clean) // 16):
            p = (1 - 1e-3) * draws.random() + 1e-3
            masked.append(draws.random(16 - max(0, len(prompt) - block * 16)) < p)
        mask = torch.cat([torch.zeros(len(prompt), dtype=torch.bool), torch.from_numpy(np.concatenate(masked))])
        is_response = torch.arange(len(clean)) >= len(prompt)
        for hidden in (mask, ~mask & is_response):
            logits = logits_of_noisy_half(block_model, clean, clean.where(~hidden, block_model.mask_token_id))
            labels = clean.where(hidden, -100)
            losses.append(cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum"))
    assert_same_loss(block_model, ours, sum(losses) / sum(len(each.response_token_ids) for each in trajectories))


@pytest.mark.parametrize("block_model", ["sdar"], indirect=True)
@pytest.mark.parametrize("shrink", [1, 2])
def test_tracerl(tmp_path, rng, block_model, shrink):
    """As many rows as the most distinct steps of a block; in each the lowest `shrink` remaining steps are supervised.

    Their blocks are counted from the beginning of the response, so prompts are whole blocks here.
    """
    trajectories = make_trajectories(rng, [(4, 12), (8, 6)])
    settings = {"objective": "window", "supervised_window": shrink, "every_cut": True}
    ours = our_loss(tmp_path, block_model, trajectories, **settings)
    losses = []
    for trajectory in trajectories:
        prompt = torch.tensor(block_model.tokenizer(trajectory.prompt).input_ids)
        response, steps = torch.tensor(trajectory.response_token_ids), torch.tensor(trajectory.decoding_order)
        blocks = [torch.arange(len(response)) // 4 == block for block in range(-(-len(response) // 4))]
        remaining = [steps[block].unique().tolist() for block in blocks]
        while any(remaining):
            masked, supervised = torch.zeros(2, len(response), dtype=torch.bool)
            for number, block in enumerate(blocks):
                if remaining[number]:
                    now, remaining[number] = remaining[number][:shrink], remaining[number][shrink:]
                    masked |= block & (steps >= now[0])
                    supervised |= block & torch.isin(steps, torch.tensor(now))
            noisy = torch.cat([prompt, response.where(~masked, block_model.mask_token_id)])
            clean = torch.cat([prompt, response])
            missing = -len(clean) % 4  # the last block of ours ends with masks
            clean = torch.cat([clean, torch.zeros(missing, dtype=torch.long)])
            noisy = torch.cat([noisy, torch.full((missing,), block_model.mask_token_id)])
            logits = logits_of_noisy_half(block_model, clean, noisy)[len(prompt) :][: len(response)]
            losses.append(cross_entropy(logits[supervised], response[supervised], reduction="none"))
    assert len(torch.cat(losses)) == sum(len(each.response_token_ids) for each in trajectories), "each token once"
    assert_same_loss(block_model, ours, torch.cat(losses).mean())
