"""Which causal and masked language models of transformers train fused: each class, tiny, beside its own logits.

    python -m benchmarks.heads [CLASS ...]

Builds each class of `MODEL_FOR_CAUSAL_LM_MAPPING` and `MODEL_FOR_MASKED_LM_MAPPING` with random weights from a small
config, with a scale, a soft-cap and padding where its config has them. The loss and gradients of `add_loss_to_forward`
must be those of the model's own logits, and those of `patch` must be those of the model's own loss. This takes under
two minutes of one core and writes benchmarks/results/heads.json. With names of classes it prints how these fare.
"""

import json
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from benchmarks.tools.measure import environment, write_json
from tabom import patch
from tabom.training.forward import add_loss_to_forward
from tabom.training.head import HeadStatus
from tabom_kernels import tabom_loss

SEQUENCES, LENGTH, SELECTED = 2, 16, 6
LOSS = {"rank_weight": 0.5, "margin": 0.2, "form": "hinge"}
SECONDS = 120
MOST_PARAMETERS = 60_000_000

SIZES = {
    r"num_hidden_layers|num_layers|n_layers?|(num_)?(en|de)coder_layers|num_blocks|depth": 2,
    r"hidden_size(_global)?|d_model|n_embd|dim|d_embed|lru_width|d_latents": 32,
    r"(word_)?emb(ed(ding)?)?(_proj)?_(size|dim)": 32,
    r"((moe|(moe_)?shared_expert|shared|dense)_)?intermediate_size|((en|de)coder_)?ffn_dim|d_?ff|n_inner": 64,
    r"((expert_)?ffn_hidden|feed_forward)_size|hidden_dim": 64,
    r"(num_)?((en|de)coder_)?(swa_|linear_)?(num_)?(global_)?(attention|key_value|kv|key|value)?_?heads": 4,
    r"n_(kv_)?heads?": 4,
    r"(swa_|global_)?((linear_)?(key|value|qk_nope|qk_rope|v|attention)_)?head_(dim|size)|d_kv|kv_channels": 8,
    r"rotary_dim": 4,
    r"(q|kv|o)_lora_rank": 16,
    r"(num_|n_routed_|num_local_|moe_num_|num_total_)experts": 4,
    r"num_experts_per_tok(en)?|moe_(top_)?k|moe_topk|top_k_experts": 2,
    r"(num_|n_|topk_)group|(n|num|moe_num)_shared_experts|first_k_dense_replace|num_dense_layers": 1,
    r"vocab_size(_per_layer_input)?": 99,
    r"unpadded_vocab_size": 95,
    r"max_(position_embeddings|seq_len|sequence_length|target_positions|source_positions)|n_positions|n_ctx": 128,
    r"final_logit_softcapping|logits_soft_cap|output_logit_soft_cap": 2.0,
    r"logit_scale|logits_scaling|lm_head_multiplier|output_multiplier": 0.4,
    r".*(dropout|drop_?(prob|rate)?|layerdrop)(_rate|_prob|_p)?": 0,
    r"initializer_range|init_std|initializer_factor": 0.2,
}
"""Values of numeric fields of configs, by patterns of the fields' names."""

MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_group": 1, "n_group": 1, "topk_group": 1},
    "bamba": MAMBA,
    "blt": {"encoder_hash_byte_group_vocab": 99},
    "cohere_compass_text": {"logit_scale": 0.4, "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "dots1": {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
    | {"topk_group": 1, "n_shared_experts": 1},
    "esm": {"vocab_size": 99, "pad_token_id": 1, "mask_token_id": 2, "emb_layer_norm_before": False},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "altup_num_inputs": 2}
    | {"laurel_rank": 8, "activation_sparsity_pattern": [0.0, 0.0]},
    "gemma4_text": {"hidden_size_per_layer_input": 8, "final_logit_softcapping": 2.0},
    "gemma4_unified_text": {"final_logit_softcapping": 2.0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": MAMBA,
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "luke": {"entity_vocab_size": 50, "entity_emb_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "ministral": {"head_dim": 8},
    "minicpm3": {"dim_model_base": 8},
    "mobilebert": {"embedding_size": 16},
    "nemotron": {"num_key_value_heads": 4, "head_dim": 8},
    "neomme": {"head_dim": 32},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [4, 4], "attn_layers": ["local", "lsh"]}
    | {"max_position_embeddings": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "layer_types": ["linear_attention", "linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
"""By model type, the settings that its config needs besides small sizes."""


FROM_LOGITS = "same, from its logits"
"""The outcome of a class whose loss is right, and computed from logits."""


class NotTried(Exception):
    """The model could not be built or run this way."""


class TooLong(Exception):
    """A class took longer than SECONDS."""


def classes() -> list[str]:
    """The names of all classes, each once."""
    return list(
        dict.fromkeys([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()])
    )


def tiny_config(cls: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The default config with small sizes, in its parts as well."""
    small: dict[str, Any] = {}
    for name, value in vars(cls()).items():
        if isinstance(value, PreTrainedConfig):
            small[name] = tiny_config(type(value))
        elif name.endswith("token_id") and (isinstance(value, list) or (isinstance(value, int) and value >= 90)):
            small[name] = 3 + len(small) % 6
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            size = next((size for pattern, size in SIZES.items() if re.fullmatch(pattern, name)), None)
            if size is not None:
                small[name] = type(value)(size) if size == 0 else size
    return cls(**small | SETTINGS.get(cls.model_type, {}))


def build(name: str) -> PreTrainedModel:
    """A model with random weights, the same at each call, and a bias where its head has one."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    config = tiny_config(cls.config_class)
    config.use_cache = False
    config.is_decoder = name == "ReformerModelWithLMHead"
    model = cls(config).float()
    if sum(p.numel() for p in model.parameters()) > MOST_PARAMETERS:
        raise NotTried("too large with the sizes that are known here")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        torch.nn.init.normal_(head.bias, std=0.3)
    return model.train(name.startswith("Reformer"))  # whose backward asks for it


def loss_and_gradients(model: PreTrainedModel, loss: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> str | None:
    """What differs by more than the rounding of a gradient in fp32; None if nothing does."""
    largest = max(gradient.norm() for gradient in expected[1].values())
    if not torch.allclose(found[0], expected[0], rtol=1e-4):
        return f"loss {found[0]:.4f}, expected {expected[0]:.4f}"
    if found[1].keys() != expected[1].keys():
        return f"gradients of {sorted(found[1].keys() ^ expected[1].keys())}"
    for name, gradient in expected[1].items():
        if not (found[1][name] - gradient).norm() < 0.01 * (gradient.norm() + 0.1 * largest):
            return f"gradient of {name}"
    return None


def outcome(compute: Callable[[], str | None]) -> str:
    """`same` (fused, or from logits), what differs, or the error that refuses the model."""
    try:
        problem = compute()
    except ValueError as error:
        return f"refused: {error}"
    except RuntimeError as error:
        problem = str(error)
    if problem is not None and problem != FROM_LOGITS:
        return f"WRONG: {problem}"
    return problem or "same"


def draw_batch() -> dict[str, Tensor]:
    """A batch as the collator makes it, with six positions of each sequence in the loss."""
    ids = torch.randint(10, 90, (SEQUENCES, LENGTH))
    positions = torch.stack([torch.randperm(LENGTH - 2)[:SELECTED] + 1 for _ in range(SEQUENCES)])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "rows": (torch.arange(SEQUENCES)[:, None] * LENGTH + positions).flatten(),
        "labels": torch.randint(10, 90, (SEQUENCES * SELECTED,)),
        "steps": torch.randint(5, (SEQUENCES * SELECTED,)),
        "cu_seqlens": torch.arange(SEQUENCES + 1, dtype=torch.int32) * SELECTED,
    }


def judge(name: str) -> dict[str, str]:
    """The outcome of a class in the trainer, fused and from the logits of the rows, and under `patch`."""
    batch = draw_batch()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    labels = inputs["input_ids"].masked_fill(torch.arange(LENGTH) % 3 == 0, -100)

    def run(model: PreTrainedModel, **arguments: Tensor) -> Any:
        torch.manual_seed(1)  # for attention that hashes or samples
        return model(**arguments)

    def with_loss(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
        return loss_and_gradients(model, run(model.train(), **inputs, labels=labels).loss)

    try:
        model = build(name)
        logits = run(model, **inputs).logits.flatten(0, 1)[batch["rows"]]
        packed = (batch[key] for key in ("labels", "steps", "cu_seqlens"))
        expected = loss_and_gradients(model, tabom_loss(logits, *packed, **LOSS).loss)
        own = with_loss(build(name))
    except Exception as error:  # of any kind: it is not ours
        raise NotTried(f"{type(error).__name__}: {error}") from error

    def from_logits(model: PreTrainedModel) -> str | None:
        return None if model.get_output_embeddings().status is HeadStatus.IN_HEAD else FROM_LOGITS

    def fused() -> str | None:
        model = build(name)
        add_loss_to_forward(model, **LOSS)
        return difference(loss_and_gradients(model, run(model, **batch).loss), expected) or from_logits(model)

    def of_rows() -> str | None:
        model = build(name)
        add_loss_to_forward(model, **LOSS, fused_linear=False)
        return difference(loss_and_gradients(model, run(model, **batch).loss), expected)

    def patched() -> str | None:
        model = patch(build(name))
        return difference(with_loss(model), own) or from_logits(model)

    return {"fused": outcome(fused), "rows": outcome(of_rows), "patched": outcome(patched)}


def judge_in_time(name: str) -> dict[str, str]:
    def stop(*_: Any) -> None:
        raise TooLong(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        return judge(name)
    except (NotTried, TooLong) as error:
        return {"not tried": str(error)}
    finally:
        signal.alarm(0)


def counts(models: dict[str, dict[str, str]]) -> dict[str, int]:
    """How many classes there are, how many were tried, and how many came out the same in each way."""
    same = Counter(way for found in models.values() for way, answer in found.items() if answer == "same")
    return {"classes": len(models), "tried": sum("not tried" not in found for found in models.values())} | same


def main() -> None:
    """Judges all classes, or those that are named."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    models = {name: judge_in_time(name) for name in sys.argv[1:] or classes()}
    if sys.argv[1:]:
        print(json.dumps(models, indent=1))
        return
    record = environment(torch.device("cpu")) | {"transformers": transformers.__version__}
    print(write_json("heads", record | {"counts": counts(models), "models": models}), counts(models))


if __name__ == "__main__":
    main()
