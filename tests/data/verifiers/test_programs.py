"""Programs against their tests, and programs against the machine."""

import json
import os
import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest

from tabom.data.verifiers import make_verifier, sandbox
from tabom.data.verifiers.programs import Code

SQUARE = "def f(x):\n    return x * x\n"
NAUGHT = "def f(x):\n    return 0\n"
TESTS = ["assert f(2) == 4", "assert f(3) == 9"]
HUMANEVAL = {
    "prompt": 'from typing import List\n\ndef total(numbers: List[int]) -> int:\n    """The sum."""\n',
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n",
    "entry_point": "total",
}
SEPARATED = {  # LiveCodeBench: JSON arguments, one a line; a string may hold what ends lines elsewhere
    "public_test_cases": json.dumps([{"input": '"a\u2028b\x85"\n2\n', "output": "10", "testtype": "functional"}]),
    "metadata": '{"func_name": "f"}',
}
PAIRS = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7"]}


@pytest.fixture(params=["bubblewrap", "limits alone"])
def code(request, monkeypatch):
    """The verifier with a sandbox, and with limits alone."""
    isolated = request.param == "bubblewrap"
    if isolated and sandbox.find_bubblewrap() is None:
        pytest.skip("no working bubblewrap on this machine")
    if not isolated:
        monkeypatch.setattr("tabom.data.verifiers.programs.find_bubblewrap", lambda: None)
        if os.getuid() == 0 and os.path.exists("/usr/bin/python3"):  # one that others than root can read
            monkeypatch.setattr("sys.executable", "/usr/bin/python3")
    try:
        return Code(timeout=30, allow_code_execution=True)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    "answer, response",
    [
        (TESTS, SQUARE),
        ("\n".join(TESTS), f"Here:\n```python\n{SQUARE}```\nIt squares."),
        (TESTS, f"```\ndef f(x): return x\n```\nBetter:\n```py\n{SQUARE}"),
        ({"test_list": ["assert r(4) == 2"], "test_setup_code": "import math"}, "def r(x): return math.sqrt(x)"),
        ({"test_list": ["assert math.pi"], "test_imports": ["import math"]}, "pass"),
        (HUMANEVAL, "    return sum(numbers)\n"),
        (HUMANEVAL, "```python\ndef total(numbers: List[int]) -> int:\n    return sum(numbers)\n```"),
        (PAIRS, "```python\nif __name__ == '__main__':\n    print(sum(map(int, input().split())), '')\n```"),
        (json.dumps(PAIRS), "import sys\nfor line in sys.stdin: print(sum(map(int, line.split())))"),
        ({"input_output": {"fn_name": "f", "inputs": [[1], [3]], "outputs": [1, 9]}}, SQUARE),
        ([{"input": "a", "output": "A"}], "print(input().upper())"),
        (
            {"fn_name": "f", "inputs": [[1, 2]], "outputs": [[3]]},
            "class Solution:\n    def f(self, a, b): return a + b",
        ),
        ({"fn_name": "f", "inputs": [[1, 2]], "outputs": [[2, 1]]}, "def f(a, b): return b, a"),
        (SEPARATED, "def f(text, times): return len(text * times) + 2"),
        ([{"input": "", "output": "a\r\nb\n"}], "print('a')\nprint('b')"),
    ],
)
def test_right_programs(code, answer, response):
    verdict = code("prompt", answer, response)
    assert verdict.correct is True, verdict.why


