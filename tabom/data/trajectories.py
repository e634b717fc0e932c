"""The trajectory record: an answer and the order in which its tokens were unmasked, one JSON object a line."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tabom.data.encoding import Prompt, encode_response
from tabom.data.fields import RecordError, integers, number_or_none, numbers, optional_text
from tabom.data.shapes import parse_prompt, parse_response, unused_fields, warn_of_unused
from tabom.data.sources import read_records

STEP_LIMIT = 2**31
"""Steps are int32 in the kernels."""


@dataclass(frozen=True)
class Trajectory:
    """A response with its decoding order.

    `decoding_order[i]` is the step (from 0) at which `response_token_ids[i]` was unmasked, -1 for never; several
    tokens may share a step. `non_ltr_positions` are the response positions unmasked before something on their
    left. `method` names the way the response was made, `data_source` the origin of the prompt. `entropy` (nats) is that
    of each token when it was unmasked. `cache` names the cache of the decoding (None: no cache, the decoding was
    exact).

    A policy loss needs four more: `logprob` (nats), of each token when it was unmasked, under
    softmax(logits / temperature) without top-k and top-p; that `temperature`; the `reward` of the response; and its
    `group`, a name for all responses to the same prompt.
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
    logprob: list[float] | None = None
    temperature: float | None = None
    reward: float | None = None
    group: str | None = None

    def to_record(self) -> dict[str, Any]:
        """A JSON object of the fields that are set; conversations are written as `messages`."""
        record = {name: value for name, value in asdict(self).items() if value is not None}
        if not isinstance(self.prompt, str):
            record["messages"] = record.pop("prompt")
        return record


def parse_trajectory(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, vocab_size: int | None) -> Trajectory:
    """Reads a record in any of the published shapes (see `tabom.data.shapes`).

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
        order = integers(record, "decoding_order", -1, STEP_LIMIT)
    if len(order) != len(token_ids):
        raise RecordError(
            "decoding_order",
            f"has {len(order)} steps for {len(token_ids)} response tokens; one a token expected",
        )
    non_ltr = record.get("non_ltr_positions")
    if non_ltr is not None:
        non_ltr = integers(record, "non_ltr_positions", 0, len(token_ids))
    entropy = numbers(record, "entropy", len(token_ids)) if record.get("entropy") is not None else None
    # Other programs write a number for the whole response under this name.
    logprob = numbers(record, "logprob", len(token_ids)) if isinstance(record.get("logprob"), list) else None
    if logprob is not None and max(logprob) > 0:
        raise RecordError("logprob", f"{max(logprob)}; expected logarithms of probabilities, at most 0")
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
        logprob=logprob,
        temperature=number_or_none(record, "temperature"),
        reward=parse_reward(record),
        group=record["group"] if isinstance(record.get("group"), str) else prompt_group(prompt),
    )


def parse_reward(record: dict[str, Any]) -> float | None:
    """The reward of a response; of a record that has none, 1 or 0 for its verdict `correct`; None without either."""
    if record.get("reward") is None and isinstance(record.get("correct"), bool):
        return float(record["correct"])
    return number_or_none(record, "reward")


def prompt_group(prompt: Prompt) -> str:
    """The name of the group of all responses to a prompt: a hash of its text or messages."""
    return hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()[:16]


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
    unused: set[str] = set()
    for place, record in read_records(source, default_split="train"):
        try:
            if isinstance(record, ValueError):
                raise record
            if is_of(method, record):
                trajectories.append(parse_trajectory(record, tokenizer, vocab_size))
                unused.update(unused_fields(record, trajectories[-1].prompt, trajectories[-1].response))
            else:
                others[str(record.get("method"))] += 1
        except ValueError as error:
            if not skip_invalid:
                raise misplaced(source, place, error) from error
            invalid += 1
    if not trajectories:
        raise none_left(source, method, others, invalid)
    warn_of_unused(source, unused)
    return trajectories, invalid


def is_of(method: Sequence[str] | None, record: dict[str, Any]) -> bool:
    """Whether a record's method is one of these; always True for None, or if "all" is among them."""
    return method is None or "all" in method or record.get("method") in method


def misplaced(source: Any, place: str, error: ValueError) -> ValueError:
    """An error with the place of the record in front."""
    if isinstance(source, str | Path):
        return ValueError(f"{source}, {place}: {error} (--skip_invalid leaves such lines out)")
    return ValueError(f"{place}: {error}")


def none_left(source: Any, method: Sequence[str] | None, others: Counter[str], invalid: int) -> ValueError:
    """The error if no record is left; names the methods of the records that were left out."""
    name = source if isinstance(source, str | Path) else "data"
    found = ", ".join(f"{count} {name}" for name, count in others.items()) or "none"
    chosen = "" if not others else f" with method {' or '.join(method)}, but {found} (--method all keeps every record)"
    return ValueError(f"{name}: no valid trajectory{chosen} ({invalid} invalid lines)")


def fit_response(trajectory: Trajectory, length: int, pad_token_id: int | None = None) -> Trajectory:
    """Cuts a response off after `length` tokens; with a `pad_token_id`, also pads shorter ones to this length.

    The padding gets the last decoding steps, left to right.
    """
    missing = max(length - len(trajectory.response_token_ids), 0) if pad_token_id is not None else 0
    next_step = max(trajectory.decoding_order) + 1
    positions, entropy, logprob = trajectory.non_ltr_positions, trajectory.entropy, trajectory.logprob
    return replace(
        trajectory,
        response_token_ids=trajectory.response_token_ids[:length] + [pad_token_id] * missing,
        decoding_order=trajectory.decoding_order[:length] + list(range(next_step, next_step + missing)),
        non_ltr_positions=None if positions is None else [position for position in positions if position < length],
        entropy=None if entropy is None else entropy[:length] + [0.0] * missing,
        logprob=None if logprob is None else logprob[:length] + [0.0] * missing,
    )


def response_blocks(prompt_length: int, length: int, block_size: int | None) -> list[slice]:
    """The tokens of a response in each of its blocks: token i is in block (prompt_length + i) // block_size.

    Without a block size, as with full attention, a response is one block.
    """
    if block_size is None:
        return [slice(0, length)]
    first = block_size - prompt_length % block_size
    edges = [0, *range(first, length, block_size), length]
    return [slice(*edge) for edge in pairwise(edges)]


def own_steps(decoding_order: Sequence[int]) -> list[int]:
    """The steps of these tokens, numbered from 0 among those that unmasked one of them; -1 stays -1."""
    number = {step: own for own, step in enumerate(sorted({step for step in decoding_order if step >= 0}))}
    return [number.get(step, -1) for step in decoding_order]


def non_ltr_positions(decoding_order: list[int]) -> list[int]:
    """Positions unmasked at an earlier step than some position on their left."""
    positions, latest = [], -1
    for position, step in enumerate(decoding_order):
        if 0 <= step < latest:
            positions.append(position)
        latest = max(latest, step)
    return positions
