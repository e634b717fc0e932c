"""The requests that the engine decodes at once, and where their positions stand in the packed rows of a step."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tabom.sampling.config import Blocks, SamplerConfig
from tabom.sampling.policies import time_shares


class Request(NamedTuple):
    """The token ids of a prompt, the length of its response in tokens, and the seed of its random numbers."""

    prompt: Sequence[int]
    length: int
    seed: int


@dataclass
class Slot:
    """A request that is being decoded, and its state when the host last read it from the device."""

    number: int  # index of the request, in the order of the requests
    request: Request
    blocks: Blocks
    unmasking: tuple[int, ...]  # the steps of a block that unmask something
    block: int = 0  # index of the active block
    index: int = 0  # of the step, among the steps of the block that unmask something
    positions: int = 0  # rows that went through the model's body so far
    beginning: int = 0  # decided tokens before the first masked one
    given_up: bool = False

    def __post_init__(self) -> None:
        self.candidates = self.blocks.size - self.blocks.given  # masked positions of the active block
        self.length = len(self.request.prompt) + self.blocks.length


class State(NamedTuple):
    """The decoding state of S slots, on the device; T is the length of the longest response.

    The step counters of a finished slot run on until the host reads them; it has no position left to unmask.
    """

    tokens: Tensor  # (S, T) int64
    order: Tensor  # (S, T) int64, -1 where masked
    entropy: Tensor  # (S, T) nats
    logprob: Tensor  # (S, T) nats, of the tokens that were drawn
    block: Tensor  # (S,) int64, index of the active block
    index: Tensor  # (S,) int64, of the step, among the steps of the block that unmask something
    step: Tensor  # (S,) int64, of all blocks, counting steps that unmask nothing
    post_steps: Tensor  # (S,) int64, of the active block while it had no mask
    edits: Tensor  # (S,) int64, tokens that were replaced so far


class Layout(NamedTuple):
    """The packed rows (N of them) of S slots, and the slots' plans; built anew when the slots change."""

    starts: list[int]  # the first row of each slot
    input_ids: Tensor  # (N + 1,); the last entry takes the writes of positions that have no row
    position_ids: Tensor  # (N,)
    rows: Tensor  # (S, T) rows of the response's tokens; N beyond the end of a shorter response
    seeds: Tensor  # (S,)
    blocks: Tensor  # (S,) how many
    steps: Tensor  # (S,) of a block, counting only steps that unmask something
    size: Tensor  # (S,) positions of a block
    given: Tensor  # (S,) positions of the first block that hold the end of the prompt
    shares: Tensor  # (S, most steps) of Dream's time schedule
    strides: Tensor  # (S, most steps) from the number of a step to that of the next one


def lay_out(slots: Sequence[Slot], longest: int, config: SamplerConfig, device: torch.device) -> Layout:
    """Packs slots one after the other; the caller fills in the tokens of the responses."""
    starts = list(accumulate((slot.length for slot in slots), initial=0))
    total = starts.pop()
    position = torch.arange(longest)
    prompts = torch.tensor([len(slot.request.prompt) for slot in slots], dtype=torch.int64)
    lengths = torch.tensor([slot.blocks.length for slot in slots], dtype=torch.int64)
    rows = (torch.tensor(starts, dtype=torch.int64) + prompts)[:, None] + position
    plans = [
        (slot.request.seed, slot.blocks.count, len(slot.unmasking), slot.blocks.size, slot.blocks.given)
        for slot in slots
    ]
    unmasking = [torch.tensor(slot.unmasking) for slot in slots]
    following = [slot.blocks.steps + slot.unmasking[0] for slot in slots]  # the first unmasking step of the next block
    shares = [time_shares(slot.blocks.steps, config.eps)[steps] for slot, steps in zip(slots, unmasking, strict=True)]
    strides = [steps.diff(append=torch.tensor([end])) for steps, end in zip(unmasking, following, strict=True)]
    tensors = (
        torch.tensor([id for slot in slots for id in [*slot.request.prompt, *[0] * slot.blocks.length]] + [0]),
        torch.cat([torch.arange(slot.length) for slot in slots]),
        rows.where(position < lengths[:, None], total),
        *torch.tensor(plans, dtype=torch.int64).unbind(1),
        pad_sequence(shares, batch_first=True),
        pad_sequence(strides, batch_first=True),
    )
    return Layout(starts, *(tensor.to(device) for tensor in tensors))
