"""The families of diffusion language models that load natively, as models of transformers.

Dream is Qwen2 and LLaDA is Llama, with bidirectional attention; their checkpoints differ in the names of settings and
weights. Both are renamed while loading, so no code of a checkpoint ever runs. What dLLM made of autoregressive models
(`a2d-...`) differs in the name of its type alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)


@dataclass(frozen=True)
class Family:
    """How the checkpoints of a family become a model of transformers.

    `logits_shift` is how far to the left the logits of a token stand. `mask_token_ids` are, by the size of the
    vocabulary, for checkpoints that do not say theirs: another vocabulary has another. `key_mapping` renames weights:
    regular expressions to replacements, in order, as in `PreTrainedModel.from_pretrained`.
    """

    architecture: type[PreTrainedModel]
    tokenizer: type[PreTrainedTokenizerBase]
    config: Callable[[dict[str, Any]], PreTrainedConfig]
    logits_shift: int
    mask_token_ids: dict[int, int] = field(default_factory=dict)
    key_mapping: dict[str, str] = field(default_factory=dict)


def same_names(config: type[PreTrainedConfig]) -> Callable[[dict[str, Any]], PreTrainedConfig]:
    """For a config.json that has the names of a config of transformers."""
    own = ("model_type", "architectures", "auto_map", "transformers_version", "use_cache")

    def convert(settings: dict[str, Any]) -> PreTrainedConfig:
        return config(**{name: value for name, value in settings.items() if name not in own}, use_cache=False)

    return convert


def llada_config(settings: dict[str, Any]) -> LlamaConfig:
    """LLaDA's config.json has OLMo's names.

    Raises:
        ValueError: a setting that Llama has no counterpart of.
    """
    expected = {
        "activation_type": "silu",
        "layer_norm_type": "rms",
        "block_type": "llama",
        "rope": True,
        "alibi": False,
        "include_bias": False,
        "scale_logits": False,
        "input_emb_norm": False,
        "attention_layer_norm": False,
        "clip_qkv": None,
    }
    for name, value in expected.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{name}={settings[name]!r} in a LLaDA config: expected {value!r}")
    return LlamaConfig(
        vocab_size=settings.get("embedding_size") or settings["vocab_size"],
        hidden_size=settings["d_model"],
        intermediate_size=settings["mlp_hidden_size"],
        num_hidden_layers=settings["n_layers"],
        num_attention_heads=settings["n_heads"],
        num_key_value_heads=settings.get("n_kv_heads") or settings["n_heads"],
        max_position_embeddings=settings["max_sequence_length"],
        rms_norm_eps=settings.get("rms_norm_eps", 1e-5),
        rope_parameters={"rope_type": "default", "rope_theta": settings.get("rope_theta", 500000.0)},
        attention_bias=settings.get("include_qkv_bias", False),
        tie_word_embeddings=settings.get("weight_tying", False),
        pad_token_id=settings.get("pad_token_id"),
        eos_token_id=settings.get("eos_token_id"),
        bos_token_id=None,
        use_cache=False,
    )


LLADA_BLOCK = r"^model\.transformer\.blocks\.(\d+)\."
LLADA_WEIGHTS = {
    r"^model\.transformer\.wte\.": "model.embed_tokens.",
    r"^model\.transformer\.ln_f\.": "model.norm.",
    r"^model\.transformer\.ff_out\.": "lm_head.",
    **{
        rf"{LLADA_BLOCK}{theirs}\.": rf"model.layers.\1.{ours}."
        for theirs, ours in {
            "attn_norm": "input_layernorm",
            "q_proj": "self_attn.q_proj",
            "k_proj": "self_attn.k_proj",
            "v_proj": "self_attn.v_proj",
            "attn_out": "self_attn.o_proj",
            "ff_norm": "post_attention_layernorm",
            "ff_proj": "mlp.gate_proj",
            "up_proj": "mlp.up_proj",
            "ff_out": "mlp.down_proj",
        }.items()
    },
}

FAMILIES = {
    "Dream": Family(
        Qwen2ForCausalLM, Qwen2TokenizerFast, same_names(Qwen2Config), logits_shift=1, mask_token_ids={152064: 151666}
    ),
    "llada": Family(
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        llada_config,
        logits_shift=0,
        mask_token_ids={126464: 126336},
        key_mapping=LLADA_WEIGHTS,
    ),
    "a2d-qwen2": Family(Qwen2ForCausalLM, Qwen2TokenizerFast, same_names(Qwen2Config), logits_shift=0),
    "a2d-qwen3": Family(Qwen3ForCausalLM, Qwen2TokenizerFast, same_names(Qwen3Config), logits_shift=0),
    "a2d-llama": Family(LlamaForCausalLM, PreTrainedTokenizerFast, same_names(LlamaConfig), logits_shift=0),
}
"""By the `model_type` of config.json."""

ADAPTABLE = ("qwen2", "qwen3", "llama")
"""Autoregressive model types whose attention `config.is_causal = False` makes bidirectional."""


WHAT_LOADS = (
    f"These load: {', '.join(FAMILIES)}, masked language models, and what this library saved; adapt=True (--adapt) "
    f"turns {', '.join(ADAPTABLE)} into a diffusion language model; for another bidirectional model of transformers "
    "set in its config.json is_causal = false, mask_token_id and logits_shift (1 if the logits at i predict the token "
    "at i + 1); code that comes with a model runs with trust_remote_code=True only"
)


def native_config(settings: dict[str, Any]) -> PreTrainedConfig:
    """The config of transformers for a config.json of one of the families, and what `describe` reads from it."""
    family = FAMILIES[settings["model_type"]]
    config = family.config(settings)
    config.is_causal = False
    mask_token_id = settings.get("mask_token_id")
    config.mask_token_id = family.mask_token_ids.get(config.vocab_size) if mask_token_id is None else mask_token_id
    config.logits_shift = family.logits_shift
    return config
