"""Packs sequences into one row of positions, each attending only to itself, so that no padding is computed.

A model of a native family takes the row in one forward. Its attention is flash-attention's variable-length kernel if
the model was loaded with it, else one call of PyTorch's attention for each run of sequences of equal length. Any other
model needs one forward for each run. With block-causal attention a mask is needed only where the computed positions of
a sequence are more than one block.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, Cache, PreTrainedModel

from tabom.models.attention import block_causal_mask
from tabom.models.compiled import CompiledLayers, padded_rows
from tabom.models.diffusion_model import logits_at
from tabom.models.families import BLOCK_CAUSAL

PACKED = "tabom_packed"
"""The name of `packed_attention` among transformers' attention implementations."""


class Span(NamedTuple):
    """How many positions of a sequence are computed, and how many they attend to: the first `keys` of its `rows`.

    With block-causal attention the computed positions are the last ones of the keys.
    """

    queries: int
    keys: int
    rows: int


class Run(NamedTuple):
    """Adjacent sequences with equal spans, which attend in one batch."""

    count: int
    span: Span


class Packing:
    """The sequences of a packed row, in an object that `torch.compile` treats as opaque."""

    def __init__(self, runs: Sequence[Run], masks: Sequence[Tensor | None], cache: Cache | None) -> None:
        self.runs, self.masks, self.cache = runs, masks, cache


def takes_packed_rows(model: PreTrainedModel) -> bool:
    """Whether one forward can take packed sequences: native families whose layers all have full attention."""
    layer_types = getattr(model.config, "layer_types", None) or ["full_attention"]
    return model.config.model_type in BLOCK_CAUSAL and set(layer_types) == {"full_attention"}


def packed_logits(
    model: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor,
    spans: Sequence[Span],
    rows: Tensor,
    cache: Cache | None = None,
    compiled: CompiledLayers | None = None,
    block_size: int | None = None,
) -> Tensor:
    """Logits of chosen positions of packed sequences, (R, V).

    The last layer's queries, output projection and MLP, and the head, are computed at the chosen positions only.

    Args:
        input_ids: (N,) tokens at the computed positions, sequence after sequence.
        position_ids: (N,) position ids of the same, from 0 in every sequence.
        spans: one for each sequence. Without a cache a sequence attends to its computed positions: all three are equal.
        rows: (R,) int64 indices into N, ascending if the model does not take packed rows.
        cache: holds the keys and values of the positions that are not computed.
        compiled: the compiled layers of `model`; positions are then padded to a size that they are compiled for.
        block_size: of block-causal attention; None is full attention.
    """
    runs = [Run(len(list(group)), span) for span, group in groupby(spans)]
    if not takes_packed_rows(model):
        return logits_by_run(model, input_ids, runs, rows)
    with ExitStack() as changes:
        if compiled is not None:
            padding = padded_rows(len(input_ids)) - len(input_ids)
            input_ids, position_ids = (functional.pad(values, (0, padding)) for values in (input_ids, position_ids))
            changes.enter_context(compiled.in_use())
        inputs: dict[str, Any] = {"input_ids": input_ids[None], "position_ids": position_ids[None]}
        if model.config._attn_implementation.startswith("flash_attention"):
            inputs |= flash_arguments(tuple(spans), input_ids.device)
            if cache is not None:
                inputs["past_key_values"] = cache
        else:
            changes.enter_context(attention_implementation(model, PACKED))
            masks = [mask_of(run.span, block_size, input_ids.device) for run in runs]
            inputs["packing"] = Packing(runs, masks, cache)
        for module in last_layer(model):
            changes.enter_context(only_rows(module, rows))
        return logits_at(model, rows, **inputs)


@torch.compiler.disable
def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None,
    *,
    packing: Packing,
    scaling: float,
    **_settings: Any,
) -> tuple[Tensor, None]:
    """Attention within each sequence: query (1, H, N, D), key and value (1, H_kv, N, D) to (1, N, H, D).

    Rows after the last sequence are padding; their output is 0.
    """
    if packing.cache is not None:
        key, value = packing.cache.update(key, value, module.layer_idx)

    def batch(states: Tensor, start: int, count: int, rows: int, length: int) -> Tensor:
        """(count, H, length, D): the first `length` of every `rows` rows."""
        return states[0, :, start : start + count * rows].unflatten(1, (count, rows))[:, :, :length].transpose(0, 1)

    outputs, first_query, first_key = [], 0, 0
    for (count, (queries, keys, rows)), mask in zip(packing.runs, packing.masks, strict=True):
        output = functional.scaled_dot_product_attention(
            batch(query, first_query, count, queries, queries),
            batch(key, first_key, count, rows, keys),
            batch(value, first_key, count, rows, keys),
            attn_mask=mask,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
        first_query += count * queries
        first_key += count * rows
    padding = query.shape[2] - first_query
    return functional.pad(torch.cat(outputs), (0, 0, 0, 0, 0, padding))[None], None


AttentionInterface.register(PACKED, packed_attention)


def mask_of(span: Span, block_size: int | None, device: torch.device) -> Tensor | None:
    """(queries, keys) bool mask of block-causal attention; None where every query attends to every key."""
    first_query = span.keys - span.queries
    if block_size is None or first_query // block_size == (span.keys - 1) // block_size:
        return None
    keys = torch.arange(span.keys, device=device)
    return block_causal_mask(keys[first_query:], keys, block_size)


@lru_cache(maxsize=2)
def flash_arguments(spans: tuple[Span, ...], device: torch.device) -> dict[str, Any]:
    """Arguments of flash-attention's variable-length kernel; cached, because most steps have the spans of the last."""
    arguments: dict[str, Any] = {}
    for side, lengths in (("q", [span.queries for span in spans]), ("k", [span.keys for span in spans])):
        offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        arguments |= {f"cu_seq_lens_{side}": offsets.to(device), f"max_length_{side}": max(lengths)}
    return arguments


def logits_by_run(model: PreTrainedModel, input_ids: Tensor, runs: Sequence[Run], rows: Tensor) -> Tensor:
    """Runs one forward for each run of equal lengths, with the model's default positions; `rows` must ascend."""
    logits, start = [], 0
    for count, (_, length, _) in runs:
        end = start + count * length
        ids = input_ids[start:end].view(count, length)
        own = rows[(rows >= start) & (rows < end)] - start
        logits.append(logits_at(model, own, input_ids=ids, attention_mask=torch.ones_like(ids)))
        start = end
    return torch.cat(logits)


def last_layer(model: PreTrainedModel) -> tuple[torch.nn.Module, ...]:
    """The modules of a native family's last layer that compute each row independently."""
    layer = model.get_decoder().layers[-1]  # get_decoder also finds it inside an adapter
    return layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp


@contextmanager
def only_rows(module: torch.nn.Module, rows: Tensor) -> Iterator[None]:
    """Within this context a module that maps (1, N, ...) row by row is computed at `rows` only; other rows are 0."""
    length = 0

    def keep_rows(_module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        nonlocal length
        length = args[0].shape[1]
        return (args[0][:, rows],)

    def put_back(_module: torch.nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.new_zeros(1, length, output.shape[-1]).index_copy_(1, rows, output)

    hooks = module.register_forward_pre_hook(keep_rows), module.register_forward_hook(put_back)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Within this context the model uses another attention, which its layers look up in the config at every forward."""
    config = model.config
    before = config._attn_implementation_internal
    config._attn_implementation_internal = name
    try:
        yield
    finally:
        config._attn_implementation_internal = before