@pytest.mark.parametrize(
    "answer, response, why",
    [
        (TESTS, "def f(x): return x", "AssertionError"),
        ([{"input": "", "output": "a\nb"}], r"print('a\u2028b')", r"printed 'a\u2028b"),
        (TESTS, "def f(x) return x", "SyntaxError"),
        (TESTS, SQUARE + "import sys; sys.exit(0)", "ended before"),
        (TESTS, SQUARE + "import os; os._exit(0)", "ended before"),
        (TESTS, "def f(x): raise SystemExit", "ended before"),
        (TESTS, SQUARE + "print(open(__file__).read())", "__file__"),
        (TESTS, NAUGHT + "import builtins; builtins.compile = lambda *a: (lambda: 0).__code__", "AssertionError"),
        (TESTS, NAUGHT + "import builtins; builtins.exec = lambda *a: None", "AssertionError"),
        (TESTS, NAUGHT + "import builtins; builtins.AssertionError = SystemExit", "AssertionError"),
        (HUMANEVAL, "    return 0\n", "AssertionError"),
        ({"fn_name": "f", "inputs": [[1], [3]], "outputs": [1, 8]}, SQUARE, "AssertionError"),
        (PAIRS, "print(3)", "test 2 of 2"),
        (PAIRS, "print(1 / 0)", "test 1 of 2: ZeroDivisionError"),
    ],
)
def test_wrong_programs(code, answer, response, why):
    verdict = code("prompt", answer, response)
    assert verdict.correct is False and why in verdict.why


@pytest.mark.parametrize("rest", ["", "\n\ndef check(candidate):\n    pass\n\n\ncheck(total)\n", "\n\nIt adds them."])
def test_a_body_may_be_followed_by_tests_or_words(code, rest):
    assert code("prompt", HUMANEVAL, "    return sum(numbers)\n" + rest).correct is True
    assert code("prompt", HUMANEVAL, "    return 0\n" + rest).correct is False


@pytest.mark.parametrize("decorator", ["given", "given(1)", "pt.given"])
def test_a_program_cannot_decorate_the_tests(code, decorator):
    tests = f"@{decorator}\ndef test_f(x=3):\n    assert f(x) == 9\n"
    verdict = code("prompt", tests, "def given(*arguments): return lambda test: None\npt = None\ndef f(x): return x")
    assert verdict.correct is None and "decorated with" in verdict.why


@pytest.mark.parametrize("answer", [None, [], {}, {"test": ""}])
def test_without_tests_a_program_is_unverified(code, answer):
    assert code("prompt", answer, SQUARE).correct is None


