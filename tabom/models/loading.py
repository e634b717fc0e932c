"""Loading a diffusion language model from a folder or the hub."""

import json
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
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
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from tabom.models.diffusion_model import DiffusionModel, describe
from tabom.models.families import ADAPTABLE, FAMILIES, WHAT_LOADS, Family, native_config


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
        FileNotFoundError: a path, and no model there.
        ValueError: the weights are pickled, the family is not known, the model attends causally, or no mask token is
            known.
    """
    check_is_there(model_name_or_path)
    path = Path(model_name_or_path)
    check_files(path)
    if path.is_dir():
        model_name_or_path = str(path.resolve())  # one model has one name, wherever it is called from
    options = {"dtype": dtype, "attn_implementation": attn_implementation}
    if find_adapter_config_file(model_name_or_path) is not None:
        return load_with_adapter(model_name_or_path, adapt=adapt, trust_remote_code=trust_remote_code, **options)
    settings, _ = PreTrainedConfig.get_config_dict(model_name_or_path)
    model_type = settings.get("model_type")
    if model_type in FAMILIES:
        return load_family(model_name_or_path, FAMILIES[model_type], settings, options)
    if model_type not in CONFIG_MAPPING and not trust_remote_code:
        raise ValueError(f"model type {model_type!r} in {model_name_or_path} is not known. {WHAT_LOADS}")
    as_masked_lm = is_masked_lm(settings)
    config = AutoConfig.from_pretrained(model_name_or_path, trust_remote_code=trust_remote_code)
    if as_masked_lm or adapt:
        config.is_causal = False
    if adapt and model_type not in ADAPTABLE:
        raise ValueError(f"adapt: model type {model_type!r}; expected one of {', '.join(ADAPTABLE)}")
    auto = AutoModelForMaskedLM if as_masked_lm else AutoModelForCausalLM
    options |= {"config": config, "trust_remote_code": trust_remote_code, "use_safetensors": True}
    model = auto.from_pretrained(model_name_or_path, **options)
    tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, trust_remote_code=trust_remote_code)
    if adapt:
        add_mask_token(model, tokenizer)
    return describe(model.eval(), tokenizer)


def as_diffusion_model(
    model: str | Path | DiffusionModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> DiffusionModel:
    """A model by its name, as `load` gave it, or as transformers did.

    Args:
        tokenizer: default: that of the model's name or folder.

    Raises:
        ValueError: a model without a name and without a tokenizer, or one that `load` or `describe` refuses.
    """
    if isinstance(model, str | Path):
        model = load(model)
    if isinstance(model, DiffusionModel):
        return model if tokenizer is None else describe(model.model, tokenizer)
    if tokenizer is None and not model.name_or_path:
        raise ValueError(
            "processing_class=None, and the model was not loaded from a folder that would have one: pass the "
            "tokenizer; it says what masks, pads and ends a response"
        )
    return describe(model, load_tokenizer(model.name_or_path) if tokenizer is None else tokenizer)


def check_is_there(name: str | Path) -> None:
    """Says at once what the hub would deny after a minute, or in words about names: `runs/typo`, `./typo`, `runs`.

    Raises:
        FileNotFoundError: `name` has the form of a path, or its first folder is here, and no model is there.
    """
    path = Path(name)
    is_path = path.exists() or str(name).count("/") > 1 or str(name).startswith((".", "/", "~"))
    if not is_path and (path.parent == Path() or not path.parent.is_dir()):
        return  # a name of the hub
    if any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
        return
    problem, folder = f"nothing of this name in {path.parent}", path.parent
    if path.exists():
        problem, folder = "expected a folder with config.json or adapter_config.json", path
    beside = sorted(each.name for each in folder.iterdir() if each.is_dir()) if folder.is_dir() else []
    similar = get_close_matches(path.name, beside, n=3) or beside[:3]
    hint = f"; there are {', '.join(similar)}" if similar else ""
    raise FileNotFoundError(f"model={name}: {problem}{hint}")


def check_files(path: Path) -> None:
    """What is wrong with the files of a folder; of a name on the hub transformers is told to take safetensors alone.

    Raises:
        ValueError: safetensors or JSON that are not whole, or pickled weights alone, which can run code.
    """
    for pattern in ("*.safetensors", "config.json", "tokenizer*.json"):
        for file in sorted(path.glob(pattern)):
            try:
                json.loads(file.read_bytes()) if file.suffix == ".json" else safe_open(file, framework="pt")
            except (SafetensorError, ValueError) as error:
                raise ValueError(
                    f"model={path}: {file.name} is not whole ({error}): save or download it again"
                ) from error
    pickled = sorted(each.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for each in path.glob(pattern))
    if pickled and not list(path.glob("*.safetensors")):
        raise ValueError(
            f"model={path}: {pickled[0]} is pickled and could run code; only safetensors load. Where you trust it: "
            "transformers' from_pretrained reads it and save_pretrained writes model.safetensors"
        )


def is_masked_lm(settings: dict[str, Any]) -> bool:
    """Whether a config.json is of a masked language model: its type has such a class, and was not saved as another."""
    model_type = settings.get("model_type")
    causal_class = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    return model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and causal_class not in (settings.get("architectures") or [])


def load_tokenizer(model_name_or_path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that `load` would give, without the model."""
    check_is_there(model_name_or_path)
    if find_adapter_config_file(model_name_or_path) is not None:
        from peft import PeftConfig

        model_name_or_path = PeftConfig.from_pretrained(model_name_or_path).base_model_name_or_path
    model_type = PreTrainedConfig.get_config_dict(model_name_or_path)[0].get("model_type")
    if model_type in FAMILIES:
        return FAMILIES[model_type].tokenizer.from_pretrained(model_name_or_path)
    return AutoTokenizer.from_pretrained(model_name_or_path, trust_remote_code=trust_remote_code)


def load_family(path: str | Path, family: Family, settings: dict[str, Any], options: dict[str, Any]) -> DiffusionModel:
    """A checkpoint in a family's own layout; its weights are renamed while they are read."""
    config = native_config(settings)
    model = family.architecture.from_pretrained(
        path, config=config, key_mapping=family.key_mapping, use_safetensors=True, **options
    )
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
    # DoRA's, which peft saves under one name and has under another; transformers would take new ones instead
    weights = {re.sub(r"lora_magnitude_vector$", r"\g<0>.weight", name): weight for name, weight in weights.items()}
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
