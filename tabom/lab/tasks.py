"""Verifiable tasks: prompts, ground-truth answers and a checker, all drawn from a seed.

Every response of a task has the same length, so that no padding is ever needed. Whether a prompt is held out
is a property of the prompt itself (a hash of its text), so training and held-out prompts cannot overlap,
whatever the seeds.
"""

import random
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Literal, NamedTuple

from tabom.data.prompts import PromptSet

Split = Literal["train", "test"]
HELD_OUT_SHARE = 10  # one prompt in ten


class Problem(NamedTuple):
    """A prompt and one right answer."""

    prompt: str
    answer: str


def is_held_out(prompt: str) -> bool:
    """Whether `prompt` belongs to the test split."""
    return zlib.crc32(prompt.encode()) % HELD_OUT_SHARE == 0


class Task(ABC):
    """A family of problems; a subclass draws one and, where several answers are right, checks one."""

    name: str
    response_length: int  # tokens, which are characters

    @abstractmethod
    def draw(self, rng: random.Random) -> Problem:
        """One problem, of either split."""

    def is_correct(self, problem: Problem, response: str) -> bool:
        """Whether `response` answers `problem`."""
        return response == problem.answer

    def stream(self, split: Split, seed: int) -> Iterator[Problem]:
        """Endless problems of one split; prompts may come back."""
        rng = random.Random(f"{self}/{split}/{seed}")
        while True:
            problem = self.draw(rng)
            if is_held_out(problem.prompt) == (split == "test"):
                yield problem

    def problems(self, count: int, split: Split, seed: int) -> list[Problem]:
        """`count` problems with distinct prompts.

        Raises:
            ValueError: `count` is below 1, or the task has too few distinct prompts.
        """
        if count < 1:
            raise ValueError(f"count={count}: expected at least 1 problem")
        found: dict[str, Problem] = {}
        for draws, problem in enumerate(self.stream(split, seed)):
            if len(found) == count:
                break
            if draws > 100 * count + 1000:
                raise ValueError(f"count={count}: task {self.name!r} has too few distinct {split} prompts")
            found.setdefault(problem.prompt, problem)
        return list(found.values())

    def prompt_set(self, count: int, split: Split, seed: int) -> PromptSet:
        """The same problems, as `tabom collect` takes them."""
        prompts, answers = zip(*self.problems(count, split, seed), strict=True)
        return PromptSet(
            self.name,
            list(prompts),
            list(answers),
            check=lambda prompt, answer, response: self.is_correct(Problem(prompt, answer), response),
            verifier=self.name,
        )


@dataclass(frozen=True)
class Addition(Task):
    """`517+289=` -> `0806`."""

    name = "addition"
    response_length = 4

    def draw(self, rng: random.Random) -> Problem:
        a, b = rng.randrange(1000), rng.randrange(1000)
        return Problem(f"{a:03d}+{b:03d}=", f"{a + b:04d}")


@dataclass(frozen=True)
class Subtraction(Task):
    """`289-517=` -> `-228`."""

    name = "subtraction"
    response_length = 4

    def draw(self, rng: random.Random) -> Problem:
        a, b = rng.randrange(1000), rng.randrange(1000)
        return Problem(f"{a:03d}-{b:03d}=", f"{a - b:+04d}")


@dataclass(frozen=True)
class Sorting(Task):
    """`sort 72914836=` -> `12346789`."""

    name = "sorting"
    response_length = 8

    def draw(self, rng: random.Random) -> Problem:
        digits = rng.choices("0123456789", k=self.response_length)
        return Problem(f"sort {''.join(digits)}=", "".join(sorted(digits)))


@dataclass(frozen=True)
class Reversing(Task):
    """`reverse badcafed=` -> `defacdab`."""

    name = "reversing"
    response_length = 8

    def draw(self, rng: random.Random) -> Problem:
        letters = "".join(rng.choices("abcdefgh", k=self.response_length))
        return Problem(f"reverse {letters}=", letters[::-1])


@dataclass(frozen=True)
class Sudoku(Task):
    """A 4x4 sudoku read row by row, dots for the empty cells; any completion that keeps the givens is right."""

    givens: int = 8
    name = "sudoku"
    response_length = 16

    def __post_init__(self) -> None:
        if not 0 <= self.givens <= 16:
            raise ValueError(f"givens={self.givens}: a 4x4 sudoku has between 0 and 16 givens")

    def draw(self, rng: random.Random) -> Problem:
        answer = rng.choice(solved_grids())
        shown = set(rng.sample(range(16), self.givens))
        puzzle = "".join(cell if i in shown else "." for i, cell in enumerate(answer))
        return Problem(f"sudoku {puzzle}=", answer)

    def is_correct(self, problem: Problem, response: str) -> bool:
        puzzle = problem.prompt.removeprefix("sudoku ").removesuffix("=")
        keeps_givens = all(given in (".", cell) for given, cell in zip(puzzle, response, strict=False))
        return len(response) == 16 and keeps_givens and is_solved_grid(response)


UNITS = (
    *(range(4 * row, 4 * row + 4) for row in range(4)),
    *(range(column, 16, 4) for column in range(4)),
    *((corner, corner + 1, corner + 4, corner + 5) for corner in (0, 2, 8, 10)),
)


def is_solved_grid(grid: str) -> bool:
    """Whether every row, column and 2x2 box of a 16-character grid holds 1, 2, 3 and 4."""
    return all({grid[cell] for cell in unit} == set("1234") for unit in UNITS)


@cache
def solved_grids() -> list[str]:
    """All 288 solved grids, built row by row."""

    def is_consistent(rows: str) -> bool:
        filled = ([rows[cell] for cell in unit if cell < len(rows)] for unit in UNITS)
        return all(len(set(cells)) == len(cells) for cells in filled)

    grids = [""]
    for _ in range(4):
        grids = [grid + "".join(row) for grid in grids for row in permutations("1234")]
        grids = [grid for grid in grids if is_consistent(grid)]
    return grids


TASKS: dict[str, type[Task]] = {task.name: task for task in (Addition, Subtraction, Sorting, Reversing, Sudoku)}


def make_task(name: str, **options: int) -> Task:
    """The task called `name`; `options` are its fields (`givens` of the sudoku).

    Raises:
        ValueError: no task has this name.
    """
    if name not in TASKS:
        raise ValueError(f"task={name!r}: expected one of {', '.join(TASKS)}")
    return TASKS[name](**options)
