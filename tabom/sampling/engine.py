"""The decoding engine: continuous batching of requests, without padding.

Requests wait in a queue, and each request that is being decoded holds a slot. A step runs the model once over the
positions of all slots, packed without padding, and unmasks tokens in every slot, each at its own step of its own plan.
A finished request frees its slot at once, and the next requests are admitted, as many as the compute budget has
positions for. With block-causal attention the keys and values of finished blocks are kept, and a step computes the
active blocks only. Without an approximate cache, each response is the one that `denoise` gives for that prompt alone,
up to the rounding of the model.

A step never waits for the device: all its shapes are known beforehand. The host reads which tokens were decided in
`sync_host`, once every `look_every` steps.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from tabom.models.compiled import CompiledLayers, padded_rows
from tabom.models.diffusion_model import DiffusionModel
from tabom.models.nan_checks import logits_not_finite
from tabom.models.packed import Span, packed_logits, takes_packed_rows
from tabom.sampling.budget import default_budget
from tabom.sampling.caches import RowCache, block_causal_positions, computed_positions
from tabom.sampling.completions import (
    Completion,
    check_positions,
    is_decided,
    response_length,
    with_block_length,
)
from tabom.sampling.config import EngineConfig, SamplerConfig
from tabom.sampling.policies import (
    POLICIES,
    Candidates,
    Step,
    choose,
    edited,
    first_sub_block,
    is_settled,
    read_candidates,
    steps_that_unmask,
)
from tabom.sampling.slots import Request, Slot, State, lay_out
from tabom_kernels import mix_keys


class Decision(NamedTuple):
    """What one step saw and did, for an observer; tensors stay on the device."""

    requests: list[int]  # number of the request in each of S slots
    step: Tensor  # (S,)
    candidates: Candidates  # (S, T) each
    chosen: Tensor  # (S, T) bool


class Engine:
    """Decodes requests of any lengths in a batch that changes as requests finish.

    Args:
        observer: called with the `Decision` of every step, for measurements.
        is_hopeless: called with the number of a request and the decided tokens at the beginning of its response,
            whenever there are more of them. If it returns True, the decoding of this response ends there.

    Raises:
        ValueError: `is_hopeless` with a policy that edits; a cache with a model that takes no packed rows, or with
            block-causal attention, whose own cache is exact; a cache or block-causal attention with `look_every` above
            1; `compile` with a model that takes no packed rows; flash-attention with `compile` or block-causal
            attention; a policy that needs another model.
    """

    def __init__(
        self,
        model: DiffusionModel,
        config: SamplerConfig,
        engine: EngineConfig | None = None,
        observer: Callable[[Decision], None] | None = None,
        is_hopeless: Callable[[int, list[int]], bool] | None = None,
    ) -> None:
        engine = engine or EngineConfig()
        model = with_block_length(model, config)
        self.packs, attention = takes_packed_rows(model.model), model.model.config._attn_implementation
        is_block_causal = model.block_size is not None
        if is_block_causal and config.cache != "none":
            raise ValueError(f"cache={config.cache!r} with block-causal attention: its cache is exact and on; use none")
        if is_block_causal and engine.look_every > 1:
            raise ValueError(f"look_every={engine.look_every} with block-causal attention: expected 1")
        if is_hopeless is not None and POLICIES[config.policy].edits:
            raise ValueError(f"give_up=True with policy={config.policy!r}: a wrong beginning may still be edited")
        if is_block_causal and attention.startswith("flash"):
            raise ValueError(f"attn_implementation={attention!r} with block-causal attention: load the model with sdpa")
        if config.cache != "none" and not self.packs:
            raise ValueError(f"cache={config.cache!r}: model type {model.model.config.model_type!r} has none; use none")
        if config.cache != "none" and engine.look_every > 1:
            raise ValueError(f"look_every={engine.look_every} with cache={config.cache!r}: expected 1")
        if engine.compile != "none" and not (self.packs and attention == "sdpa"):
            raise ValueError(
                f"compile={engine.compile!r}: model type {model.model.config.model_type!r} with attn_implementation="
                f"{attention!r} is not compiled; load qwen2, qwen3 or llama with sdpa, or use none"
            )
        self.model, self.config, self.observer, self.is_hopeless = model, config, observer, is_hopeless
        keeps = is_block_causal or config.cache != "none"
        self.compute_budget = engine.compute_budget or default_budget(model, keeps)
        self.look_every = engine.look_every if self.packs else 1
        self.compiled = None if engine.compile == "none" else CompiledLayers(model.model, engine.compile)
        self.cache = RowCache(model.model.config.num_hidden_layers) if keeps else None
        self.slots: list[Slot] = []
        self.state = State(*torch.zeros(4, 0, 0, dtype=torch.int64), *torch.zeros(5, 0, dtype=torch.int64))
        self.edits = POLICIES[config.policy].edits

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
        """Yields the number of a request (from 0, as they come) and its completion, in the order they finish.

        Raises:
            ValueError: a response's length does not fit the blocks and steps of the config, or the model's positions.
            FloatingPointError: the logits of a step are not finite; names the cause.
        """
        waiting = iter(enumerate(requests))
        following = next(waiting, None)
        staying: list[int] = []
        while staying or following:
            admitted: list[Slot] = []
            used = sum(self.slots[i].length for i in staying)
            while following:
                slot = self.slot_of(*following)
                check_positions(self.model, len(slot.request.prompt), slot.blocks.length)
                if used and used + slot.length > self.compute_budget:
                    break
                admitted.append(slot)
                used += slot.length
                following = next(waiting, None)
            if admitted or len(staying) < len(self.slots):
                self.arrange(staying, admitted)
            for _ in range(self.look_every):
                self.step()
            finished = self.sync_host()
            staying = [i for i in range(len(self.slots)) if i not in finished]
            yield from zip((self.slots[i].number for i in finished), self.completions(finished), strict=True)

    def slot_of(self, number: int, request: Request) -> Slot:
        """A new slot for a waiting request."""
        blocks = self.config.plan(request.length, len(request.prompt), self.model.block_size)
        unmasking = steps_that_unmask(self.config.policy, blocks.steps, blocks.size, self.config.eps)
        return Slot(number, request, blocks, unmasking)

    @torch.inference_mode()
    def arrange(self, staying: list[int], admitted: list[Slot]) -> None:
        """Packs the staying and the admitted slots, sorted by length, so that equal lengths are neighbours."""
        device = self.model.device
        slots = [self.slots[i] for i in staying] + admitted
        places = sorted(range(len(slots)), key=lambda i: slots[i].length)
        longest = max(slot.blocks.length for slot in slots)
        count = len(admitted)
        fresh = State(
            torch.full((count, longest), self.model.mask_token_id),
            torch.full((count, longest), -1),
            *torch.zeros(2, count, longest),
            *torch.zeros(2, count, dtype=torch.int64),
            torch.tensor([slot.unmasking[0] for slot in admitted], dtype=torch.int64),
            *torch.zeros(2, count, dtype=torch.int64),
        )
        kept, place = (torch.tensor(indices, dtype=torch.int64).to(device) for indices in (staying, places))
        fields = []
        for old, new in zip(self.state, fresh, strict=True):
            stays = old.to(device)[kept]
            if new.ndim == 2:
                stays = pad(stays, (0, longest - stays.shape[1]), value=-1)
            fields.append(torch.cat([stays, new.to(device)])[place])
        self.state = State(*fields)
        if self.cache is not None:  # an admitted slot computes its rows before it attends to them: any source will do
            before = [torch.arange(self.slots[i].length) + self.layout.starts[i] for i in staying]
            before += [torch.zeros(slot.length, dtype=torch.int64) for slot in admitted]
            self.cache.move(torch.cat([before[i] for i in places]).to(device))
        self.slots = [slots[i] for i in places]
        self.layout = lay_out(self.slots, longest, self.config, device)
        self.layout.input_ids.scatter_(0, self.layout.rows.flatten(), self.state.tokens.flatten())
        self.look_for_candidates()
        self.is_finite = torch.ones(len(slots), dtype=torch.int64, device=device)

    @torch.inference_mode()
    def step(self) -> None:
        """Runs one decoding step of every slot."""
        state, layout, config = self.state, self.layout, self.config
        seen, longest = self.candidates | self.editable, self.candidates.shape[1]
        reads = torch.nonzero_static(seen.flatten(), size=self.most_candidates(), fill_value=0).squeeze(1)
        slot, position = reads // longest, reads % longest
        logits = self.forward(slot, self.model.logit_rows(layout.rows.flatten()[reads]))
        logits[:, self.model.mask_token_id] = -torch.inf
        keys = mix_keys(layout.seeds[slot], state.step[slot], position)
        token, candidates = read_candidates(logits, seen, keys, config)
        candidates = candidates._replace(masked=self.candidates)
        planned = state.index.minimum(layout.steps - 1)[:, None]
        share, stride = (table.gather(1, planned).squeeze(1) for table in (layout.shares, layout.strides))
        self.is_finite *= candidates.entropy.isfinite().all(1)  # it is not for logits that are not finite
        chosen = choose(candidates, Step(state.index, layout.steps, layout.size, share), config)
        if self.observer is not None:
            self.observer(Decision([slot.number for slot in self.slots], state.step, candidates, chosen))

        index, post_steps = state.index + 1, state.post_steps
        block_ends = (index >= layout.steps) | ~(self.masked & ~chosen).any(1)
        if self.edits:
            had_masks = self.masked.any(1)
            replaced = edited(candidates, self.editable, token, state.tokens, config)
            post_steps = post_steps + ~had_masks
            block_ends = is_settled(had_masks, replaced, post_steps, config)
            chosen |= replaced
            state = state._replace(edits=state.edits + replaced.sum(1))
        tokens = torch.where(chosen, token, state.tokens)
        order = torch.where(chosen, state.step[:, None], state.order)
        entropy = torch.where(chosen, candidates.entropy, state.entropy)
        logprob = state.logprob
        if candidates.logprob is not None:
            logprob = torch.where(chosen, candidates.logprob, logprob)
        layout.input_ids.scatter_(0, layout.rows.flatten(), tokens.flatten())
        self.state = State(
            tokens,
            order,
            entropy,
            logprob,
            state.block + block_ends,
            torch.where(block_ends, 0, index),
            state.step + stride,
            torch.where(block_ends, 0, post_steps),
            state.edits,
        )
        self.look_for_candidates()

    def most_candidates(self) -> int:
        """Rows that go through the head: the masked ones, or an upper bound if the host has not read their number."""
        if self.look_every == 1:
            return sum(slot.candidates for slot in self.slots)
        return sum(slot.blocks.size for slot in self.slots)

    def forward(self, slot: Tensor, rows: Tensor) -> Tensor:
        """Logits (R, V) at packed rows (R,) of slots (R,); computes only the positions whose keys no cache holds."""
        layout, count = self.layout, len(self.layout.position_ids)
        ranges = [self.computed(s) for s in self.slots]
        is_block_causal = self.model.block_size is not None
        spans = [
            Span(len(computed), computed.stop if is_block_causal else s.length, s.length)
            for computed, s in zip(ranges, self.slots, strict=True)
        ]
        for s, span in zip(self.slots, spans, strict=True):
            s.positions += span.queries
        queries = sum(span.queries for span in spans)
        if self.compiled is not None:  # the padding after the last slot is counted as its cost
            self.slots[-1].positions += padded_rows(queries) - queries
        if queries == count:
            computed = None
            input_ids, position_ids = layout.input_ids[:count], layout.position_ids
        else:
            pieces = [torch.arange(r.start, r.stop) + start for r, start in zip(ranges, layout.starts, strict=True)]
            computed = torch.cat(pieces).to(rows.device)
            input_ids, position_ids = layout.input_ids[computed], layout.position_ids[computed]
            before = accumulate((span.queries for span in spans[:-1]), initial=0)
            left_out = [s + r.start - b for s, r, b in zip(layout.starts, ranges, before, strict=True)]
            rows = rows - torch.tensor(left_out, device=rows.device)[slot]
        if self.cache is not None:
            self.cache.begin(computed, count)
        return packed_logits(
            self.model.model, input_ids, position_ids, spans, rows, self.cache, self.compiled, self.model.block_size
        )

    def computed(self, slot: Slot) -> range:
        """The positions of a slot that the next step computes."""
        positions = computed_positions if self.model.block_size is None else block_causal_positions
        progress = (len(slot.request.prompt), slot.blocks, slot.block, slot.index)
        return positions(*progress, self.config, self.model.logit_rows)

    def look_for_candidates(self) -> None:
        """Sets `masked`, the masked positions (S, T) of the active block, and those that a step may unmask or edit."""
        state, layout = self.state, self.layout
        position = torch.arange(state.order.shape[1], device=state.order.device)
        end = torch.where(state.block < layout.blocks, (state.block + 1) * layout.size - layout.given, 0)
        masked = (state.order < 0) & (position < end[:, None])
        begin = (state.block * layout.size - layout.given)[:, None]
        editable = (state.order >= 0) & (begin <= position) & (position < end[:, None]) & self.edits
        if self.config.stop_early:
            stops = is_decided(state.tokens, state.order, self.model.eos_token_id)
            if self.edits:  # a block that has begun is edited to its end
                stops &= state.index == 0
            masked &= ~stops[:, None]
        self.masked, self.editable = masked, editable
        self.candidates = first_sub_block(masked, layout.given, layout.size, self.config)

    def sync_host(self) -> list[int]:
        """Waits for the device, reads the state of every slot and returns the indices of the finished ones.

        This is the only wait for the device. It also reads whether the logits were finite.

        Raises:
            FloatingPointError: they were not; names the cause.
        """
        reads = (self.candidates | self.editable).sum(1)
        seen = torch.stack([reads, self.state.block, self.state.index, self.is_finite], dim=1).tolist()
        for slot, (candidates, block, index, is_finite) in zip(self.slots, seen, strict=True):
            if not is_finite:
                raise logits_not_finite(self.model.model)
            slot.candidates, slot.block, slot.index = candidates, block, index
        if self.is_hopeless is not None:
            self.give_up(self.is_hopeless)
        return [i for i, slot in enumerate(self.slots) if slot.candidates == 0 or slot.given_up]

    def give_up(self, is_hopeless: Callable[[int, list[int]], bool]) -> None:
        """Marks the hopeless slots; asks only for responses with more decided tokens at their beginning than before."""
        lengths = (self.state.order < 0).int().argmax(1).where((self.state.order < 0).any(1), self.state.order.shape[1])
        for slot, length, tokens in zip(self.slots, lengths.tolist(), self.state.tokens.tolist(), strict=True):
            if slot.candidates > 0 and length > slot.beginning:
                slot.beginning = length
                slot.given_up = is_hopeless(slot.number, tokens[:length])

    def completions(self, finished: list[int]) -> list[Completion]:
        """The completions of these slots; positions that were left masked get the padding token."""
        if not finished:
            return []
        which = torch.tensor(finished, device=self.model.device)
        tokens, order, *certainties = (values[which] for values in self.state[:4])
        tokens = tokens.masked_fill(order < 0, self.model.pad_token_id)
        columns = tokens.tolist(), order.tolist(), *(values.tolist() for values in certainties)
        completions = []
        for i, edits, *rows in zip(finished, self.state.edits[which].tolist(), *columns, strict=True):
            slot = self.slots[i]
            token_ids, steps, entropy, logprob = (row[: slot.blocks.length] for row in rows)
            cost = (slot.positions, slot.given_up, edits)
            completions.append(
                Completion(token_ids, steps, entropy, *cost, logprob if self.config.temperature > 0 else None)
            )
        return completions


def sample(
    model: DiffusionModel,
    prompts: Sequence[Sequence[int]],
    config: SamplerConfig,
    seeds: Sequence[int] | None = None,
    engine: EngineConfig | None = None,
    observer: Callable[[Decision], None] | None = None,
) -> list[Completion]:
    """Decodes prompts and returns their completions in the same order.

    Args:
        prompts: token ids, of any number and lengths.
        seeds: one for each prompt; default: `config.seed` for all.
        observer: see `Engine`.
    """
    length = response_length(model, config)
    seeds = seeds or [config.seed] * len(prompts)
    requests = [Request(prompt, length, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    finished = dict(Engine(model, config, engine, observer).run(requests))
    return [finished[number] for number in range(len(requests))]
