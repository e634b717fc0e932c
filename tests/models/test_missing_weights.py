"""A checkpoint that lacks weights is refused with their names: transformers would give them random values."""

import json

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AlbertForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DebertaV2ForMaskedLM,
    DistilBertForMaskedLM,
    ElectraForMaskedLM,
    EsmForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertForMaskedLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaForMaskedLM,
)

from tabom import load
from tabom.cli.main import main
from tests.models.test_families import SIZES, save_with_characters, write_dream, write_llada

BERT_SIZES = {name: SIZES[name] for name in SIZES if name not in ("num_key_value_heads", "head_dim")}


def change_weights(folder, change):
    """Gives every weight of a folder the name that `change` makes of its name; None drops it."""
    for path in folder.glob("*.safetensors"):
        weights = {change(name): weight for name, weight in load_file(path).items()}
        weights.pop(None, None)
        save_file(weights, path, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = {change(name): file for name, file in json.loads(index.read_text())["weight_map"].items()}
        files.pop(None, None)
        index.write_text(json.dumps({"metadata": {}, "weight_map": files}))


def without(part):
    return lambda name: None if part in name else name


def renamed(part, other):
    return lambda name: name.replace(part, other)


def change_config(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "write, change, message",
    [
        (write_dream, without("lm_head"), r"1 missing: lm_head\.weight\); save or download it again, or"),
        (write_dream, renamed("mlp.up_proj", "mlp.up"), r"2 missing: model\.layers\.0\.mlp\.up_proj\.w"),
        (write_dream, without("layers.1"), r"12 missing: .*layernorm.*, .*, .* and 9 more"),
        (write_llada, without("transformer.ff_out"), r"1 missing: lm_head\.weight"),
        (
            write_llada,
            renamed("blocks.0.ff_norm", "blocks.0.norm"),
            r"1 missing: .*0\.post_attention_layernorm",
        ),
    ],
)
def test_a_family_that_lacks_weights_is_refused_with_their_names(tmp_path, rng, write, change, message):
    write(tmp_path)
    change_weights(tmp_path, change)
    with pytest.raises(ValueError, match=rf"^model={tmp_path}: weights do not fit the model \({message}"):
        load(tmp_path)


def test_a_model_type_that_was_changed_to_dream_is_refused(tmp_path, rng):
    """Qwen3 has no biases, and Qwen2 has: they would be random."""
    save_with_characters(Qwen3ForCausalLM(Qwen3Config(**SIZES, vocab_size=60, is_causal=False)), tmp_path)
    change_config(tmp_path / "config.json", model_type="Dream", mask_token_id=3)
    with pytest.raises(ValueError, match=r"6 missing: .*k_proj\.bias.*which asks for Qwen2ForCausalLM"):
        load(tmp_path)


@pytest.mark.parametrize("adapt", [False, True])
def test_a_tied_head_is_not_missing_and_an_untied_one_is(tmp_path, rng, adapt):
    config = LlamaConfig(**SIZES, vocab_size=60, is_causal=adapt, tie_word_embeddings=True)
    save_with_characters(LlamaForCausalLM(config), tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load(tmp_path, adapt=adapt).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    change_config(tmp_path / "config.json", tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"1 missing: lm_head\.weight"):
        load(tmp_path, adapt=adapt)


@pytest.mark.parametrize("head", [True, False])
def test_a_masked_language_model_without_its_head_is_refused(tmp_path, rng, head):
    model = (BertForMaskedLM if head else BertModel)(BertConfig(vocab_size=60, **BERT_SIZES))
    save_with_characters(model, tmp_path)
    if not head:
        change_config(tmp_path / "config.json", architectures=["BertForMaskedLM"])
        with pytest.raises(ValueError, match=r"6 missing: cls\.predictions\..*BertForMaskedLM"):
            load(tmp_path)
        return
    load(tmp_path)
    change_weights(tmp_path, without("cls.predictions.transform.dense.weight"))
    with pytest.raises(ValueError, match=r"1 missing: cls\.predictions\.transform\.dense\.weight"):
        load(tmp_path)


@pytest.mark.parametrize(
    "architecture",
    [
        AlbertForMaskedLM,
        DebertaV2ForMaskedLM,
        DistilBertForMaskedLM,
        ElectraForMaskedLM,
        EsmForMaskedLM,
        ModernBertForMaskedLM,
        RobertaForMaskedLM,
    ],
)
def test_a_whole_masked_language_model_loads_whatever_it_ties(tmp_path, rng, architecture):
    sizes = BERT_SIZES | {"dim": 16, "n_heads": 2, "n_layers": 2, "hidden_dim": 32, "embedding_size": 16}
    config = architecture.config_class(**sizes, vocab_size=60, pad_token_id=0, max_position_embeddings=40)
    save_with_characters(architecture(config), tmp_path)
    load(tmp_path)


def test_weights_of_another_shape_are_refused_in_one_line(tmp_path, rng, capsys):
    write_dream(tmp_path)
    change_config(tmp_path / "config.json", intermediate_size=24)
    with pytest.raises(ValueError, match=r"6 of another shape: .*0\.mlp.*\(16, 32\) instead of \(16, 24\)"):
        load(tmp_path)
    capsys.readouterr()
    assert main(["generate", "--model", str(tmp_path), "--prompt", "1"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"tabom generate: error: model={tmp_path}: weights do")


@pytest.fixture
def adapter(tmp_path, rng):
    """A folder with a LoRA adapter of two layers, beside its base."""
    base = tmp_path / "base"
    base.mkdir()
    write_dream(base)
    peft_model = get_peft_model(load(base).model, LoraConfig(r=4, target_modules=["q_proj"]))
    peft_model.peft_config["default"].base_model_name_or_path = str(base)
    peft_model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    "change, message",
    [
        (without("layers.1"), r"2 missing: model\.layers\.1\.self_attn\.q_proj\.lora_A"),
        (
            renamed("q_proj", "query"),
            r"4 missing: .*q_proj.* and 1 more; 4 of no layer.*query",
        ),
    ],
)
def test_an_adapter_whose_weights_do_not_match_its_base_is_refused(adapter, change, message):
    load(adapter)
    change_weights(adapter, change)
    with pytest.raises(ValueError, match=rf"{message}.*it was trained on another base than .*base, or adapter"):
        load(adapter)


def test_an_adapter_of_another_rank_or_with_more_layers_is_refused(adapter):
    change_config(adapter / "adapter_config.json", r=8)
    with pytest.raises(ValueError, match=r"4 of another shape: .*lora_A.*\(4, 16\) instead of \(8, 16\)"):
        load(adapter)
    change_config(adapter / "adapter_config.json", r=4, layers_to_transform=[0])
    with pytest.raises(ValueError, match=r"2 of no layer that has an adapter here: model\.layers\.1"):
        load(adapter)
