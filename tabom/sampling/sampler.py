"""Sampling: a response starts as mask tokens, and each step unmasks the most certain positions."""

from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from tabom.models.diffusion_model import DiffusionModel, logits_at
from tabom.models.nan_checks import logits_not_finite
from tabom.sampling.completions import check_positions, is_decided, with_block_length
from tabom.sampling.config import SamplerConfig
from tabom.sampling.policies import (
    POLICIES,
    Step,
    choose,
    edited,
    first_sub_block,
    is_settled,
    read_candidates,
    steps_that_unmask,
    time_shares,
)
from tabom_kernels import mix_keys


class DecodingState(NamedTuple):
    """A batch of B responses between two steps; `decoding_order` is -1 where a token is still masked.

    `candidate_entropy` belongs to the step just taken: the entropy of every position that it could have unmasked,
    which are the masked positions of the active block.
    """

    tokens: Tensor  # (B, T) int64
    decoding_order: Tensor  # (B, T) int64
    entropy: Tensor  # (B, T) nats, 0 where masked
    candidate_entropy: Tensor  # (B, T) nats, NaN where the position was no candidate
    positions: int  # rows that went through the model's body so far


def left_pad(model: DiffusionModel, prompts: Sequence[Sequence[int]], length: int) -> dict[str, Tensor]:
    """The model's inputs: left-padded prompts, each followed by `length` mask tokens; padding is never attended to."""
    prompt_length = max(map(len, prompts))
    input_ids = torch.full((len(prompts), prompt_length + length), model.mask_token_id)
    is_token = torch.ones_like(input_ids, dtype=torch.bool)
    for b, prompt in enumerate(prompts):
        padding = prompt_length - len(prompt)
        input_ids[b, :padding] = model.pad_token_id
        is_token[b, :padding] = False
        input_ids[b, padding:prompt_length] = torch.tensor(prompt, dtype=torch.long)
    return model.inputs(input_ids, is_token)


@torch.inference_mode()
def denoise(
    model: DiffusionModel,
    prompts: Sequence[Sequence[int]],
    length: int,
    config: SamplerConfig,
    seeds: Sequence[int] | None = None,
) -> Iterator[DecodingState]:
    """Decodes a batch of prompts and yields the state before the first step and after every step.

    This is the specification of the engine (`tabom.sampling.engine`), whose responses must equal those that this
    function gives for each prompt alone. It keeps no keys and values: every step computes all positions, with the mask
    of block-causal attention where the model has it. Responses are then rounded up to whole blocks, and end with mask
    tokens where another one of the batch is longer.

    Only the masked positions of the active block go through the head and the vocabulary statistics. The mask token is
    never chosen. Ties go to the leftmost position. A step whose plan unmasks nothing is counted but not computed.
    Random numbers depend only on (seed, step, position), so a response does not depend on the batch, up to the rounding
    of the model.

    Args:
        prompts: token ids, of any lengths.
        length: of the responses, tokens.
        seeds: one for each prompt; default: `config.seed` for all.

    Raises:
        ValueError: the config asks for a cache, which this loop does not implement.
        FloatingPointError: the logits of a step are not finite; names the cause.
    """
    if config.cache != "none":
        raise ValueError(
            f"cache={config.cache!r}: denoise does not use a cache; set cache='none', or sample with the engine"
        )
    model = with_block_length(model, config)
    plans = [config.plan(length, len(prompt), model.block_size) for prompt in prompts]
    for prompt, blocks in zip(prompts, plans, strict=True):
        check_positions(model, len(prompt), blocks.length)
    length = max(blocks.length for blocks in plans)
    given, ends = (
        torch.tensor(numbers, device=model.device)
        for numbers in ([blocks.given for blocks in plans], [blocks.length for blocks in plans])
    )
    size, steps = plans[0].size, plans[0].steps
    shares = time_shares(steps, config.eps)
    unmasking = steps_that_unmask(config.policy, steps, size, config.eps)
    inputs = left_pad(model, prompts, length)
    positions = inputs["input_ids"].shape[1]
    tokens = inputs["input_ids"][:, -length:]  # a view, so that the next forward sees the unmasked tokens
    order = torch.full_like(tokens, -1)
    entropy = torch.zeros_like(tokens, dtype=torch.float32)
    place = torch.arange(length, device=model.device)
    sequence_seeds = torch.tensor(seeds or [config.seed] * len(prompts), device=model.device)

    no_choice = torch.full_like(entropy, torch.nan)
    yield DecodingState(tokens, order, entropy, no_choice, 0)
    step = computed = 0
    edits = POLICIES[config.policy].edits
    for block in range(max(blocks.count for blocks in plans)):
        block_end = ends.minimum((block + 1) * size - given)[:, None]
        in_block = (place < block_end) & (place >= block * size - given[:, None])
        stops = is_decided(tokens, order, model.eos_token_id) & config.stop_early
        settled, post_steps = stops.clone(), torch.zeros_like(given)
        for index in count() if edits else range(steps):
            masked = (order < 0) & (place < block_end)
            if config.stop_early and not edits:
                stops = is_decided(tokens, order, model.eos_token_id)
            masked &= ~stops[:, None]
            had_masks = masked.any(1)
            masked = first_sub_block(masked, given, size, config)
            editable = (order >= 0) & in_block & ~settled[:, None] & edits
            seen = masked | editable
            b, t = seen.nonzero(as_tuple=True)
            if len(b) == 0:
                break
            if not edits and index not in unmasking:  # counted only: a later step would see the same tokens
                step += 1
                yield DecodingState(tokens, order, entropy, no_choice, computed)
                continue
            rows = model.logit_rows((b + 1) * positions - length + t)
            logits = logits_at(model.model, rows, **inputs)
            logits[:, model.mask_token_id] = -torch.inf
            keys = mix_keys(sequence_seeds[b], step, t)
            token, candidates = read_candidates(logits, seen, keys, config)
            if not candidates.entropy.isfinite().all():  # the entropy of logits that are not finite is not finite
                raise logits_not_finite(model.model)
            share = 1.0 if edits else shares[index].item()
            chosen = choose(candidates._replace(masked=masked), Step(index, steps, size, share), config)
            if edits:
                replaced = edited(candidates, editable, token, tokens, config)
                post_steps += ~had_masks
                settled |= is_settled(had_masks, replaced, post_steps, config)
                chosen |= replaced
            tokens.copy_(torch.where(chosen, token, tokens))
            entropy = torch.where(chosen, candidates.entropy, entropy)
            order = torch.where(chosen, step, order)
            step += 1
            computed += inputs["input_ids"].numel()
            yield DecodingState(tokens, order, entropy, candidates.entropy.where(masked, no_choice), computed)
    if config.stop_early:
        tokens.masked_fill_(order < 0, model.pad_token_id)
        yield DecodingState(tokens, order, entropy, no_choice, computed)
