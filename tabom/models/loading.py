"""Loading a diffusion language model from a folder or the hub."""

import json
import re
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
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
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from tabom.models.diffusion_model import DiffusionModel, describe
from tabom.models.families import ADAPTABLE, FAMILIES, WHAT_LOADS, Family, native_config
from tabom.models.progress import bars_of_long_waits

if TYPE_CHECKING:
    from peft import PeftConfig


SHIPPED_PATH = Path(__file__).parents[1] / "lab" / "base"
"""The model of one million parameters that ships with the package, which every command and `load` call "shipped"."""
SHIPPED_PATHS = {"shipped": SHIPPED_PATH, "shipped-block": SHIPPED_PATH.with_name("block_base")}
"""The models that ship with the package, by their names; the second has block-causal attention."""

MOST = {
    "hidden_size": 2**20,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "vocab_size": 2**24,
    "d_model": 2**20,
    "n_layers": 2**12,
    "n_heads": 2**16,
}
"""The largest sizes that a config.json may ask for, far above those of any model; the last three are LLaDA's names."""


def load(
    model_name_or_path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    adapt: bool = False,
    trust_remote_code: bool = False,
    block_size: int | None = None,
    mask_token_id: int | None = None,
) -> DiffusionModel:
    """Loads model and tokenizer from a folder in the Hugging Face layout, from the hub, or a shipped one.

    Dream and LLaDA become transformers' Qwen2 and Llama, and so do the families with block-causal attention
    (`tabom.models.families`); masked language models load as they are, and so does what this library saved. A folder
    with an adapter loads the base that it names and puts the adapter into it. "shipped" and "shipped-block" are the
    models of this package, with full and with block-causal attention.

    Args:
        attn_implementation: "sdpa", "flash_attention_2", "eager" or, on a GPU, "flex_attention"; default: transformers'
            choice.
        adapt: turn an autoregressive Qwen2, Qwen3 or Llama into a diffusion language model: bidirectional attention,
            shifted logits, and a mask token, added if there is none. It must be trained before it is of use.
        block_size: tokens of a block of block-causal attention, for a Llama, Qwen2, Qwen3 or mixture of experts whose
            config.json does not say it (Stable-DiffCoder: 4), or another one than the config's.
        mask_token_id: of the vocabulary, if config.json does not say it or says another one.

    Raises:
        FileNotFoundError: a path, and no model there.
        ValueError: the weights are pickled, some are missing or have another shape than the config says, the family is
            not known, the model attends causally, or no mask token is known.
    """
    check_is_there(model_name_or_path)
    model_name_or_path = path_of(model_name_or_path)
    path = Path(model_name_or_path)
    check_files(path)
    if path.is_dir():
        model_name_or_path = str(path.resolve())  # one model has one name, wherever it is called from
    options = {"dtype": dtype, "attn_implementation": attn_implementation}
    asked = {"block_size": block_size, "mask_token_id": mask_token_id}
    if find_adapter_config_file(model_name_or_path) is not None:
        options |= {"adapt": adapt, "trust_remote_code": trust_remote_code, **asked}
        return load_with_adapter(model_name_or_path, **options)
    asked = {name: value for name, value in asked.items() if value is not None}
    settings, _ = PreTrainedConfig.get_config_dict(model_name_or_path)
    check_sizes(model_name_or_path, settings)
    model_type = settings.get("model_type")
    if model_type in FAMILIES:
        return load_family(model_name_or_path, FAMILIES[model_type], settings | asked, options)
    if model_type not in CONFIG_MAPPING and not trust_remote_code:
        raise ValueError(f"model type {model_type!r} in {model_name_or_path} is not known. {WHAT_LOADS}")
    as_masked_lm = is_masked_lm(settings)
    config = AutoConfig.from_pretrained(model_name_or_path, trust_remote_code=trust_remote_code)
    config.update(asked)
    if as_masked_lm or adapt:
        config.is_causal = False
    if adapt and model_type not in ADAPTABLE:
        raise ValueError(f"adapt: model type {model_type!r}; expected one of {', '.join(ADAPTABLE)}")
    auto = AutoModelForMaskedLM if as_masked_lm else AutoModelForCausalLM
    options |= {"config": config, "trust_remote_code": trust_remote_code}
    model = load_weights(auto, model_name_or_path, **options)
    tokenizer = read_tokenizer(AutoTokenizer, model_name_or_path, trust_remote_code=trust_remote_code)
    if adapt:
        add_mask_token(model, tokenizer)
    return describe(model, tokenizer)


