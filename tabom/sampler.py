"""Sampling: a response of mask tokens is filled in over many steps, the most certain positions first."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tabom.models import DiffusionModel, logits_at
from tabom_kernels import UnmaskStatistics, mix_keys, unmask_statistics

Policy = Literal["entropy", "confidence", "margin", "random"]


@dataclass
class SamplerConfig:
    """How responses are decoded.

    Raises:
        ValueError: settings that contradict each other.
    """

    max_new_tokens: int | None = field(
        default=None,
        metadata={"help": "Length of the response, tokens. Default: the model's generation config."},
    )
    policy: Policy = field(
        default="entropy",
        metadata={"help": "Unmask first: lowest entropy, highest probability, largest top-2 margin, or random."},
    )
    tokens_per_step: int | None = field(
        default=None, metadata={"help": "Tokens unmasked in one step. Default 1; excludes steps."}
    )
    steps: int | None = field(
        default=None, metadata={"help": "Total denoising steps, shared evenly; excludes tokens_per_step."}
    )
    block_length: int | None = field(
        default=None,
        metadata={"help": "Decode blocks of this many tokens left to right. Default: one block."},
    )
    temperature: float = field(default=0.0, metadata={"help": "Of the token choice; 0 is greedy."})
    top_k: int | None = field(default=None, metadata={"help": "Sample among the k most probable tokens."})
    top_p: float | None = field(default=None, metadata={"help": "Sample within this probability mass."})
    seed: int = field(default=0, metadata={"help": "Of tokens and of the random policy."})

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "tokens_per_step", "steps", "block_length", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected at least 1")
        if self.policy not in Policy.__args__:
            raise ValueError(f"policy={self.policy!r}: expected one of {', '.join(Policy.__args__)}")
        if self.tokens_per_step is not None and self.steps is not None:
            raise ValueError(f"tokens_per_step={self.tokens_per_step} and steps={self.steps}: give only one of them")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: expected 0 (greedy) or above")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: expected a probability mass in (0, 1]")

    def schedule(self, length: int) -> list[list[int]]:
        """How many tokens each step unmasks, a list a block.

        Args:
            length: of the response, tokens.

        Raises:
            ValueError: the steps do not share out over the blocks and tokens.
        """
        block_length = min(self.block_length or length, length)
        if length % block_length:
            raise ValueError(f"block_length={block_length}: expected a divisor of the response length {length}")
        blocks = length // block_length
        if self.steps is None:
            per_step = self.tokens_per_step or 1
            full, rest = divmod(block_length, per_step)
            return [[per_step] * full + [rest] * (rest > 0)] * blocks
        steps, rest = divmod(self.steps, blocks)
        if rest or steps > block_length:
            raise ValueError(
                f"steps={self.steps}: expected a multiple of the {blocks} blocks and at most {length}, "
                "so that every step unmasks a token"
            )
        few, more = divmod(block_length, steps)
        return [[few + 1] * more + [few] * (steps - more)] * blocks


class Completion(NamedTuple):
    """One response of T tokens: the step at which each was unmasked, and its entropy (nats) at that step."""

    token_ids: list[int]
    decoding_order: list[int]
    entropy: list[float]


class DecodingState(NamedTuple):
    """A batch of B responses between two steps; `decoding_order` is -1 where a token is still masked."""

    tokens: Tensor  # (B, T) int64
    decoding_order: Tensor  # (B, T) int64
    entropy: Tensor  # (B, T) nats, 0 where masked


def certainty(policy: Policy, statistics: UnmaskStatistics, keys: Tensor) -> Tensor:
    """(N,) scores of masked positions; the highest is unmasked first."""
    if policy == "entropy":
        return -statistics.entropy
    if policy == "confidence":
        return statistics.probability
    if policy == "margin":
        return statistics.margin
    return mix_keys(keys, 1).double()  # the tokens use the key itself


@torch.inference_mode()
def denoise(
    model: DiffusionModel,
    prompts: Sequence[Sequence[int]],
    length: int,
    config: SamplerConfig,
    seeds: Sequence[int] | None = None,
) -> Iterator[DecodingState]:
    """Decodes a batch of prompts and yields the state before the first step and after every step.

    Only positions that are still masked in the active block go through the head and the vocabulary statistics. The
    mask token itself is never chosen. Ties go to the leftmost position. Random numbers depend on (seed, step,
    position) alone, so a prompt's answer does not depend on its batch (up to the rounding of the model itself).

    Args:
        prompts: token ids, of any lengths.
        length: of the responses, tokens.
        seeds: one for each prompt; default `config.seed` for all.
    """
    device = model.device
    batch, prompt_length = len(prompts), max(map(len, prompts))
    input_ids = torch.full((batch, prompt_length + length), model.mask_token_id, device=device)
    attention_mask = torch.ones_like(input_ids)
    for b, prompt in enumerate(prompts):
        padding = prompt_length - len(prompt)
        input_ids[b, :padding] = model.pad_token_id
        attention_mask[b, :padding] = 0
        input_ids[b, padding:prompt_length] = torch.tensor(prompt, dtype=torch.long)
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)

    tokens = input_ids[:, prompt_length:]  # a view: what is unmasked here is what the model sees next
    order = torch.full((batch, length), -1, device=device)
    entropy = torch.zeros(batch, length, device=device)
    sequence_seeds = torch.tensor(seeds or [config.seed] * batch, device=device)[:, None]
    offsets = torch.arange(batch, device=device)[:, None] * input_ids.shape[1] + prompt_length

    yield DecodingState(tokens, order, entropy)
    step = 0
    for block, counts in enumerate(config.schedule(length)):
        block_end = (block + 1) * sum(counts)
        for count in counts:
            # Every sequence has the same number of masked tokens, so their positions form a (B, m) matrix.
            masked = (order[:, :block_end] < 0).nonzero()[:, 1].view(batch, -1)
            logits = logits_at(
                model.model,
                (offsets + masked - model.logits_shift).flatten(),
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
            )
            logits[:, model.mask_token_id] = -torch.inf
            keys = mix_keys(sequence_seeds, step, masked).flatten()
            statistics = unmask_statistics(
                logits,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                generator=keys,
            )
            scores = certainty(config.policy, statistics, keys).view(batch, -1)
            chosen = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
            positions = masked.gather(1, chosen)
            tokens.scatter_(1, positions, statistics.token.view(batch, -1).gather(1, chosen))
            entropy.scatter_(1, positions, statistics.entropy.view(batch, -1).gather(1, chosen))
            order.scatter_(1, positions, step)
            step += 1
            yield DecodingState(tokens, order, entropy)


def sample(
    model: DiffusionModel,
    prompts: Sequence[Sequence[int]],
    config: SamplerConfig,
    seeds: Sequence[int] | None = None,
) -> list[Completion]:
    """Decodes a batch of prompts to the end; see `denoise`."""
    if not prompts:
        return []
    *_, state = denoise(model, prompts, response_length(model, config), config, seeds)
    columns = (state.tokens.tolist(), state.decoding_order.tolist(), state.entropy.tolist())
    return [Completion(*row) for row in zip(*columns, strict=True)]


def response_length(model: DiffusionModel, config: SamplerConfig) -> int:
    """`max_new_tokens` of the sampler, else of the model's generation config, else 64."""
    return config.max_new_tokens or model.model.generation_config.max_new_tokens or 64


def decode_response(model: DiffusionModel, token_ids: Sequence[int]) -> str:
    """The text of a response up to its first end token."""
    token_ids = list(token_ids)
    if model.eos_token_id in token_ids:
        token_ids = token_ids[: token_ids.index(model.eos_token_id)]
    return model.tokenizer.decode(token_ids, skip_special_tokens=True)
