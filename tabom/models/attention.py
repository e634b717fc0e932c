"""Block-causal attention: a position attends to its whole block and to all blocks before it.

The block of a position is position // block_size, counted from the first token of the prompt (SDAR, arXiv 2510.06303).
"""

import torch
from torch import Tensor
from transformers import PreTrainedConfig

FLEX = "flex_attention"
"""transformers' name of flex attention (arXiv 2412.05496), which takes a mask in tiles."""


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
