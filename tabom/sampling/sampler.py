"""Sampling: a response of mask tokens is filled in over many steps, the most certain positions first."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import torch
import yaml
from tokenizers.decoders import WordPiece
from torch import Tensor

from tabom.data.encoding import decode
from tabom.models.diffusion_model import DiffusionModel, logits_at
from tabom.sampling.policies import (
    POLICIES,
    Candidates,
    PolicySettings,
    Step,
    check_at_least,
    choose,
    steps_that_unmask,
    time_shares,
)
from tabom_kernels import mix_keys, unmask_statistics
from tabom_kernels.noise import uniform_noise
from tabom_kernels.sampling import filter_logits


@dataclass
class SamplerConfig(PolicySettings):
    """How responses are decoded.

    Raises:
        ValueError: settings that contradict each other.
    """

    max_new_tokens: int | None = field(
        default=None,
        metadata={"help": "Length of the response, tokens. Default: the model's generation config."},
    )
    block_length: int | None = field(
        default=None,
        metadata={"help": "Decode blocks of this many tokens left to right. Default: one block."},
    )
    temperature: float = field(default=0.0, metadata={"help": "Of the token choice; 0 is greedy."})
    top_k: int | None = field(default=None, metadata={"help": "Sample among the k most probable tokens."})
    top_p: float | None = field(default=None, metadata={"help": "Sample within this probability mass."})
    stop_early: bool = field(
        default=False,
        metadata={"help": "Stop once all before the first end token is decided; the rest is padding, never unmasked."},
    )
    seed: int = field(default=0, metadata={"help": "Of tokens and of the random policies."})
    cache: Literal["none", "prefix", "block"] = field(
        default="none",
        metadata={
            "help": "Keep keys and values of what stands before the active block (prefix), or of all but the block "
            "(block). Faster, and an approximation; none is exact."
        },
    )
    cache_refresh: int | None = field(
        default=None,
        metadata={"help": "Steps after which a cache is computed anew. Default: when a block begins, and only then."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_new_tokens", "block_length", "top_k", "cache_refresh"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("temperature", self.temperature, 0)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: expected a probability mass in (0, 1]")
        if self.cache not in ("none", "prefix", "block"):
            raise ValueError(f"cache={self.cache!r}: expected none, prefix or block")
        if self.cache == "none" and self.cache_refresh is not None:
            raise ValueError(f"cache_refresh={self.cache_refresh} with cache='none': give a cache, prefix or block")

    @property
    def is_random(self) -> bool:
        """Whether another seed can give another answer."""
        return self.temperature > 0 or self.order_is_random

    @property
    def cache_name(self) -> str | None:
        """As trajectories record it: which cache, and after how many steps it is refreshed; None is exact."""
        if self.cache == "none":
            return None
        return self.cache if self.cache_refresh is None else f"{self.cache}, refresh {self.cache_refresh}"

    def plan(self, length: int) -> list[Step]:
        """The first step of every block; `steps` is the most that the block can take.

        Args:
            length: of the response, tokens.

        Raises:
            ValueError: the steps do not share out over the blocks and tokens.
        """
        tokens = min(self.block_length or length, length)
        if length % tokens:
            raise ValueError(f"block_length={tokens}: expected a divisor of the response length {length}")
        blocks = length // tokens
        if self.steps is None:
            return [Step(0, math.ceil(tokens / (self.tokens_per_step or 1)), tokens)] * blocks
        steps, rest = divmod(self.steps, blocks)
        if rest:
            raise ValueError(f"steps={self.steps}: expected a multiple of the {blocks} blocks")
        if steps > tokens and not self.policy.startswith("dream_"):
            raise ValueError(f"steps={self.steps}: expected at most {length}, so that every step unmasks a token")
        return [Step(0, steps, tokens)] * blocks


def parse_sampler(text: str, base: SamplerConfig) -> SamplerConfig:
    """`steps=64,policy=confidence` on top of other settings.

    Raises:
        ValueError: a field that the sampler does not know.
    """
    known = get_type_hints(SamplerConfig)
    changes = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in known:
            raise ValueError(f"sampler {text!r}: {name!r} is none of {', '.join(sorted(known))}")
        changes[name] = parse_value(name, value, known[name])
    return replace(base, **changes)


def parse_value(name: str, text: str, annotation: Any) -> Any:
    """A value of a setting, as YAML spells it.

    Raises:
        ValueError: not a value of this type.
    """
    kinds = get_args(annotation) or (annotation,)  # of a Literal, its values
    types = tuple((int, float) if kind is float else kind for kind in kinds if isinstance(kind, type))
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if value not in kinds and not isinstance(value, types):
        expected = ", ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
        raise ValueError(f"{name}={text}: expected one of {expected}")
    return value


def check_positions(model: DiffusionModel, prompt_length: int, length: int) -> None:
    """Refuses what a model has no positions for.

    Raises:
        ValueError: prompt and response are longer than its `max_position_embeddings`.
    """
    if model.positions is not None and prompt_length + length > model.positions:
        raise ValueError(
            f"max_new_tokens={length}: with a prompt of {prompt_length} tokens more than the {model.positions} "
            "positions of the model (max_position_embeddings); ask for fewer, or set max_prompt_length"
        )


class Completion(NamedTuple):
    """One response of T tokens: the step at which each was unmasked, and its entropy (nats) at that step.

    `positions` is its cost: the rows that went through the model's body for it. One that was given up ended before it
    was done.
    """

    token_ids: list[int]
    decoding_order: list[int]
    entropy: list[float]
    positions: int
    given_up: bool = False


class DecodingState(NamedTuple):
    """A batch of B responses between two steps; `decoding_order` is -1 where a token is still masked.

    `candidate_entropy` is what the step just taken saw: the entropy of every position that it could have unmasked,
    those of the active block that were still masked.
    """

    tokens: Tensor  # (B, T) int64
    decoding_order: Tensor  # (B, T) int64
    entropy: Tensor  # (B, T) nats, 0 where masked
    candidate_entropy: Tensor  # (B, T) nats, NaN where the step had no choice
    positions: int  # computed so far: rows that went through the model's body


def read_candidates(logits: Tensor, masked: Tensor, keys: Tensor, config: SamplerConfig) -> tuple[Tensor, Candidates]:
    """The token that would be unmasked at each masked position (B, T), and how certain the model is.

    Args:
        logits: (N, V) of the masked positions, row by row of `masked`.
        masked: (B, T) bool.
        keys: (N,) of the random numbers.
    """
    temperature, top_k, top_p = config.temperature, config.top_k, config.top_p
    changes_distribution = temperature > 0 or top_k is not None or top_p is not None
    if POLICIES[config.policy].on_draw_distribution and changes_distribution:
        logits = filter_logits(filter_logits(logits, temperature=temperature or 1.0, top_p=top_p), top_k=top_k)
        temperature, top_k, top_p = float(temperature > 0), None, None
    statistics = unmask_statistics(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=keys)

    def on_grid(values: Tensor) -> Tensor:
        return values.new_zeros(masked.shape).masked_scatter_(masked, values)

    token, *certainties = map(on_grid, statistics)
    return token, Candidates(masked, *certainties, on_grid(uniform_noise(mix_keys(keys, 1))))


def is_decided(tokens: Tensor, order: Tensor, eos_token_id: int | None) -> Tensor:
    """(B,) whether nothing is masked before the first end token of (B, T) responses; False without an end token."""
    ended = ((order >= 0) & (tokens == eos_token_id)).cumsum(1) > 0
    return ended[:, -1] & ((order >= 0) | ended).all(1)


def left_pad(model: DiffusionModel, prompts: Sequence[Sequence[int]], length: int) -> dict[str, Tensor]:
    """What the model takes: prompts, left-padded, and `length` mask tokens; no padding is seen or counted."""
    prompt_length = max(map(len, prompts))
    input_ids = torch.full((len(prompts), prompt_length + length), model.mask_token_id)
    attention_mask = torch.ones_like(input_ids)
    for b, prompt in enumerate(prompts):
        padding = prompt_length - len(prompt)
        input_ids[b, :padding] = model.pad_token_id
        attention_mask[b, :padding] = 0
        input_ids[b, padding:prompt_length] = torch.tensor(prompt, dtype=torch.long)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if not attention_mask.all():  # most models would count the padding
        inputs["position_ids"] = model.first_position + (attention_mask.cumsum(1) - 1).clamp(min=0)
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


@torch.inference_mode()
def denoise(
    model: DiffusionModel,
    prompts: Sequence[Sequence[int]],
    length: int,
    config: SamplerConfig,
    seeds: Sequence[int] | None = None,
) -> Iterator[DecodingState]:
    """Decodes a batch of prompts and yields the state before the first step and after every step.

    This is the specification of the engine (`tabom.sampling.engine`), which gives each prompt what it gets here alone.
    Only positions that are still masked in the active block go through the head and the vocabulary statistics. The mask
    token itself is never chosen. Ties go to the leftmost position. A step that unmasks nothing by its plan is counted,
    and not computed. Random numbers depend on (seed, step, position)
    alone, so a prompt's answer does not depend on its batch (up to the rounding of the model itself).

    Args:
        prompts: token ids, of any lengths.
        length: of the responses, tokens.
        seeds: one for each prompt; default `config.seed` for all.

    Raises:
        ValueError: a cache, which this loop has none of.
    """
    if config.cache != "none":
        raise ValueError(f"cache={config.cache!r}: step by step, decoding is exact; leave the cache out")
    check_positions(model, max(map(len, prompts)), length)
    inputs = left_pad(model, prompts, length)
    positions = inputs["input_ids"].shape[1]
    tokens = inputs["input_ids"][:, -length:]  # a view: what is unmasked here is what the model sees next
    order = torch.full_like(tokens, -1)
    entropy = torch.zeros_like(tokens, dtype=torch.float32)
    sequence_seeds = torch.tensor(seeds or [config.seed] * len(prompts), device=model.device)

    no_choice = torch.full_like(entropy, torch.nan)
    yield DecodingState(tokens, order, entropy, no_choice, 0)
    step = block_end = computed = 0
    for block in config.plan(length):
        block_end += block.tokens
        shares = time_shares(block.steps, config.eps)
        unmasking = steps_that_unmask(config.policy, block.steps, block.tokens, config.eps)
        for index in range(block.steps):
            masked = order < 0
            masked[:, block_end:] = False
            if config.stop_early:
                masked &= ~is_decided(tokens, order, model.eos_token_id)[:, None]
            b, t = masked.nonzero(as_tuple=True)
            if len(b) == 0:
                break
            if index not in unmasking:  # it has its number; the next one computes what it would
                step += 1
                yield DecodingState(tokens, order, entropy, no_choice, computed)
                continue
            rows = (b + 1) * positions - length + t - model.logits_shift
            logits = logits_at(model.model, rows, **inputs)
            logits[:, model.mask_token_id] = -torch.inf
            keys = mix_keys(sequence_seeds[b], step, t)
            token, candidates = read_candidates(logits, masked, keys, config)
            chosen = choose(candidates, block._replace(index=index, share=shares[index].item()), config)
            tokens.copy_(torch.where(chosen, token, tokens))
            entropy = torch.where(chosen, candidates.entropy, entropy)
            order = torch.where(chosen, step, order)
            step += 1
            computed += inputs["input_ids"].numel()
            seen = candidates.entropy.where(masked, no_choice)
            yield DecodingState(tokens, order, entropy, seen, computed)
    if config.stop_early:
        tokens.masked_fill_(order < 0, model.pad_token_id)
        yield DecodingState(tokens, order, entropy, no_choice, computed)


@dataclass
class Cost:
    """Of completions: the rows that went through the model's body, and the tokens that it decided."""

    positions: int = 0
    tokens: int = 0

    def add(self, completion: Completion) -> None:
        """Counts one more."""
        self.positions += completion.positions
        self.tokens += sum(step >= 0 for step in completion.decoding_order)

    @property
    def positions_per_token(self) -> float:
        """Positions computed a decided token: what decoding costs, on any machine."""
        return self.positions / max(self.tokens, 1)


def cost_of(completions: Iterable[Completion]) -> Cost:
    """Of all of them together."""
    cost = Cost()
    for completion in completions:
        cost.add(completion)
    return cost


def response_length(model: DiffusionModel, config: SamplerConfig) -> int:
    """`max_new_tokens` of the sampler, else of the model's generation config, else 64."""
    return config.max_new_tokens or model.model.generation_config.max_new_tokens or 64


def decode_response(model: DiffusionModel, token_ids: Sequence[int]) -> str:
    """The text of a response up to its first end token."""
    return decode(model.tokenizer, token_ids)


def certain_text(model: DiffusionModel, token_ids: Sequence[int]) -> str:
    """What the text of every response begins with whose first tokens are these.

    A last character may lack some of its bytes, and is left out. Tokenizers that tidy up spaces change what stands
    before a token: of them, and of those in Python, nothing is certain.
    """
    tokenizer = model.tokenizer
    tidies = not tokenizer.is_fast or isinstance(tokenizer.backend_tokenizer.decoder, WordPiece)
    tidies = tidies or tokenizer.clean_up_tokenization_spaces
    return "" if tidies else decode_response(model, token_ids).rstrip("\N{REPLACEMENT CHARACTER}")
