"""Prompt sets: prompts with their answers, and the verifier that judges responses."""

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from tabom.data.encoding import Prompt, as_messages
from tabom.data.fields import RecordError, as_text, is_finite_number, lookup
from tabom.data.shapes import (
    closing_message,
    is_choice,
    parse_answer,
    parse_prompt,
    unused_fields,
    usual_names,
    warn_of_unused,
)
from tabom.data.sources import Table, in_order, open_records
from tabom.data.verifiers import Answer, Check, Verdict, as_verifier, make_verifier, settings_of, verifier_for
from tabom.data.verifiers.record_tests import read_tests

TEST_FIELDS = ("tests", "test_list", "test", "input_output", "public_test_cases")


@dataclass(frozen=True)
class PromptSet:
    """Prompts, one right answer to each (None where none is known), and the check of (prompt, answer, response).

    `verifier` is the name of the check; stores note it among their settings.
    """

    name: str
    prompts: list[Prompt]
    answers: list[Answer]
    check: Check = field(default_factory=lambda: make_verifier("exact"))
    verifier: str = "exact"

    def fingerprint(self) -> str:
        """Name, size and digest, which are equal if two prompt sets are."""
        digest = hashlib.sha256(json.dumps([self.prompts, self.answers]).encode()).hexdigest()
        return f"{self.name}, {len(self.prompts)} prompts, sha256 {digest[:16]}"

    def first(self, count: int) -> "PromptSet":
        """A prompt set of the first `count` prompts."""
        return replace(self, prompts=self.prompts[:count], answers=self.answers[:count])

    def without(self, indices: Collection[int]) -> "PromptSet":
        """A prompt set without these prompts."""
        kept = [index for index in range(len(self.prompts)) if index not in set(indices)]
        return replace(self, prompts=[self.prompts[i] for i in kept], answers=[self.answers[i] for i in kept])

    def share(self, rank: int, size: int) -> "PromptSet":
        """A prompt set of every `size`-th prompt, from index `rank` on."""
        return replace(self, prompts=self.prompts[rank::size], answers=self.answers[rank::size])

    def verdicts(self, indices: Sequence[int], responses: Sequence[str]) -> list[Verdict]:
        """A verdict on each response to the prompts at `indices`; several are judged in parallel."""
        cases = zip(indices, responses, strict=True)
        verifier = as_verifier(self.check)
        return verifier.verify_all([(self.prompts[index], self.answers[index], text) for index, text in cases])

    def is_hopeless(self, index: int, beginning: str) -> bool:
        """Whether no response to prompt `index` with this beginning can be right."""
        return as_verifier(self.check).is_hopeless(self.answers[index], beginning)

    def is_correct(self, index: int, response: str) -> bool:
        """Whether `response` to prompt `index` is right; False if it could not be checked."""
        return self.verdicts([index], [response])[0].correct is True


class Item(NamedTuple):
    """A prompt, the answer that responses are compared with, and the verifier that fits the record, if any."""

    prompt: Prompt
    answer: Answer
    verifier: str | None


