"""The mask of block-causal training: one rule, dense for sdpa and in tiles for flex attention."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.nn.attention.flex_attention import flex_attention
from transformers.integrations import flex_attention as flex_of_transformers

from tabom import load
from tabom.models import layout as layout_module
from tabom.models.attention import attention_rule, block_bias, block_mask
from tabom.models.diffusion_model import LogitRows
from tabom.training.collator import TrajectoryCollator
from tabom.training.forward import add_loss_to_forward
from tabom.training.objectives import Example, Target
from tests.models.block_causal import SETTINGS, block_causal_model
from tests.training.test_blocks import collate, config, make_trajectories, train

SIZES = {
    "shorter than a tile": ([(7, 30), (3, 50), (0, 1)], 4),
    "of several tiles": ([(100, 256), (33, 120), (3, 300)], 32),
    "ends with a tile": ([(4, 62), (128, 4)], 4),
}
TILE = 128


def layout_of(sizes, block_size):
    """Positions, noise and tokens of a padded batch, as `TrajectoryCollator` makes it."""
    examples = []
    for prompt, response in sizes:
        steps = np.arange(response)
        target = Target(np.ones(response, bool), np.ones(response, bool), steps, np.ones(response), response)
        examples.append(Example([5] * prompt, [6] * response, target))
    batch = TrajectoryCollator(1, 0, LogitRows(0), block_size)(examples)
    return batch["position_ids"], batch["is_noisy"], batch["attention_mask"]


def allowed(sizes, block_size, b, query, key):
    """Whether a position of the layout attends to another, in words of the method."""
    prompt, response = sizes[b]
    clean = prompt + response
    first = prompt - prompt % block_size
    length = clean + -(-(clean - first) // block_size) * block_size
    if key >= length:
        return False
    is_noisy = [place >= clean for place in (query, key)]
    places = [first + place - clean if noisy else place for place, noisy in zip((query, key), is_noisy, strict=True)]
    if query >= length:
        places[0], is_noisy[0] = 0, False
    blocks = [place // block_size for place in places]
    if is_noisy[1]:
        return is_noisy[0] and blocks[0] == blocks[1]
    return blocks[1] < blocks[0] if is_noisy[0] else blocks[1] <= blocks[0]


def pairs_of_tiles(bias):
    """(B, L / 128, L / 128) how many pairs of each tile attend."""
    beyond = -bias.shape[-1] % TILE
    padded = functional.pad(bias[:, 0] == 0, (0, beyond, 0, beyond))
    return padded.unflatten(1, (-1, TILE)).unflatten(3, (-1, TILE)).sum((2, 4))


def test_the_rule_in_words():
    sizes, block_size = [(5, 6), (3, 2), (0, 3)], 4
    layout = layout_of(sizes, block_size)
    shape = layout[0].shape
    bias = block_bias(attention_rule(*layout, block_size), shape, torch.device("cpu"), torch.float64)
    for b in range(shape[0]):
        wanted = [[allowed(sizes, block_size, b, query, key) for key in range(shape[1])] for query in range(shape[1])]
        assert (bias[b, 0] == 0).tolist() == wanted
    assert bias.unique().tolist() == [torch.finfo(torch.float64).min, 0]


@pytest.mark.parametrize("sizes, block_size", SIZES.values(), ids=SIZES)
def test_attention_over_tiles_is_that_over_the_bias(sizes, block_size):
    layout = layout_of(sizes, block_size)
    attends, shape, cpu = attention_rule(*layout, block_size), layout[0].shape, torch.device("cpu")
    bias = block_bias(attends, shape, cpu, torch.float64)
    tiles = block_mask(attends, shape, cpu)
    query = torch.randn(shape[0], 4, shape[1], 8, dtype=torch.float64)
    key, value = (torch.randn(shape[0], 2, shape[1], 8, dtype=torch.float64) for _ in range(2))
    expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=True)
    found = flex_attention(query, key, value, block_mask=tiles, enable_gqa=True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    pairs = pairs_of_tiles(bias)
    assert torch.equal(tiles.kv_num_blocks[:, 0].long(), ((pairs > 0) & (pairs < TILE**2)).sum(2))
    assert torch.equal(tiles.full_kv_num_blocks[:, 0].long(), (pairs == TILE**2).sum(2))


def test_tiles_are_made_without_a_tensor_of_all_pairs():
    """The memory of the process grows by less than one byte for each of the 15 360^2 pairs (225 MiB)."""
    script = """
import resource, torch
from tests.training.test_block_attention import *
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
grown = []
for sizes in ([(30, 100)], [(31, 200)], [(1024, 7168)]):
    layout, before = layout_of(sizes, 32), peak()
    tiles = block_mask(attention_rule(*layout, 32), layout[0].shape, torch.device("cpu"))
    grown.append(peak() - before)
assert tiles.seq_lengths == (15360, 15360)
assert grown[-1] < 15360 ** 2 / 4, grown
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)


def test_the_documented_sizes():
    text = (Path(__file__).parents[2] / "docs" / "method.md").read_text()
    rows = re.findall(r"^\| (\d+) \+ (\d+) \| (.+) \|$", text, re.MULTILINE)
    assert len(rows) == 3
    for prompt, response, figures in rows:
        layout = layout_of([(int(prompt), int(response))], 4)
        bias = block_bias(attention_rule(*layout, 4), layout[0].shape, torch.device("cpu"), torch.bfloat16)
        attend, tiles = (bias == 0).float().mean(), (pairs_of_tiles(bias) > 0).float().mean()
        expected = f"{bias.shape[-1]} | {bias.nbytes / 2**20:.1f} MiB | {100 * attend:.0f} % | {100 * tiles:.0f} %"
        assert figures == expected


@pytest.mark.parametrize("model_type", SETTINGS)
def test_a_model_with_flex_attention_has_the_loss_of_sdpa(tmp_path, rng, monkeypatch, model_type):
    """On a CPU flex attention runs uncompiled and has no backward, so that this compares losses only."""
    monkeypatch.setattr(flex_of_transformers.WrappedFlexAttention, "__call__", lambda self: flex_attention)
    monkeypatch.setattr(layout_module, "check_attention", lambda config, device: None)
    block_causal_model(tmp_path / "m", model_type)
    trajectories, losses = None, []
    for attention in ("sdpa", "flex_attention"):
        model = load(tmp_path / "m", attn_implementation=attention)
        model.model.requires_grad_(False)
        if "moe" in model_type:
            model.model.config.output_router_logits = True
        trajectories = trajectories or make_trajectories(rng, model.block_size)
        batch, _ = collate(model, trajectories)
        add_loss_to_forward(model.model)
        losses.append(model.model(**batch).loss)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


def test_flex_attention_is_refused_on_a_cpu(tmp_path, rng):
    block_causal_model(tmp_path / "m", "sdar")
    model = load(tmp_path / "m", attn_implementation="flex_attention")
    message = r"^attn_implementation='flex_attention' on a CPU: .* attn_implementation='sdpa'$"
    with pytest.raises(ValueError, match=message):
        model.inputs(torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=message):
        train(model, make_trajectories(rng, 4), config(tmp_path, max_steps=1))
