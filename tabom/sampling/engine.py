"""The decoding engine: requests in, completions out as they finish, and no position computed in vain.

Requests wait in a queue; those in flight hold a slot each. A step runs the model once over the positions of all slots,
packed without padding, and unmasks tokens in every one of them, each at its own step of its own plan. A finished
request leaves its slot at once and the next ones move in, as many as the compute budget has positions for. The answers
are those of `denoise` for each prompt alone, up to the rounding of the model, unless a cache is asked for.

All of a step stays on the device: its shapes are known beforehand, and what is decided is read by the host when it
looks, every `look_every` steps.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig

from tabom.models.compiled import CompiledLayers, padded_rows
from tabom.models.diffusion_model import DiffusionModel
from tabom.models.packed import Span, packed_logits, takes_packed_rows
from tabom.sampling.caches import RowCache, computed_positions
from tabom.sampling.policies import Candidates, Step, check_at_least, choose, steps_that_unmask, time_shares
from tabom.sampling.sampler import (
    Completion,
    SamplerConfig,
    check_positions,
    is_decided,
    read_candidates,
    response_length,
)
from tabom_kernels import mix_keys

MOST_ON_A_CPU = 2**12
"""Positions: a step of more is no faster a position (the lab's model: 57 µs of a core at 3200, 53 µs at 6400)."""

MOST_ON_A_GPU = 2**14
"""Positions, where no cache keeps them. Below some 300 rows a matmul waits for its bf16 weights (990 TFLOP/s over 3.35
TB/s on an H100's data sheet), beyond for its arithmetic: at 2**14 reading the weights takes 2 % as long. More is hardly
faster a position, takes memory, and has the first answers come later. By arithmetic, not yet measured.
"""


class Request(NamedTuple):
    """A prompt's token ids, how many tokens to answer, and the seed of its random numbers."""

    prompt: Sequence[int]
    length: int
    seed: int


@dataclass
class EngineConfig:
    """How much is computed at once; changes no answer."""

    compute_budget: int | None = field(
        default=None, metadata={"help": "Positions a decoding step computes at most. Default: what memory allows."}
    )
    look_every: int = field(
        default=1, metadata={"help": "Decoding steps between two looks of the host. Caches need 1."}
    )
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"] = field(
        default="none",
        metadata={
            "help": "torch.compile the model's layers, in this mode; rows are padded to a few sizes. reduce-overhead "
            "captures CUDA graphs on a GPU."
        },
    )

    def __post_init__(self) -> None:
        for name in ("compute_budget", "look_every"):
            check_at_least(name, getattr(self, name), 1)
        modes = ("none", "default", "reduce-overhead", "max-autotune")
        if self.compile not in modes:
            raise ValueError(f"compile={self.compile!r}: expected one of {', '.join(modes)}")


@dataclass
class Slot:
    """A request in flight, and what the host knew of it when it last looked."""

    number: int  # of the request, in the order of the requests
    request: Request
    plan: list[Step]
    unmasking: tuple[int, ...]  # the steps of a block that unmask something
    block: int = 0  # the active one
    index: int = 0  # of the step, among those of the block that unmask something
    positions: int = 0  # computed so far
    beginning: int = 0  # decided tokens without a gap
    given_up: bool = False

    def __post_init__(self) -> None:
        self.candidates = self.plan[0].tokens  # masked positions of the active block
        self.length = len(self.request.prompt) + self.request.length

    @property
    def step(self) -> Step:
        """Where the active block stands."""
        return self.plan[self.block]._replace(index=self.index)


class State(NamedTuple):
    """What is decided in each of S slots, on the device; T is the longest response.

    A slot that is done counts on until the host looks, and has nothing to unmask.
    """

    tokens: Tensor  # (S, T) int64
    order: Tensor  # (S, T) int64, -1 where masked
    entropy: Tensor  # (S, T) nats
    block: Tensor  # (S,) int64, the active one
    index: Tensor  # (S,) int64, of the step, among those of the block that unmask something
    step: Tensor  # (S,) int64, its number over all blocks, those that unmask nothing included


class Layout(NamedTuple):
    """Where the positions of S slots stand among N packed rows, and their plans; the same until slots change."""

    starts: list[int]  # the first row of each slot
    input_ids: Tensor  # (N + 1,); the last one takes what belongs to no row
    position_ids: Tensor  # (N,)
    rows: Tensor  # (S, T) of the response's positions; N where the response is shorter
    seeds: Tensor  # (S,)
    blocks: Tensor  # (S,)
    steps: Tensor  # (S,) of a block, those that unmask something
    tokens: Tensor  # (S,) of a block
    shares: Tensor  # (S, most steps) of Dream's time schedule
    strides: Tensor  # (S, most steps) from the number of a step to that of the next one


