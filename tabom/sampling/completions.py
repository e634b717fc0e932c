"""Completions: the length of a response before it is decoded, and its tokens, text and cost afterwards."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from tokenizers.decoders import WordPiece
from torch import Tensor

from tabom.data.encoding import check_prompt, decode
from tabom.models.diffusion_model import DiffusionModel
from tabom.sampling.config import SamplerConfig
from tabom.sampling.policies import POLICIES


class Completion(NamedTuple):
    """A decoded response of T tokens, with the step at which each was unmasked and its entropy (nats) at that step.

    `positions` is the cost of the decoding: the rows that went through the model's body. `given_up` is True if the
    decoding was ended early because the response could no longer be right. `edits` is how many decided tokens were
    replaced, each of which has the step of its last change. `logprob` (nats) is the log-probability of each token when
    it was drawn, at the sampler's temperature; None at temperature 0.
    """

    token_ids: list[int]
    decoding_order: list[int]
    entropy: list[float]
    positions: int
    given_up: bool = False
    edits: int = 0
    logprob: list[float] | None = None


def response_length(model: DiffusionModel, config: SamplerConfig) -> int:
    """`max_new_tokens` of the sampler, else of the model's generation config, else 64.

    Raises:
        ValueError: the sampler's blocks are longer, which with full attention would have no effect.
    """
    length = config.max_new_tokens or model.model.generation_config.max_new_tokens or 64
    if model.block_size is None and config.block_length is not None and config.block_length > length:
        raise ValueError(f"block_length={config.block_length}: expected at most the response length {length}")
    return length


def with_block_length(model: DiffusionModel, config: SamplerConfig) -> DiffusionModel:
    """The model with the sampler's `block_length` in place of its own block size, if its attention is block-causal.

    Raises:
        ValueError: the policy reads the first token of a block from the logits before it, and the model has none there.
    """
    if POLICIES[config.policy].begins_alone and (model.block_size is None or model.logits_shift == 0):
        raise ValueError(
            f"policy={config.policy!r}: expected a block-causal model with logits_shift=1, got "
            f"block_size={model.block_size} and logits_shift={model.logits_shift}; use threshold, with sub_block_length"
        )
    if model.block_size is None or config.block_length is None:
        return model
    return replace(model, block_size=config.block_length)


def check_positions(model: DiffusionModel, prompt_length: int, length: int) -> None:
    """Refuses a prompt and response that do not fit the positions of the model.

    Raises:
        ValueError: prompt and response are longer than its `max_position_embeddings`, or the prompt is shorter than its
            `logits_shift`.
    """
    check_prompt(prompt_length, model.logits_shift)
    if model.positions is not None and prompt_length + length > model.positions:
        raise ValueError(
            f"max_new_tokens={length}: with a prompt of {prompt_length} tokens more than the {model.positions} "
            "positions of the model (max_position_embeddings); ask for fewer, or shorten the prompt"
        )


def is_decided(tokens: Tensor, order: Tensor, eos_token_id: int | None) -> Tensor:
    """(B,) bool: no token before the first end token of (B, T) responses is masked; False without an end token."""
    ended = ((order >= 0) & (tokens == eos_token_id)).cumsum(1) > 0
    return ended[:, -1] & ((order >= 0) | ended).all(1)


def decode_response(model: DiffusionModel, token_ids: Sequence[int]) -> str:
    """The text of a response up to its first end token."""
    return decode(model.tokenizer, token_ids)


def guaranteed_text(model: DiffusionModel, token_ids: Sequence[int]) -> str:
    """The longest text prefix that these tokens guarantee; empty if the tokenizer may still rewrite it.

    A last character whose bytes are incomplete is left out. Nothing is guaranteed by tokenizers that clean up spaces,
    because a later token changes the text before it, and by tokenizers written in Python, which may do the same.
    """
    tokenizer = model.tokenizer
    tidies = not tokenizer.is_fast or isinstance(tokenizer.backend_tokenizer.decoder, WordPiece)
    tidies = tidies or tokenizer.clean_up_tokenization_spaces
    return "" if tidies else decode_response(model, token_ids).rstrip("\N{REPLACEMENT CHARACTER}")


@dataclass
class Cost:
    """The cost of completions: the rows that went through the model's body, and the tokens that were decided."""

    positions: int = 0
    tokens: int = 0

    def add(self, completion: Completion) -> None:
        """Adds the cost of one completion."""
        self.positions += completion.positions
        self.tokens += sum(step >= 0 for step in completion.decoding_order)

    @property
    def positions_per_token(self) -> float:
        """Rows computed per decided token: the cost of decoding, independent of the machine."""
        return self.positions / max(self.tokens, 1)


def cost_of(completions: Iterable[Completion]) -> Cost:
    """The cost of all completions together."""
    cost = Cost()
    for completion in completions:
        cost.add(completion)
    return cost
