"""Prompt sets: prompts, and how to tell a right response from a wrong one."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from tabom.data.encoding import Prompt, as_messages
from tabom.data.sources import read_records
from tabom.data.trajectories import (
    PROMPT_FIELDS,
    RecordError,
    closing_answer,
    is_finite_number,
    number_text,
    parse_prompt,
    text,
    texts,
)
from tabom.data.verifiers import Answer, Check, Verdict, as_verifier, make_verifier, settings_of, verifier_for

TEST_FIELDS = ("tests", "test_list", "test", "input_output", "public_test_cases")
ANSWER_FIELDS = ("answer", "ground_truth_answer", "solution")
CAPITALISED = ("Problem", "Question", "Solution", "Answer")
MBPP_TASK = "{text}\n\nYour code should pass these tests:\n\n{tests}"


@dataclass(frozen=True)
class PromptSet:
    """Prompts, one right answer to each (None where none is known), and the check of (prompt, answer, response).

    `verifier` is the name of the check, for those who read what it judged.
    """

    name: str
    prompts: list[Prompt]
    answers: list[Answer]
    check: Check = field(default_factory=lambda: make_verifier("exact"))
    verifier: str = "exact"

    def fingerprint(self) -> str:
        """Name, size and a digest: whether two prompt sets are the same."""
        digest = hashlib.sha256(json.dumps([self.prompts, self.answers]).encode()).hexdigest()
        return f"{self.name}, {len(self.prompts)} prompts, sha256 {digest[:16]}"

    def first(self, count: int) -> "PromptSet":
        """The first `count` of them."""
        return replace(self, prompts=self.prompts[:count], answers=self.answers[:count])

    def share(self, rank: int, size: int) -> "PromptSet":
        """Every `size`-th of them, from the `rank`-th on."""
        return replace(self, prompts=self.prompts[rank::size], answers=self.answers[rank::size])

    def verdicts(self, indices: Sequence[int], responses: Sequence[str]) -> list[Verdict]:
        """A verdict on each response to the prompt of the same place in `indices`; several are judged at once."""
        cases = zip(indices, responses, strict=True)
        verifier = as_verifier(self.check)
        return verifier.verify_all([(self.prompts[index], self.answers[index], text) for index, text in cases])

    def is_hopeless(self, index: int, beginning: str) -> bool:
        """Whether no response to prompt `index` that begins so can be right."""
        return as_verifier(self.check).is_hopeless(self.answers[index], beginning)

    def is_correct(self, index: int, response: str) -> bool:
        """Whether `response` answers prompt `index`; one that nobody could check does not."""
        return self.verdicts([index], [response])[0].correct is True


class Item(NamedTuple):
    """What a record asks, what a response is held against, and the verifier that its shape asks for, if any."""

    prompt: Prompt
    answer: Answer
    verifier: str | None


@dataclass(frozen=True)
class PromptReader:
    """How a record becomes a prompt and an answer.

    Args:
        prompt_column, answer_column: fields to take instead of those of the known shapes.
        template: text with `{prompt}` in it that every prompt is put into.
        system_prompt: opens every conversation that has none of its own.
        verifier: the name of the verifier that will judge: `code` takes a record's tests, the others its answer;
            None: tests where there are some.
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
            if self.answer_column not in record:
                raise RecordError(self.answer_column, f"missing; the record has {', '.join(record)}")
            answer = record[self.answer_column]
            verifier = verifier_for([answer])
        return Item(self.dress(prompt), answer if is_tests(answer) else as_text(answer), verifier)

    def recognise(self, record: dict[str, Any]) -> Item:
        """GSM8K, MATH-500, PRM12K and the like, HumanEval, MBPP, APPS, LiveCodeBench, conversations, and our own."""
        record = {name.lower(): record[name] for name in CAPITALISED if name in record} | record  # AIME's
        tests = self.tests_of(record)
        if isinstance(record.get("question"), dict):  # PRM800K keeps problem and answer one level down
            record = {**record["question"], **record}
            del record["question"]
        if self.prompt_column is not None:
            if self.prompt_column not in record:
                raise RecordError(self.prompt_column, f"missing; the record has {', '.join(record)}")
            prompt = record[self.prompt_column]
            prompt = parse_prompt({"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt})
        elif "test_list" in record and ("text" in record or "prompt" in record):
            task = text(record, "text" if "text" in record else "prompt")
            prompt = MBPP_TASK.replace("{text}", task).replace("{tests}", "\n".join(texts(record, "test_list")))
        elif "problem" in record and not any(name in record for name in PROMPT_FIELDS):
            prompt = parse_prompt({"prompt": record["problem"]})
        elif "question_content" in record:  # LiveCodeBench
            prompt = with_starter_code(record, "question_content")
        elif record.get("starter_code") and isinstance(record.get("question"), str):  # APPS
            prompt = with_starter_code(record, "question")
        else:
            prompt = parse_prompt(record)
        if tests is not None:
            return Item(prompt, tests, "code")
        answer = next((record[name] for name in ANSWER_FIELDS if name in record), closing_solution(record))
        return Item(prompt, answer, "math" if "problem" in record else None)

    def tests_of(self, record: dict[str, Any]) -> dict[str, Any] | None:
        """The fields of a record that the code verifier reads, if it is the one that judges."""
        is_judged_by_tests = self.verifier in (None, "code") or str(self.verifier).startswith("python:")
        if not is_judged_by_tests or not has_tests(record):
            return None
        names = (*TEST_FIELDS, "entry_point", "test_setup_code", "test_imports")
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


def with_starter_code(record: dict[str, Any], field: str) -> str:
    """A question, and the code that its answer begins with, if there is some."""
    question = text(record, field)
    return f"{question}\n\n{text(record, 'starter_code')}" if record.get("starter_code") else question


def has_tests(record: dict[str, Any]) -> bool:
    """Whether a record has tests that a program could be run against."""
    return any(record.get(name) for name in TEST_FIELDS)


def is_tests(answer: Answer) -> bool:
    """Whether an answer is tests rather than text."""
    return isinstance(answer, list | dict)


def as_text(answer: Answer) -> str | None:
    """Whatever an answer is, as text."""
    if is_finite_number(answer):
        return number_text(answer)
    return None if answer is None else str(answer)


def closing_solution(record: dict[str, Any]) -> str | None:
    """The closing message of the assistant, if it is a solution with a marked final answer."""
    closing = closing_answer(record)
    return closing if closing is not None and verifier_for([closing]) == "math" else None


def read_prompts(
    source: str | Path,
    *,
    split: str | None = None,
    config_name: str | None = None,
    reader: PromptReader | None = None,
    verifier_settings: dict[str, Any] | None = None,
    skip_invalid: bool = False,
) -> tuple[PromptSet, int]:
    """Reads prompts and what their responses are held against, from a file, a folder or the hub.

    Without a verifier in `reader` the shape of the data chooses: tests ask for `code`, GSM8K's and MATH's solutions for
    `math`, any other answers for `exact`.

    Args:
        source, split, config_name: see `tabom.data.sources.read_records`.
        verifier_settings: of `make_verifier`.

    Returns:
        The prompts in order, and how many records were invalid.

    Raises:
        ValueError: a record is invalid (names file, line and field), or there is no prompt.
    """
    reader = reader or PromptReader()
    items: list[Item] = []
    invalid = untested = 0
    for place, record in read_records(source, split, config_name):
        try:
            if isinstance(record, ValueError):
                raise record
            items.append(reader.read(record))
        except ValueError as error:
            if not skip_invalid:
                raise ValueError(f"{source}, {place}: {error} (--skip-invalid leaves such lines out)") from error
            invalid += 1
            continue
        untested += has_tests(record) and not is_tests(items[-1].answer)
    if not items:
        raise ValueError(f"{source}: no valid prompt ({invalid} invalid lines)")
    if untested:
        print(f"warning: {source}: the tests of {untested} records are not used by the verifier {reader.verifier!r}")
    prompts, answers, shapes = (list(column) for column in zip(*items, strict=True))
    name = reader.verifier or choose(answers, shapes)
    if reader.verifier is None and any(answer is not None for answer in answers):
        print(f"{source}: verifier {name!r}, by the shape of the data (--verifier chooses another)")
    settings = verifier_settings or {}
    if reader.verifier is None:  # settings meant for another shape of data
        settings = {setting: value for setting, value in settings.items() if setting in settings_of(name)}
    check = make_verifier(name, **settings)
    return PromptSet(Path(source).name, prompts, answers, check, name), invalid


def choose(answers: Sequence[Answer], shapes: Sequence[str | None]) -> str:
    """The verifier that the records' shapes ask for, else the answers'."""
    asked = [shape for shape in shapes if shape is not None]
    return asked[0] if asked else verifier_for(answers)
