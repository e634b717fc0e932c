"""How a model reads a response of which some tokens are masked: as it is, or block-causally, with a copy of its blocks.

A block-causal model denoises a block behind the finished blocks before it. To train every block at once, its noisy copy
stands beside the finished text (BD3-LM, arXiv 2503.09573; SDAR, arXiv 2510.06303). With n prompt tokens, T response
tokens and blocks of b tokens:

    input        prompt and clean response    |  noisy copy, in whole blocks
    positions    0, .., n + T - 1             |  n - n % b, .., ceil((n + T) / b) * b - 1

A clean position attends to the clean positions of its block and of the blocks before it. A noisy position attends to
its whole noisy block and to the clean blocks before it. The first noisy block begins with the last n % b tokens of the
prompt, which are visible. The last one ends with masks that have no loss, because there are masks in decoding as well.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from tabom.models.attention import FLEX, attention_rule, block_bias, block_mask, check_attention
from tabom.models.diffusion_model import DiffusionModel, LogitRows, logits_at


class Layout(NamedTuple):
    """A prompt and a response of T tokens as L positions; `inputs` shows the response without masks."""

    inputs: dict[str, np.ndarray]  # (L,) each
    token_rows: np.ndarray  # (T,) at which of the L positions each response token stands, or its mask
    logit_rows: np.ndarray  # (T,) at which of the L positions its logits stand
    blocks: np.ndarray  # (T,) the block that it is in, from 0


def lay_out(
    prompt: Sequence[int],
    response: Sequence[int],
    mask_token_id: int,
    logit_rows: LogitRows,
    block_size: int | None,
    first_token_logits: Literal["clean", "noisy"] = "clean",
) -> Layout:
    """Lays out a prompt and a response for full attention (`block_size` None), or for block-causal attention.

    Where a model's logits are shifted, those of the first token of a block stand in the block before it: "clean" takes
    the clean copy, as in decoding, and "noisy" the noisy one, as the trainer of Fast-dLLM v2 (arXiv 2509.26328) does.
    Before the first noisy block there is the clean copy only, which is the same, because it is a part of the prompt.
    """
    text = np.array([*prompt, *response], dtype=np.int64)
    end, places = len(text), np.arange(len(prompt), len(text))
    if block_size is None:
        inputs = {"input_ids": text, "attention_mask": np.ones(end, dtype=np.int64)}
        return Layout(inputs, places, logit_rows(places), np.zeros_like(places))

    start = len(prompt) - len(prompt) % block_size
    noisy = np.full(-(-(end - start) // block_size) * block_size, mask_token_id)
    noisy[: end - start] = text[start:]
    inputs = {
        "input_ids": np.concatenate([text, noisy]),
        "attention_mask": np.ones(end + len(noisy), dtype=np.int64),
        "position_ids": np.concatenate([np.arange(end), start + np.arange(len(noisy))]),
        "is_noisy": np.arange(end + len(noisy)) >= end,
    }
    to_noisy, logit_places = end - start, logit_rows(places)
    first_noisy = start if first_token_logits == "noisy" else places // block_size * block_size
    rows = logit_places + np.where(logit_places >= first_noisy, to_noisy, 0)
    return Layout(inputs, places + to_noisy, rows, places // block_size - start // block_size)


def forward_of_blocks(
    model: PreTrainedModel,
    own_forward: Callable[..., ModelOutput],
    block_size: int,
    is_noisy: Tensor,
    **inputs: Tensor,
) -> ModelOutput:
    """Runs the model's own forward on the layout of block-causal attention, with this attention.

    The mask is made once for all layers: tiles for flex attention, else a bias in the dtype of their scores. Only the
    body gets it: a mixture of experts that computes an auxiliary loss needs the mask of the tokens for it, which leaves
    the padding out.

    Args:
        inputs: `input_ids` and `attention_mask` (B, L); `position_ids` (B, L) and, as these, `is_noisy`, or (1, L).

    Raises:
        ValueError: see `check_attention`.
    """
    check_attention(model.config, is_noisy.device)
    device, shape = is_noisy.device, is_noisy.shape
    attends = attention_rule(inputs["position_ids"], is_noisy, inputs["attention_mask"], block_size)
    if model.config._attn_implementation == FLEX:
        mask = block_mask(attends, shape, device)
    else:
        in_autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if in_autocast else model.dtype
        mask = block_bias(attends, shape, device, dtype)

    if not getattr(model.config, "output_router_logits", False):  # a hook would break a compiled graph
        return own_forward(**{**inputs, "attention_mask": mask})

    def with_mask(_body: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, {**kwargs, "attention_mask": mask}

    hook = model.base_model.register_forward_pre_hook(with_mask, with_kwargs=True)
    try:
        return own_forward(**inputs)
    finally:
        hook.remove()


def response_logits(
    model: DiffusionModel, prompt: Sequence[int], response: Sequence[int], masked: Tensor, wanted: Tensor
) -> Tensor:
    """Logits (N, V) of the tokens of a response, which the model reads B times with other masks.

    Args:
        masked: (B, T) bool, the tokens that are masked.
        wanted: (B, T) bool, the N tokens whose logits are returned, in the order of `wanted.nonzero()`.
    """
    layout = lay_out(prompt, response, model.mask_token_id, model.logit_rows, model.block_size)
    inputs = {name: torch.from_numpy(array)[None] for name, array in layout.inputs.items()}
    input_ids, token_rows = inputs["input_ids"].repeat(len(masked), 1), torch.from_numpy(layout.token_rows)
    input_ids[:, token_rows] = input_ids[:, token_rows].masked_fill(masked, model.mask_token_id)
    b, t = wanted.nonzero(as_tuple=True)
    rows = (b * input_ids.shape[1] + torch.from_numpy(layout.logit_rows)[t]).to(model.device)
    if model.block_size is None:
        return logits_at(model.model, rows, **model.inputs(input_ids))
    inputs |= {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    forward = partial(forward_of_blocks, model.model, model.model, model.block_size, inputs.pop("is_noisy"))
    return logits_at(model.model, rows, forward=forward, **inputs)
