"""Keys and values kept between the steps of a decoding, so that a step computes a part of a sequence only.

In a bidirectional model every key and value changes when a token is decided, so what is kept is stale until it is
computed again: an approximation, after Fast-dLLM (arXiv 2505.22618) and dKV-Cache (arXiv 2505.15781). A sequence is
refreshed, that is computed whole, when a block begins, and every `cache_refresh` steps in it.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from tabom.sampling.policies import Step
from tabom.sampling.sampler import SamplerConfig


def computed_positions(
    prompt_length: int, response_length: int, block: int, step: Step, config: SamplerConfig, logits_shift: int
) -> range:
    """What a step computes of a sequence: all of it when it is refreshed, else what its cache does not keep.

    `prefix` keeps what stands before the active block, `block` also what stands behind it. The position whose logits
    are those of the block's first token is computed too, wherever it stands.

    Args:
        block: the active one, from 0.
        step: within it.
    """
    end = prompt_length + response_length
    refreshes = step.index == 0 or (config.cache_refresh is not None and step.index % config.cache_refresh == 0)
    if config.cache == "none" or refreshes:
        return range(end)
    start = prompt_length + block * step.tokens
    return range(start - logits_shift, end if config.cache == "prefix" else start + step.tokens)


class RowCache(Cache):
    """Keys and values of all packed rows, layer by layer; a forward replaces those of the rows that it computes."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[])
        self.keys: list[Tensor] = [torch.empty(0)] * layers
        self.values: list[Tensor] = [torch.empty(0)] * layers
        self.rows: Tensor | None = None
        self.count = 0

    def begin(self, rows: Tensor | None, count: int) -> None:
        """Says which of the `count` packed rows the next forward computes; None: all of them."""
        self.rows, self.count = rows, count

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of all rows, (1, H, N, D), from those of the computed ones, which padding may follow."""
        for kept, states in ((self.keys, key_states), (self.values, value_states)):
            if self.rows is None:  # a copy, as what a CUDA graph returns is overwritten by its next replay
                kept[layer_idx] = states[:, :, : self.count].clone()
            else:
                kept[layer_idx].index_copy_(2, self.rows, states[:, :, : len(self.rows)])
        return self.keys[layer_idx], self.values[layer_idx]

    def move(self, source: Tensor) -> None:
        """Packs anew: row i becomes what row `source[i]` was."""
        for kept in (self.keys, self.values):
            kept[:] = [states.index_select(2, source) if states.numel() else states for states in kept]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: no position stands before those that are computed."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """All rows, from the first; no mask is made of it, as sequences are told apart by their spans."""
        return self.count, 0
