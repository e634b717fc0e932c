"""Makes trajectories of other tools' recordings: the canvas after every step, or the step of every token."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tabom.data.encoding import Prompt, decode, encode_prompt
from tabom.data.trajectories import Trajectory, non_ltr_positions, response_blocks


def from_histories(
    histories: Sequence[Tensor | Sequence],
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    *,
    mask_token_id: int | None = None,
    max_new_tokens: int | None = None,
    method: str | None = None,
    data_source: str | None = None,
) -> list[Trajectory]:
    """The trajectories of a batch whose sampler kept its canvas after every step, as dLLM's do (`return_dict`).

    The step of a position is the last one that changed it: its last unmasking if the sampler masks tokens again, its
    last overwriting if the sampler edits tokens. Positions that are masked in the last canvas get -1. The response
    consists of the positions that the first canvas masks. If later canvases are wider, because blocks are appended, the
    missing positions count as masked.

    Args:
        histories: token ids, (B, L) or (L,) each, prompts included: the canvas before the first step, then the one
            after every step. If a tool keeps only the latter, put the prompt with its masks before them.
        prompts: the text or conversation of each row.
        mask_token_id: default: the tokenizer's.
        max_new_tokens: drops the tokens that a sampler of whole blocks decoded after this many.
        method, data_source: values of these fields of the records.

    Raises:
        ValueError: no mask token is known, there is no step, the first canvas masks nothing, a row does not begin with
            its prompt, or the numbers of prompts and rows differ.
    """
    mask = tokenizer.mask_token_id if mask_token_id is None else mask_token_id
    if mask is None:
        raise ValueError("mask_token_id=None, and the tokenizer has no mask token: pass the model's")
    canvases = [torch.atleast_2d(torch.as_tensor(canvas)).cpu() for canvas in histories]
    if len(canvases) < 2:
        raise ValueError(
            f"histories: {len(canvases)} canvases; expected the one before the first step and one for each step"
        )
    width = max(canvas.shape[1] for canvas in canvases)
    canvas = torch.stack([F.pad(each, (0, width - each.shape[1]), value=mask) for each in canvases])
    if len(prompts) != canvas.shape[1]:
        raise ValueError(f"prompts: {len(prompts)} for canvases of {canvas.shape[1]} rows; expected one for each row")
    steps = torch.arange(len(canvas) - 1)[:, None, None]
    order = torch.where(canvas[1:] != canvas[:-1], steps, -1).amax(0)

    trajectories = []
    for row, prompt in enumerate(prompts):
        masked = (canvas[0, row] == mask).nonzero().flatten()
        if len(masked) == 0:
            raise ValueError(f"histories[0] masks nothing in row {row}: expected the canvas before the first step")
        start, end = int(masked[0]), int(masked[-1]) + 1
        check_prompt(tokenizer, prompt, canvas[0, row, :start].tolist(), row)
        response = slice(start, min(end, start + max_new_tokens) if max_new_tokens else end)
        tokens, decoding_order = canvas[-1, row, response].tolist(), order[row, response].tolist()
        trajectories.append(make_trajectory(tokenizer, prompt, tokens, decoding_order, mask, method, data_source))
    return trajectories


def from_step_map(
    prompt: Prompt,
    response: str,
    step_map: Tensor | Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    mask_token_id: int | None = None,
    first_step: int = 1,
    block_size: int | None = None,
    prompt_length: int | None = None,
    method: str | None = None,
    data_source: str | None = None,
) -> Trajectory:
    """A trajectory from the step of every token of a text, as TraceRL (dLLM-RL) and engines write them.

    Steps that count on over the blocks of a response, as JetEngine's do, are taken as they are. Steps that begin anew
    in every block, as those of SGLang's `step_maps` do, need the `block_size`: each block begins after the last step of
    the block before it.

    Args:
        response: text with its special tokens.
        step_map: the step of each token; a value below `first_step` means that it was never unmasked.
        first_step: 1 for TraceRL's engine for SDAR and TraDo, 0 for its rollouts of LLaDA and Dream. The latter also
            write 0 for tokens that were never unmasked; only tokens that are still masks count as such.
        mask_token_id: default: the tokenizer's.
        block_size: tokens of a block, for steps that begin anew in every block; None: they count on.
        prompt_length: tokens of the prompt: token i is in block (prompt_length + i) // block_size. Default: those of
            the encoded prompt.

    Raises:
        ValueError: the text does not have as many tokens as the map has steps, `block_size` is not at least 1, or there
            is a `prompt_length` without it.
    """
    tokens, step_map = tokenizer(response, add_special_tokens=False).input_ids, torch.as_tensor(step_map).tolist()
    if len(tokens) != len(step_map):
        raise ValueError(
            f"step_map has {len(step_map)} steps for {len(tokens)} tokens of the response; one a token expected, of "
            "the text with its special tokens (skip_special_tokens=False)"
        )
    mask = tokenizer.mask_token_id if mask_token_id is None else mask_token_id
    order = [step - first_step if step >= first_step else -1 for step in step_map]
    if block_size is not None:
        if block_size < 1:
            raise ValueError(f"block_size={block_size}: expected at least 1 token")
        length = len(encode_prompt(tokenizer, prompt)) if prompt_length is None else prompt_length
        order = count_on(order, response_blocks(length, len(order), block_size))
    elif prompt_length is not None:
        raise ValueError(f"prompt_length={prompt_length} without block_size: give the size of the blocks as well")
    return make_trajectory(tokenizer, prompt, tokens, order, mask, method, data_source)


def count_on(order: list[int], blocks: Sequence[slice]) -> list[int]:
    """Steps that count on over the blocks, from steps that begin at 0 in every block; -1 stays -1."""
    counted, first = [], 0
    for block in blocks:
        counted += [step + first if step >= 0 else -1 for step in order[block]]
        first += max(order[block], default=-1) + 1
    return counted


class DiffusersRecorder:
    """Records the canvases of diffusers' block-wise text pipelines (LLaDA2), for `from_histories`.

    `pipeline(..., callback_on_step_end=recorder, callback_on_step_end_tensor_inputs=recorder.tensor_inputs)`; one
    recorder a call.
    """

    tensor_inputs = ("block_x", "active_block")

    def __init__(self, mask_token_id: int) -> None:
        self.mask_token_id = mask_token_id
        self.histories: list[Tensor] = []

    def __call__(self, pipeline: Any, step: int, timestep: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keeps a copy of the canvas; the first call also keeps the masked canvas before the first step."""
        canvas, was_masked = tensors["block_x"].clone(), tensors["active_block"]
        if not self.histories:
            start = canvas.clone()
            start[:, -was_masked.shape[1] :].masked_fill_(was_masked, self.mask_token_id)
            self.histories.append(start)
        self.histories.append(canvas)
        return tensors


def check_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, tokens: list[int], row: int) -> None:
    """Raises a ValueError unless the tokens before the response are the encoded prompt, which training uses."""
    expected = encode_prompt(tokenizer, prompt)
    if tokens[len(tokens) - len(expected) :] != expected:
        raise ValueError(
            f"prompts[{row}] has {len(expected)} tokens that are not what stands before the response "
            f"({tokenizer.decode(tokens)!r:.80}): pass the text or the conversation that it was made from"
        )


def make_trajectory(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    tokens: list[int],
    order: list[int],
    mask_token_id: int | None,
    method: str | None,
    data_source: str | None,
) -> Trajectory:
    """A record as `collect` writes it: tokens that stayed masked become padding that was never unmasked."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    order = [-1 if token == mask_token_id else step for token, step in zip(tokens, order, strict=True)]
    tokens = [pad if token == mask_token_id else token for token in tokens]
    return Trajectory(
        prompt=prompt,
        response=decode(tokenizer, tokens),
        response_token_ids=tokens,
        decoding_order=order,
        non_ltr_positions=non_ltr_positions(order),
        method=method,
        data_source=data_source,
    )
