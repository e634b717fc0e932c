"""The families of diffusion language models that load natively, as models of transformers.

Dream is Qwen2 and LLaDA is Llama, with bidirectional attention; SDAR is Qwen3 and Qwen3-MoE, Fast-dLLM v2 is Qwen2 and
LLaDA2 is GLM-4-MoE, with block-causal attention. Their checkpoints differ in the names of settings and weights. Both
are renamed while loading, so that no code of a checkpoint runs. Autoregressive models that dLLM adapted (`a2d-...`)
differ only in the name of their model type.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
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
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Split, WeightConverter, WeightRenaming


@dataclass(frozen=True)
class Family:
    """How the checkpoints of a family become a model of transformers.

    `logits_shift` is how many positions before a token its logits stand. `mask_token_ids` maps the size of the
    vocabulary to the mask token of checkpoints whose config does not name one. `key_mapping` renames weights: regular
    expressions to replacements, in order, as in `PreTrainedModel.from_pretrained`. `block_size` is that of block-causal
    attention where the config names none; None is full attention. `saved_as` is the class that the model has once its
    weights are read, if `architecture` exists for reading them only.
    """

    architecture: type[PreTrainedModel]
    tokenizer: type[PreTrainedTokenizerBase]
    config: Callable[[dict[str, Any]], PreTrainedConfig]
    logits_shift: int
    mask_token_ids: dict[int, int] = field(default_factory=dict)
    key_mapping: dict[str, str] = field(default_factory=dict)
    block_size: int | None = None
    saved_as: type[PreTrainedModel] | None = None


def same_names(config: type[PreTrainedConfig]) -> Callable[[dict[str, Any]], PreTrainedConfig]:
    """Returns the reader of a config.json whose settings have transformers' names."""
    own = ("model_type", "architectures", "auto_map", "transformers_version", "use_cache")

    def convert(settings: dict[str, Any]) -> PreTrainedConfig:
        return config(**{name: value for name, value in settings.items() if name not in own}, use_cache=False)

    return convert


def llada_config(settings: dict[str, Any]) -> LlamaConfig:
    """Reads LLaDA's config.json, whose settings have OLMo's names.

    Raises:
        ValueError: a setting has no counterpart in Llama.
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


def llada2_config(settings: dict[str, Any]) -> Glm4MoeConfig:
    """Reads LLaDA2's config.json.

    Raises:
        ValueError: a setting has no counterpart in GLM-4-MoE.
    """
    expected = {
        "hidden_act": "silu",
        "use_bias": False,
        "use_qkv_bias": False,
        "use_qk_norm": True,
        "use_rmsnorm": True,
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    }
    for name, value in expected.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{name}={settings[name]!r} in a LLaDA2 config: expected {value!r}")
    rope = {
        "rope_type": "default",
        "rope_theta": settings.get("rope_theta", 600000.0),
        "partial_rotary_factor": settings.get("partial_rotary_factor", 0.5),
    }
    names = ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "max_position_embeddings")
    names += ("num_hidden_layers", "num_attention_heads", "num_experts_per_tok")
    return Glm4MoeConfig(
        **{name: settings[name] for name in names},
        num_key_value_heads=settings.get("num_key_value_heads") or settings["num_attention_heads"],
        head_dim=settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"],
        n_routed_experts=settings["num_experts"],
        n_shared_experts=settings.get("num_shared_experts", 1),
        n_group=settings.get("n_group", 1),
        topk_group=settings.get("topk_group", 1),
        norm_topk_prob=settings.get("norm_topk_prob", True),
        routed_scaling_factor=settings.get("routed_scaling_factor", 2.5),
        first_k_dense_replace=settings.get("first_k_dense_replace", 1),
        rms_norm_eps=settings.get("rms_norm_eps", 1e-6),
        rope_parameters=rope,
        use_qk_norm=True,
        attention_bias=False,
        tie_word_embeddings=settings.get("tie_word_embeddings", False),
        pad_token_id=settings.get("pad_token_id"),
        eos_token_id=settings.get("eos_token_id"),
        bos_token_id=None,
        num_nextn_predict_layers=0,
        use_cache=False,
    )


class LLaDA2ForCausalLM(Glm4MoeForCausalLM):
    """GLM-4-MoE, read from LLaDA2's checkpoints: their names, and queries, keys and values in one weight."""


