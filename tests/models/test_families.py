"""Tiny checkpoints in the layouts of Dream and LLaDA, made here; nothing is downloaded."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AttentionInterface,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    NystromformerForMaskedLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaForMaskedLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tabom import describe, load
from tabom.lab.dry_run import DREAM_7B, LLADA_8B
from tabom.lab.model import character_tokenizer
from tabom.models.families import native_config
from tabom.models.loading import load_tokenizer
from tabom.sampling.config import SamplerConfig
from tabom.sampling.engine import sample
from tabom.sampling.sampler import denoise
from tabom_kernels import softmax_entropy

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.3,
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLADA_NAMES = {
    "model.embed_tokens": "model.transformer.wte",
    "model.norm": "model.transformer.ln_f",
    "lm_head": "model.transformer.ff_out",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}


def llada_name(name):
    layer, part = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.*)\.weight", name).groups()
    prefix = "" if layer is None else f"model.transformer.blocks.{layer}."
    return f"{prefix}{LLADA_NAMES[part]}.weight"


def write_shards(folder, weights):
    """Two safetensors files and their index."""
    names, index = sorted(weights), {}
    for number, shard in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: weights[name].clone() for name in shard}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def write_dream(folder):
    """A checkpoint in Dream's layout, and the model that it holds."""
    characters = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ"]
    vocabulary = {character: i for i, character in enumerate(characters)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
    added = {len(vocabulary) + i: {"content": token, "special": True} for i, token in enumerate(special)}
    settings = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": {
            str(i): token | {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
            for i, token in added.items()
        },
        "pad_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    size = len(vocabulary) + len(special)
    config = {**SIZES, "vocab_size": size, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 99}
    model = Qwen2ForCausalLM(Qwen2Config(**config, is_causal=False)).eval()
    own = {
        "model_type": "Dream",
        "architectures": ["DreamModel"],
        "auto_map": {"AutoModel": "modeling_dream.DreamModel"},
    }
    ids = {"mask_token_id": size - 1, "pad_token_id": size - 4, "eos_token_id": size - 4}
    (folder / "config.json").write_text(json.dumps(own | config | ids))
    write_shards(folder, model.state_dict())
    return model


def write_llada(folder, **changes):
    """A checkpoint in LLaDA's layout, and the model that it holds."""
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    config = LlamaConfig(
        **SIZES,
        vocab_size=60,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        is_causal=False,
        tie_word_embeddings=changes.get("weight_tying", False),
    )
    model = LlamaForCausalLM(config).eval()
    own = {
        "model_type": "llada",
        "architectures": ["LLaDAModelLM"],
        "auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"},
        "d_model": 16,
        "n_layers": 2,
        "n_heads": 2,
        "n_kv_heads": 1,
        "mlp_hidden_size": 32,
        "vocab_size": 60,
        "embedding_size": 60,
        "max_sequence_length": 99,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "activation_type": "silu",
        "layer_norm_type": "rms",
        "mask_token_id": 3,
        "pad_token_id": 0,
        "eos_token_id": 1,
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(own))
    weights = model.state_dict()
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    write_shards(folder, {llada_name(name): weight for name, weight in weights.items()})
    return model


@pytest.mark.parametrize(
    "write, architecture, shift", [(write_dream, Qwen2ForCausalLM, 1), (write_llada, LlamaForCausalLM, 0)]
)
def test_a_family_loads_as_a_model_of_transformers_and_saves_as_one(tmp_path, rng, write, architecture, shift):
    original = write(tmp_path)
    diffusion_model = load(tmp_path)
    assert type(diffusion_model.model) is architecture and diffusion_model.logits_shift == shift
    assert diffusion_model.model.config.rope_parameters["rope_theta"] == {1: 1e6, 0: 5e5}[shift]
    input_ids = torch.randint(4, 50, (2, 9))
    assert torch.equal(diffusion_model.model(input_ids).logits, original(input_ids).logits)
    assert diffusion_model.tokenizer.mask_token_id == diffusion_model.mask_token_id
    diffusion_model.model.save_pretrained(tmp_path / "again")
    diffusion_model.tokenizer.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(again.model(input_ids).logits, original(input_ids).logits)
    assert (again.logits_shift, again.mask_token_id, again.pad_token_id, again.eos_token_id) == (
        diffusion_model.logits_shift,
        diffusion_model.mask_token_id,
        diffusion_model.pad_token_id,
        diffusion_model.eos_token_id,
    )
    prompt = diffusion_model.tokenizer.apply_chat_template([{"role": "user", "content": "1+1"}], tokenize=False)
    assert again.tokenizer(prompt).input_ids == diffusion_model.tokenizer(prompt).input_ids
    assert again.tokenizer.chat_template == TEMPLATE


