"""Runs inside the sandbox, given to Python as text: a program in one process, its tests in another.

`serve_program` runs the candidate's program and then does what the tests ask for. `run_tests` runs the tests, in whose
module the names that the program defines are `Remote`s (see remote.py). Names that the tests, the record's own code or
Python define are never the program's: a program that defines `abs` or `isclose` does not change what a test means.
"""

import builtins
import importlib
import importlib.util
import io
import math
import os
import sys
import types
from contextlib import suppress

from tabom.data.verifiers.remote import Gone, NothingToRun, Peer, Remote, RemoteClass

TOLERANCE = 1e-6
"""Difference of two decimal fractions, relative or absolute, that is taken for rounding."""

PRELUDE = {
    "typing": "Any Callable Deque Dict DefaultDict FrozenSet Generator Generic Iterable Iterator List Literal Mapping "
    "NamedTuple NoReturn Optional Sequence Set Tuple Type TypeVar Union",
    "collections": "Counter OrderedDict defaultdict deque namedtuple ChainMap",
    "math": "ceil comb cos fabs factorial floor gcd hypot inf isclose isqrt lcm log log10 log2 perm pi prod sin sqrt "
    "tan",
    "functools": "cache cmp_to_key lru_cache partial reduce",
    "itertools": "accumulate chain combinations combinations_with_replacement count cycle groupby islice pairwise "
    "permutations product repeat starmap takewhile zip_longest",
    "heapq": "heapify heappop heappush heappushpop heapreplace nlargest nsmallest",
    "bisect": "bisect bisect_left bisect_right insort insort_left insort_right",
    "string": "ascii_letters ascii_lowercase ascii_uppercase digits",
    "dataclasses": "dataclass field",
    "abc": "ABC abstractmethod",
    "enum": "Enum IntEnum",
    "copy": "deepcopy",
    "operator": "itemgetter attrgetter",
}
"""What LeetCode's Python and the usual harnesses import before a program, by module."""

PRELUDE_MODULES = [
    "bisect", "collections", "copy", "datetime", "functools", "heapq", "itertools", "json", "math", "operator",
    "os", "random", "re", "statistics", "string", "sys", "time", "typing",
]  # fmt: skip
ALIASES = {"np": "numpy", "pd": "pandas", "plt": "matplotlib.pyplot"}
PYTEST_PLUGINS = ("pytest_asyncio.plugin", "pytest_mock")
"""Plugins whose marks and fixtures tests of programs use."""

RUNNERS = ("pytest", "unittest")
SOLUTION_MODULES = [
    "__main__", "solution", "solutions", "program", "main", "candidate", "submission", "answer", "your_module",
]  # fmt: skip
"""Names under which tests import the program."""


def customary(names: list[str]) -> dict[str, object]:
    """The names of the prelude that are used, imported."""
    places = {name: (module, name) for module, listed in PRELUDE.items() for name in listed.split()}
    found: dict[str, object] = {}
    for name in names:
        if name in places:
            module, attribute = places[name]
            found[name] = getattr(importlib.import_module(module), attribute)
        elif name in PRELUDE_MODULES:
            found[name] = importlib.import_module(name)
        elif name in ALIASES:
            with suppress(ImportError):
                found[name] = importlib.import_module(ALIASES[name])
    return found


def names_of(code: types.CodeType) -> list[str]:
    """The names that code uses, that of its functions included."""
    inner = [name for each in code.co_consts if isinstance(each, types.CodeType) for name in names_of(each)]
    return [*code.co_names, *inner]


def execute(sources: list[str], module: types.ModuleType, filename: str) -> None:
    """Runs sources one after the other in one module, after the imports that they leave out."""
    sys.modules[module.__name__] = module
    for source in sources:
        code = compile(source, filename, "exec", dont_inherit=True)
        for name, value in customary(names_of(code)).items():
            module.__dict__.setdefault(name, value)
        exec(code, module.__dict__)


def serve_program(stream: io.BufferedRWPair) -> None:
    """Runs the program that comes first on the stream, says how that went, and does what is asked."""
    peer = Peer(stream, is_guarded=False)
    sources = peer.receive()["program"]
    module = types.ModuleType("program")
    peer.globals = module.__dict__
    output, sys.stdout = sys.stdout, io.StringIO()
    try:
        execute(sources, module, "program.py")
        reply = {}
    except BaseException as error:
        reply = {"raised": peer.describe(error)}
    sys.stdout = output
    peer.send(reply)
    peer.serve()