register_checkpoint_conversion_mapping(
    LLaDA2ForCausalLM.__name__,
    [
        WeightRenaming("model.word_embeddings.", "model.embed_tokens."),
        WeightRenaming(".attention.dense.", ".self_attn.o_proj."),
        WeightRenaming(".attention.query_layernorm.", ".self_attn.q_norm."),
        WeightRenaming(".attention.key_layernorm.", ".self_attn.k_norm."),
        WeightRenaming(".mlp.gate.expert_bias", ".mlp.gate.e_score_correction_bias"),
        WeightConverter(
            ".attention.query_key_value.weight",
            [f".self_attn.{each}_proj.weight" for each in "qkv"],
            [Split(dim=0)],
        ),
    ],
)

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
    "sdar": Family(
        Qwen3ForCausalLM,
        Qwen2TokenizerFast,
        same_names(Qwen3Config),
        logits_shift=0,
        mask_token_ids={151936: 151669},
        block_size=4,
    ),
    "sdar_moe": Family(
        Qwen3MoeForCausalLM,
        Qwen2TokenizerFast,
        same_names(Qwen3MoeConfig),
        logits_shift=0,
        mask_token_ids={151936: 151669},
        block_size=4,
    ),
    "llada2_moe": Family(
        LLaDA2ForCausalLM,
        PreTrainedTokenizerFast,
        llada2_config,
        logits_shift=0,
        mask_token_ids={157184: 156895},
        block_size=32,
        saved_as=Glm4MoeForCausalLM,
    ),
    "Fast_dLLM_Qwen": Family(
        Qwen2ForCausalLM,
        Qwen2TokenizerFast,
        same_names(Qwen2Config),
        logits_shift=1,
        mask_token_ids={151936: 151665, 152064: 151665},
        block_size=32,
    ),
}
"""The families by the `model_type` of config.json."""

ADAPTABLE = ("qwen2", "qwen3", "llama")
"""Autoregressive model types whose attention becomes bidirectional with `config.is_causal = False`."""

BLOCK_CAUSAL = (*ADAPTABLE, "qwen3_moe", "glm4_moe")
"""Model types of transformers that attend block-causally where their config has a `block_size`."""

WHAT_LOADS = (
    f"These load: {', '.join(FAMILIES)}, masked language models, and what this library saved; adapt=True (--adapt) "
    f"turns {', '.join(ADAPTABLE)} into a diffusion language model; block_size and mask_token_id, as arguments of load "
    f"(--block_size, --mask_token_id) or in config.json, let {', '.join(BLOCK_CAUSAL)} attend block-causally; for "
    "another bidirectional model of transformers set in its config.json is_causal = false, mask_token_id and "
    "logits_shift (1 if the logits at i predict the token at i + 1); code that comes with a model runs with "
    "trust_remote_code=True only"
)


def native_config(settings: dict[str, Any]) -> PreTrainedConfig:
    """The transformers config for a config.json of one of the families, with the conventions that `describe` reads."""
    family = FAMILIES[settings["model_type"]]
    config = family.config(settings)
    config.is_causal = False
    mask_token_id = settings.get("mask_token_id")
    config.mask_token_id = family.mask_token_ids.get(config.vocab_size) if mask_token_id is None else mask_token_id
    config.logits_shift = family.logits_shift
    block_size = settings.get("block_size") or settings.get("bd_size") or family.block_size
    if block_size is not None:
        config.block_size = block_size
    return config
