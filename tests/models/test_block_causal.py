"""Block-causal families: tiny checkpoints in the published layouts load, attend in blocks, and are saved."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tabom import load
from tabom.models.attention import block_causal_mask
from tabom.models.diffusion_model import logits_at
from tabom.models.families import native_config
from tabom.models.packed import Span, packed_logits
from tests.models.block_causal import SETTINGS, SIZES, block_causal_model, make_checkpoint

TYPES = list(SETTINGS)


def test_a_position_attends_to_its_block_and_to_those_before_it():
    mask = block_causal_mask(torch.arange(7), torch.arange(7), 3)
    assert mask.int().tolist() == [[1] * 3 + [0] * 4] * 3 + [[1] * 6 + [0]] * 3 + [[1] * 7]


@pytest.mark.parametrize("model_type", TYPES)
def test_a_checkpoint_has_the_logits_of_the_model_that_it_was_written_from(tmp_path, rng, model_type):
    written = make_checkpoint(tmp_path / "m", model_type, seed=rng.randrange(99))
    loaded = load(tmp_path / "m")
    ids = torch.randint(5, 15, (2, 19))
    expected = written(input_ids=ids, attention_mask=torch.zeros(2, 1, 19, 19)).logits
    assert torch.equal(loaded.model(input_ids=ids, attention_mask=torch.zeros(2, 1, 19, 19)).logits, expected)
    settings = SETTINGS[model_type]
    assert loaded.block_size == settings.get("block_size", settings.get("bd_size", 4))
    assert loaded.logits_shift == (model_type == "Fast_dLLM_Qwen")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", TYPES)
def test_logits_depend_on_the_own_block_and_on_those_before_it(tmp_path, rng, model_type, attention):
    """The logits of a whole sequence are those of its beginning: what stands behind a block changes nothing in it."""
    model = block_causal_model(tmp_path / "m", model_type, attn_implementation=attention)
    size = model.block_size
    ids = torch.randint(5, 15, (2, 2 * size + 3))
    rows = torch.arange(ids.numel())
    whole = logits_at(model.model, rows, **model.inputs(ids)).view(*ids.shape, -1)
    for end in (1, size, size + 2, 2 * size):
        beginning = ids[:, :end]
        alone = logits_at(model.model, torch.arange(beginning.numel()), **model.inputs(beginning)).view(2, end, -1)
        blocks = end // size * size
        torch.testing.assert_close(whole[:, :blocks], alone[:, :blocks], rtol=1e-4, atol=1e-4)
    changed = ids.clone()
    changed[:, size - 1] = (changed[:, size - 1] - 4) % 10 + 5
    other = logits_at(model.model, rows, **model.inputs(changed)).view(*ids.shape, -1)
    assert not torch.allclose(whole[:, 0], other[:, 0], rtol=1e-4, atol=1e-4), "the whole block is seen"


@pytest.mark.parametrize("model_type", TYPES)
def test_padding_on_the_left_and_packing_change_nothing(tmp_path, rng, model_type):
    model = block_causal_model(tmp_path / "m", model_type)
    lengths = [3, 11, 11, 20]
    ids = [torch.randint(5, 15, (length,)) for length in lengths]
    alone = [logits_at(model.model, torch.arange(len(each)), **model.inputs(each[None])) for each in ids]
    padded, is_token = torch.full((4, 20), model.pad_token_id), torch.zeros(4, 20, dtype=torch.bool)
    for b, each in enumerate(ids):
        padded[b, 20 - len(each) :], is_token[b, 20 - len(each) :] = each, True
    together = logits_at(model.model, torch.arange(80), **model.inputs(padded, is_token)).view(4, 20, -1)
    spans = [Span(length, length, length) for length in lengths]
    positions, rows = torch.cat([torch.arange(length) for length in lengths]), torch.arange(sum(lengths))
    packed = packed_logits(model.model, torch.cat(ids), positions, spans, rows, block_size=model.block_size)
    for b, (expected, own) in enumerate(zip(alone, packed.split(lengths), strict=True)):
        torch.testing.assert_close(together[b, 20 - lengths[b] :], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", TYPES)
def test_what_is_saved_loads_in_transformers_and_here(tmp_path, model_type):
    model = block_causal_model(tmp_path / "m", model_type)
    model.model.save_pretrained(tmp_path / "saved")
    model.tokenizer.save_pretrained(tmp_path / "saved")
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ours = load(tmp_path / "saved")
    assert (ours.block_size, ours.mask_token_id, ours.logits_shift) == (
        model.block_size,
        model.mask_token_id,
        model.logits_shift,
    )
    inputs = model.inputs(torch.randint(5, 15, (1, 9)))
    expected = model.model(**inputs).logits
    assert torch.equal(theirs(**inputs).logits, expected) and torch.equal(ours.model(**inputs).logits, expected)


@pytest.mark.parametrize("missing", ["attention.query_key_value", "mlp.gate.expert_bias", "experts.3.up_proj"])
def test_a_missing_weight_is_named(tmp_path, monkeypatch, caplog, missing):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    make_checkpoint(tmp_path / "m", "llada2_moe")
    path = tmp_path / "m" / "model.safetensors"
    weights = {name: weight for name, weight in load_file(path).items() if f"layers.1.{missing}" not in name}
    weights = {name: weight for name, weight in weights.items() if f"layers.1.mlp.{missing}" not in name}
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"weights .*do.* not fit") as raised:
        load(tmp_path / "m")
    assert "layers.1." in str(raised.value) + caplog.text


def test_block_size_and_mask_token_may_be_given(tmp_path):
    make_checkpoint(tmp_path / "m", "llama")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    mask = config.pop("mask_token_id")
    size = config.pop("block_size")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"attends causally.*block_size and mask_token_id, .*\(--block_size, "):
        load(tmp_path / "m")
    model = load(tmp_path / "m", block_size=size, mask_token_id=mask + 1)
    assert (model.block_size, model.mask_token_id) == (size, mask + 1)
    for wrong, message in ((0, "block_size=0: expected"), (True, "block_size=True: expected")):
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "m", block_size=wrong)


def test_a_missing_mask_token_may_be_given(tmp_path):
    """A Stable-DiffCoder's tokenizer names none."""
    make_checkpoint(tmp_path / "m", "llama")
    for file, name in (("config.json", "mask_token_id"), ("tokenizer_config.json", "mask_token")):
        settings = json.loads((tmp_path / "m" / file).read_text())
        del settings[name]
        (tmp_path / "m" / file).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"^no mask token is known .*give it to load \(--mask_token_id\)"):
        load(tmp_path / "m")
    assert load(tmp_path / "m", mask_token_id=5).mask_token_id == 5


@pytest.mark.parametrize("key_value_heads", [0, None])
def test_llada2_has_as_many_key_value_heads_as_heads_unless_it_says_otherwise(key_value_heads):
    settings = {"model_type": "llada2_moe", "vocab_size": 45, **SIZES, **SETTINGS["llada2_moe"]}
    config = native_config({**settings, "num_key_value_heads": key_value_heads})
    assert config.num_key_value_heads == config.num_attention_heads == 4
    assert native_config(settings).num_key_value_heads == 2


def test_a_model_without_blocks_refuses_a_block_size(model_folder):
    with pytest.raises(ValueError, match="block_size=4 with model type 'bert'"):
        load(model_folder, block_size=4)


@pytest.fixture
def model_folder(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    from tabom.lab.model import character_tokenizer

    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    return tmp_path