A2D = {
    "a2d-qwen2": Qwen2ForCausalLM(Qwen2Config(**SIZES, vocab_size=60, is_causal=False)),
    "a2d-qwen3": Qwen3ForCausalLM(Qwen3Config(**SIZES, vocab_size=60, is_causal=False)),
    "a2d-llama": LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=60, is_causal=False)),
}


@pytest.mark.parametrize("model_type", A2D)
def test_what_was_made_of_an_autoregressive_model_loads_unshifted(tmp_path, rng, model_type):
    """dLLM's `a2d-` types: config and weights of transformers under another name, the mask token the tokenizer's."""
    original = A2D[model_type].eval()
    save_with_characters(original, tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["is_causal"]
    own = {
        "model_type": model_type,
        "auto_map": {"AutoConfig": "modeling.A2DConfig"},
        "architectures": ["A2DLMHeadModel"],
    }
    (tmp_path / "config.json").write_text(json.dumps(settings | own))
    diffusion_model = load(tmp_path)
    input_ids = torch.randint(4, 50, (2, 9))
    assert type(diffusion_model.model) is type(original) and diffusion_model.logits_shift == 0
    assert (
        diffusion_model.mask_token_id == diffusion_model.tokenizer.mask_token_id == character_tokenizer().mask_token_id
    )
    assert torch.equal(diffusion_model.model(input_ids).logits, original(input_ids).logits)


def test_llada_with_tied_embeddings_and_its_own_mask_token(tmp_path, rng):
    original = write_llada(tmp_path, weight_tying=True, mask_token_id=7)
    diffusion_model = load(tmp_path)
    assert diffusion_model.mask_token_id == 7 and diffusion_model.model.config.num_key_value_heads == 1
    input_ids = torch.randint(4, 50, (2, 9))
    assert torch.equal(diffusion_model.model(input_ids).logits, original(input_ids).logits)
    assert diffusion_model.model.lm_head.weight is diffusion_model.model.model.embed_tokens.weight


def test_a_mask_token_is_never_guessed_for_another_vocabulary(tmp_path, rng):
    """LLaDA's own, 126336, is that of its vocabulary of 126464 alone."""
    write_llada(tmp_path, mask_token_id=None)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["mask_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"no mask token is known for this vocabulary of 60: set mask_token_id in its"):
        load(tmp_path)
    write_llada(tmp_path, mask_token_id=126336)
    with pytest.raises(ValueError, match="mask_token_id=126336: not in this model's vocabulary of 60"):
        load(tmp_path)
    assert native_config({**LLADA_8B}).mask_token_id == 126336
    assert native_config({**LLADA_8B, "mask_token_id": 0}).mask_token_id == 0
    assert native_config(DREAM_7B).mask_token_id == 151666
    assert native_config(DREAM_7B | {"vocab_size": 151936}).mask_token_id is None


def test_attention_is_bidirectional(tmp_path, rng):
    write_dream(tmp_path)
    model = load(tmp_path).model
    input_ids = torch.randint(4, 50, (1, 9))
    changed = input_ids.clone()
    changed[0, -1] = 3
    assert not torch.allclose(model(input_ids).logits[0, 0], model(changed).logits[0, 0])


def test_dream_reads_its_tokens_one_to_the_left(tmp_path, rng):
    """The first token that greedy decoding unmasks is the argmax of the logits one position before it."""
    write_dream(tmp_path)
    diffusion_model = load(tmp_path)
    prompt = torch.randint(4, 50, (5,)).tolist()
    [completion] = sample(diffusion_model, [prompt], SamplerConfig(max_new_tokens=4))
    place = completion.decoding_order.index(0)
    logits = diffusion_model.model(torch.tensor([[*prompt, *[diffusion_model.mask_token_id] * 4]])).logits[
        0, len(prompt) + place - 1
    ]
    logits[diffusion_model.mask_token_id] = -torch.inf
    assert completion.token_ids[place] == logits.argmax()


def test_left_padded_prompts_give_the_logits_of_each_alone(tmp_path, rng):
    write_llada(tmp_path)
    model = load(tmp_path).model
    long, short = torch.randint(4, 50, (1, 9)), torch.randint(4, 50, (1, 5))
    batch = torch.cat([long, torch.cat([torch.zeros(1, 4, dtype=torch.int64), short], 1)])
    mask = torch.ones_like(batch)
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(input_ids=batch, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(padded[0], model(long).logits[0])
    torch.testing.assert_close(padded[1, 4:], model(short).logits[0])


@pytest.mark.parametrize("architecture", [BertForMaskedLM, RobertaForMaskedLM, NystromformerForMaskedLM])
def test_positions_begin_where_the_model_has_its_first(tmp_path, rng, architecture):
    """RoBERTa's positions begin behind its padding's, Nystromformer's at 2: sampling counts as training did."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {
        "vocab_size": 60,
        "max_position_embeddings": 32,
        "initializer_range": 0.5,
        "segment_means_seq_len": 32,
        "num_landmarks": 32,
    }
    tokenizer = character_tokenizer()
    config = architecture.config_class(**sizes, pad_token_id=tokenizer.pad_token_id, is_causal=False)
    diffusion_model = describe(architecture(config).eval(), tokenizer)
    prompts = [torch.randint(4, 50, (length,)).tolist() for length in (3, 9, 5)]

    def entropy(prompt):
        logits = diffusion_model.model(torch.tensor([[*prompt, diffusion_model.mask_token_id]])).logits[0, -1]
        logits[diffusion_model.mask_token_id] = -torch.inf
        return softmax_entropy(logits[None]).item()

    expected = pytest.approx([entropy(prompt) for prompt in prompts], abs=1e-4)
    settings = SamplerConfig(max_new_tokens=1)
    assert [completion.entropy[0] for completion in sample(diffusion_model, prompts, settings)] == expected
    alone = [list(denoise(diffusion_model, [prompt], 1, settings))[-1].entropy.item() for prompt in prompts]
    assert alone == expected
    if architecture is not NystromformerForMaskedLM:  # which takes no padding on the left
        assert list(denoise(diffusion_model, prompts, 1, settings))[-1].entropy[:, 0].tolist() == expected
    longest = 31 if architecture is RobertaForMaskedLM else 32
    list(denoise(diffusion_model, [[5] * (longest - 1)], 1, settings))
    with pytest.raises(ValueError, match=f"more than the {longest} positions"):
        next(denoise(diffusion_model, [[5] * longest], 1, settings))


def test_the_attention_implementation_is_chosen_and_changes_nothing(tmp_path, rng):
    write_dream(tmp_path)
    eager, sdpa = (load(tmp_path, attn_implementation=name).model for name in ("eager", "sdpa"))
    assert (eager.config._attn_implementation, sdpa.config._attn_implementation) == ("eager", "sdpa")
    input_ids = torch.randint(4, 50, (2, 9))
    torch.testing.assert_close(eager(input_ids).logits, sdpa(input_ids).logits)


def test_an_attention_without_a_mask_is_told_not_to_be_causal(tmp_path, rng):
    """As flash attention, which gets no mask for an unpadded batch and must know from the flag."""
    told = []

    def probe(module, query, key, value, attention_mask, **kwargs):
        told.append((attention_mask, kwargs["is_causal"]))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("probe", probe)
    write_dream(tmp_path)
    load(tmp_path, attn_implementation="probe").model(torch.randint(4, 50, (1, 9)))
    assert told == [(None, False)] * 2


def save_with_characters(model, folder):
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize(
    "architecture, config", [(BertForMaskedLM, BertConfig), (ModernBertForMaskedLM, ModernBertConfig)]
)
def test_a_masked_language_model_loads_as_it_is_and_answers(tmp_path, rng, architecture, config):
    sizes = {name: SIZES[name] for name in SIZES if name not in ("num_key_value_heads", "head_dim")}
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
    original = architecture(config(vocab_size=60, pad_token_id=0, **tokens, **sizes)).eval()
    save_with_characters(original, tmp_path)
    diffusion_model = load(tmp_path)
    input_ids = torch.randint(4, 50, (2, 9))
    assert type(diffusion_model.model) is architecture and diffusion_model.logits_shift == 0
    assert torch.equal(diffusion_model.model(input_ids).logits, original(input_ids).logits)
    prompts = [[5, 6, 7], [8, 9]]
    together = sample(diffusion_model, prompts, SamplerConfig(max_new_tokens=4))
    assert [sorted(completion.decoding_order) for completion in together] == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize(
    "build", [lambda c: Qwen3ForCausalLM(Qwen3Config(**c)), lambda c: LlamaForCausalLM(LlamaConfig(**c))]
)
def test_an_autoregressive_model_is_adapted_when_asked(tmp_path, rng, build):
    tokenizer = Tokenizer(BPE({character: i for i, character in enumerate("0123456789+=")}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
    build({**SIZES, "vocab_size": 12}).save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="0", eos_token="0").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"attends causally.*adapt=True \(--adapt\)"):
        load(tmp_path)
    diffusion_model = load(tmp_path, adapt=True)
    assert (diffusion_model.logits_shift, diffusion_model.mask_token_id, diffusion_model.tokenizer.mask_token) == (
        1,
        12,
        "<|mask|>",
    )
    first, second = torch.tensor([[1, 2, 3, 12]]), torch.tensor([[1, 2, 3, 4]])
    assert not torch.allclose(diffusion_model.model(first).logits[0, 0], diffusion_model.model(second).logits[0, 0])
    for layer in (diffusion_model.model.model.embed_tokens, diffusion_model.model.lm_head):
        torch.testing.assert_close(layer.weight[12], layer.weight[:12].mean(dim=0), msg="the row of the new mask token")
    diffusion_model.model.save_pretrained(tmp_path / "again")
    diffusion_model.tokenizer.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(again.model(first).logits, diffusion_model.model(first).logits) and again.logits_shift == 1


@pytest.mark.parametrize("settings", [{"model_type": "sedd"}, {"vocab_size": 9}])
def test_an_unknown_family_is_refused_with_what_is_known_and_no_code_of_it_runs(tmp_path, settings):
    remote = {"auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(settings | remote))
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match=r"is not known\. These load: Dream, llada, .*mask_token_id and logits_shift"):
        load(tmp_path)


def test_what_cannot_be_adapted_or_mapped_is_refused_by_name(tmp_path, rng):
    write_llada(tmp_path, alibi=True)
    with pytest.raises(ValueError, match="alibi=True in a LLaDA config: expected False"):
        load(tmp_path)
    bert = tmp_path / "bert"
    sizes = {name: SIZES[name] for name in SIZES if name not in ("num_key_value_heads", "head_dim")}
    save_with_characters(BertForMaskedLM(BertConfig(vocab_size=60, **sizes)), bert)
    with pytest.raises(ValueError, match=r"adapt: model type 'bert'; expected one of qwen2, qwen3, llama"):
        load(bert, adapt=True)


@pytest.mark.parametrize(
    "write, layer", [(write_dream, "model.layers.1.self_attn"), (write_llada, "model.transformer.blocks.1")]
)
def test_an_adapter_in_the_names_of_the_authors_loads_into_its_base(tmp_path, rng, write, layer):
    """y = x W + (alpha / r) x A B, so merging it by hand into the base's weights must give the same logits."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    original = write(base)
    a, b = torch.randn(16, 16), torch.randn(16, 16)
    names = {f"base_model.model.{layer}.q_proj.lora_A.weight": a, f"base_model.model.{layer}.q_proj.lora_B.weight": b}
    save_file(names, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "r": 16,
        "lora_alpha": 16,
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
    }
    settings |= {"base_model_name_or_path": str(base), "task_type": "CAUSAL_LM", "inference_mode": True}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    diffusion_model = load(adapter)
    with torch.no_grad():
        original.model.layers[1].self_attn.q_proj.weight += b @ a
    input_ids = torch.randint(4, 50, (2, 9))
    torch.testing.assert_close(
        diffusion_model.model(input_ids).logits, original(input_ids).logits, rtol=1e-4, atol=1e-4
    )
    trained = [name for name, p in diffusion_model.model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("runs/taobm", "model=runs/taobm: nothing of this name in runs; there are tabom"),
        ("./run", "model=./run: nothing of this name in .; there are runs"),
        ("rnus/tabom/checkpoint-1", "model=rnus/tabom/checkpoint-1: nothing of this name in rnus/tabom"),
        ("runs/tabom", "model=runs/tabom: expected a folder with config.json or adapter_config.json; there are check"),
        ("runs/notes.txt", "model=runs/notes.txt: expected a folder with config.json"),
    ],
)
@pytest.mark.parametrize("ask", [load, load_tokenizer])
def test_a_path_without_a_model_is_named_at_once(tmp_path, monkeypatch, name, message, ask):
    """The hub is not asked: a name in a folder that is here was meant to be here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", lambda name: pytest.fail("asked the hub"))
    (tmp_path / "runs" / "tabom" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "runs" / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        ask(name)
