"""Loading a diffusion language model, and what the rest of the library must know about its family."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from tabom.families import ADAPTABLE, FAMILIES, Family, native_config

WHAT_LOADS = (
    f"These load: {', '.join(FAMILIES)}, masked language models, and what this library saved; adapt=True (--adapt) "
    f"turns {', '.join(ADAPTABLE)} into a diffusion language model; for another bidirectional model of transformers "
    "set in its config.json is_causal = false, mask_token_id and logits_shift (1 if the logits at i predict the token "
    "at i + 1); code that comes with a model runs with trust_remote_code=True only"
)


@dataclass(frozen=True)
class DiffusionModel:
    """A model with bidirectional attention, its tokenizer, and the conventions of its family.

    `logits_shift` is how far to the left the logits of a token stand: 0 in LLaDA and masked language models, 1 in
    Dream, whose logits at i - 1 predict the token at i.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    mask_token_id: int
    pad_token_id: int
    eos_token_id: int | None
    logits_shift: int = 0

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return self.model.device


def load(
    model_name_or_path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    adapt: bool = False,
    trust_remote_code: bool = False,
) -> DiffusionModel:
    """Loads model and tokenizer from a folder in the Hugging Face layout, or from the hub.

    Dream and LLaDA become transformers' Qwen2 and Llama; masked language models load as they are, and so does what
    this library saved. A folder with an adapter loads the base that it names and puts the adapter into it.

    Args:
        attn_implementation: "sdpa", "flash_attention_2", "eager"; default: transformers' choice.
        adapt: turn an autoregressive Qwen2, Qwen3 or Llama into a diffusion language model: bidirectional attention,
            shifted logits, and a mask token, added if there is none. It must be trained before it is of use.

    Raises:
        ValueError: the family is not known, the model attends causally, or no mask token is known.
    """
    options = {"dtype": dtype, "attn_implementation": attn_implementation}
    if find_adapter_config_file(model_name_or_path) is not None:
        return load_with_adapter(model_name_or_path, adapt=adapt, trust_remote_code=trust_remote_code, **options)
    settings, _ = PreTrainedConfig.get_config_dict(model_name_or_path)
    model_type = settings.get("model_type")
    if model_type in FAMILIES:
        return load_family(model_name_or_path, FAMILIES[model_type], settings, options)
    if model_type not in CONFIG_MAPPING and not trust_remote_code:
        raise ValueError(f"model type {model_type!r} in {model_name_or_path} is not known. {WHAT_LOADS}")
    is_masked_lm = model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and "is_causal" not in settings
    config = AutoConfig.from_pretrained(model_name_or_path, trust_remote_code=trust_remote_code)
    if is_masked_lm or adapt:
        config.is_causal = False
    if adapt and model_type not in ADAPTABLE:
        raise ValueError(f"adapt: model type {model_type!r}; expected one of {', '.join(ADAPTABLE)}")
    auto = AutoModelForMaskedLM if is_masked_lm else AutoModelForCausalLM
    model = auto.from_pretrained(model_name_or_path, config=config, trust_remote_code=trust_remote_code, **options)
    tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, trust_remote_code=trust_remote_code)
    if adapt:
        add_mask_token(model, tokenizer)
    return describe(model.eval(), tokenizer)


def load_family(path: str | Path, family: Family, settings: dict[str, Any], options: dict[str, Any]) -> DiffusionModel:
    """A checkpoint in a family's own layout; its weights are renamed while they are read."""
    config = native_config(settings)
    model = family.architecture.from_pretrained(path, config=config, key_mapping=family.key_mapping, **options)
    model._weight_conversions = []  # it is saved under transformers' names, which its saved config asks for
    model.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    return describe(model.eval(), family.tokenizer.from_pretrained(path))


def load_with_adapter(path: str | Path, **options: Any) -> DiffusionModel:
    """An adapter of peft in the base that it names; only the adapter's weights require gradients.

    Adapters that were trained on a family's own modelling code are renamed as its checkpoints are.
    """
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(path)
    base = config.base_model_name_or_path
    family = load(base, **options)
    native = FAMILIES.get(PreTrainedConfig.get_config_dict(base)[0].get("model_type"))
    weights = load_file(cached_file(path, "adapter_model.safetensors"))
    if native is not None:
        weights = {rename_adapter_weight(name, native.key_mapping): weight for name, weight in weights.items()}
    family.model.load_adapter(peft_config=config, adapter_state_dict=weights, is_trainable=True)
    return family


def rename_adapter_weight(name: str, key_mapping: dict[str, str]) -> str:
    """Renames the layer in a weight of an adapter, which peft prefixes."""
    prefix = "base_model.model."
    for pattern, replacement in key_mapping.items():
        name = prefix + re.sub(pattern, replacement, name.removeprefix(prefix))
    return name


def add_mask_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives an autoregressive model a mask token; its logits stay those of the next token."""
    if tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    if len(tokenizer) > model.config.vocab_size:
        model.resize_token_embeddings(len(tokenizer))
    model.config.mask_token_id = tokenizer.mask_token_id
    model.config.logits_shift = 1


def describe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> DiffusionModel:
    """The conventions of a model in memory, read from its config and tokenizer.

    Raises:
        ValueError: the model attends causally, or no mask token is known.
    """
    config = model.config
    if getattr(config, "is_causal", True):
        raise ValueError(
            f"model type {config.model_type!r} attends causally; a diffusion language model needs bidirectional "
            f"attention. {WHAT_LOADS}"
        )
    mask_token_id = getattr(config, "mask_token_id", None)
    if mask_token_id is None:
        mask_token_id = tokenizer.mask_token_id
    if mask_token_id is None:
        raise ValueError("no mask token: set config.mask_token_id, or the tokenizer's mask_token")
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    logits_shift = getattr(config, "logits_shift", 0)
    return DiffusionModel(model, tokenizer, mask_token_id, pad_token_id, tokenizer.eos_token_id, logits_shift)


def logits_at(
    model: PreTrainedModel, rows: Tensor, forward: Callable[..., Any] | None = None, **inputs: Tensor
) -> Tensor:
    """Runs the model and returns the logits of chosen positions only, (N, V).

    The rows are gathered just before the head, so the head never sees the others; the model's own forward does
    everything else, such as scaling or capping the logits.

    Args:
        rows: (N,) int64 indices into the flattened (B * L) positions of `inputs`.
        forward: called instead of `model`, for a caller that has replaced the model's forward.
        inputs: what the model's forward takes: `input_ids` (B, L), `attention_mask`, `position_ids`, ...
    """

    def keep_rows(_head: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        (hidden,) = args
        return (hidden.reshape(-1, hidden.shape[-1])[rows],)

    hook = model.get_output_embeddings().register_forward_pre_hook(keep_rows)
    try:
        return (forward or model)(**inputs).logits
    finally:
        hook.remove()
