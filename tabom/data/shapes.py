"""The shapes of public data sets: which fields of a record make its prompt, its response and its answer."""

import logging
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from string import Formatter, ascii_uppercase
from typing import Any

from tabom.data.conversations import CONVERSATION_FIELDS, conversation
from tabom.data.encoding import Prompt, as_messages
from tabom.data.fields import RecordError, as_text, is_finite_number, lookup, text, texts
from tabom.data.text import printable

logger = logging.getLogger(__name__)

PROMPTS = (
    "{text}\n\nYour code should pass these tests:\n\n{test_list}",  # MBPP
    "{prompt}\n\nYour code should pass these tests:\n\n{test_list}",  # MBPP, sanitized
    "{prompt}",
    "{instruction}\n\n{input}",  # Alpaca
    "{instruction}\n\n{context}",  # Dolly
    "{instruction}",
    "{question_content}\n\n{starter_code}",  # LiveCodeBench
    "{question_content}",
    "{question}\n\n{starter_code}",  # APPS
    "{body} {question}",  # SVAMP
    "{context}\n\n{question}",  # SQuAD
    "{question}\n\n{choices}",  # ARC, CommonsenseQA, MMLU
    "{question}\n\n{options}",  # MMLU-Pro
    "{question_stem}\n\n{choices}",  # OpenBookQA
    "{question}",  # GSM8K, OpenOrca
    "{problem}",  # MATH, AIME
)
"""Prompts of fields; a record has the first one whose fields it has. Fields that are blank count as missing."""

FIELDS_OF = {template: [name for _, name, _, _ in Formatter().parse(template) if name] for template in PROMPTS}

SYSTEM_FIELDS = ("system", "system_prompt")
"""Fields of a text that opens the conversation: of Alpaca and ShareGPT, and of OpenOrca."""

CHOICE_FIELDS = ("choices", "options")
"""Fields of the answers to choose from."""

RESPONSE_FIELDS = ("response", "completion", "output", "gen_text", "solution", "answer", "answerKey", "answers.text")
RESPONSE_FIELDS += ("canonical_solution", "code")  # HumanEval's and MBPP's
ANSWER_FIELDS = ("answer", "ground_truth_answer", "solution", "answerKey", "answers.text", "reward_model.ground_truth")
"""Fields of the response to train on, and of the answer that responses are compared with."""

CAPITALISED = ("Problem", "Question", "Solution", "Answer", "Body")  # AIME's and SVAMP's

OWN_FIELDS = ("id", "method", "data_source", "cache", "correct", "why", "group")
"""Fields of a trajectory and its verdict whose text is about the record."""


def usual_names(record: dict[str, Any]) -> dict[str, Any]:
    """A record with the field names of `PROMPTS`."""
    record = {name.lower(): record[name] for name in CAPITALISED if name in record} | record
    if isinstance(record.get("question"), dict):  # PRM800K keeps problem and answer one level down
        return {**record.pop("question"), **record}
    return record


def parse_prompt(record: dict[str, Any]) -> Prompt:
    """The prompt: a conversation without its closing answer, or the first of `PROMPTS` that the record has.

    A system prompt or a `history` of earlier turns makes a conversation of a text.

    Raises:
        RecordError: there is no prompt, or a field of it cannot be read.
    """
    record = usual_names(record)
    field = conversation_field(record)
    if field is not None:
        messages = conversation(record, field)
        prompt = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        if not prompt:
            raise RecordError(field, "has an answer, but nothing before it")
        return with_system(record, prompt)
    for template, fields in FIELDS_OF.items():
        if len(fields) == 1 and fields[0] in record:
            [field] = fields
            prompt = conversation(record, field) if isinstance(record[field], list) else text(record, field)
            return with_system(record, with_history(record, prompt))
        parts = {name: part(record, name) for name in fields}
        if all(parts.values()):
            return with_system(record, with_history(record, template.format_map(parts)))
    raise missing(record, ("prompt", "instruction", "question", "problem", *CONVERSATION_FIELDS))


def part(record: dict[str, Any], field: str) -> str | None:
    """A field as part of a prompt; None if it is missing, blank or no text."""
    value = record.get(field)
    if field == "test_list" and value is not None:
        return "\n".join(texts(record, field))
    if field in CHOICE_FIELDS:
        return "\n".join(labelled(*each) for each in choices(record, field)) or None
    return text(record, field) if isinstance(value, str) and value.strip() else None


def choices(record: dict[str, Any], field: str) -> list[tuple[str, str]]:
    """Pairs of label and text of the choices in a field; empty if it holds neither a list of texts nor ARC's object.

    ARC's object is `{"text": [...], "label": [...]}`. The labels of a list are A, B, C, ...
    """
    value = record.get(field)
    value = value if isinstance(value, dict) else {"text": value}
    found, labels = value.get("text"), value.get("label", ascii_uppercase)
    if not isinstance(found, list) or not all(isinstance(each, str) or is_finite_number(each) for each in found):
        return []
    if "label" not in value:
        labels = labels[: len(found)]
    if len(labels) != len(found) or not all(isinstance(label, str) for label in labels):
        raise RecordError(field, f"has labels {labels!r:.60} for {len(found)} choices; expected a text for each")
    return [(label, as_text(each)) for label, each in zip(labels, found, strict=True)]


def labelled(label: str, choice: str) -> str:
    """A choice after its label, which some data sets have written in front of it already."""
    return choice if re.match(rf"\(?{re.escape(label)}[).:]", choice) else f"{label}. {choice}"