HOSTILE = {
    "infinite loop": "while True: pass",
    "sleep": "import time; time.sleep(1000)",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "10 GB": "x = bytearray(10 * 2**30)",
    "10 GB in pieces": "x = []\nwhile True: x.append(bytearray(2**20))",
    "kills its parent": "import os; os.kill(os.getppid(), 9)",
    "kills its group": "import os; os.killpg(0, 9)",
    "fills the disk": "f = open('a', 'wb')\nwhile True: f.write(bytes(2**20))",
    "floods the output": "while True: print('x' * 2**20)",
    "ignores signals": "import signal\nfor s in (2, 14, 15): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
    "leaves its session": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
    "        os.closerange(0, 3)\n        time.sleep(1000)\n    os._exit(0)\nraise SystemExit",
    "threads that sleep": "import threading, time\n"
    "for _ in range(9): threading.Thread(target=time.sleep, args=(1000,)).start()\nraise SystemExit",
    "waits for nobody": "import os; os.mkfifo('p'); open('p')",
    "kills everything": "import os; os.kill(-1, 9); os._exit(0)",
    "closes its connection": "import os; os.closerange(0, 64)",
    "ends at exit": "import atexit, os; atexit.register(os._exit, 0); raise SystemExit",
    "raises its limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "endless recursion": "import sys; sys.setrecursionlimit(10**9)\ndef g(): g()\ng()",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_fail_in_time_and_leave_nothing(code, monkeypatch, name):
    monkeypatch.setattr(sandbox, "MARK", f"TABOM_TEST_{os.getpid()}")
    patient = code.limits
    code.limits = replace(patient, seconds=2)
    assert code("prompt", TESTS, SQUARE + HOSTILE[name]).correct is False
    code.limits = patient
    deadline = time.monotonic() + 30
    while (left := processes_with(sandbox.MARK)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, "nothing of it runs any more"
    assert code("prompt", TESTS, SQUARE).correct is True


def test_memory_is_limited_before_it_is_used(code):
    """Two GiB fit into this machine and not into the limit of one."""
    assert "MemoryError" in code("prompt", TESTS, SQUARE + "x = bytearray(2 * 2**30)").why


def test_the_kernel_ends_these_programs_first_and_they_inherit_no_secret(code, monkeypatch):
    monkeypatch.setenv("SECRET", "precious")
    check = "import os; assert open('/proc/self/oom_score_adj').read() == '1000\\n' and 'SECRET' not in os.environ\n"
    stolen = (
        "import glob\nfor p in glob.glob('/proc/[0-9]*/environ'):\n    try: assert 'precious' not in open(p).read()\n"
    )
    verdict = code("prompt", TESTS, f"{SQUARE}{check}{stolen}    except OSError: pass\n")
    assert verdict.correct is True, verdict.why


def processes_with(variable):
    """The processes that have this variable in their environment."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if variable in environment.read_text(errors="replace"):
                found.append(environment.parent.name)
    return found


@pytest.mark.skipif(sandbox.find_bubblewrap() is None, reason="no working bubblewrap on this machine")
def test_the_sandbox_shows_nothing_of_the_machine_and_no_network(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("precious")
    code = Code(timeout=5)
    for attempt in (
        f"open({str(secret)!r}).read()",
        f"open({str(secret)!r}, 'w')",
        "open('/etc/passwd').read()",
        "open('/usr/x', 'w')",
        "import socket; socket.create_connection(('127.0.0.1', 1), 1)",
        "import os; assert len([p for p in os.listdir('/proc') if p.isdigit()]) > 3",
        "import os; os.setuid(0)",
    ):
        verdict = code("prompt", TESTS, f"{SQUARE}{attempt}\n")
        assert verdict.correct is False, attempt
    assert secret.read_text() == "precious"
    interfaces = f"{SQUARE}import socket; assert [name for _, name in socket.if_nameindex()] in ([], ['lo'])"
    assert code("prompt", TESTS, interfaces).correct is True


def test_without_a_sandbox_consent_is_needed(monkeypatch):
    monkeypatch.setattr("tabom.data.verifiers.programs.find_bubblewrap", lambda: None)
    with pytest.raises(ValueError, match="--allow_code_execution"):
        make_verifier("code")


def test_a_bubblewrap_that_does_not_work_is_none(monkeypatch, tmp_path):
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    sandbox.find_bubblewrap.cache_clear()
    assert sandbox.find_bubblewrap() is None
    sandbox.find_bubblewrap.cache_clear()


def test_several_programs_run_at_once():
    if sandbox.find_bubblewrap() is None:
        pytest.skip("no working bubblewrap on this machine")
    cases = [("q", TESTS, SQUARE if i % 2 else "def f(x): return 0") for i in range(8)]
    verdicts = Code(workers=4).verify_all(cases)
    assert [verdict.correct for verdict in verdicts] == [False, True] * 4


def test_a_program_that_takes_all_its_processes_leaves_another_one_its_own(code):
    """Linux counts the processes of a user on the whole machine, in whatever sandbox they are."""
    greedy = Thread(target=code, args=("prompt", TESTS, SQUARE + HOSTILE["fork bomb"]))
    code.limits = replace(code.limits, seconds=4)
    greedy.start()
    time.sleep(1.5)
    verdict = code("prompt", TESTS, SQUARE)
    greedy.join()
    assert verdict.correct is True, verdict.why


def test_the_group_is_killed_with_its_children():
    process = subprocess.Popen(["sh", "-c", "sleep 1000 & wait"], start_new_session=True)
    sandbox.kill_group(process)
    assert process.returncode == -9
