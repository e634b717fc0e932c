"""Tiny random checkpoints of the block-causal families, in the layouts that their authors publish."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from tabom import load
from tabom.lab.model import character_tokenizer
from tabom.models.diffusion_model import DiffusionModel
from tabom.models.families import FAMILIES, native_config

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
SETTINGS = {
    "sdar": {"head_dim": 8, "rope_theta": 1000000, "block_size": 4},
    "sdar_moe": {"head_dim": 8, "rope_theta": 1000000, "decoder_sparse_step": 1, "mlp_only_layers": [], **EXPERTS},
    "llada2_moe": {
        "head_dim": 8,
        "rope_theta": 600000,
        "partial_rotary_factor": 0.5,
        "num_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "sliding_window": 8,
        "block_size": 8,
        **EXPERTS,
    },
    "Fast_dLLM_Qwen": {"rope_theta": 1000000, "bd_size": 16},
    "llama": {"block_size": 4},
}
"""What the config.json of each family says beside the sizes."""

FUSED = ("q_proj", "k_proj", "v_proj")


def random_weights(model: PreTrainedModel, seed: int) -> None:
    """Weights that make the tokens of a response differ; router biases are not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" not in name:
                values = torch.randn(weight.shape, generator=generator)
                weight.copy_(1 + 0.1 * values if "norm" in name else values * (0.5 if weight.ndim > 1 else 0.1))


def published(weights: dict[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """Weights of transformers under the names of the authors' checkpoints."""
    found = {}
    for name, weight in weights.items():
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(weight):
                gate, up = both.chunk(2)
                found[name.replace("gate_up_proj", f"{expert}.gate_proj.weight")] = gate
                found[name.replace("gate_up_proj", f"{expert}.up_proj.weight")] = up
        elif name.endswith("experts.down_proj"):
            found |= {name.replace("down_proj", f"{i}.down_proj.weight"): each for i, each in enumerate(weight)}
        elif model_type == "llada2_moe" and "self_attn.q_proj" in name:
            parts = [weights[name.replace("q_proj", each)] for each in FUSED]
            found[name.replace("self_attn.q_proj", "attention.query_key_value")] = torch.cat(parts)
        elif model_type == "llada2_moe" and any(f"self_attn.{each}" in name for each in FUSED):
            continue
        elif model_type == "llada2_moe":
            for ours, theirs in {
                "model.embed_tokens": "model.word_embeddings",
                "self_attn.o_proj": "attention.dense",
                "self_attn.q_norm": "attention.query_layernorm",
                "self_attn.k_norm": "attention.key_layernorm",
                "e_score_correction_bias": "expert_bias",
            }.items():
                name = name.replace(ours, theirs)
            found[name] = weight
        else:
            found[name] = weight
    return {name: weight.clone().contiguous() for name, weight in found.items()}


def make_checkpoint(folder: Path, model_type: str, seed: int = 0) -> PreTrainedModel:
    """Writes a checkpoint, and returns the model of transformers whose weights it holds."""
    folder.mkdir()
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(folder)
    settings = {"model_type": model_type, "vocab_size": len(tokenizer), "mask_token_id": tokenizer.mask_token_id}
    settings |= {**SIZES, **SETTINGS[model_type], "eos_token_id": tokenizer.eos_token_id}
    (folder / "config.json").write_text(json.dumps(settings))
    if model_type == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM

        model = LlamaForCausalLM(LlamaConfig(**settings))
    else:
        family = FAMILIES[model_type]
        model = (family.saved_as or family.architecture)(native_config(settings))
    random_weights(model, seed)
    save_file(published(model.state_dict(), model_type), folder / "model.safetensors", metadata={"format": "pt"})
    return model.eval()


def block_causal_model(folder: Path, model_type: str, seed: int = 0, **options: object) -> DiffusionModel:
    """A random model of a block-causal family, loaded from its checkpoint."""
    make_checkpoint(folder, model_type, seed)
    return load(folder, **options)
