"""Prompt sets: prompts, and how to tell a right response from a wrong one."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tabom.data.encoding import Prompt
from tabom.data.trajectories import parse_prompt, read_json_lines, text


def same_text(prompt: Prompt, answer: str | None, response: str) -> bool:
    """Whether the stripped texts are equal; without an answer every response counts as right."""
    return answer is None or response.strip() == answer.strip()


@dataclass(frozen=True)
class PromptSet:
    """Prompts, one right answer to each (None where none is known), and the check of (prompt, answer, response)."""

    name: str
    prompts: list[Prompt]
    answers: list[str | None]
    check: Callable[[Prompt, str | None, str], bool] = same_text

    def fingerprint(self) -> str:
        """Name, size and a digest: whether two prompt sets are the same."""
        digest = hashlib.sha256(json.dumps([self.prompts, self.answers]).encode()).hexdigest()
        return f"{self.name}, {len(self.prompts)} prompts, sha256 {digest[:16]}"

    def first(self, count: int) -> "PromptSet":
        """The first `count` of them."""
        return replace(self, prompts=self.prompts[:count], answers=self.answers[:count])

    def is_correct(self, index: int, response: str) -> bool:
        """Whether `response` answers prompt `index`."""
        return self.check(self.prompts[index], self.answers[index], response)


def read_prompts(path: str | Path, *, skip_invalid: bool = False) -> tuple[PromptSet, int]:
    """Reads a JSONL file of `prompt` (or `instruction`, `question`, `messages`) and an optional `answer`.

    Returns:
        The prompts in file order, and how many lines were invalid.

    Raises:
        ValueError: a line is invalid (names file, line and field), or there is no prompt.
    """
    prompts: list[Prompt] = []
    answers: list[str | None] = []
    invalid = 0
    for number, record in read_json_lines(path):
        try:
            if isinstance(record, ValueError):
                raise record
            prompt = parse_prompt(record)
            answer = text(record, "answer") if record.get("answer") is not None else None
        except ValueError as error:
            if not skip_invalid:
                raise ValueError(f"{path}, line {number}: {error} (--skip-invalid leaves such lines out)") from error
            invalid += 1
            continue
        prompts.append(prompt)
        answers.append(answer)
    if not prompts:
        raise ValueError(f"{path}: no valid prompt ({invalid} invalid lines)")
    return PromptSet(Path(path).name, prompts, answers), invalid
