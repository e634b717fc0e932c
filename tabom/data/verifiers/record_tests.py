"""A record's tests, of whatever data set, in one shape; what is wrong with them is said when they are read."""

import ast
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from tabom.data.verifiers.code_blocks import closed, is_stub, used_names
from tabom.data.verifiers.tested_names import (
    STANDARD,
    bound_names,
    free_names,
    imported_names,
    imported_packages,
    tested_standard_names,
)
from tabom.data.verifiers.verdict import Answer

INPUT_FIELDS = ("input", "stdin")
OUTPUT_FIELDS = ("output", "expected_output", "expected", "stdout")
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
NOT_RUN = (*DEFINITIONS, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Pass)


class Tests(NamedTuple):
    """A record's tests in one shape: `source`, or `pairs` with or without a `function`.

    `source` raises where the program is wrong. `pairs` are what the program reads and what it must print, or, with
    `function`, the arguments and what the function returns. `header` is code that the program continues or needs,
    `entry_point` the function that it must define.
    """

    source: str | None = None
    pairs: Sequence[tuple[Any, Any]] = ()
    function: str | None = None
    header: str = ""
    entry_point: str | None = None

    @property
    def names(self) -> list[str]:
        """The names that the tests use and do not define: those that the program should, among them."""
        names = free_names(self.source or "") | imported_names(self.tree) | free_names(self.entry_point or "")
        return sorted(names | ({self.function, "Solution"} if self.function else set()))

    @property
    def shadowed(self) -> list[str]:
        """The names of Python's own functions that the program is asked to define, as MBPP's `sum(10, 15)`."""
        if self.entry_point is not None:
            return sorted({self.entry_point} & STANDARD)
        return sorted(tested_standard_names(self.tree, free_names(self.source or "") - bound_names(self.own_code)))

    @property
    def modules(self) -> list[str]:
        """The packages that the tests import."""
        return sorted(imported_packages(ast.parse(f"{self.own_code}\n{self.source or ''}")))

    @property
    def tree(self) -> ast.Module:
        """The syntax tree of the source."""
        return ast.parse(self.source or "")

    @property
    def calls_check(self) -> bool:
        """Whether the entry point is handed to the function `check` of the tests, as in HumanEval."""
        return self.entry_point is not None and any(
            isinstance(node, ast.FunctionDef) and node.name == "check" for node in self.tree.body
        )

    @property
    def own_code(self) -> str:
        """The header without what the program has to define: the tests' helpers, whatever the program calls so."""
        tree = ast.parse(closed(self.header))
        kept = [
            node
            for node in tree.body
            if not isinstance(node, DEFINITIONS) or not (is_stub(node) or node.name == self.entry_point)
        ]
        return "\n".join(map(ast.unparse, kept))

    @property
    def needs_pytest(self) -> bool:
        """Whether pytest has to run the tests: they have its marks or fixtures."""
        tree = ast.parse(self.source or "")
        if any(isinstance(node, ast.Attribute) and node.attr in ("mark", "fixture") for node in ast.walk(tree)):
            return True
        return any(
            isinstance(node, ast.FunctionDef) and node.name.startswith("test") and node.args.args for node in tree.body
        )

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing in the tests that could be run."""
        if self.source is None:
            return not self.pairs
        return not self.calls_check and not any(map(is_run, ast.parse(self.source).body))


def is_run(node: ast.stmt) -> bool:
    """Whether a statement of the tests is a test, or is run and may be one."""
    if isinstance(node, DEFINITIONS):
        bases = [
            base.id if isinstance(base, ast.Name) else getattr(base, "attr", "") for base in getattr(node, "bases", [])
        ]
        is_class = isinstance(node, ast.ClassDef) and (node.name.startswith("Test") or "TestCase" in bases)
        if is_class:
            return any(isinstance(each, DEFINITIONS) and each.name.startswith("test") for each in node.body)
        return not isinstance(node, ast.ClassDef) and node.name.startswith("test")
    if isinstance(node, ast.If) and "__name__" in used_names(node.test):
        return False
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call | ast.Await)
    return not isinstance(node, NOT_RUN)


def read_tests(answer: Answer) -> Tests | None:
    """The tests of a record in any of the known shapes, None where there are none.

    Raises:
        ValueError: they cannot be run, and why.
    """
    tests = recognise(answer)
    if tests is None:
        return None
    for part in ("source", "entry_point", "function"):
        try:
            ast.parse(getattr(tests, part) or "0", mode="exec" if part == "source" else "eval")
            free_names(getattr(tests, part) or "")  # refuses what a syntax tree may hold, as two equal arguments
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            problem = getattr(error, "msg", None) or str(error) or type(error).__name__
            raise ValueError(f"{part} {getattr(tests, part)!r:.80} is no Python: {problem}") from error
    if unknown := decorators(tests.tree) & free_names(tests.source or "") - STANDARD - bound_names(tests.own_code):
        raise ValueError(f"tests are decorated with {', '.join(sorted(unknown))}, which they neither define nor import")
    return tests


def decorators(tree: ast.Module) -> set[str]:
    """The names in the decorators of tests: a program that defined them could have any test pass."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, DEFINITIONS) and node.name.lower().startswith("test")]
    return {name for node in nodes for each in node.decorator_list for name in used_names(each)}


