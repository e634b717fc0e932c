"""Merges adapters into their bases, which gives models that load without peft and without the base."""

from pathlib import Path

import torch
from transformers.utils.peft_utils import find_adapter_config_file

from tabom.models.loading import check_is_there, load, read_adapter
from tabom.models.progress import bars_of_long_waits
from tabom.models.writing import naming_full_disk


def merge_adapter(
    adapter: str | Path,
    output_dir: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> None:
    """Adds the weights of an adapter to those of its base, and saves the model and the tokenizer of the base.

    The folder loads with `tabom.load` and with transformers' `AutoModelForCausalLM` (or `AutoModelForMaskedLM`). The
    base may be in the layout of Dream or LLaDA; it is saved as the model of transformers that it loads as.

    Args:
        adapter: folder or hub name of an adapter of peft, such as `TabomTrainer` saves.
        output_dir: a folder that does not exist yet, or is empty.
        dtype: of the base in memory and of the weights in `output_dir`.
        trust_remote_code: run code that comes with the base.

    Raises:
        FileNotFoundError: the adapter, or the base that it names, does not exist.
        ValueError: `adapter` holds no adapter or weights that its base has no layers for, or `output_dir` is not empty.
        ModuleNotFoundError: peft is not installed.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    check_is_there(adapter, "adapter")
    if find_adapter_config_file(str(adapter)) is None:
        raise ValueError(f"adapter={adapter}: no adapter_config.json there; expected an adapter that peft saved")
    output = Path(output_dir)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"output_dir={output}: exists and is not empty; give a new folder")
    config, weights = read_adapter(adapter)
    diffusion_model = load(config.base_model_name_or_path, dtype=dtype, trust_remote_code=trust_remote_code)
    model = get_peft_model(diffusion_model.model, config)
    unknown = set_peft_model_state_dict(model, weights).unexpected_keys
    if unknown:
        raise ValueError(
            f"adapter={adapter}: {unknown[0]} belongs to no layer of the base {diffusion_model.model.name_or_path}"
        )
    merged = model.merge_and_unload()
    with bars_of_long_waits(), naming_full_disk(output):
        merged.save_pretrained(output)
        diffusion_model.tokenizer.save_pretrained(output)