class Solution(types.ModuleType):
    """The program as a module that tests import from."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        return self.__dict__["look_up"](name)


def run_tests(stream: io.BufferedRWPair, job: dict) -> dict:
    """Runs a program's tests.

    Args:
        job: `program` are the sources of the other process; `tests` the source that is run here after `header`, the
            record's own code; `names` what the tests use and do not define; `entry_point` the expression that they
            call, and `calls` whether it is handed to `check`; `shadowed` names of Python's own functions by which the
            tests mean the program's; `pytest` whether the tests need it.

    Returns:
        `error`, None where all passed; `nothing` instead where there was nothing to run.
    """
    peer = Peer(stream, is_guarded=True)
    peer.own = {"tests"}
    module = types.ModuleType("tests")
    try:
        peer.send({"program": job["program"]})
        reply = peer.receive()
        if "raised" in reply:
            raise peer.exception(reply["raised"], "program")
        prepare(peer, module, job)
        execute([job["tests"]], module, "tests.py")
        if job["entry_point"] and job["calls"]:
            execute([f"check({job['entry_point']})"], module, "tests.py")
        if job["function"]:
            run_pairs(sys.modules["solution"], job["function"], job["pairs"])
        run_collected(module, job["pytest"])
    except Gone:
        return {"error": "the program ended before its tests did"}
    except NothingToRun as error:
        return {"nothing": str(error)}
    except SystemExit:
        return {"error": "ended before its tests did"}
    except BaseException as error:
        return {"error": explain(error, job["tests"])}
    return {"error": None}


def prepare(peer: Peer, module: types.ModuleType, job: dict) -> None:
    """Fills the module of the tests: the record's own code, then the program's names that are still missing."""
    needed = {*job["modules"], *(ALIASES.get(name, name) for name in job["names"] if name in (*ALIASES, *RUNNERS))}
    for name in sorted(needed - set(SOLUTION_MODULES)):
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            raise NothingToRun(f"the tests need {name}, which is not installed")
    for name in needed & set(RUNNERS):
        importlib.import_module(name).main = lambda *arguments, **named: None  # they are run afterwards

    def look_up(name: str) -> object:
        if name == "__all__":
            return job["names"]
        try:
            found = peer.ask("global", name)
        except KeyError:
            raise AttributeError(f"the program does not define {name!r}") from None
        if type(found) is RemoteClass and name[0].isupper():
            found.is_trusted = True
        return found

    for name in SOLUTION_MODULES:
        sys.modules[name] = Solution(name)
        sys.modules[name].__dict__["look_up"] = look_up
    if job["header"]:
        execute([job["header"]], module, "header.py")
    for name in job["names"]:
        if name in job["shadowed"]:
            module.__dict__[name] = look_up(name)  # Python's own must not take its place
        elif name not in module.__dict__ and not hasattr(builtins, name):
            module.__dict__.update(customary([name]))
            if name not in module.__dict__:
                with suppress(AttributeError):  # a NameError, if it is used
                    module.__dict__[name] = look_up(name)


def run_pairs(program: Solution, name: str, pairs: list) -> None:
    """Calls a function, or a method of `Solution`, with the arguments of each pair and compares what it returns."""
    function = getattr(program.Solution() if hasattr(program, "Solution") else program, name)
    for number, (arguments, expected) in enumerate(pairs, start=1):
        returned = function(*arguments)
        if not (same(returned, expected) or same([returned], expected)):
            raise AssertionError(f"test {number} of {len(pairs)}: expected {expected!r:.80}, returned {returned!r:.80}")


def same(returned: object, expected: object) -> bool:
    """Whether a result is the expected JSON: tuples are lists, keys are text, and decimal fractions are rounded."""
    if isinstance(returned, list | tuple) and isinstance(expected, list):
        return len(returned) == len(expected) and all(map(same, returned, expected))
    if isinstance(returned, dict) and isinstance(expected, dict):
        returned = {str(key): value for key, value in returned.items()}
        return returned.keys() == expected.keys() and all(same(returned[key], expected[key]) for key in expected)
    if isinstance(returned, bool) or isinstance(expected, bool):
        return returned is expected
    if isinstance(expected, float) and isinstance(returned, int | float):
        return math.isclose(returned, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return type(returned) is not Remote and bool(returned == expected)


def run_collected(module: types.ModuleType, needs_pytest: bool) -> None:
    """Runs the test functions and classes of a module as pytest and unittest would."""
    functions = [
        value
        for name, value in list(vars(module).items())
        if name.startswith("test") and isinstance(value, types.FunctionType) and value.__module__ == "tests"
    ]
    classes = [
        value
        for name, value in list(vars(module).items())
        if isinstance(value, type) and value.__module__ == "tests" and (name.startswith("Test") or is_case(value))
    ]
    if needs_pytest and (functions or classes):
        run_with_pytest(module)
        return
    cases = [each for each in classes if is_case(each)]
    if cases:
        run_with_unittest(cases)
    for function in functions:
        call(getattr(module, "setup_function", None))
        run_function(function)
        call(getattr(module, "teardown_function", None))
    for kind in classes:
        if not is_case(kind):
            run_class(kind)


def is_case(kind: type) -> bool:
    """Whether a class is a test case of unittest."""
    unittest = sys.modules.get("unittest")
    return unittest is not None and hasattr(unittest, "TestCase") and issubclass(kind, unittest.TestCase)


def run_class(kind: type) -> None:
    """Runs the test methods of a class, each on an object of its own."""
    call(getattr(kind, "setup_class", None))
    for name in [name for name in dir(kind) if name.startswith("test")]:
        instance = kind()
        call(getattr(instance, "setup_method", None))
        run_function(getattr(instance, name))
        call(getattr(instance, "teardown_method", None))
    call(getattr(kind, "teardown_class", None))


def run_function(function: types.FunctionType) -> None:
    """Runs one test, to its end if it is a coroutine."""
    result = function()
    if isinstance(result, types.CoroutineType):
        import asyncio

        asyncio.run(result)


def call(function: types.FunctionType | None) -> None:
    """Calls what prepares or clears up, where it is defined."""
    if function is not None:
        function(*[None] * (function.__code__.co_argcount - isinstance(function, types.MethodType)))


def run_with_unittest(cases: list[type]) -> None:
    """Runs test cases; the first failure is raised."""
    import unittest

    suite = unittest.TestSuite(map(unittest.defaultTestLoader.loadTestsFromTestCase, cases))
    result = unittest.TestResult()
    result.failfast = True
    suite.run(result)
    for _, text in result.failures + result.errors:
        raise AssertionError(text.strip().rpartition("\n")[2])
    if result.unexpectedSuccesses:
        raise AssertionError("a test succeeded that was expected to fail")
    if result.testsRun == len(result.skipped):
        raise NothingToRun("the tests are all skipped")


def run_with_pytest(module: types.ModuleType) -> None:
    """Runs a module that is in memory with pytest; the first failure is raised."""
    try:
        import pytest
    except ImportError as error:
        raise NothingToRun("the tests need pytest: pip install pytest (the extra code)") from error
    from _pytest.config import main
    from _pytest.python import Module

    class InMemory(Module):
        def _getobj(self) -> types.ModuleType:
            return module

    class Plugin:
        passed = 0
        failure = None

        def pytest_pycollect_makemodule(self, module_path: object, parent: object) -> object:
            return InMemory.from_parent(parent, path=module_path)

        def pytest_runtest_logreport(self, report: object) -> None:
            self.passed += report.when == "call" and report.passed
            if report.failed and self.failure is None:
                crash = getattr(report.longrepr, "reprcrash", None)
                self.failure = crash.message if crash else str(report.longrepr)

    with open("test_program.py", "w"):
        plugin = Plugin()
    disabled = ("cacheprovider", "terminal", "faulthandler", "unraisableexception")
    options = ["-x", *(f"-pno:{name}" for name in disabled)]
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # plugins that no test asks for take longer than the tests
    for name in PYTEST_PLUGINS:
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            options += ["-p", name]
    status = main([*options, "--rootdir=.", "--noconftest", "test_program.py"], plugins=[plugin])
    if plugin.failure or status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise AssertionError((plugin.failure or f"pytest ended with {status!r}").partition("\n")[0])
    if not plugin.passed:
        raise NothingToRun("pytest found no test that it could run")


def explain(error: BaseException, tests: str) -> str:
    """What was raised, and the line of the tests that raised it."""
    text = f"{type(error).__name__}: {error}".rstrip(": ").partition("\n")[0]
    line, trace = "", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "tests.py":
            line = tests.split("\n")[trace.tb_lineno - 1].strip() if trace.tb_lineno <= tests.count("\n") + 1 else ""
        trace = trace.tb_next
    return f"{text} ({line:.120})" if line else text
