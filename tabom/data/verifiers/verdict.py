"""What every verifier takes and gives."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from tabom.data.encoding import Prompt

Answer = Any
"""What a response is held against: text, or for code the record's tests; None where nothing is known."""


class Verdict(NamedTuple):
    """Whether a response is right, and why. `correct` is None where nobody could tell: it is then *unverified*."""

    correct: bool | None
    why: str

    @property
    def reward(self) -> float | None:
        """1 for a right response, 0 for a wrong one, None where nobody could tell."""
        return None if self.correct is None else float(self.correct)


Check = Callable[[Prompt, Answer, str], "Verdict | bool"]
"""A function of (prompt, answer, response); a plain truth value will do."""


class Verifier(ABC):
    """A function of (prompt, answer, response) that can also judge many responses at once."""

    workers = 1
    """Responses that are judged at the same time."""

    def __call__(self, prompt: Prompt, answer: Answer, response: str) -> Verdict:
        """The verdict on one response; without an answer it stays unverified."""
        if answer is None or answer == "":
            return Verdict(None, "no answer to hold it against")
        return self.judge(prompt, answer, response)

    @abstractmethod
    def judge(self, prompt: Prompt, answer: Answer, response: str) -> Verdict:
        """The verdict on one response, held against an answer that is there."""

    def is_hopeless(self, answer: Answer, beginning: str) -> bool:
        """Whether no response that begins so can be right, for sure; decoding may then give up."""
        return False

    def verify_all(self, cases: Sequence[tuple[Prompt, Answer, str]]) -> list[Verdict]:
        """A verdict for each (prompt, answer, response), in order."""
        if self.workers == 1:
            return [self(*case) for case in cases]
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(lambda case: self(*case), cases))


class Custom(Verifier):
    """Somebody's own function of (prompt, answer, response)."""

    def __init__(self, function: Check) -> None:
        self.function = function

    def __call__(self, prompt: Prompt, answer: Answer, response: str) -> Verdict:
        """The function's verdict, with or without an answer: the prompt may be all that it needs."""
        return self.judge(prompt, answer, response)

    def judge(self, prompt: Prompt, answer: Answer, response: str) -> Verdict:
        """Its verdict, or its truth value as one."""
        result = self.function(prompt, answer, response)
        if isinstance(result, tuple):
            return Verdict(*result)
        return Verdict(None if result is None else bool(result), "right" if result else "wrong")


def as_verifier(check: Check) -> Verifier:
    """A verifier as it is, and a plain function as one."""
    return check if isinstance(check, Verifier) else Custom(check)
