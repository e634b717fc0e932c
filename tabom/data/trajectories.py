"""The trajectory record: an answer and the order in which its tokens were unmasked, one JSON object a line."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tabom.data.encoding import Prompt, encode_response
from tabom.data.sources import read_records

STEPS_BELOW = 2**31
"""Steps are int32 in the kernels."""

CONVERSATION_FIELDS = ("messages", "conversations")
PROMPT_FIELDS = ("prompt", "instruction", "question", *CONVERSATION_FIELDS)
RESPONSE_FIELDS = ("response", "completion", "output", "gen_text", "answer")

ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool", "function")}
ROLES |= {"human": "user", "gpt": "assistant"}
"""What data sets call a role, in small letters, and what chat templates do."""

SHAREGPT = {"from": "role", "value": "content"}
"""ShareGPT's names of a message's fields."""


class RecordError(ValueError):
    """A field of a record is missing or wrong; says which field, its value and what was expected."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"field {field!r}: {problem}")


@dataclass(frozen=True)
class Trajectory:
    """One answer with its decoding order.

    `decoding_order[i]` is the step (from 0) at which `response_token_ids[i]` was unmasked, -1 for never; several
    tokens may share a step. `non_ltr_positions` are the response positions unmasked before something on their
    left. `method` names how the answer was made, `data_source` where the prompt came from. `entropy` (nats) is that
    of each token when it was unmasked. `cache` is what the decoding kept between its steps (None: nothing, it was
    exact).
    """

    prompt: Prompt
    response: str
    response_token_ids: list[int]
    decoding_order: list[int]
    non_ltr_positions: list[int] | None = None
    method: str | None = None
    data_source: str | None = None
    entropy: list[float] | None = None
    cache: str | None = None

    def to_record(self) -> dict[str, Any]:
        """A JSON object of the fields that are set; conversations are written as `messages`."""
        record = {name: value for name, value in asdict(self).items() if value is not None}
        if not isinstance(self.prompt, str):
            record["messages"] = record.pop("prompt")
        return record


def parse_trajectory(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, vocab_size: int | None) -> Trajectory:
    """Reads a record in any of the published spellings (see PROMPT_FIELDS and RESPONSE_FIELDS).

    Without `response_token_ids` the response is tokenized; without `decoding_order` it decodes left to right.

    Args:
        vocab_size: token ids must be below it; None: any will do.

    Raises:
        RecordError: a field is missing, of the wrong type or length, or out of range.
    """
    prompt = parse_prompt(record)
    response = parse_response(record)
    if "response_token_ids" in record:
        token_ids = integers(record, "response_token_ids", 0, vocab_size)
    else:
        token_ids = encode_response(tokenizer, prompt, response)
    if not token_ids:
        raise RecordError("response_token_ids", "is empty; a trajectory needs at least one token")
    order = range(len(token_ids))
    if "decoding_order" in record:
        order = integers(record, "decoding_order", -1, STEPS_BELOW)
    if len(order) != len(token_ids):
        raise RecordError(
            "decoding_order",
            f"has {len(order)} steps for {len(token_ids)} response tokens; one a token expected",
        )
    non_ltr = record.get("non_ltr_positions")
    if non_ltr is not None:
        non_ltr = integers(record, "non_ltr_positions", 0, len(token_ids))
    entropy = numbers(record, "entropy", len(token_ids)) if record.get("entropy") is not None else None
    return Trajectory(
        prompt=prompt,
        response=response,
        response_token_ids=token_ids,
        decoding_order=list(order),
        non_ltr_positions=non_ltr,
        method=optional_text(record, "method"),
        data_source=optional_text(record, "data_source"),
        entropy=entropy,
        cache=record.get("cache"),
    )


def parse_prompt(record: dict[str, Any]) -> Prompt:
    """The prompt under any of its names; a closing assistant message is the response, not the prompt."""
    field = first_present(record, PROMPT_FIELDS)
    if field not in CONVERSATION_FIELDS:
        return conversation(record, field) if isinstance(record[field], list) else text(record, field)
    messages = conversation(record, field)
    prompt = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not prompt:
        raise RecordError(field, "has an answer, but nothing before it")
    return prompt


