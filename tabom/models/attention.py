"""Block-causal attention: a position attends to its whole block and to all blocks before it.

The block of a position is position // block_size, counted from the first token of the prompt (SDAR, arXiv 2510.06303).
Where noisy copies of blocks stand beside the text (`tabom.models.layout`), a noisy position attends to its whole noisy
block and to the clean blocks before it.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedConfig

FLEX = "flex_attention"
"""transformers' name of flex attention (arXiv 2412.05496), which takes a mask in tiles."""

TAKES_PAIRS = ("sdpa", "eager", FLEX)
"""Implementations of attention that take a mask of the pairs of positions."""


def block_causal_mask(queries: Tensor, keys: Tensor, block_size: int) -> Tensor:
    """(..., Q, K) bool: whether the query at a position (..., Q) attends to the key at a position (..., K)."""
    return keys[..., None, :] // block_size <= queries[..., :, None] // block_size


def as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a mask allows attention, and the lowest number of the dtype elsewhere; eager attention adds it."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def check_flex_device(config: PreTrainedConfig, device: torch.device) -> None:
    """Raises a ValueError for flex attention on a CPU, where PyTorch has no backward and compiles it wrongly."""
    if config._attn_implementation == FLEX and device.type == "cpu":
        raise ValueError(
            f"attn_implementation={FLEX!r} on a CPU: PyTorch's flex attention has no backward there, and is not "
            "reliable when compiled; load the model with attn_implementation='sdpa'"
        )


def check_attention(config: PreTrainedConfig, device: torch.device) -> None:
    """Checks that a block-causal model can read noisy copies with its implementation of attention on this device.

    Raises:
        ValueError: the implementation takes no mask of pairs of positions, or it is flex attention on a CPU.
    """
    implementation = config._attn_implementation
    if implementation not in TAKES_PAIRS:
        raise ValueError(
            f"attn_implementation={implementation!r} with block_size={config.block_size}: the blocks of block-causal "
            f"models need {', '.join(TAKES_PAIRS[:-1])} or, on a GPU, {TAKES_PAIRS[-1]}"
        )
    check_flex_device(config, device)


AttentionRule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Whether queries attend to keys, as flex attention asks it (`mask_mod`): bool for indices of sequences, heads, queries
and keys, which broadcast."""


def attention_rule(position_ids: Tensor, is_noisy: Tensor, is_token: Tensor, block_size: int) -> AttentionRule:
    """The attention of a text with noisy copies of blocks beside it.

    Args:
        position_ids: (B, L) positions.
        is_noisy: (B, L) bool, the noisy copies.
        is_token: (B, L) bool or int, 0 for the padding, which no position attends to.
    """
    block, is_token = position_ids // block_size, is_token.bool()

    def attends(b: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query_block, query_noisy = block[b, query], is_noisy[b, query]
        key_block, key_noisy = block[b, key], is_noisy[b, key]
        to_clean = ~key_noisy & (key_block <= query_block - query_noisy.long())
        to_own = key_noisy & query_noisy & (key_block == query_block)
        return (to_clean | to_own) & is_token[b, key]

    return attends


def block_bias(attends: AttentionRule, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(B, 1, L, L) of `dtype`: what attention adds to its scores, 0 where the query attends to the key.

    Args:
        shape: (B, L).
    """
    batch, positions = (torch.arange(size, device=device) for size in shape)
    return as_bias(attends(batch[:, None, None, None], batch.new_zeros(()), positions[:, None], positions), dtype)


def block_mask(attends: AttentionRule, shape: torch.Size, device: torch.device) -> BlockMask:
    """The same for flex attention, which keeps for tiles of 128 x 128 pairs whether all, some or none attend.

    It is compiled, because only so the pairs are never in memory.
    """
    (batch, length) = shape
    return torch.compile(create_block_mask)(attends, batch, None, length, length, device)
