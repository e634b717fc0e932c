"""Sequences packed into one row of positions, each attending to itself alone: no padding is computed.

A model of a native family takes the row in one forward: its attention, which is looked up by name, is flash-attention's
variable-length kernel where the model was loaded with it, and else one call of PyTorch's for every run of sequences of
equal length. Any other model takes one forward a run.
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

from tabom.models.compiled import CompiledLayers, padded_rows
from tabom.models.diffusion_model import logits_at
from tabom.models.families import ADAPTABLE

PACKED = "tabom_packed"
"""The name of `packed_attention` among transformers' attention implementations."""


class Span(NamedTuple):
    """Of one sequence: how many of its positions are computed, and how many they attend to."""

    queries: int
    keys: int


class Run(NamedTuple):
    """Neighbouring sequences of equal spans."""

    count: int
    span: Span


class Packing:
    """How a packed row is made up; a class of its own, into which `torch.compile` does not look."""

    def __init__(self, runs: Sequence[Run], cache: Cache | None) -> None:
        self.runs, self.cache = runs, cache


def takes_packed_rows(model: PreTrainedModel) -> bool:
    """Whether one forward can hold sequences of different lengths: native families, all of whose layers see all."""
    layer_types = getattr(model.config, "layer_types", None) or ["full_attention"]
    return model.config.model_type in ADAPTABLE and set(layer_types) == {"full_attention"}


def packed_logits(
    model: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor,
    spans: Sequence[Span],
    rows: Tensor,
    cache: Cache | None = None,
    compiled: CompiledLayers | None = None,
) -> Tensor:
    """Logits of chosen positions of packed sequences, (R, V).

    The last layer's queries, output projection and MLP, and the head, see the chosen positions only.

    Args:
        input_ids: (N,) of the positions that are computed, sequence after sequence.
        position_ids: (N,) of the same, from 0 in every sequence.
        spans: one a sequence. Without a cache a sequence attends to what is computed of it: queries == keys.
        rows: (R,) int64 indices into N, ascending if the model does not take packed rows.
        cache: holds the keys and values of the positions that are not computed.
        compiled: the layers of `model`; positions are then padded to a size that they are compiled for.
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
            inputs["packing"] = Packing(runs, cache)
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

    Rows behind the last sequence are padding and come out as 0.
    """
    if packing.cache is not None:
        key, value = packing.cache.update(key, value, module.layer_idx)

    def batch(states: Tensor, start: int, count: int, length: int) -> Tensor:
        """(count, H, length, D)."""
        return states[0, :, start : start + count * length].unflatten(1, (count, length)).transpose(0, 1)

    outputs, first_query, first_key = [], 0, 0
    for count, (queries, keys) in packing.runs:
        output = functional.scaled_dot_product_attention(
            batch(query, first_query, count, queries),
            batch(key, first_key, count, keys),
            batch(value, first_key, count, keys),
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
        first_query += count * queries
        first_key += count * keys
    padding = query.shape[2] - first_query
    return functional.pad(torch.cat(outputs), (0, 0, 0, 0, 0, padding))[None], None


AttentionInterface.register(PACKED, packed_attention)


@lru_cache(maxsize=2)
def flash_arguments(spans: tuple[Span, ...], device: torch.device) -> dict[str, Any]:
    """What transformers passes on to flash-attention's variable-length kernel; kept, as most steps repeat the last."""
    arguments: dict[str, Any] = {}
    for side, lengths in zip("qk", zip(*spans, strict=True), strict=True):
        offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        arguments |= {f"cu_seq_lens_{side}": offsets.to(device), f"max_length_{side}": max(lengths)}
    return arguments


def logits_by_run(model: PreTrainedModel, input_ids: Tensor, runs: Sequence[Run], rows: Tensor) -> Tensor:
    """One forward for every run of sequences of equal length, at the model's own positions; `rows` ascend."""
    logits, start = [], 0
    for count, (_, length) in runs:
        end = start + count * length
        ids = input_ids[start:end].view(count, length)
        own = rows[(rows >= start) & (rows < end)] - start
        logits.append(logits_at(model, own, input_ids=ids, attention_mask=torch.ones_like(ids)))
        start = end
    return torch.cat(logits)


def last_layer(model: PreTrainedModel) -> tuple[torch.nn.Module, ...]:
    """The parts of a native family's last layer whose every row is for itself."""
    layer = model.get_decoder().layers[-1]  # also inside an adapter
    return layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp


@contextmanager
def only_rows(module: torch.nn.Module, rows: Tensor) -> Iterator[None]:
    """Computes a module that maps (1, N, ...) row by row at `rows` only; its other rows are 0."""
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
    """Swaps the attention of a model, whose layers look it up in their config at every forward."""
    config = model.config
    before = config._attn_implementation_internal
    config._attn_implementation_internal = name
    try:
        yield
    finally:
        config._attn_implementation_internal = before
