"""Loads the model that the arguments of a command name."""

import os

import torch

from tabom.cli.commands import ModelArguments
from tabom.models.diffusion_model import DiffusionModel
from tabom.models.loading import load


def load_model(arguments: ModelArguments) -> DiffusionModel:
    """The model that the arguments name."""
    return load(
        arguments.model or "shipped",
        dtype=getattr(torch, arguments.dtype),
        attn_implementation=arguments.attn_implementation,
        adapt=arguments.adapt,
        trust_remote_code=arguments.trust_remote_code,
        block_size=arguments.block_size,
        mask_token_id=arguments.mask_token_id,
    )


def load_to_sample(arguments: ModelArguments) -> DiffusionModel:
    """The same model, moved to this process's GPU if there is one."""
    diffusion_model = load_model(arguments)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        diffusion_model.model.cuda()
    return diffusion_model