def parse_response(record: dict[str, Any]) -> str:
    """The response under any of its names, or the closing assistant message. Numbers are taken as text."""
    closing = None if any(field in record for field in RESPONSE_FIELDS) else closing_answer(record)
    if closing is not None:
        return closing
    field = first_present(record, RESPONSE_FIELDS)
    if is_finite_number(record[field]):
        return number_text(record[field])
    if not isinstance(record[field], list):
        return text(record, field)
    messages = conversation(record, field)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise RecordError(field, f"expected one message of the assistant, got {messages!r:.60}")
    return messages[0]["content"]


def number_text(number: float) -> str:
    """A number as people write it; Parquet and CSV keep whole ones beside missing ones as floats."""
    return str(int(number) if isinstance(number, float) and number.is_integer() else number)


def closing_answer(record: dict[str, Any]) -> str | None:
    """The closing message of a conversation, if it is the assistant's."""
    field = next((field for field in CONVERSATION_FIELDS if field in record), None)
    closing = conversation(record, field)[-1] if field else None
    return closing["content"] if closing and closing["role"] == "assistant" else None


def conversation(record: dict[str, Any], field: str) -> list[dict[str, str]]:
    """A field that must be a conversation, in the names of chat templates (see ROLES and SHAREGPT)."""
    messages = record[field]
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise RecordError(field, 'expected a list of {"role": ..., "content": ...} messages')
    return [parse_message(message, field) for message in messages]


def parse_message(message: dict[str, Any], field: str) -> dict[str, str]:
    """One message of a conversation. What Arrow fills with None is not there."""
    message = {name: value for name, value in message.items() if value is not None}
    if "role" not in message:
        message = {SHAREGPT.get(name, name): value for name, value in message.items()}
    if not isinstance(message.get("content"), str) or not isinstance(message.get("role"), str):
        raise RecordError(field, 'expected a list of {"role": ..., "content": ...} messages')
    check_unicode(field, message["content"])
    role = ROLES.get(message["role"].lower())
    if role is None:
        raise RecordError(field, f"role {message['role']!r:.60}: expected one of {', '.join(ROLES)}")
    return message | {"role": role}


def first_present(record: dict[str, Any], fields: tuple[str, ...]) -> str:
    """The first of `fields` that the record has."""
    for field in fields:
        if field in record:
            return field
    raise RecordError(fields[0], f"missing; expected one of {', '.join(fields)}")


def text(record: dict[str, Any], field: str) -> str:
    """A field that must be a string."""
    value = record[field]
    if not isinstance(value, str):
        raise RecordError(field, f"expected text, got {value!r:.60}")
    check_unicode(field, value)
    return value


def texts(record: dict[str, Any], field: str) -> list[str]:
    """A field that must be a list of strings."""
    values = record[field]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise RecordError(field, f"expected a list of texts, got {values!r:.60}")
    for value in values:
        check_unicode(field, value)
    return values


def optional_text(record: dict[str, Any], field: str) -> str | None:
    """A field that is a string, null or missing."""
    return None if record.get(field) is None else text(record, field)