def recognise(answer: Answer) -> Tests | None:
    """The tests of a record, as yet unread."""
    if isinstance(answer, str):
        if not answer.strip():
            return None
        return recognise(parse_json(answer)) if is_json(answer) else Tests(source=answer)
    if isinstance(answer, list):
        return recognise_list(answer)
    if not isinstance(answer, dict):
        return None
    header = answer.get("test_setup_code") or "\n".join(as_list(answer.get("test_imports") or [], "test_imports"))
    entry_point = answer.get("entry_point") or None
    if entry_point:
        prompt = answer.get("code_prompt") or answer.get("prompt")
        header = prompt if isinstance(prompt, str) and is_code(prompt) else header
    if answer.get("test") and entry_point:
        return Tests(source=answer["test"], header=header, entry_point=entry_point)
    if answer.get("public_test_cases"):
        return recognise_livecodebench(answer["public_test_cases"], answer.get("metadata") or "{}")
    if "inputs" in answer and "outputs" in answer:
        return recognise_columns(answer, header)
    for field in ("tests", "test_list", "test", "input_output"):
        if answer.get(field):
            tests = recognise(answer[field])
            return tests and tests._replace(header=tests.header or header, entry_point=tests.entry_point or entry_point)
    return None


def is_json(text: str) -> bool:
    """Whether a text is meant as JSON rather than as code."""
    return text.lstrip().startswith(("{", "["))


def is_code(text: str) -> bool:
    """Whether a prompt is code to be continued, rather than a task in words."""
    return re.search(r"^[ \t]*(?:async +)?(?:def|class|import|from) +\w", text, re.MULTILINE) is not None


def recognise_list(answer: list) -> Tests | None:
    """Asserts as MBPP's `test_list`, or pairs of input and output."""
    if not answer:
        return None
    if all(isinstance(each, str) for each in answer):
        return Tests(source="\n".join(answer))
    pairs = []
    for number, each in enumerate(answer, start=1):
        given = first_of(each, INPUT_FIELDS)
        expected = first_of(each, OUTPUT_FIELDS)
        if given is None or expected is None:
            raise ValueError(f"test {number} is {each!r:.80}; expected text, or an object with 'input' and 'output'")
        pairs.append((as_text(given), as_text(expected)))
    return Tests(pairs=pairs)


def first_of(each: Any, fields: Sequence[str]) -> Any:
    """The first of these fields that an object has."""
    return next((each[field] for field in fields if field in each), None) if isinstance(each, dict) else None


def recognise_columns(answer: dict, header: str) -> Tests:
    """APPS: `inputs` and `outputs`; with `fn_name` arguments and results instead of text in and out."""
    inputs, outputs = as_list(answer["inputs"], "inputs"), as_list(answer["outputs"], "outputs")
    if len(inputs) != len(outputs):
        raise ValueError(f"'inputs' has {len(inputs)} entries and 'outputs' {len(outputs)}; expected as many")
    function = answer.get("fn_name")
    if not function:
        return Tests(pairs=[(as_text(given), as_text(out)) for given, out in zip(inputs, outputs, strict=True)])
    for number, arguments in enumerate(inputs, start=1):
        as_list(arguments, f"inputs[{number - 1}]")
    return Tests(pairs=list(zip(inputs, outputs, strict=True)), function=str(function), header=header)


def recognise_livecodebench(cases: Any, metadata: Any) -> Tests | None:
    """Its public tests: text in and out, or a function's arguments (JSON, one a line) and what it returns (JSON)."""
    cases = as_list(parse_json(cases) if isinstance(cases, str) else cases, "public_test_cases")
    if not cases:
        return None
    if not isinstance(cases[0], dict) or cases[0].get("testtype") != "functional":
        return recognise_list(cases)
    metadata = parse_json(metadata) if isinstance(metadata, str) else metadata
    if not isinstance(metadata, dict) or not metadata.get("func_name"):
        raise ValueError("'metadata' names no 'func_name', which tests of a function need")
    recognise_list(cases)  # refuses a test without its fields
    inputs = [[parse_json(argument) for argument in case["input"].split("\n") if argument.strip()] for case in cases]
    outputs = [parse_json(case["output"]) for case in cases]
    return Tests(pairs=list(zip(inputs, outputs, strict=True)), function=str(metadata["func_name"]))


def parse_json(text: str) -> Any:
    """What JSON says, or a ValueError of one line."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{text!r:.80} is no JSON: {error!s:.120}") from error


def as_list(value: Any, name: str) -> list:
    """A list, or a ValueError that names what should be one."""
    if not isinstance(value, list):
        raise ValueError(f"{name!r} is {value!r:.80}; expected a list")
    return value


def as_text(value: Any) -> str:
    """What stands on standard input or output; some data sets keep it as a list of lines."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)