class Decision(NamedTuple):
    """What one step saw and did, for an observer; tensors stay on the device."""

    requests: list[int]  # number of the request in each of S slots
    step: Tensor  # (S,)
    candidates: Candidates  # (S, T) each
    chosen: Tensor  # (S, T) bool


class Engine:
    """Decodes requests of any lengths, a changing batch of them at a time.

    Args:
        observer: called with the `Decision` of every step, for what is measured along the way.
        is_hopeless: called with the number of a request and the tokens that its response begins with, whenever more of
            them are decided; where it is true the response is given up as it stands.

    Raises:
        ValueError: a cache with a model that takes no packed rows, or with `look_every` above 1; `compile` with such
            a model, or one that was loaded with flash-attention.
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
        self.packs, attention = takes_packed_rows(model.model), model.model.config._attn_implementation
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
        self.compute_budget = engine.compute_budget or default_budget(model, keeps=config.cache != "none")
        self.look_every = engine.look_every if self.packs else 1
        self.compiled = None if engine.compile == "none" else CompiledLayers(model.model, engine.compile)
        self.cache = None if config.cache == "none" else RowCache(model.model.config.num_hidden_layers)
        self.slots: list[Slot] = []
        self.state = State(*torch.zeros(3, 0, 0, dtype=torch.int64), *torch.zeros(3, 0, dtype=torch.int64))

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
        """Yields the number of a request (from 0, as they come) and its completion, in the order they finish.

        Raises:
            ValueError: a response's length does not fit the blocks and steps of the config, or the model's positions.
        """
        waiting = iter(enumerate(requests))
        following = next(waiting, None)
        staying: list[int] = []
        while staying or following:
            admitted: list[Slot] = []
            used = sum(self.slots[i].length for i in staying)
            while following:
                check_positions(self.model, len(following[1].prompt), following[1].length)
                slot = self.slot_of(*following)
                if used and used + slot.length > self.compute_budget:
                    break
                admitted.append(slot)
                used += slot.length
                following = next(waiting, None)
            if admitted or len(staying) < len(self.slots):
                self.arrange(staying, admitted)
            for _ in range(self.look_every):
                self.step()
            finished = self.look()
            staying = [i for i in range(len(self.slots)) if i not in finished]
            yield from zip((self.slots[i].number for i in finished), self.completions(finished), strict=True)

    def slot_of(self, number: int, request: Request) -> Slot:
        """A slot for a request that waits."""
        plan = self.config.plan(request.length)
        unmasking = steps_that_unmask(self.config.policy, plan[0].steps, plan[0].tokens, self.config.eps)
        return Slot(number, request, plan, unmasking)

    @torch.inference_mode()
    def arrange(self, staying: list[int], admitted: list[Slot]) -> None:
        """Packs the slots that stay and the admitted ones, those of like lengths side by side."""
        device = self.model.device
        slots = [self.slots[i] for i in staying] + admitted
        places = sorted(range(len(slots)), key=lambda i: slots[i].length)
        longest = max(slot.request.length for slot in slots)
        count = len(admitted)
        fresh = State(
            torch.full((count, longest), self.model.mask_token_id),
            torch.full((count, longest), -1),
            torch.zeros(count, longest),
            *torch.zeros(2, count, dtype=torch.int64),
            torch.tensor([slot.unmasking[0] for slot in admitted], dtype=torch.int64),
        )
        kept, place = (torch.tensor(indices, dtype=torch.int64).to(device) for indices in (staying, places))
        fields = []
        for old, new in zip(self.state, fresh, strict=True):
            stays = old.to(device)[kept]
            if new.ndim == 2:
                stays = pad(stays, (0, longest - stays.shape[1]), value=-1)
            fields.append(torch.cat([stays, new.to(device)])[place])
        self.state = State(*fields)
        if self.cache is not None:  # an admitted slot is computed whole before its rows are read
            before = [torch.arange(self.slots[i].length) + self.layout.starts[i] for i in staying]
            before += [torch.zeros(slot.length, dtype=torch.int64) for slot in admitted]
            self.cache.move(torch.cat([before[i] for i in places]).to(device))
        self.slots = [slots[i] for i in places]
        self.layout = lay_out(self.slots, longest, self.config, device)
        self.layout.input_ids.scatter_(0, self.layout.rows.flatten(), self.state.tokens.flatten())
        self.masked = self.masked_now()

    @torch.inference_mode()
    def step(self) -> None:
        """One step of every slot."""
        state, layout, config = self.state, self.layout, self.config
        masked, longest = self.masked, self.masked.shape[1]
        reads = torch.nonzero_static(masked.flatten(), size=self.most_candidates(), fill_value=0).squeeze(1)
        slot, position = reads // longest, reads % longest
        logits = self.forward(slot, layout.rows.flatten()[reads] - self.model.logits_shift)
        logits[:, self.model.mask_token_id] = -torch.inf
        keys = mix_keys(layout.seeds[slot], state.step[slot], position)
        token, candidates = read_candidates(logits, masked, keys, config)
        share, stride = (table.gather(1, state.index[:, None]).squeeze(1) for table in (layout.shares, layout.strides))
        chosen = choose(candidates, Step(state.index, layout.steps, layout.tokens, share), config)
        if self.observer is not None:
            self.observer(Decision([slot.number for slot in self.slots], state.step, candidates, chosen))

        tokens = torch.where(chosen, token, state.tokens)
        order = torch.where(chosen, state.step[:, None], state.order)
        entropy = torch.where(chosen, candidates.entropy, state.entropy)
        layout.input_ids.scatter_(0, layout.rows.flatten(), tokens.flatten())
        index = state.index + 1
        block_ends = (index >= layout.steps) | ~(masked & ~chosen).any(1)
        self.state = State(
            tokens,
            order,
            entropy,
            state.block + block_ends,
            torch.where(block_ends, 0, index),
            state.step + stride,
        )
        self.masked = self.masked_now()

    def most_candidates(self) -> int:
        """Rows that go through the head: the masked ones, or as many as there may be when the host has not looked."""
        if self.look_every == 1:
            return sum(slot.candidates for slot in self.slots)
        return sum(slot.plan[0].tokens for slot in self.slots)

    def forward(self, slot: Tensor, rows: Tensor) -> Tensor:
        """Logits (R, V) at packed rows (R,) that belong to slots (R,), computing what no cache keeps."""
        layout, count = self.layout, len(self.layout.position_ids)
        ranges = [
            computed_positions(
                len(s.request.prompt), s.request.length, s.block, s.step, self.config, self.model.logits_shift
            )
            for s in self.slots
        ]
        spans = [Span(len(computed), s.length) for computed, s in zip(ranges, self.slots, strict=True)]
        for s, span in zip(self.slots, spans, strict=True):
            s.positions += span.queries
        queries = sum(span.queries for span in spans)
        if self.compiled is not None:  # what is padded behind the last slot counts for it
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
        return packed_logits(self.model.model, input_ids, position_ids, spans, rows, self.cache, self.compiled)

    def masked_now(self) -> Tensor:
        """(S, T) the positions that the next step may unmask: the masked ones of the active block, none when done."""
        state, layout = self.state, self.layout
        position = torch.arange(state.order.shape[1], device=state.order.device)
        end = torch.where(state.block < layout.blocks, (state.block + 1) * layout.tokens, 0)
        masked = (state.order < 0) & (position < end[:, None])
        if self.config.stop_early:
            masked &= ~is_decided(state.tokens, state.order, self.model.eos_token_id)[:, None]
        return masked

    def look(self) -> list[int]:
        """Reads where every slot stands, the one wait for the device; returns the slots that are done."""
        seen = torch.stack([self.masked.sum(1), self.state.block, self.state.index], dim=1).tolist()
        for slot, (candidates, block, index) in zip(self.slots, seen, strict=True):
            slot.candidates, slot.block, slot.index = candidates, block, index
        if self.is_hopeless is not None:
            self.give_up(self.is_hopeless)
        return [i for i, slot in enumerate(self.slots) if slot.candidates == 0 or slot.given_up]

    def give_up(self, is_hopeless: Callable[[int, list[int]], bool]) -> None:
        """Marks the slots whose responses begin with more than at the last look, and hopelessly."""
        lengths = (self.state.order < 0).int().argmax(1).where((self.state.order < 0).any(1), self.state.order.shape[1])
        for slot, length, tokens in zip(self.slots, lengths.tolist(), self.state.tokens.tolist(), strict=True):
            if slot.candidates > 0 and length > slot.beginning:
                slot.beginning = length
                slot.given_up = is_hopeless(slot.number, tokens[:length])

    def completions(self, finished: list[int]) -> list[Completion]:
        """The responses of some slots; what an early stop, or giving up, left masked is padding."""
        if not finished:
            return []
        which = torch.tensor(finished, device=self.model.device)
        tokens, order, entropy = (values[which] for values in self.state[:3])
        tokens = tokens.masked_fill(order < 0, self.model.pad_token_id)
        columns = tokens.tolist(), order.tolist(), entropy.tolist()
        completions = []
        for i, *rows in zip(finished, *columns, strict=True):
            slot = self.slots[i]
            columns = (row[: slot.request.length] for row in rows)
            completions.append(Completion(*columns, slot.positions, slot.given_up))
        return completions


def lay_out(slots: Sequence[Slot], longest: int, config: SamplerConfig, device: torch.device) -> Layout:
    """Packs slots one after the other; the responses' tokens are yet to be filled in."""
    starts = list(accumulate((slot.length for slot in slots), initial=0))
    total = starts.pop()
    position = torch.arange(longest)
    prompts = torch.tensor([len(slot.request.prompt) for slot in slots], dtype=torch.int64)
    lengths = torch.tensor([slot.request.length for slot in slots], dtype=torch.int64)
    rows = (torch.tensor(starts, dtype=torch.int64) + prompts)[:, None] + position
    plans = [(slot.request.seed, len(slot.plan), len(slot.unmasking), slot.plan[0].tokens) for slot in slots]
    unmasking = [torch.tensor(slot.unmasking) for slot in slots]
    following = [slot.plan[0].steps + slot.unmasking[0] for slot in slots]  # in the next block
    shares = [time_shares(slot.plan[0].steps, config.eps)[steps] for slot, steps in zip(slots, unmasking, strict=True)]
    strides = [steps.diff(append=torch.tensor([end])) for steps, end in zip(unmasking, following, strict=True)]
    tensors = (
        torch.tensor([id for slot in slots for id in [*slot.request.prompt, *[0] * slot.request.length]] + [0]),
        torch.cat([torch.arange(slot.length) for slot in slots]),
        rows.where(position < lengths[:, None], total),
        *torch.tensor(plans, dtype=torch.int64).unbind(1),
        pad_sequence(shares, batch_first=True),
        pad_sequence(strides, batch_first=True),
    )
    return Layout(starts, *(tensor.to(device) for tensor in tensors))