def with_history(record: dict[str, Any], prompt: Prompt) -> Prompt:
    """The prompt behind the earlier turns in `history`: pairs of what the user and the assistant said, or messages.

    A `history` without any text, such as one of token ids, is no conversation.
    """
    history = record.get("history")
    if not any(texts_in(history)):
        return prompt
    if isinstance(history, list) and all(isinstance(turn, dict) for turn in history):
        return [*conversation(record, "history"), *as_messages(prompt)]
    is_history = isinstance(history, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in history)
    if not is_history or not all(isinstance(each, str) for turn in history for each in turn):
        raise RecordError("history", f"expected a list of pairs of texts, or of messages, got {history!r:.60}")
    turns = [{"user": user, "assistant": assistant} for user, assistant in history]
    earlier = [{"role": role, "content": content} for turn in turns for role, content in turn.items()]
    return [*earlier, *as_messages(prompt)]


def with_system(record: dict[str, Any], prompt: Prompt) -> Prompt:
    """The prompt behind the record's system prompt, unless it opens with one."""
    field = next((name for name in SYSTEM_FIELDS if record.get(name)), None)
    if field is None or not text(record, field).strip() or as_messages(prompt)[0]["role"] == "system":
        return prompt
    return [{"role": "system", "content": record[field]}, *as_messages(prompt)]


def parse_response(record: dict[str, Any]) -> str:
    """The response to train on: the closing message of the conversation, else the first of RESPONSE_FIELDS.

    Raises:
        RecordError: there is no response, or it cannot be read.
    """
    record = usual_names(record)
    closing = closing_message(record)
    if closing is not None and closing.get("tool_calls"):
        raise RecordError(conversation_field(record), "the closing message calls a tool; only text is learnt")
    if closing is not None:
        return closing["content"]
    for field in RESPONSE_FIELDS:
        value = answer_in(record, field)
        if isinstance(value, list):
            messages = conversation(record, field)
            if len(messages) != 1 or messages[0]["role"] != "assistant":
                raise RecordError(field, f"expected one message of the assistant, got {messages!r:.60}")
            return messages[0]["content"]
        if value is not None:
            return as_text(value) if is_finite_number(value) else text({field: value}, field)
    raise missing(record, RESPONSE_FIELDS)


def parse_answer(record: dict[str, Any]) -> Any:
    """The answer that responses are compared with: the first of ANSWER_FIELDS; None if there is none."""
    record = usual_names(record)
    return next((value for field in ANSWER_FIELDS if (value := answer_in(record, field)) is not None), None)


def answer_in(record: dict[str, Any], field: str) -> Any:
    """The answer in a field: the label of a choice that is given by its index, the first of SQuAD's answers."""
    value = lookup(record, field)
    if field == "answers.text" and isinstance(value, list):
        return value[0] if value else None
    offered = next((found for name in CHOICE_FIELDS if (found := choices(record, name))), [])
    if field != "answer" or not offered or not is_finite_number(value):
        return value
    labels, contents = zip(*offered, strict=True)
    if as_text(value) not in labels and value in range(len(labels)):
        return labels[int(value)]
    if as_text(value) not in (*labels, *contents):
        raise RecordError(field, f"{value}, with {len(labels)} choices; expected an index from 0, a label or a choice")
    return as_text(value)


def is_choice(record: dict[str, Any]) -> bool:
    """Whether a record asks for one of several choices."""
    return any(choices(record, field) for field in CHOICE_FIELDS)


def closing_message(record: dict[str, Any]) -> dict[str, Any] | None:
    """The closing message of a record's conversation, if it is the assistant's."""
    field = conversation_field(record)
    closing = conversation(record, field)[-1] if field else None
    return closing if closing and closing["role"] == "assistant" else None


def conversation_field(record: dict[str, Any]) -> str | None:
    """The field of the conversation that a record consists of; None if its prompt and response are apart."""
    has_prompt = any(name in record for name in ("prompt", "instruction", "question"))
    if has_prompt and any(name in record for name in ("response", "completion")):
        return None
    return next((field for field in CONVERSATION_FIELDS if field in record), None)


def missing(record: dict[str, Any], fields: Collection[str]) -> RecordError:
    """The error of a record that has none of these fields."""
    [first, *_] = fields
    return RecordError(
        first, f"missing; expected one of {', '.join(fields)}; the record has {', '.join(record)!s:.200}"
    )


def unused_fields(record: dict[str, Any], *used: Any) -> list[str]:
    """The fields with a text of several words that is not in what was used.

    A copy of all that was used, such as Alpaca's `text`, does not count.

    Args:
        used: texts, and JSON values that hold texts.
    """
    known = "\n".join(texts_in(used))
    held = {name: [each for each in texts_in(record[name]) if len(each.split()) > 1] for name in record}
    unused = [
        name
        for name, contents in held.items()
        if contents and name not in OWN_FIELDS and not any(each.strip() in known for each in contents)
    ]
    taken = [each for name, contents in held.items() if name not in (*unused, *OWN_FIELDS) for each in contents]
    return [name for name in unused if not taken or not all(each in held[name][0] for each in taken)]


def texts_in(value: Any) -> Iterator[str]:
    """The texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from texts_in(each)
    elif isinstance(value, list | tuple) and not all(type(each) in (int, float) for each in value):
        for each in value:
            yield from texts_in(each)


def warn_of_unused(source: Any, fields: Collection[str]) -> None:
    """Names the fields of a source whose text is not used."""
    if fields:
        name = f"{source}: " if isinstance(source, str | Path) else ""
        logger.warning(printable(f"{name}text in fields that are not used: {', '.join(sorted(fields))}"))
