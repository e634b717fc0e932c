"""Models with random weights, to be timed."""

import torch
from transformers import AutoModelForCausalLM

from benchmarks.tools.measure import is_gpu
from tabom.lab.dry_run import DREAM_7B, TINY, random_model
from tabom.lab.model import character_tokenizer
from tabom.models.diffusion_model import DiffusionModel, describe
from tabom.models.families import native_config

SMALL = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


def tiny_dream(**changes: int) -> DiffusionModel:
    """Two layers in fp32 on the CPU, or what the config says instead."""
    config = native_config(DREAM_7B)
    config.update(TINY | changes)
    return sharpened(describe(AutoModelForCausalLM.from_config(config), character_tokenizer()))


def random_dream(device: torch.device) -> tuple[str, DiffusionModel]:
    """Dream-7B in bf16 on a GPU; elsewhere four small layers in fp32 under Dream's real vocabulary."""
    if is_gpu(device):
        name = "Dream-7B, random weights, bf16"
        diffusion_model = random_model("Dream-org/Dream-v0-Instruct-7B", "full", torch.bfloat16, None, device)
    else:
        name = "4 layers of 256, V = 152064, random weights, fp32"
        config = native_config(DREAM_7B)
        config.update(SMALL)
        diffusion_model = describe(AutoModelForCausalLM.from_config(config), character_tokenizer())
    return name, sharpened(diffusion_model)


def large_vocabulary(device: torch.device) -> tuple[str, DiffusionModel]:
    """Four layers of 64 in fp32 under Dream's vocabulary, to be decoded in minutes."""
    config = native_config(DREAM_7B)
    config.update(SMALL | {"hidden_size": 64, "intermediate_size": 256, "head_dim": 16})
    diffusion_model = describe(AutoModelForCausalLM.from_config(config).to(device), character_tokenizer())
    return "4 layers of 64, V = 152064", sharpened(diffusion_model)


def sharpened(diffusion_model: DiffusionModel) -> DiffusionModel:
    """The model, ready to decode."""
    diffusion_model.model.eval()
    with torch.no_grad():
        diffusion_model.model.lm_head.weight.mul_(20)  # far from uniform, so that certainties are no near ties
    return diffusion_model