def as_diffusion_model(
    model: str | Path | DiffusionModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> DiffusionModel:
    """Makes a `DiffusionModel` of a name or folder, of a model of transformers, or of a `DiffusionModel`.

    Args:
        tokenizer: default: the tokenizer of the model's name or folder.

    Raises:
        ValueError: neither a tokenizer nor the model's folder is known, or `load` or `describe` refuses the model.
    """
    if isinstance(model, str | Path):
        model = load(model)
    if isinstance(model, DiffusionModel):
        return model if tokenizer is None else describe(model.model, tokenizer)
    if tokenizer is None and not model.name_or_path:
        raise ValueError(
            "processing_class=None, and the model was not loaded from a folder with a tokenizer: pass the tokenizer, "
            "which defines the mask, padding and end tokens"
        )
    return describe(model, load_tokenizer(model.name_or_path) if tokenizer is None else tokenizer)


def path_of(name: str | Path) -> str | Path:
    """The folder of a shipped model for its name, else the name as it is."""
    return SHIPPED_PATHS.get(name, name)


def check_is_there(name: str | Path, argument: str = "model") -> None:
    """Refuses what is neither a folder with a model nor the name of a model on the hub.

    Args:
        argument: name of the argument, for the error.

    Raises:
        FileNotFoundError: `name` has the form of a path, or its first folder is here, and no model is there; or it is
            a name, and the hub does not give a model of this name.
    """
    path = Path(path_of(name))
    is_path = path.exists() or str(name).count("/") > 1 or str(name).startswith((".", "/", "~"))
    if not is_path and (path.parent == Path() or not path.parent.is_dir()):
        check_hub_has(str(name), argument)
        return
    if any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
        return
    problem, folder = f"nothing of this name in {path.parent}", path.parent
    if path.exists():
        problem, folder = "expected a folder with config.json or adapter_config.json", path
    beside = sorted(each.name for each in folder.iterdir() if each.is_dir()) if folder.is_dir() else []
    similar = get_close_matches(path.name, beside, n=3) or beside[:3]
    hint = f"; there are {', '.join(similar)}" if similar else ""
    raise FileNotFoundError(f"{argument}={name}: {problem}{hint}")


def check_hub_has(name: str, argument: str) -> None:
    """Refuses a name that the hub does not give, with the names of models and folders here that are similar.

    Raises:
        FileNotFoundError: there is no such model, it is not public, or the hub cannot be reached and its files are not
            in the cache.
    """
    if similar := get_close_matches(name, SHIPPED_PATHS, n=1, cutoff=0.8):
        raise FileNotFoundError(f"{argument}={name}: no such model; did you mean {similar[0]!r}?")
    try:
        cached_file(name, "config.json")
    except OSError as error:
        is_here = not isinstance(error.__cause__, RepositoryNotFoundError | LocalEntryNotFoundError)
        if is_here and find_adapter_config_file(name) is not None:
            return
        folders = [each.name for each in Path().iterdir() if each.is_dir()]
        similar = get_close_matches(name, [*SHIPPED_PATHS, *folders], n=1)
        hint = f"; did you mean {similar[0]!r}?" if similar else ""
        raise FileNotFoundError(
            f"{argument}={name}: expected a folder, {' or '.join(map(repr, SHIPPED_PATHS))}, or a name of the hub, "
            f"which says: {' '.join(str(error).split()).partition('. ')[0]}{hint}"
        ) from error


def check_files(path: Path) -> None:
    """Checks the files of a local folder. For names on the hub, transformers is told to load only safetensors.

    Raises:
        ValueError: a safetensors or JSON file is incomplete, or all weights are pickled, which can run code.
    """
    for pattern in ("*.safetensors", "config.json", "tokenizer*.json"):
        for file in sorted(path.glob(pattern)):
            try:
                content = json.loads(file.read_bytes()) if file.suffix == ".json" else safe_open(file, framework="pt")
            except (SafetensorError, ValueError, RecursionError) as error:
                raise ValueError(
                    f"model={path}: {file.name} is not whole ({error}): save or download it again"
                ) from error
            if file.suffix == ".json" and not isinstance(content, dict):
                raise ValueError(
                    f"model={path}: {file.name} holds {content!r:.60} instead of an object: save or download it again"
                )
    pickled = sorted(each.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for each in path.glob(pattern))
    if pickled and not list(path.glob("*.safetensors")):
        raise ValueError(
            f"model={path}: {pickled[0]} is pickled and could run code; only safetensors load. Where you trust it: "
            "transformers' from_pretrained reads it and save_pretrained writes model.safetensors"
        )


def check_sizes(path: str | Path, settings: dict[str, Any]) -> None:
    """Checks what would end in an error of arithmetic, or never, while transformers builds the model.

    Raises:
        ValueError: `model_type` is no name, or a size is no positive number, or is absurdly large.
    """
    model_type = settings.get("model_type")
    if not isinstance(model_type, str | None):
        raise ValueError(f"model={path}: config.json has model_type={model_type!r}: expected a name")
    for name, most in MOST.items():
        size = settings.get(name)
        if name == "num_key_value_heads" and model_type in FAMILIES and size == 0:
            continue  # LLaDA2's way to say all heads
        if size is not None and (type(size) is not int or not 1 <= size <= most):
            raise ValueError(f"model={path}: config.json has {name}={size!r}: expected a number from 1 to {most}")


def is_masked_lm(settings: dict[str, Any]) -> bool:
    """Whether a config.json is that of a masked language model: its type has one, and it names no causal class."""
    model_type = settings.get("model_type")
    causal_class = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    return model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and causal_class not in (settings.get("architectures") or [])


def load_tokenizer(model_name_or_path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that `load` would give, without loading the model."""
    check_is_there(model_name_or_path)
    model_name_or_path = path_of(model_name_or_path)
    if find_adapter_config_file(model_name_or_path) is not None:
        model_name_or_path = read_adapter_config(model_name_or_path).base_model_name_or_path
    model_type = PreTrainedConfig.get_config_dict(model_name_or_path)[0].get("model_type")
    if model_type in FAMILIES:
        return read_tokenizer(FAMILIES[model_type].tokenizer, model_name_or_path)
    return read_tokenizer(AutoTokenizer, model_name_or_path, trust_remote_code=trust_remote_code)


def read_tokenizer(kind: Any, path: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """Loads a tokenizer through `from_pretrained` of a transformers class.

    Raises:
        ValueError: transformers cannot read its files.
    """
    try:
        return kind.from_pretrained(path, **options)
    except (OSError, ValueError, ImportError):
        raise  # these say what is missing
    except Exception as error:  # of the library `tokenizers`, which raises this very class, or a KeyError
        raise ValueError(
            f"model={path}: its tokenizer cannot be read ({type(error).__name__}: {error}): save or download it again"
        ) from error


def load_family(path: str | Path, family: Family, settings: dict[str, Any], options: dict[str, Any]) -> DiffusionModel:
    """Loads a checkpoint in a family's own layout; its weights are renamed while they are read."""
    config = native_config(settings)
    model = load_weights(family.architecture, path, config=config, key_mapping=family.key_mapping, **options)
    if family.saved_as is not None:
        model.__class__ = family.saved_as
    # It is saved under transformers' names, which its saved config expects.
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    model.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    return describe(model, read_tokenizer(family.tokenizer, path))


def load_weights(architecture: Any, path: str | Path, **options: Any) -> PreTrainedModel:
    """Loads a model through `from_pretrained` of a transformers class, in evaluation mode, and checks its weights.

    transformers gives random values to a weight that is missing or has another shape. Tied weights do not count as
    missing.

    Raises:
        ValueError: a weight is missing or has another shape; names it. Weights that several of the checkpoint's are
            joined into, as the experts of a layer are, are named by transformers' report in the log.
    """
    try:
        with bars_of_long_waits():
            model, info = architecture.from_pretrained(
                path, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except RuntimeError as error:
        raise ValueError(
            f"model={path}: weights that are joined into one do not fit ({error}); save or download it again"
        ) from error
    remedy = f"save or download it again, or correct its config.json, which asks for {type(model).__name__}"
    check_complete(path, {"missing": info["missing_keys"]}, info["mismatched_keys"], remedy)
    return model.eval()


def check_complete(
    path: str | Path, misplaced: dict[str, set[str]], mismatched: set[tuple[str, Any, Any]], remedy: str
) -> None:
    """Refuses a checkpoint whose weights do not fit the model.

    Args:
        misplaced: names of weights, by the kind of problem.
        mismatched: names, with the shapes in the checkpoint and in the model.

    Raises:
        ValueError: there are such weights; names the first three of each kind and says how many there are.
    """
    shapes = {f"{name} {tuple(found)} instead of {tuple(expected)}" for name, found, expected in mismatched}
    problems = []
    for problem, names in {**misplaced, "of another shape": shapes}.items():
        if names:
            shown = ", ".join(sorted(names)[:3])
            others = f" and {len(names) - 3} more" if len(names) > 3 else ""
            problems.append(f"{len(names)} {problem}: {shown}{others}")
    if problems:
        raise ValueError(f"model={path}: weights do not fit the model ({'; '.join(problems)}); {remedy}")


def load_with_adapter(path: str | Path, **options: Any) -> DiffusionModel:
    """Loads the base that a peft adapter names, with the adapter in it; only the adapter's weights require gradients.

    Raises:
        ValueError: the adapter's weights do not fit the layers that its config names in this base.
    """
    config, weights = read_adapter(path)
    diffusion_model = load(config.base_model_name_or_path, **options)
    with bars_of_long_waits():
        info = diffusion_model.model.load_adapter(
            peft_config=config, adapter_state_dict=weights, is_trainable=True, ignore_mismatched_sizes=True
        )
    misplaced = {"missing": info.missing_keys, "of no layer that has an adapter here": info.unexpected_keys}
    remedy = (
        f"it was trained on another base than {config.base_model_name_or_path}, or adapter_config.json is that of "
        "another adapter"
    )
    check_complete(path, misplaced, info.mismatched_keys, remedy)
    return diffusion_model


def read_adapter_config(path: str | Path) -> "PeftConfig":
    """Reads the config of an adapter and checks that its base exists.

    Raises:
        FileNotFoundError: the base does not exist.
        ValueError: the config names no base.
    """
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(path)
    base, setting = config.base_model_name_or_path, f"base_model_name_or_path in {path}/adapter_config.json"
    if not base:
        raise ValueError(f"{setting}: empty; set it to the folder or hub name of the model that was trained")
    check_is_there(base, setting)
    return config


def read_adapter(path: str | Path) -> tuple["PeftConfig", dict[str, Tensor]]:
    """Reads config and weights of a peft adapter; the weights get the layer names of the loaded base.

    Adapters that were trained on a family's own modelling code are renamed like the checkpoints of the family.

    Raises:
        FileNotFoundError, ValueError: see `read_adapter_config`.
    """
    config = read_adapter_config(path)
    native = FAMILIES.get(PreTrainedConfig.get_config_dict(config.base_model_name_or_path)[0].get("model_type"))
    weights = load_file(cached_file(path, "adapter_model.safetensors"))
    # peft saves and loads DoRA's magnitudes under different names; transformers would initialize new ones
    weights = {re.sub(r"lora_magnitude_vector$", r"\g<0>.weight", name): weight for name, weight in weights.items()}
    if native is not None:
        weights = {rename_adapter_weight(name, native.key_mapping): weight for name, weight in weights.items()}
    return config, weights


def rename_adapter_weight(name: str, key_mapping: dict[str, str]) -> str:
    """Renames the layer in the name of an adapter's weight, keeping peft's prefix."""
    prefix = "base_model.model."
    for pattern, replacement in key_mapping.items():
        name = prefix + re.sub(pattern, replacement, name.removeprefix(prefix))
    return name


def add_mask_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives an autoregressive model a mask token; its logits still predict the next token (`logits_shift` 1).

    New rows of the embeddings and the head are the mean of the others. transformers would draw them from a normal
    distribution around the mean, with a deviation too small to matter, and would log a message about it.
    """
    if tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    known = model.config.vocab_size
    if len(tokenizer) > known:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                layer.weight[known:] = layer.weight[:known].mean(dim=0, dtype=torch.float32)
    model.config.mask_token_id = tokenizer.mask_token_id
    model.config.logits_shift = 1
