"""Prompt sets: the problems of a lab task, or a JSONL file of prompts with an optional `answer`."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from tabom.lab.tasks import Problem, Split, Task
from tabom.trajectories import Prompt, parse_prompt, read_json_lines, text


@dataclass(frozen=True)
class PromptSet:
    """Prompts with a way to check responses.

    `answers[i]` is one right answer, None where none is known: then every response counts as right.
    """

    name: str
    prompts: list[Prompt]
    answers: list[str | None]
    task: Task | None = None

    def fingerprint(self) -> str:
        """Name, size and a digest: whether two prompt sets are the same."""
        digest = hashlib.sha256(json.dumps([self.prompts, self.answers]).encode()).hexdigest()
        return f"{self.name}, {len(self.prompts)} prompts, sha256 {digest[:16]}"

    def is_correct(self, index: int, response: str) -> bool:
        """Whether `response` answers prompt `index`: by the task's checker, else by equality of stripped text."""
        if self.task is not None:
            return self.task.is_correct(Problem(self.prompts[index], self.answers[index]), response)
        answer = self.answers[index]
        return answer is None or response.strip() == answer.strip()


def task_prompts(task: Task, count: int, split: Split, seed: int) -> PromptSet:
    """`count` problems of a lab task."""
    problems = task.problems(count, split, seed)
    return PromptSet(task.name, [p.prompt for p in problems], [p.answer for p in problems], task)


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
