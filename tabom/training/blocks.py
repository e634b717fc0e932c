"""Block-causal training: one forward trains all blocks of a response.

A block-causal model denoises a block behind the finished blocks before it. To train every block at once, its noisy copy
stands beside the finished text (BD3-LM, arXiv 2503.09573; SDAR, arXiv 2510.06303). With n prompt tokens, T response
tokens and blocks of b tokens:

    input        prompt and clean response    |  noisy copy, in whole blocks
    positions    0, .., n + T - 1             |  n - n % b, .., ceil((n + T) / b) * b - 1

A clean position attends to the clean positions of its block and of the blocks before it. A noisy position attends to
its whole noisy block and to the clean blocks before it. The first noisy block begins with the last n % b tokens of the
prompt, which are visible. The last one ends with masks that have no loss, because there are masks in decoding as well.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedConfig

from tabom.data.tokenized import TokenizedTrajectory
from tabom.data.trajectories import response_blocks
from tabom.models.attention import FLEX, as_bias, check_flex_device
from tabom.models.diffusion_model import LogitRows
from tabom.training.settings import FirstTokenLogits

ATTENTION = ("sdpa", "eager", FLEX)
"""Implementations of attention that take a mask of the pairs of positions."""


def split_into_blocks(trajectory: TokenizedTrajectory, block_size: int) -> Iterator[TokenizedTrajectory]:
    """The trajectory of each block, whose prompt is all that stands before it.

    Its steps are those that unmasked one of its tokens, numbered from 0.
    """
    prompt, response = trajectory.prompt_token_ids, trajectory.response_token_ids
    for block in response_blocks(len(prompt), len(response), block_size):
        steps = np.asarray(trajectory.decoding_order[block])
        own_steps = np.searchsorted(np.unique(steps[steps >= 0]), steps)
        non_ltr = trajectory.non_ltr_positions
        yield TokenizedTrajectory(
            prompt_token_ids=prompt + response[: block.start],
            response_token_ids=response[block],
            decoding_order=np.where(steps >= 0, own_steps, -1).tolist(),
            non_ltr_positions=non_ltr and [i - block.start for i in non_ltr if block.start <= i < block.stop],
            entropy=trajectory.entropy and trajectory.entropy[block],
        )


class Layout(NamedTuple):
    """A record of L positions as the model reads it."""

    inputs: dict[str, np.ndarray]  # (L,) each
    logit_rows: np.ndarray  # (T,) at which of the L positions the logits of each response token stand
    sequences: np.ndarray  # (T,) the sequence of the rank loss that each response token is in, from 0


def block_layout(
    prompt: list[int],
    response: list[int],
    masked: np.ndarray,
    mask_token_id: int,
    block_size: int,
    logit_rows: LogitRows,
    first_token_logits: FirstTokenLogits = "clean",
) -> Layout:
    """The layout of a record whose noisy copy masks the response tokens where `masked` (T,).

    Where a model's logits are shifted, those of the first token of a block stand in the block before it: "clean" takes
    the clean copy, as in decoding, and "noisy" the noisy one, as the trainer of Fast-dLLM v2 (arXiv 2509.26328) does.
    Before the first noisy block there is the clean copy only, which is the same, because it is a part of the prompt.
    """
    clean = np.array([*prompt, *response], dtype=np.int64)
    end, start = len(clean), len(prompt) - len(prompt) % block_size
    noisy = np.full(-(-(end - start) // block_size) * block_size, mask_token_id)
    noisy[: end - start] = clean[start:]
    noisy[len(prompt) - start : end - start][masked] = mask_token_id

    positions = np.arange(len(prompt), end)
    logit_positions = logit_rows(positions)
    first_noisy = start if first_token_logits == "noisy" else positions // block_size * block_size
    is_noisy = logit_positions >= first_noisy
    inputs = {
        "input_ids": np.concatenate([clean, noisy]),
        "position_ids": np.concatenate([np.arange(end), start + np.arange(len(noisy))]),
        "is_noisy": np.arange(end + len(noisy)) >= end,
    }
    rows = logit_positions + np.where(is_noisy, end - start, 0)
    return Layout(inputs, rows, positions // block_size - start // block_size)


def check_attention(config: PreTrainedConfig, device: torch.device) -> None:
    """Checks that a block-causal model can be trained with its implementation of attention on this device.

    Raises:
        ValueError: the implementation takes no mask of pairs of positions, or it is flex attention on a CPU.
    """
    implementation = config._attn_implementation
    if implementation not in ATTENTION:
        raise ValueError(
            f"attn_implementation={implementation!r} with block_size={config.block_size}: training of block-causal "
            f"models needs {', '.join(ATTENTION[:-1])} or, on a GPU, {ATTENTION[-1]}"
        )
    check_flex_device(config, device)


AttentionRule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Whether queries attend to keys, as flex attention asks it (`mask_mod`): bool for indices of sequences, heads, queries
and keys, which broadcast."""


def attention_rule(position_ids: Tensor, is_noisy: Tensor, is_token: Tensor, block_size: int) -> AttentionRule:
    """The attention of the layout of this module.

    Args:
        position_ids: (B, L) positions; the block of a position is position // block_size.
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
