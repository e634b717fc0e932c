"""Verifiers of plain text: the response is the answer, contains it, or a pattern finds it."""

import re

from tabom.data.encoding import Prompt
from tabom.data.verifiers.verdict import Answer, Verdict, Verifier


class Exact(Verifier):
    """The whole response is the answer, but for spaces around it."""

    def judge(self, prompt: Prompt, answer: Answer, response: str) -> Verdict:
        """Right if both texts are the same."""
        return compare(str(answer).strip(), response.strip())

    def is_hopeless(self, answer: Answer, beginning: str) -> bool:
        """Whether the texts part, spaces around them aside; nothing is hopeless without an answer."""
        expected, found = str(answer or "").strip(), beginning.lstrip()
        return expected != "" and not (expected.startswith(found) or found.rstrip() == expected)


class Contains(Verifier):
    """The answer stands somewhere in the response."""

    def judge(self, prompt: Prompt, answer: Answer, response: str) -> Verdict:
        """Right if the answer's text is found as it is."""
        found = str(answer).strip() in response
        return Verdict(found, f"{'contains' if found else 'does not contain'} {str(answer).strip()!r:.80}")


class Regex(Verifier):
    """What a pattern finds last in the response is the answer.

    Args:
        pattern: a regular expression with exactly one group.

    Raises:
        ValueError: the pattern does not parse, or has no or several groups.
    """

    def __init__(self, pattern: str) -> None:
        try:
            self.pattern = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"pattern={pattern!r}: not a regular expression: {error}") from error
        if self.pattern.groups != 1:
            raise ValueError(
                f"pattern={pattern!r}: has {self.pattern.groups} groups, expected one, as in 'answer: (.*)'"
            )

    def judge(self, prompt: Prompt, answer: Answer, response: str) -> Verdict:
        """Right if the group of the last match is the answer, but for spaces around it."""
        found = [match.group(1) for match in self.pattern.finditer(response)]
        if not found:
            return Verdict(False, f"nothing matches {self.pattern.pattern!r}")
        return compare(str(answer).strip(), (found[-1] or "").strip())


def compare(expected: str, found: str) -> Verdict:
    """Right if they are equal; says what was expected otherwise."""
    if expected == found:
        return Verdict(True, f"is {expected!r:.80}")
    return Verdict(False, f"expected {expected!r:.80}, found {found!r:.80}")
