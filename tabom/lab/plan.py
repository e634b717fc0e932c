"""What a whole run computes, part by part, from the architecture and a few lengths: arithmetic, nothing is run.

A multiply-add is two FLOP. A position costs 2 FLOP a weight of the body and 4 * width * length of attention in every
layer; a row of the head 2 * vocabulary * hidden size. A training step of an adapter costs a forward and the gradient of
the activations; of all weights, their gradient too.
"""

from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from tabom.lab.config import PlanConfig
from tabom.lab.dry_run import random_model

H100_BF16 = 989e12
"""FLOP/s of dense bf16 matrix products of an H100 SXM, from NVIDIA's data sheet."""


class Part(NamedTuple):
    """One part of a run."""

    name: str
    positions: float  # rows through the body; of training, forward only
    flop: float

    def hours(self, config: PlanConfig) -> float:
        """GPU hours, summed over all GPUs."""
        return self.flop / (H100_BF16 * config.efficiency) / 3600


class Architecture(NamedTuple):
    """The sizes of a model that determine its FLOP."""

    body: int  # weights of all layers
    layers: int
    width: int  # of attention: heads times their size
    head: int  # weights of the head

    def forward(self, positions: float, keys: float, read: float) -> float:
        """FLOP of positions that each attend to `keys` positions, and of `read` rows of the head."""
        return positions * (2 * self.body + 4 * self.layers * self.width * keys) + 2 * self.head * read


def architecture(model_name: str) -> Architecture:
    """The architecture of a published model or of a folder with a config; no weights are allocated.

    Raises:
        ValueError: another family, or one with block-causal attention, for which this arithmetic does not hold.
    """
    diffusion_model = random_model(model_name, "full", torch.bfloat16, None, torch.device("meta"))
    if diffusion_model.block_size is not None:
        raise ValueError(
            f"model={model_name}: the plan's arithmetic is that of full attention, and this model attends "
            "block-causally; expected a model of the Dream or LLaDA family"
        )
    model = diffusion_model.model
    config: PreTrainedConfig = model.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Architecture(
        body=sum(weight.numel() for weight in model.base_model.layers.parameters()),
        layers=config.num_hidden_layers,
        width=config.num_attention_heads * head_size,
        head=config.vocab_size * config.hidden_size,
    )


def decode(name: str, model: Architecture, config: PlanConfig, answers: int, how: str) -> Part:
    """Decoding with the plain loop of fixed batches, with the exact engine, or with the engine and the block cache."""
    if how == "plain":
        steps, length = config.response, config.longest_prompt + config.response
        positions = steps * length
    else:
        steps, length = config.mean_answer, config.mean_prompt + config.response
        positions = steps * length
        if how == "block cache":
            positions = steps / config.block_length * (length + (config.block_length - 1) * (config.block_length + 1))
    read = steps * (config.block_length + 1) / 2  # masked positions of the active block, on average
    return Part(name, answers * positions, answers * model.forward(positions, length, read))


def train(model: Architecture, config: PlanConfig, epochs: float, window: int, is_adapter: bool) -> Part:
    """Training on every kept response once an epoch, with `window` rows of each in the head."""
    sequences = config.num_prompts * config.right * epochs
    length = config.longest_prompt + config.response
    forward = model.forward(length, length, window)
    return Part("train", sequences * length, sequences * forward * (2 if is_adapter else 3))


def plan(model: Architecture, config: PlanConfig, how: str, epochs: float, window: int, is_adapter: bool) -> list[Part]:
    """All parts of a run; verification runs on the CPU."""
    return [
        decode("collect", model, config, config.num_prompts, how),
        Part("verify", 0, 0),
        train(model, config, epochs, window, is_adapter),
        decode("evaluate", model, config, config.evaluated, how),
    ]
