"""What a whole run computes, part by part, from the architecture and a few lengths: arithmetic, nothing is run.

A multiply-add is two FLOP. A position costs 2 FLOP a weight of the body and 4 * width * length of attention in every
layer; a row of the head 2 * vocabulary * hidden size. A training step of an adapter costs a forward and the gradient of
the activations; of all weights, their gradient too.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from tabom.lab.dry_run import random_model

H100_BF16 = 989e12
"""FLOP a second of dense bf16 matrix products, NVIDIA's data sheet of the H100 SXM."""


@dataclass
class PlanConfig:
    """The size of a run; lengths are means over prompts, in tokens."""

    prompts: int = field(default=12000, metadata={"help": "Prompts answered once each to collect trajectories."})
    gpus: int = field(default=8, metadata={"help": "GPUs that share the work."})
    longest_prompt: int = field(default=256, metadata={"help": "What a fixed batch is padded to."})
    mean_prompt: int = field(default=120, metadata={"help": "Mean length of a prompt."})
    response: int = field(default=256, metadata={"help": "Length of a response; one token is decided a step."})
    mean_answer: int = field(default=150, metadata={"help": "Mean steps until all before the end is decided."})
    block: int = field(default=32, metadata={"help": "Block length, for the block cache."})
    right: float = field(default=0.425, metadata={"help": "Share of the answers that verification keeps."})
    evaluated: int = field(default=2000, metadata={"help": "Answers made for evaluation, base and tuned together."})
    efficiency: float = field(default=0.4, metadata={"help": "Share of the H100's bf16 rate that is reached; a guess."})

    def __post_init__(self) -> None:
        for name in ("right", "efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a share in (0, 1]")
        for name in ("prompts", "gpus", "mean_prompt", "response", "block", "evaluated"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        if not self.block <= self.response or not 1 <= self.mean_answer <= self.response:
            raise ValueError(
                f"block={self.block}, mean_answer={self.mean_answer}: expected at most response={self.response}"
            )


class Part(NamedTuple):
    """One part of a run."""

    name: str
    positions: float  # rows through the body; of training, forward only
    flop: float

    def hours(self, config: PlanConfig) -> float:
        """GPU hours, all GPUs added up."""
        return self.flop / (H100_BF16 * config.efficiency) / 3600


class Architecture(NamedTuple):
    """What the arithmetic needs of a model."""

    body: int  # weights of all layers
    layers: int
    width: int  # of attention: heads times their size
    head: int  # weights of the head

    def forward(self, positions: float, keys: float, read: float) -> float:
        """FLOP of positions that attend to `keys` others each, and of `read` rows of the head."""
        return positions * (2 * self.body + 4 * self.layers * self.width * keys) + 2 * self.head * read


def architecture(model_name: str) -> Architecture:
    """Of a published model or a folder with a config, whose weights are counted and never made.

    Raises:
        ValueError: another family.
    """
    model = random_model(model_name, "full", torch.bfloat16, None, torch.device("meta")).model
    config: PreTrainedConfig = model.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Architecture(
        body=sum(weight.numel() for weight in model.base_model.layers.parameters()),
        layers=config.num_hidden_layers,
        width=config.num_attention_heads * head_size,
        head=config.vocab_size * config.hidden_size,
    )


def decode(name: str, model: Architecture, config: PlanConfig, answers: int, how: str) -> Part:
    """Decoding by the plain loop of fixed batches, by the engine exact, or by the engine with the block cache."""
    if how == "plain":
        steps, length = config.response, config.longest_prompt + config.response
        positions = steps * length
    else:
        steps, length = config.mean_answer, config.mean_prompt + config.response
        positions = steps * length
        if how == "block cache":
            positions = steps / config.block * (length + (config.block - 1) * (config.block + 1))
    read = steps * (config.block + 1) / 2  # masked positions of the active block, on average
    return Part(name, answers * positions, answers * model.forward(positions, length, read))


def train(model: Architecture, config: PlanConfig, epochs: float, window: int, is_adapter: bool) -> Part:
    """Every kept answer once an epoch, `window` of its positions through the head."""
    sequences = config.prompts * config.right * epochs
    length = config.longest_prompt + config.response
    forward = model.forward(length, length, window)
    return Part("train", sequences * length, sequences * forward * (2 if is_adapter else 3))


def plan(model: Architecture, config: PlanConfig, how: str, epochs: float, window: int, is_adapter: bool) -> list[Part]:
    """All parts of a run; verification runs on the CPU."""
    return [
        decode("collect", model, config, config.prompts, how),
        Part("verify", 0, 0),
        train(model, config, epochs, window, is_adapter),
        decode("evaluate", model, config, config.evaluated, how),
    ]
