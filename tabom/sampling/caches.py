"""Caches of keys and values between decoding steps, so that a step computes only a part of each sequence.

With block-causal attention the keys and values of a finished block never change again, so its cache is exact. With full
attention every key and value changes when a token is decided, so cached ones are stale until they are computed again.
Caching is then an approximation, after Fast-dLLM (arXiv 2505.22618) and dKV-Cache (arXiv 2505.15781). A sequence is
refreshed, which means that all its positions are computed, when a block begins and then every `cache_refresh` steps.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from tabom.models.diffusion_model import LogitRows
from tabom.sampling.config import Blocks, SamplerConfig
from tabom.sampling.policies import POLICIES


def computed_positions(
    prompt_length: int, blocks: Blocks, block: int, index: int, config: SamplerConfig, logit_rows: LogitRows
) -> range:
    """The positions of a sequence with full attention that a step computes: all in a refresh, else those not cached.

    The cache `prefix` holds the positions before the active block, `block` also those after it. The position whose
    logits predict the first token of the block is computed even where it stands before the block.

    Args:
        block: index of the active block, from 0.
        index: of the step, among the steps of this block.
        logit_rows: see `DiffusionModel.logit_rows`.
    """
    end = prompt_length + blocks.length
    refreshes = index == 0 or (config.cache_refresh is not None and index % config.cache_refresh == 0)
    if config.cache == "none" or refreshes:
        return range(end)
    start = prompt_length + block * blocks.size
    return range(logit_rows(start), end if config.cache == "prefix" else start + blocks.size)


def block_causal_positions(
    prompt_length: int, blocks: Blocks, block: int, index: int, config: SamplerConfig, logit_rows: LogitRows
) -> range:
    """The positions of a sequence with block-causal attention that a step computes. This cache is exact.

    It is the active block, and in the first step of a block also the block before it, whose tokens are final now: these
    keys and values are kept. The first step of a sequence computes its whole prompt. Where the first token of the block
    is decided alone (`Policy.begins_alone`), this step ends before the block.

    A later step also computes the position before the block if this position may have to predict the first token again:
    not where the token was decided alone, or is of the prompt.
    """
    start = prompt_length - blocks.given + block * blocks.size
    decides_alone, is_of_prompt = POLICIES[config.policy].begins_alone, block == 0 and blocks.given > 0
    if index > 0:
        return range(start if decides_alone or is_of_prompt else max(logit_rows(start), 0), start + blocks.size)
    first = 0 if block == 0 else start - blocks.size
    return range(first, start if decides_alone and not is_of_prompt else start + blocks.size)


class RowCache(Cache):
    """Keys and values of all packed rows, one tensor a layer; a forward overwrites the rows that it computes."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[])
        self.keys: list[Tensor] = [torch.empty(0)] * layers
        self.values: list[Tensor] = [torch.empty(0)] * layers
        self.rows: Tensor | None = None
        self.count = 0

    def begin(self, rows: Tensor | None, count: int) -> None:
        """Sets which of the `count` packed rows the next forward computes; None: all of them."""
        self.rows, self.count = rows, count

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores the computed rows, which padding may follow; returns keys and values of all rows, (1, H, N, D)."""
        for kept, states in ((self.keys, key_states), (self.values, value_states)):
            if self.rows is None:  # a copy, because the next replay of a CUDA graph overwrites its outputs
                kept[layer_idx] = states[:, :, : self.count].clone()
            else:
                if kept[layer_idx].numel() == 0:
                    kept[layer_idx] = states.new_zeros(*states.shape[:2], self.count, states.shape[3])
                kept[layer_idx].index_copy_(2, self.rows, states[:, :, : len(self.rows)])
        return self.keys[layer_idx], self.values[layer_idx]

    def move(self, source: Tensor) -> None:
        """Reorders the rows: row i gets the contents of row `source[i]`."""
        for kept in (self.keys, self.values):
            kept[:] = [states.index_select(2, source) if states.numel() else states for states in kept]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0, because the inputs of a forward are not the continuation of a cached sequence."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The number of all rows, and offset 0; no mask is built from them, because spans separate the sequences."""
        return self.count, 0