def default_budget(model: DiffusionModel, keeps: bool = False) -> int:
    """Positions a step that take half of the free memory, and no more than make a position cheaper.

    The other half is for what the allocator wastes. Dream-7B in bf16 takes 2 * (2 * 3584 + 3 * 152064) bytes a
    position, 0.93 MB, so that 60 GB free after its weights hold 32 000 positions; a step gets `MOST_ON_A_GPU` of them,
    40 sequences of 400. With a cache on a GPU memory alone decides, as a step computes but a block of each sequence.

    Args:
        keeps: whether a cache keeps keys and values, see `bytes_per_position`.
    """
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fitting = max(1, free // 2 // bytes_per_position(model.model.config, model.model.dtype.itemsize, keeps))
    if model.device.type == "cuda":
        return fitting if keeps else min(fitting, MOST_ON_A_GPU)
    return min(fitting, MOST_ON_A_CPU)


def bytes_per_position(config: PreTrainedConfig, itemsize: int, keeps: bool) -> int:
    """What a step holds of a position at most: in attention, in the MLP or in the head, whichever is most.

    Of the hidden size D attention holds 9 (the residual stream, its norm, queries, keys and values, rotated ones, the
    output), the MLP 6 and 3 intermediate sizes (gate, its activation, up), the head 2 and 3 vocabularies (the logits,
    filtered twice). A cache keeps keys and values of every layer beside it.
    """
    hidden = config.hidden_size
    held = max(9 * hidden, 6 * hidden + 3 * config.intermediate_size, 2 * hidden + 3 * config.vocab_size)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    kept = 2 * config.num_hidden_layers * heads * head_size if keeps else 0
    return (held + kept) * itemsize


def sample(
    model: DiffusionModel,
    prompts: Sequence[Sequence[int]],
    config: SamplerConfig,
    seeds: Sequence[int] | None = None,
    engine: EngineConfig | None = None,
    observer: Callable[[Decision], None] | None = None,
) -> list[Completion]:
    """Decodes prompts to the end, in their order.

    Args:
        prompts: token ids, of any number and lengths.
        seeds: one for each prompt; default `config.seed` for all.
        observer: see `Engine`.
    """
    length = response_length(model, config)
    seeds = seeds or [config.seed] * len(prompts)
    requests = [Request(prompt, length, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    finished = dict(Engine(model, config, engine, observer).run(requests))
    return [finished[number] for number in range(len(requests))]
