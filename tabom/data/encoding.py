"""Encodes prompts and responses as token ids, through the chat template if the tokenizer has one."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from tabom.data.limits import limited

TEMPLATE_SECONDS = 2
TEMPLATE_BYTES = 2**30
TEMPLATE_CHARACTERS = 2**24
"""Limits of rendering one conversation: time, memory, and length of the resulting text."""

Prompt = str | list[dict[str, Any]]
"""Plain text, or a conversation of `{"role": ..., "content": ...}` messages, which may have `tool_calls`."""


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, max_length: int | None = None) -> list[int]:
    """Token ids of a prompt, after which the response begins.

    A prompt of more than `max_length` tokens is shortened. A conversation loses the end of its last message, so that
    the tokens that the template puts after it, which begin the assistant's turn, are kept. Plain text loses its
    beginning, because the response continues its end. Empty plain text becomes the BOS token, if the tokenizer has one.

    Raises:
        ValueError: the prompt is a conversation and the tokenizer has no chat template; or `max_length` leaves no room
            for the tokens that the template puts after the last message.
    """
    if tokenizer.chat_template is None:
        if not isinstance(prompt, str):
            raise ValueError("prompt is a list of messages, but this tokenizer has no chat template; use plain text")
        token_ids = tokenizer(prompt).input_ids or bos_alone(tokenizer)
        return token_ids if max_length is None else token_ids[-max_length:]

    messages = as_messages(prompt)
    token_ids = encode_text(tokenizer, render(tokenizer, messages, add_generation_prompt=True))
    if max_length is None or len(token_ids) <= max_length:
        return token_ids
    emptied = [*messages[:-1], messages[-1] | {"content": ""}]
    empty = encode_text(tokenizer, render(tokenizer, emptied, add_generation_prompt=True))
    ending = shared_ending(token_ids, empty)
    if max_length <= ending:
        raise ValueError(
            f"max_length={max_length} tokens for a prompt: the chat template needs {ending} after the last message"
        )
    return token_ids[: max_length - ending] + token_ids[len(token_ids) - ending :]


def bos_alone(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS token, or an empty list if the tokenizer has none."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def check_prompt(length: int, logits_shift: int) -> None:
    """Refuses a prompt that is too short for the logits of the first response token, which stand before the response.

    Args:
        length: of the prompt, tokens.
        logits_shift: how many positions before a token its logits stand.

    Raises:
        ValueError: the prompt is shorter than the shift.
    """
    if length < logits_shift:
        raise ValueError(
            f"the prompt has {length} tokens, and this model reads the logits of a response's first token "
            f"{logits_shift} position before it: give a prompt with text, or a tokenizer with a bos_token or a template"
        )


def has_unknown_text(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> bool:
    """Whether token ids hold the unknown token, which stands for text that the vocabulary does not have.

    Tokenizers whose unknown token ends or pads texts too know all texts.
    """
    others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, None)
    return tokenizer.unk_token_id not in others and tokenizer.unk_token_id in token_ids


def encode_response(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, response: str) -> list[int]:
    """Token ids of a response, with the tokens that the chat template puts after it.

    The response is tokenized apart from its prompt, because the sampler puts its tokens after those of the prompt too.

    Raises:
        ValueError: the template renders the prompt differently when a response follows it.
    """
    if tokenizer.chat_template is None:
        return tokenizer(response, add_special_tokens=False).input_ids
    messages = as_messages(prompt)
    beginning = render(tokenizer, messages, add_generation_prompt=True)
    whole = render(tokenizer, [*messages, {"role": "assistant", "content": response}])
    if not whole.startswith(beginning):
        raise ValueError("this chat template writes a prompt differently when a response follows: give token ids")
    return encode_text(tokenizer, whole[len(beginning) :])


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text of a response up to its first end token."""
    token_ids = list(token_ids)
    if tokenizer.eos_token_id in token_ids:
        token_ids = token_ids[: token_ids.index(tokenizer.eos_token_id)]
    return tokenizer.decode(token_ids, skip_special_tokens=True)


def as_messages(prompt: Prompt) -> list[dict[str, Any]]:
    """A conversation; plain text becomes one message of the user."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], add_generation_prompt: bool = False
) -> str:
    """Renders a conversation as text.

    Raises:
        ValueError: the template fails, exceeds the limits of time, memory or length, or leaves out a call of a tool.
    """
    options = {"add_generation_prompt": add_generation_prompt, "tokenize": False}
    try:
        with limited("it", TEMPLATE_SECONDS, TEMPLATE_BYTES):
            text = tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # a template is a program, which may raise anything
        raise ValueError(f"the chat template fails on this conversation: {error}") from error
    if len(text) > TEMPLATE_CHARACTERS:
        raise ValueError(f"the chat template writes {len(text)} characters; at most {TEMPLATE_CHARACTERS} are read")
    calls = [call for message in messages for call in message.get("tool_calls") or []]
    for name in [call.get("function", call).get("name", "") for call in calls]:
        if name not in text:
            raise ValueError(f"the chat template does not write the tool call {name!r}; give one that does")
    return text


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text from the chat template, which has written its special tokens already."""
    return tokenizer(text, add_special_tokens=False, return_attention_mask=False).input_ids


def shared_ending(a: list[int], b: list[int]) -> int:
    """The length of the longest common suffix of two lists."""
    count = 0
    for x, y in zip(reversed(a), reversed(b), strict=False):
        if x != y:
            break
        count += 1
    return count