@dataclass(frozen=True)
class PromptReader:
    """Reads prompts and answers from records.

    Args:
        prompt_column, answer_column: fields to take instead of those of the known shapes.
        template: text with `{prompt}` in it that every prompt is put into.
        system_prompt: opens every conversation that has none of its own.
        verifier: the name of the verifier that will judge: `code` takes a record's tests, the others its answer;
            None: the tests if the record has some.
    """

    prompt_column: str | None = None
    answer_column: str | None = None
    template: str | None = None
    system_prompt: str | None = None
    verifier: str | None = None

    def __post_init__(self) -> None:
        if self.template is not None and "{prompt}" not in self.template:
            raise ValueError(f"prompt_template={self.template!r:.60}: expected {{prompt}} in it")

    def read(self, record: dict[str, Any]) -> Item:
        """The item of a record.

        Raises:
            RecordError: there is no prompt, or a named column is missing.
        """
        prompt, answer, verifier = self.recognise(record)
        if self.answer_column is not None:
            answer = column(record, self.answer_column)
            verifier = verifier_for([answer])
        if isinstance(answer, float) and not is_finite_number(answer):
            raise RecordError(self.answer_column or "answer", f"{answer}; expected a text or a finite number")
        return Item(self.dress(prompt), answer if is_tests(answer) else as_text(answer), verifier)

    def recognise(self, record: dict[str, Any]) -> Item:
        """Reads records like those of GSM8K, MATH-500, PRM12K, HumanEval, MBPP, APPS and LiveCodeBench, or ours."""
        record = usual_names(record)
        tests = self.tests_of(record)
        if self.prompt_column is None:
            prompt = parse_prompt(record)
        else:
            prompt = column(record, self.prompt_column)
            prompt = parse_prompt({"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt})
        if tests is not None:
            check_tests(record, tests)
            return Item(prompt, tests, "code")
        answer = parse_answer(record)
        answer = closing_solution(record) if answer is None else answer
        return Item(prompt, answer, "math" if "problem" in record or is_choice(record) else None)

    def tests_of(self, record: dict[str, Any]) -> dict[str, Any] | None:
        """The fields of a record that the code verifier reads, or None if another verifier judges."""
        is_judged_by_tests = self.verifier in (None, "code") or str(self.verifier).startswith("python:")
        if not is_judged_by_tests or not has_tests(record):
            return None
        names = (*TEST_FIELDS, "entry_point", "test_setup_code", "test_imports", "code_prompt")
        tests = {name: record[name] for name in names if name in record}
        if "public_test_cases" in record and "metadata" in record:
            tests["metadata"] = record["metadata"]
        if "entry_point" in record and "prompt" in record:
            tests["prompt"] = record["prompt"]
        return tests

    def dress(self, prompt: Prompt) -> Prompt:
        """The prompt in the template, after the system prompt."""
        if self.template is not None:
            *earlier, last = as_messages(prompt)
            content = self.template.replace("{prompt}", last["content"])
            prompt = content if isinstance(prompt, str) else [*earlier, last | {"content": content}]
        if self.system_prompt is None:
            return prompt
        messages = as_messages(prompt)
        opening = [] if messages[0]["role"] == "system" else [{"role": "system", "content": self.system_prompt}]
        return [*opening, *messages]


def check_tests(record: dict[str, Any], tests: dict[str, Any]) -> None:
    """Reads a record's tests, so that one that cannot be run is named where its data are read.

    Raises:
        RecordError: names the field and what is wrong with it.
    """
    try:
        read_tests(tests)
    except ValueError as error:
        raise RecordError(next(name for name in TEST_FIELDS if record.get(name)), str(error)) from error


def column(record: dict[str, Any], field: str) -> Any:
    """A field that somebody named; raises a RecordError if it is missing."""
    value = lookup(record, field)
    if value is None:
        raise RecordError(field, f"missing; the record has {', '.join(record)}")
    return value


def has_tests(record: dict[str, Any]) -> bool:
    """Whether a record has tests for a program."""
    return any(record.get(name) for name in TEST_FIELDS)


def is_tests(answer: Answer) -> bool:
    """Whether an answer is tests rather than text."""
    return isinstance(answer, list | dict)


def closing_solution(record: dict[str, Any]) -> str | None:
    """The last message, if it is the assistant's and a solution with a marked final answer."""
    closing = closing_message(record)
    is_solution = closing is not None and verifier_for([closing["content"]]) == "math"
    return closing["content"] if is_solution else None


def read_prompts(
    source: str | Path,
    *,
    split: str | None = None,
    config_name: str | None = None,
    default_split: str = "test",
    reader: PromptReader | None = None,
    verifier_settings: dict[str, Any] | None = None,
    skip_invalid: bool = False,
) -> tuple[PromptSet, int]:
    """Reads prompts and answers from a file, a folder or the hub.

    If `reader` names no verifier, the fields of the data decide: `code` for tests, `math` for solutions like those of
    GSM8K and MATH, `exact` for any other answers. This choice and that of the split are printed.

    Args:
        source, split, config_name, default_split: see `tabom.data.sources.open_records`.
        verifier_settings: keywords of `make_verifier`.

    Returns:
        The prompts in order, and how many records were invalid.

    Raises:
        ValueError: a record is invalid (names file, line and field), or there is no prompt.
    """
    reader = reader or PromptReader()
    items: list[Item] = []
    unused: set[str] = set()
    invalid = untested = 0
    records = open_records(source, split, config_name, default_split)
    if isinstance(records, Table) and records.split is not None:
        print(f"{source}: split {records.split!r} (--split chooses another)")
    for place, record in in_order(records):
        try:
            if isinstance(record, ValueError):
                raise record
            items.append(reader.read(record))
            unused.update(unused_fields(record, items[-1].prompt, items[-1].answer))
        except ValueError as error:
            if not skip_invalid:
                raise ValueError(f"{source}, {place}: {error} (--skip_invalid leaves such lines out)") from error
            invalid += 1
            continue
        untested += has_tests(record) and not is_tests(items[-1].answer)
    if not items:
        raise ValueError(f"{source}: no valid prompt ({invalid} invalid lines)")
    if untested:
        print(f"warning: {source}: the tests of {untested} records are not used by the verifier {reader.verifier!r}")
    warn_of_unused(source, unused)
    prompts, answers, shapes = (list(column) for column in zip(*items, strict=True))
    name = reader.verifier or choose(answers, shapes)
    if reader.verifier is None and any(answer is not None for answer in answers):
        print(f"{source}: verifier {name!r}, by the shape of the data (--verifier chooses another)")
    settings = verifier_settings or {}
    if reader.verifier is None:  # drop the settings of other verifiers
        settings = {setting: value for setting, value in settings.items() if setting in settings_of(name)}
    check = make_verifier(name, **settings)
    return PromptSet(Path(source).name, prompts, answers, check, name), invalid


def choose(answers: Sequence[Answer], shapes: Sequence[str | None]) -> str:
    """The verifier that fits the records' fields, else the one that fits the answers."""
    asked = [shape for shape in shapes if shape is not None]
    return asked[0] if asked else verifier_for(answers)