def check_unicode(field: str, value: str) -> None:
    """JSON can spell half of a surrogate pair, which no encoding and no tokenizer takes."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RecordError(field, f"half a surrogate pair at character {error.start}") from error


def integers(record: dict[str, Any], field: str, low: int, high: int | None) -> list[int]:
    """A field that must be a list of integers in [low, high)."""
    values = record[field]
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise RecordError(field, f"expected a list of integers, got {values!r:.60}")
    for position, value in enumerate(values):
        if value < low or (high is not None and value >= high):
            bound = "" if high is None else f" and below {high}"
            raise RecordError(field, f"{value} at position {position}; expected at least {low}{bound}")
    return values


def numbers(record: dict[str, Any], field: str, count: int) -> list[float]:
    """A field that must be a list of `count` finite numbers."""
    values = record[field]
    if not isinstance(values, list) or not all(is_finite_number(value) for value in values):
        raise RecordError(field, f"expected a list of finite numbers, got {values!r:.60}")
    if len(values) != count:
        raise RecordError(field, f"has {len(values)} numbers for {count} response tokens; one a token expected")
    return [float(value) for value in values]


def is_finite_number(value: Any) -> bool:
    """Whether a JSON value is a number that a float holds."""
    if type(value) is int:
        return abs(value) < 2**1023
    return type(value) is float and isfinite(value)


def read_trajectories(
    source: Any,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    *,
    method: Sequence[str] | None = None,
    skip_invalid: bool = False,
) -> tuple[list[Trajectory], int]:
    """Reads trajectories into memory; `TabomTrainer` and `tokenize` take the same sources without doing so.

    Args:
        source: a JSONL, JSON, Parquet or CSV file, a folder of `datasets`, a hub name, a `datasets.Dataset`, or a list
            of dicts.
        vocab_size: the model's; token ids must be below it.
        method: keep only the records whose `method` field is one of these; None, or "all" among them: every record.
        skip_invalid: count and leave out the lines that do not parse, instead of raising.

    Returns:
        The trajectories in file order, and how many lines were invalid.

    Raises:
        ValueError: a line is invalid (names file, line and field), or nothing is left.
    """
    trajectories: list[Trajectory] = []
    invalid = 0
    others: Counter[str] = Counter()
    for place, record in read_records(source, default_split="train"):
        try:
            if isinstance(record, ValueError):
                raise record
            if is_of(method, record):
                trajectories.append(parse_trajectory(record, tokenizer, vocab_size))
            else:
                others[str(record.get("method"))] += 1
        except ValueError as error:
            if not skip_invalid:
                raise misplaced(source, place, error) from error
            invalid += 1
    if not trajectories:
        raise none_left(source, method, others, invalid)
    return trajectories, invalid


def is_of(method: Sequence[str] | None, record: dict[str, Any]) -> bool:
    """Whether a record is of one of these methods; None, or "all" among them: every one is."""
    return method is None or "all" in method or record.get("method") in method


def misplaced(source: Any, place: str, error: ValueError) -> ValueError:
    """What is wrong with a record, and where it stands."""
    if isinstance(source, str | Path):
        return ValueError(f"{source}, {place}: {error} (--skip-invalid leaves such lines out)")
    return ValueError(f"{place}: {error}")


def none_left(source: Any, method: Sequence[str] | None, others: Counter[str], invalid: int) -> ValueError:
    """No record is left: which there were."""
    name = source if isinstance(source, str | Path) else "data"
    found = ", ".join(f"{count} {name}" for name, count in others.items()) or "none"
    chosen = "" if not others else f" with method {' or '.join(method)}, but {found} (--method all keeps every record)"
    return ValueError(f"{name}: no valid trajectory{chosen} ({invalid} invalid lines)")


def fit_response(trajectory: Trajectory, length: int, pad_token_id: int | None = None) -> Trajectory:
    """Cuts a response off after `length` tokens; with a `pad_token_id`, also fills it up to them.

    The filling is decoded after everything else, left to right.
    """
    missing = max(length - len(trajectory.response_token_ids), 0) if pad_token_id is not None else 0
    next_step = max(trajectory.decoding_order) + 1
    positions, entropy = trajectory.non_ltr_positions, trajectory.entropy
    return replace(
        trajectory,
        response_token_ids=trajectory.response_token_ids[:length] + [pad_token_id] * missing,
        decoding_order=trajectory.decoding_order[:length] + list(range(next_step, next_step + missing)),
        non_ltr_positions=None if positions is None else [position for position in positions if position < length],
        entropy=None if entropy is None else entropy[:length] + [0.0] * missing,
    )


def non_ltr_positions(decoding_order: list[int]) -> list[int]:
    """Positions unmasked at an earlier step than some position on their left."""
    positions, latest = [], -1
    for position, step in enumerate(decoding_order):
        if 0 <= step < latest:
            positions.append(position)
        latest = max(latest, step)
    return positions
