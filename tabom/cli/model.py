"""The model of a command line."""

import os
from dataclasses import dataclass, field
from typing import Literal

import torch

from tabom.lab.model import BASE_PATH
from tabom.models.diffusion_model import DiffusionModel
from tabom.models.loading import load


@dataclass
class ModelArguments:
    """Which model."""

    model: str | None = field(
        default=None,
        metadata={"help": "Folder or hub name. Default: the tiny model that ships with the package."},
    )
    adapt: bool = field(
        default=False,
        metadata={"help": "Turn an autoregressive Qwen2, Qwen3 or Llama into a diffusion language model."},
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Of the weights in memory."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, flash_attention_2 or eager. Default: transformers' choice."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


def load_model(arguments: ModelArguments) -> DiffusionModel:
    """The model that the arguments name."""
    return load(
        arguments.model or BASE_PATH,
        dtype=getattr(torch, arguments.dtype),
        attn_implementation=arguments.attn_implementation,
        adapt=arguments.adapt,
        trust_remote_code=arguments.trust_remote_code,
    )


def load_to_sample(arguments: ModelArguments) -> DiffusionModel:
    """The same, on this process's GPU where there is one; a trainer moves it to its own."""
    family = load_model(arguments)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        family.model.cuda()
    return family
