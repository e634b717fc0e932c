"""From text to token ids: prompts and responses, through the chat template where the tokenizer has one."""

from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from tabom.data.limits import limited

TEMPLATE_SECONDS = 10
TEMPLATE_BYTES = 2**30
"""Limits of rendering one conversation."""

Prompt = str | list[dict[str, str]]
"""Plain text, or a conversation of `{"role": ..., "content": ...}` messages."""


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, max_length: int | None = None) -> list[int]:
    """Token ids of a prompt, ready to be answered.

    A prompt of more than `max_length` tokens is shortened: a conversation loses the end of its last message, so that
    what the template puts after it, the turn to the assistant, survives; plain text loses its beginning, as what is
    to be continued stands at its end.

    Raises:
        ValueError: a conversation, and the tokenizer has no chat template; or `max_length` leaves no room for what
            the template puts after the last message.
    """
    if tokenizer.chat_template is None:
        if not isinstance(prompt, str):
            raise ValueError("prompt is a list of messages, but this tokenizer has no chat template; use plain text")
        token_ids = tokenizer(prompt).input_ids
        return token_ids if max_length is None else token_ids[-max_length:]

    messages = as_messages(prompt)
    token_ids = render(tokenizer, messages, add_generation_prompt=True)
    if max_length is None or len(token_ids) <= max_length:
        return token_ids
    empty = render(tokenizer, [*messages[:-1], messages[-1] | {"content": ""}], add_generation_prompt=True)
    ending = shared_ending(token_ids, empty)
    if max_length <= ending:
        raise ValueError(
            f"max_length={max_length} tokens for a prompt: the chat template needs {ending} after the last message"
        )
    return token_ids[: max_length - ending] + token_ids[len(token_ids) - ending :]


def encode_response(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, response: str) -> list[int]:
    """Token ids of a response, with what the chat template puts after it.

    Raises:
        ValueError: the template writes the prompt differently when a response follows it.
    """
    if tokenizer.chat_template is None:
        return tokenizer(response, add_special_tokens=False).input_ids
    messages = as_messages(prompt)
    prompt_ids = render(tokenizer, messages, add_generation_prompt=True)
    token_ids = render(tokenizer, [*messages, {"role": "assistant", "content": response}])
    if token_ids[: len(prompt_ids)] != prompt_ids:
        raise ValueError("this chat template writes a prompt differently when a response follows: give token ids")
    return token_ids[len(prompt_ids) :]


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text of a response up to its first end token."""
    token_ids = list(token_ids)
    if tokenizer.eos_token_id in token_ids:
        token_ids = token_ids[: token_ids.index(tokenizer.eos_token_id)]
    return tokenizer.decode(token_ids, skip_special_tokens=True)


def as_messages(prompt: Prompt) -> list[dict[str, str]]:
    """Plain text is one message of the user."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], add_generation_prompt: bool = False
) -> list[int]:
    """Token ids of a conversation.

    Raises:
        ValueError: the template refuses it, loops, or makes endless text.
    """
    options = {"add_generation_prompt": add_generation_prompt, "return_dict": True}
    with limited("the chat template", TEMPLATE_SECONDS, TEMPLATE_BYTES):
        try:
            rendered = tokenizer.apply_chat_template(messages, **options)
        except (TemplateError, OverflowError, ArithmeticError, TypeError) as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from error
    return rendered["input_ids"]


def shared_ending(a: list[int], b: list[int]) -> int:
    """How many last elements two lists share."""
    count = 0
    for x, y in zip(reversed(a), reversed(b), strict=False):
        if x != y:
            break
        count += 1
    return count
