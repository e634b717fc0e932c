"""The tests and the program in two processes: nothing passes that solves nothing, and honest programs still pass."""

import pytest

from tabom.data.verifiers import sandbox
from tabom.data.verifiers.programs import Code

TESTS = ["assert f(2) == 4", "assert f(3) == 9"]
CLOSE = ["assert abs(f(2) - 1.4) < 1e-6", "assert abs(f(3) - 1.7) < 1e-6"]


@pytest.fixture(scope="module")
def code():
    if sandbox.find_bubblewrap() is None:
        pytest.skip("no working bubblewrap on this machine")
    return Code(timeout=60)


EVIL = """
class Evil{base}:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __lt__
    def __hash__(self): return 0
    def __sub__(self, other): return 0.0
    def __rsub__(self, other): return 0.0
    def __contains__(self, other): return True
    def __bool__(self): return True
    def __abs__(self): return 0.0
    def __round__(self, digits=0): return self
"""

FRAMES = """
import sys, gc, os, re
def f(x):
    frame = sys._getframe()
    while frame:
        for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):
            found = re.search(r"f\\({}\\) == (\\d+)".format(x), repr(value))
            if found: return int(found[1])
        frame = frame.f_back
    for value in gc.get_objects():
        try: found = re.search(r"f\\({}\\) == (\\d+)".format(x), str(value))
        except Exception: continue
        if found and "re.search" not in str(value): return int(found[1])
"""

MEMORY = """
import os, re
def f(x):
    for pid in os.listdir("/proc"):
        if pid.isdigit() and int(pid) != os.getpid():
            for place in ("fd/0", "environ", "cmdline", "mem"):
                try:
                    text = open(f"/proc/{pid}/{place}", "rb").read(10**7)
                except OSError:
                    continue
                found = re.search(rb"f\\(%d\\) == (\\d+)" % x, text)
                if found: return int(found[1])
    for descriptor in range(256):
        try: text = os.pread(descriptor, 10**7, 0)
        except OSError: continue
        found = re.search(rb"f\\(%d\\) == (\\d+)" % x, text)
        if found: return int(found[1])
"""

FORGES = """
import sys
frame = sys._getframe()
while frame and "peer" not in frame.f_locals: frame = frame.f_back
peer = frame.f_locals["peer"]
def f(x):
    {}
"""

OWN_VERDICT = """
import os, signal
def f(x):
    for pid in filter(str.isdigit, os.listdir("/proc")):
        for number in range(20):
            try: os.write(os.open(f"/proc/{pid}/fd/{number}", os.O_WRONLY), b'{"error": null}')
            except OSError: pass
    os.kill(os.getppid(), signal.SIGKILL)
"""

CHEATS = {
    "always equal": (TESTS, EVIL.format(base="") + "def f(x): return Evil()"),
    "an int that is always equal": (TESTS, EVIL.format(base="(int)") + "def f(x): return Evil(0)"),
    "a float that is always close": (CLOSE, EVIL.format(base="(float)") + "def f(x): return Evil(0)"),
    "an object that is always close": (CLOSE, EVIL.format(base="") + "def f(x): return Evil()"),
    "a list that is always equal": (["assert f(1) == [1]"], EVIL.format(base="(list)") + "def f(x): return Evil()"),
    "a text that is always equal": (["assert f(1) == 'a'"], EVIL.format(base="(str)") + "def f(x): return Evil()"),
    "contains everything": (["assert 5 in f(1)"], EVIL.format(base="") + "def f(x): return Evil()"),
    "in everything": (["assert f(1) in [1, 2]"], EVIL.format(base="") + "def f(x): return Evil()"),
    "less than everything": (["assert 1 < f(1) < 3"], EVIL.format(base="") + "def f(x): return Evil()"),
    "mock.ANY": (TESTS, "from unittest.mock import ANY\ndef f(x): return ANY"),
    "a mock": (CLOSE, "from unittest.mock import MagicMock\ndef f(x): return MagicMock()"),
    "reads frames": (TESTS, FRAMES),
    "reads memory and files": (TESTS, MEMORY),
    "defines abs": (CLOSE, "def abs(x): return 0\ndef f(x): return 0"),
    "defines isclose": (
        ["assert math.isclose(f(1), 5)"],
        "class math:\n    isclose = lambda *a: True\ndef f(x): return 0",
    ),
    "defines math": (
        ["import math", "assert math.isclose(f(1), 5)"],
        "import sys, types\nmath = sys.modules['math'] = types.SimpleNamespace(isclose=lambda *a: True)\n"
        "def f(x): return 0",
    ),
    "defines check": (
        {"test": "def check(candidate):\n    assert candidate(1) == 2", "entry_point": "f"},
        "def check(candidate): pass\ndef f(x): return 0",
    ),
    "defines the tests": (
        "def test_f():\n    assert f(1) == 2",
        "def test_f(): pass\ndef f(x): return 0",
    ),
    "a helper of the prompt": (
        {
            "prompt": "import math\n\ndef poly(x):\n    return x - 3\n\ndef root():\n    '''The root of poly.'''\n",
            "test": "def check(candidate):\n    assert abs(poly(candidate())) < 1e-6",
            "entry_point": "root",
        },
        "def poly(x): return 0\ndef root(): return 0",
    ),
    "skips": (
        "import unittest\nclass T(unittest.TestCase):\n    def test_f(self): self.assertEqual(f(1), 2)",
        "import unittest\ndef f(x): raise unittest.SkipTest",
    ),
    "skips by another name": (
        "import unittest\nclass T(unittest.TestCase):\n    def test_f(self): self.assertEqual(f(1), 2)",
        "import unittest\nclass S(unittest.SkipTest): pass\ndef f(x): raise S",
    ),
    "skips in pytest": (
        "import pytest\n@pytest.mark.parametrize('x', [1])\ndef test_f(x): assert f(x) == 2",
        "import pytest\ndef f(x): pytest.skip('no')",
    ),
    "leaves pytest": (
        "import pytest\n@pytest.mark.parametrize('x', [1])\ndef test_f(x): assert f(x) == 2",
        "import pytest\ndef f(x): pytest.exit('no', 0)",
    ),
    "ends the loop": (["for a, b in zip(map(f, [1, 2]), [3, 4]): assert a == b"], "def f(x): raise StopIteration"),
    "exits": (TESTS, "import os\ndef f(x): os._exit(0)"),
    "raises SystemExit": (TESTS, "def f(x): raise SystemExit(0)"),
    "raises KeyboardInterrupt": (TESTS, "def f(x): raise KeyboardInterrupt"),
    "calls eval over there": (
        TESTS,
        FORGES.format("return peer.ask('call', eval, ['4 if True else 0'], {})"),
    ),
    "asks for a frame over there": (
        ["assert f(lambda: 5) == 'secret'"],
        "def f(g): return g.__globals__['__builtins__']",
    ),
    "asks for the globals of a function": (
        ["answer = 77", "assert f(lambda: 5) == answer"],
        "def f(g): return g.__globals__['answer']",
    ),
    "forges the reply": (TESTS, FORGES.format("peer.send({'returned': None, 'error': None}); import os; os._exit(0)")),
    "forges a builtin function": (["assert f(1)(5) == 5"], FORGES.format("return eval")),
    "replaces what encodes": (
        TESTS,
        FORGES.format("pass") + "type(peer).encode = lambda self, value: {'builtin': 'eval'}",
    ),
    "patches json": (TESTS, "import json\njson.dumps = lambda *a, **k: '{\"returned\": 4}'\ndef f(x): return 0"),
    "a true type": (["assert isinstance(f(1), list)"], "class L:\n    __class__ = list\ndef f(x): return L()"),
    "returns what it was called with": (["assert f([1, 2]) == [2, 1]"], "def f(x): return x"),
    "writes to the outputs": (
        TESTS,
        "import os\nfor i in range(3, 64):\n    try: os.write(i, b'{\"error\": null}')\n    except OSError: pass\nos._exit(0)",
    ),
    "nothing defined": (TESTS, "x = 1"),
    "nothing for pytest": ("def test_add():\n    assert add(1, 2) == 3", "x = 1"),
    "nothing for unittest": (
        "import unittest\nclass TestAdd(unittest.TestCase):\n    def test_add(self):\n        self.assertEqual(add(1, 2), 3)",
        "x = 1",
    ),
    "an enumeration": (
        TESTS,
        "import enum\nclass E(enum.Enum):\n    A = 1\n    def __eq__(s, o): return True\ndef f(x): return E.A",
    ),
    "a dict that is always equal": (
        ["assert f(1) == {'a': 1}"],
        EVIL.format(base="(dict)") + "def f(x): return Evil()",
    ),
    "a key that is always equal": (
        ["assert f(1)['b'] == 1"],
        EVIL.format(base="(str)") + "def f(x): return {Evil('a'): 1}",
    ),
    "a set of what is always equal": (["assert f(1) == {1}"], EVIL.format(base="(int)") + "def f(x): return {Evil(0)}"),
    "inside a list": (["assert f(1) == [4]"], EVIL.format(base="") + "def f(x): return [Evil()]"),
    "inside a tuple": (["assert f(1) == (4, 5)"], EVIL.format(base="") + "def f(x): return (Evil(), Evil())"),
    "yielded": (["assert list(f(1)) == [4]"], EVIL.format(base="") + "def f(x): yield Evil()"),
    "from a method": (
        ["v = V()", "assert v.norm() == 5", "assert abs(v.norm() - 5) < 1e-6"],
        EVIL.format(base="") + "class V:\n    def norm(self): return Evil()",
    ),
    "an attribute": (["v = V()", "assert v.x == 5"], EVIL.format(base="") + "class V:\n    x = Evil()"),
    "unittest's assertEqual": (
        "import unittest\nclass T(unittest.TestCase):\n    def test_f(self): self.assertEqual(f(1), 2)",
        EVIL.format(base="") + "def f(x): return Evil()",
    ),
    "unittest's assertAlmostEqual": (
        "import unittest\nclass T(unittest.TestCase):\n    def test_f(self): self.assertAlmostEqual(f(1), 2.5)",
        EVIL.format(base="") + "def f(x): return Evil()",
    ),
    "pytest's approx": (
        "import pytest\ndef test_f():\n    assert f(1) == pytest.approx(2.5)",
        EVIL.format(base="") + "def f(x): return Evil()",
    ),
    "numpy's allclose": (
        "import numpy as np\nassert np.allclose(f(1), [2.5])",
        EVIL.format(base="") + "def f(x): return Evil()",
    ),
    "pairs": ({"fn_name": "f", "inputs": [[1]], "outputs": [4]}, EVIL.format(base="") + "def f(x): return Evil()"),
    "a class in a function's place": (
        "assert abs(sq(1.5) - 2.25) < 1e-9",
        EVIL.format(base="") + "class sq(Evil):\n    def __init__(self, x): pass",
    ),
    "a number's class in a function's place": (
        "assert abs(sq(1.5) - 2.25) < 1e-9",
        "class sq(float):\n    def __sub__(self, other): return 0.0",
    ),
    "a verdict of its own": (TESTS, OWN_VERDICT),
    "an exception that is a function": (
        TESTS,
        "class E(Exception): pass\nE.__module__, E.__qualname__ = 'builtins', 'exec'\n"
        "def f(x): raise E('import os\\nfor n in range(3, 20):\\n try: os.write(n, b\\'{\"error\": null}\\')\\n except OSError: pass\\nos._exit(0)')",
    ),
    "nothing to run": (
        TESTS,
        "class NothingToRun(BaseException): pass\nNothingToRun.__module__ = 'tabom.data.verifiers.remote'\n"
        "def f(x): raise NothingToRun('skip me')",
    ),
    "a method returns its object": (
        "assert abs(Solution().area(2) - 12.57) < 0.01",
        EVIL.format(base="") + "class Solution(Evil):\n    def area(self, r): return self",
    ),
    "a method returns its object, compared": (
        "assert 12.5 < Solution().area(2) < 12.6",
        EVIL.format(base="") + "class Solution(Evil):\n    def area(self, r): return self",
    ),
    "an object that ends loops": (
        "p = P()\nassert all(map(lambda x: p.value == x, [1, 2]))",
        "class P:\n    @property\n    def value(self): raise StopIteration",
    ),
    "a text that ends loops": (
        "p = P()\nassert all(map(lambda x: str(p) == x, ['a']))",
        "class P:\n    def __str__(self): raise StopIteration",
    ),
    "the tests' own module": (
        "value = 5\nassert f(1).value == value",
        "import sys, types\ndef f(x): return types.ModuleType('tests')",
    ),
    "a mock that never complains": (
        "from unittest.mock import Mock\nm = Mock()\nsend(m)\nm.get.assert_called_once_with('k')",
        "def send(m): m.get.assert_called_once_with = lambda *a: None",
    ),
    "Python's function for the program's": ("assert factorial(5) == 120", "def factorial(n): return 1"),
    "Python's function, none in the program": (["assert gcd(12, 8) == 4", "assert gcd(9, 6) == 3"], "x = 1"),
    "a builtin function, none in the program": ("assert sorted([3, 1]) == [1, 3]", "x = 1"),
    "Python's function in a method": (
        "import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        self.assertEqual(factorial(5), 120)",
        "def factorial(n): return 1",
    ),
    "Python's function as entry point": (
        {"prompt": "def factorial(n):\n", "test": "def check(f):\n    assert f(5) == 120", "entry_point": "factorial"},
        "def factorial(n): return 1",
    ),
    "Python's function by name": (
        {"fn_name": "factorial", "inputs": [[5]], "outputs": [120]},
        "def factorial(n): return 1",
    ),
    "Python's function beside another": ("assert gcd(12, 8) == 4\nassert f(2) == 4", "def f(x): return 4"),
    "a helper of Python": (
        "assert sqrt(f(16)) == 2\nassert isclose(f(2), 3)",
        "def sqrt(x): return 2\ndef isclose(*a): return True\ndef f(x): return 0",
    ),
    "pairs, true for one": ({"fn_name": "f", "inputs": [[1]], "outputs": [1]}, "def f(x): return True"),
}


@pytest.mark.parametrize("name", CHEATS)
def test_programs_that_solve_nothing_fail(code, name):
    tests, program = CHEATS[name]
    verdict = code("prompt", tests, program)
    assert verdict.correct is False, verdict.why


STACK = """
class Stack:
    '''A stack.'''
    limit = 3
    def __init__(self): self.items = []
    def push(self, item):
        if len(self.items) == self.limit: raise OverflowError('full')
        self.items.append(item)
    def pop(self): return self.items.pop()
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __contains__(self, item): return item in self.items
    def __getitem__(self, place): return self.items[place]
    def __repr__(self): return f'Stack({self.items})'
    @property
    def top(self): return self.items[-1]
    @staticmethod
    def twice(x): return 2 * x
    @classmethod
    def of(cls, *items):
        made = cls()
        for item in items: made.push(item)
        return made
"""
VECTOR = """
from dataclasses import dataclass
@dataclass(frozen=True)
class Vector:
    x: float
    y: float = 0
    def __add__(self, other): return Vector(self.x + other.x, self.y + other.y)
    def __mul__(self, k): return Vector(self.x * k, self.y * k)
    __rmul__ = __mul__
    def __neg__(self): return Vector(-self.x, -self.y)
    def __abs__(self): return (self.x ** 2 + self.y ** 2) ** .5
    def __lt__(self, other): return abs(self) < abs(other)
"""
NODES = """class ListNode:
    def __init__(self, val=0, next=None):
        self.val = val
        self.next = next

def build(values):
    head = None
    for value in reversed(values):
        head = ListNode(value, head)
    return head

def same(a, b):
    while a and b:
        if a.val != b.val:
            return False
        a, b = a.next, b.next
    return a is None and b is None
"""
REVERSE = """class Solution:
    def reverse(self, head: Optional[ListNode]) -> Optional[ListNode]:
        last = None
        while head:
            head.next, last, head = last, head, head.next
        return last
"""

HONEST = {
    "plain": (TESTS, "def f(x): return x * x"),
    "close": (CLOSE, "def f(x): return {2: 1.4, 3: 1.7}[x]"),
    "a list": (
        ["assert isinstance(f(1), list)", "assert f(1) == [1, [2, (3, None)], 'a']"],
        "def f(x): return [1, [2, (3, None)], 'a']",
    ),
    "a set": (
        ["assert set(f()) == {1, 2}", "assert f() == {2, 1}", "assert isinstance(f(), set)"],
        "def f(): return {1, 2}",
    ),
    "a frozenset of tuples": (["assert f() == frozenset({(1, 2)})"], "def f(): return frozenset({(1, 2)})"),
    "keys that are no text": (
        ["assert f() == {1: 'a', (2, 3): None, None: 1.5}"],
        "def f(): return {1: 'a', (2, 3): None, None: 1.5}",
    ),
    "a tuple": (["a, b = f()", "assert (a, b) == (1, 2) and isinstance(f(), tuple)"], "def f(): return 1, 2"),
    "bytes, complex, range": (["assert f() == (b'a', 1j, range(3))"], "def f(): return b'a', 1j, range(3)"),
    "numbers of libraries": (
        [
            "from fractions import Fraction",
            "from decimal import Decimal",
            "assert f() == [Fraction(1, 3), Decimal('1.10')]",
        ],
        "import fractions, decimal\ndef f(): return [fractions.Fraction(1, 3), decimal.Decimal('1.10')]",
    ),
    "dates": (
        ["from datetime import date, datetime, timedelta", "assert f(date(2024, 2, 28)) == date(2024, 2, 29)"],
        "import datetime\ndef f(d): return d + datetime.timedelta(days=1)",
    ),
    "Counter and deque": (
        [
            "from collections import Counter, deque",
            "assert f('aab') == Counter(a=2, b=1)",
            "assert f('aab').most_common(1) == [('a', 2)]",
            "assert g() == deque([1])",
        ],
        "from collections import *\ndef f(s): return Counter(s)\ndef g(): return deque([1])",
    ),
    "defaultdict": (
        ["assert f() == {'a': [1]}", "assert isinstance(f(), dict)"],
        "def f():\n    d = defaultdict(list)\n    d['a'].append(1)\n    return d",
    ),
    "a named tuple": (
        ["assert f().x == 1 and f() == (1, 2)"],
        "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, 2)",
    ),
    "infinity and nan": (
        ["import math", "assert f(1) == float('inf') and math.isnan(f(0))"],
        "def f(x): return float('inf') if x else float('nan')",
    ),
    "large integers": (["assert f(20000) == 3 ** 20000"], "def f(n): return 3 ** n"),
    "a generator": (
        ["assert list(f(3)) == [0, 1, 4]", "g = f(2)", "assert next(g) == 0 and next(g) == 1 and next(g, 9) == 9"],
        "def f(n):\n    for i in range(n): yield i * i",
    ),
    "an endless generator": (
        ["from itertools import islice", "assert list(islice(f(), 3)) == [0, 1, 2]"],
        "import itertools\ndef f(): return itertools.count()",
    ),
    "an iterator": (
        ["assert sorted(f([3, 1])) == [1, 3]", "assert 3 in f([3, 1])", "assert sum(f([3, 1])) == 4"],
        "def f(x): return map(int, x)",
    ),
    "views of a dict": (
        ["assert sorted(f({1: 2}).keys()) == [1]", "assert list(g({1: 2})) == [2]"],
        "def f(d): return d\ndef g(d): return d.values()",
    ),
    "in place": (["a = [3, 1, 2]", "assert f(a) is None", "assert a == [1, 2, 3]"], "def f(a): a.sort()"),
    "in place, nested": (
        [
            "board = [[1, 2], [3, 4]]",
            "row = board[0]",
            "f(board)",
            "assert board == [[3, 1], [4, 2]]",
            "assert row == [3, 1]",
        ],
        "def f(m): m[:] = [list(r) for r in zip(*m[::-1])]",
    ),
    "in place, shorter and longer": (
        ["a = [1, 2]", "f(a)", "assert a == []", "g(a)", "assert a == [1, 2, 3]"],
        "def f(a): a.clear()\ndef g(a): a.extend([1, 2, 3])",
    ),
    "in place, a dict and a set": (
        ["d, s = {'a': [1]}, {1}", "f(d, s=s)", "assert d == {'a': [1, 2], 'b': 3} and s == {1, 2}"],
        "def f(d, s):\n    d['a'].append(2)\n    d['b'] = 3\n    s.add(2)",
    ),
    "exceptions": (
        [
            "try:\n    f(-1)\n    assert False\nexcept ValueError as error:\n    assert str(error) == 'negative' and error.args == ('negative',)"
        ],
        "def f(x): raise ValueError('negative')",
    ),
    "KeyError and others": (
        [
            "for bad, kind in ((1, KeyError), (2, ZeroDivisionError), (3, TypeError)):\n    try: f(bad)\n    except kind: continue\n    assert False"
        ],
        "def f(x):\n    if x == 1: return {}[1]\n    if x == 2: return 1 / 0\n    return 1 + 'a'",
    ),
    "its own exception": (
        [
            "try:\n    f(5)\n    assert False\nexcept TooMuch as error:\n    assert error.amount == 5 and isinstance(error, ValueError)"
        ],
        "class TooMuch(ValueError):\n    def __init__(self, amount):\n        super().__init__(f'too much: {amount}')\n        self.amount = amount\ndef f(x): raise TooMuch(x)",
    ),
    "an exception of a library": (
        ["import json", "try:\n    f('{')\n    assert False\nexcept json.JSONDecodeError:\n    pass"],
        "import json\ndef f(x): return json.loads(x)",
    ),
    "pytest.raises": (
        "import pytest\ndef test_f():\n    with pytest.raises(ValueError, match='neg'): f(-1)\n    assert f(1) == 1",
        "def f(x):\n    if x < 0: raise ValueError('negative')\n    return x",
    ),
    "pytest.raises of its own": (
        "import pytest\nfrom solution import f, Bad\ndef test_f():\n    with pytest.raises(Bad): f()",
        "class Bad(Exception): pass\ndef f(): raise Bad('x')",
    ),
    "parametrize": (
        "import pytest\n@pytest.mark.parametrize('x, y', [(1, 1), (2, 4)])\ndef test_f(x, y): assert f(x) == y",
        "def f(x): return x * x",
    ),
    "a fixture": (
        "import pytest\n@pytest.fixture\ndef two(): return 2\ndef test_f(two): assert f(two) == 4",
        "def f(x): return x * x",
    ),
    "capsys": ("def test_f(capsys):\n    f('a')\n    assert capsys.readouterr().out == 'a\\n'", "def f(x): print(x)"),
    "tmp_path": (
        "def test_f(tmp_path):\n    p = tmp_path / 'x'\n    p.write_text('a b')\n    assert f(p) == 2 and f(str(p)) == 2",
        "def f(p): return len(open(p).read().split())",
    ),
    "test functions": (
        "from solution import add\n\ndef test_add():\n    assert add(1, 2) == 3\n\ndef test_more():\n    assert add(-1, 1) == 0",
        "def add(a, b): return a + b",
    ),
    "import solution": (
        "import solution\ndef test_add():\n    assert solution.add(1, 2) == 3",
        "def add(a, b): return a + b",
    ),
    "from solution import *": (
        "from solution import *\ndef test_add():\n    assert add(1, 2) == 3",
        "def add(a, b): return a + b",
    ),
    "a test class": (
        "class TestAdd:\n    def setup_method(self): self.x = 2\n    def test_add(self): assert add(1, self.x) == 3",
        "def add(a, b): return a + b",
    ),
    "unittest": (
        "import unittest\nclass TestAdd(unittest.TestCase):\n    def setUp(self): self.x = 2\n    def test_add(self): self.assertEqual(add(1, self.x), 3)\n"
        "    def test_raises(self):\n        with self.assertRaises(TypeError): add(1, None)\n        self.assertAlmostEqual(add(.1, .2), .3)\n\nif __name__ == '__main__':\n    unittest.main()",
        "def add(a, b): return a + b",
    ),
    "unittest.main": (
        "import unittest\nclass T(unittest.TestCase):\n    def test_add(self): self.assertEqual(add(1, 2), 3)\nunittest.main()",
        "def add(a, b): return a + b",
    ),
    "BigCodeBench": (
        {
            "test": "import unittest\nclass TestCases(unittest.TestCase):\n    def test_1(self):\n        self.assertEqual(task_func([1, 2]), 1.5)\n        self.assertIsInstance(task_func([1]), float)",
            "entry_point": "task_func",
            "code_prompt": "import numpy as np\ndef task_func(values):\n",
            "prompt": "Write the mean.",
        },
        "```python\nimport numpy as np\ndef task_func(values):\n    return float(np.mean(values))\n```",
    ),
    "numpy": (
        [
            "import numpy as np",
            "assert np.array_equal(f(np.array([1, 2])), np.array([2, 4]))",
            "assert f(np.eye(2)).shape == (2, 2)",
        ],
        "import numpy as np\ndef f(x): return 2 * x",
    ),
    "a class": (
        [
            "s = Stack()",
            "s.push(1)",
            "s.push('b')",
            "assert s.pop() == 'b' and len(s) == 1 and s[0] == 1",
            "assert 1 in s and 2 not in s",
            "assert list(s) == [1]",
            "assert repr(s) == 'Stack([1])'",
            "assert s.top == 1 and s.items == [1]",
        ],
        STACK,
    ),
    "its class methods and constants": (
        [
            "assert Stack.twice(2) == 4 and Stack.limit == 3",
            "s = Stack.of(1, 2)",
            "assert isinstance(s, Stack) and s.pop() == 2",
            "try:\n    Stack.of(1, 2, 3, 4)\n    assert False\nexcept OverflowError: pass",
        ],
        STACK,
    ),
    "attributes that are set": (["s = Stack()", "s.items = [1, 2]", "assert s.pop() == 2 and s.items == [1]"], STACK),
    "operators": (
        [
            "v = Vector(3, 4)",
            "assert abs(v) == 5 and v + v == Vector(6, 8) and v * 2 == 2 * v == Vector(6, 8)",
            "assert -v == Vector(-3, -4) and Vector(1) < v and (v * 2).x == 6",
            "assert len({Vector(1), Vector(1)}) == 1",
        ],
        VECTOR,
    ),
    "a function that returns objects": (
        ["assert [p.name for p in f()] == ['a', 'b']", "assert isinstance(f()[0], P)"],
        "class P:\n    def __init__(self, name): self.name = name\ndef f(): return [P('a'), P('b')]",
    ),
    "inheritance": (
        [
            "d = Dog()",
            "assert isinstance(d, Animal) and d.speak() == 'Woof' and issubclass(Dog, Animal)",
            "assert d.__class__.__name__ == 'Dog'",
        ],
        "class Animal:\n    def speak(self): return ''\nclass Dog(Animal):\n    def speak(self): return 'Woof'",
    ),
    "an enumeration": (
        [
            "assert f() == Color.RED and f() is Color.RED and Color.RED.name == 'RED' and Color['RED'].value == 1",
            "assert len(list(Color)) == 2",
        ],
        "from enum import Enum\nclass Color(Enum):\n    RED = 1\n    BLUE = 2\ndef f(): return Color.RED",
    ),
    "a list by inheritance": (
        ["s = S()", "s.append(1)", "assert s == [1] and s.last() == 1 and f() == [2]"],
        "class S(list):\n    def last(self): return self[-1]\ndef f(): return S([2])",
    ),
    "functions as arguments": (
        [
            "assert f(lambda x: x + 1, [1, 2]) == [2, 3]",
            "assert f(len, ['a', 'bc']) == [1, 2]",
            "assert f(str, [1]) == ['1']",
            "seen = []",
            "f(seen.append, [1, 2])",
            "assert seen == [1, 2]",
        ],
        "def f(g, xs): return [g(x) for x in xs]",
    ),
    "an exception through a function": (
        ["def bad(x): raise KeyError('k')", "try:\n    f(bad, [1])\n    assert False\nexcept KeyError: pass"],
        "def f(g, xs): return [g(x) for x in xs]",
    ),
    "closures": (["add = f(2)", "assert add(3) == 5 and add(4) == 6"], "def f(n): return lambda x: x + n"),
    "a decorator": (
        ["calls = []", "@f\ndef g(x):\n    calls.append(x)\n    return x", "assert g(1) == g(1) == 1 and calls == [1]"],
        "import functools\ndef f(g): return functools.lru_cache(None)(g)",
    ),
    "a context": (
        ["with f('a') as c:\n    assert c.name == 'a' and c.open", "assert not c.open"],
        "class C:\n    def __init__(self, n): self.name, self.open = n, False\n    def __enter__(self):\n        self.open = True\n        return self\n    def __exit__(self, *a): self.open = False\ndef f(n): return C(n)",
    ),
    "a context that forgives": (
        ["with f():\n    raise ValueError('x')"],
        "from contextlib import suppress\ndef f(): return suppress(ValueError)",
    ),
    "coroutines": (
        [
            "import asyncio",
            "assert asyncio.run(f(2)) == 4",
            "async def main(): return await f(3)",
            "assert asyncio.run(main()) == 9",
        ],
        "async def f(x): return x * x",
    ),
    "prints": (
        [
            "import io, contextlib",
            "out = io.StringIO()",
            "with contextlib.redirect_stdout(out): f('a')",
            "assert out.getvalue() == 'a\\n'",
        ],
        "def f(x): print(x)",
    ),
    "patched print": (
        "import unittest\nfrom unittest.mock import patch\nfrom io import StringIO\nclass T(unittest.TestCase):\n    @patch('sys.stdout', new_callable=StringIO)\n    def test_f(self, out):\n        f()\n        self.assertEqual(out.getvalue().strip(), 'hi')",
        "def f(): print('hi')",
    ),
    "patched input": (
        "from unittest.mock import patch\ndef test_f():\n    with patch('builtins.input', side_effect=['a', 'b']):\n        assert f() == 'ab'",
        "def f(): return input() + input()",
    ),
    "named arguments": (
        ["assert f(b=1, a=2) == 1 and f(*[2], **{'b': 1}) == 1 and f(a=5) == 5"],
        "def f(a, b=0): return a - b",
    ),
    "HumanEval": (
        {
            "prompt": "from typing import List\n\ndef total(numbers: List[int]) -> int:\n    '''Sum.'''\n",
            "test": "METADATA = {'author': 'x'}\n\ndef check(candidate):\n    assert candidate([1, 2]) == 3\n",
            "entry_point": "total",
        },
        "    return sum(numbers)",
    ),
    "HumanEval's helper": (
        {
            "prompt": "import math\n\ndef poly(x):\n    return x - 3\n\ndef root():\n    '''The root of poly.'''\n",
            "test": "def check(candidate):\n    assert math.fabs(poly(candidate())) < 1e-6",
            "entry_point": "root",
        },
        "    return 3.0",
    ),
    "the entry point of a method": (
        {
            "prompt": NODES,
            "test": "def check(candidate):\n    assert same(candidate(build([1, 2, 3])), build([3, 2, 1]))\n    assert candidate(None) is None",
            "entry_point": "Solution().reverse",
        },
        REVERSE,
    ),
    "linked lists made by the program": (
        {
            "prompt": NODES,
            "test": "def check(candidate):\n    assert same(candidate(head = build([1, 2])), build([2, 1]))",
            "entry_point": "Solution().reverse",
        },
        "class Solution:\n    def reverse(self, head):\n        out = None\n        while head:\n            out = ListNode(head.val, out)\n            head = head.next\n        return out",
    ),
    "LeetCode's names": (
        {"fn_name": "f", "inputs": [[[3, 1, 1]]], "outputs": [[1, 3]]},
        "class Solution:\n    def f(self, a: List[int]) -> Optional[List[int]]:\n        c, d = Counter(a), defaultdict(int)\n        heapq.heapify(a)\n        return sorted(c) if math.gcd(4, 6) == 2 and inf > 1 else None",
    ),
    "state between calls": (
        ["c = Counter2()", "assert c.next() == 1 and c.next() == 2"],
        "class Counter2:\n    n = 0\n    def next(self):\n        self.n += 1\n        return self.n",
    ),
    "MBPP's sum": (
        ["assert sum(10, 15) == 6", "assert sum(100, 150) == 93"],
        "def sum(a, b):\n    return __import__('builtins').sum(i for i in range(1, min(a, b)) if a % i == 0 and b % i == 0)",
    ),
    "an entry point called like a function of Python": (
        {
            "test": "def check(candidate):\n    assert candidate([2, 1]) == [1, 2]\n    assert sorted([1]) == [1]",
            "entry_point": "sorted",
            "prompt": "",
        },
        "def sorted(x):\n    x = list(x)\n    x.sort()\n    return x",
    ),
    "pairs with tuples, floats and keys": (
        {"fn_name": "f", "inputs": [[1]], "outputs": [[[1, [2, 0.1]], {"3": 4}]]},
        "def f(x): return (1, (2, 0.1 + 1e-9)), {3: 4}",
    ),
    "its globals": (["assert LIMIT == 5 and NAMES == ['a']"], "LIMIT = 5\nNAMES = ['a']"),
    "modules that it imported": (
        ["assert math.isclose(f(1), 1.0) and np.isclose(f(1), 1)"],
        "import math\nimport numpy as np\ndef f(x): return 1.0",
    ),
    "name and docstring": (
        ["assert f.__name__ == 'f' and f.__doc__ == 'Doc.' and callable(f)"],
        "def f():\n    'Doc.'",
    ),
    "threads": (
        [
            "from concurrent.futures import ThreadPoolExecutor",
            "with ThreadPoolExecutor(4) as p: assert list(p.map(f, range(50))) == [x * x for x in range(50)]",
        ],
        "def f(x): return x * x",
    ),
    "many calls": (["for i in range(3000): assert f(i) == i * i"], "def f(x): return x * x"),
    "it is main": (TESTS, "def f(x): return x * x\nif __name__ == '__main__':\n    print(f(int(input())))"),
    "prints while it is defined": (TESTS, "def f(x): return x * x\nprint(f(2))"),
    "dataclass": (
        ["p = P('a', [1])", "assert p.name == 'a' and p == P('a', [1]) and p != P('b', [1])"],
        "from dataclasses import dataclass, field\n@dataclass\nclass P:\n    name: str\n    tags: list = field(default_factory=list)",
    ),
    "the program's own functions of Python's names": (
        ["assert gcd(12, 8) == 4", "assert factorial(3) == 6"],
        "from math import gcd\ndef factorial(n): return 1 if n < 2 else n * factorial(n - 1)",
    ),
    "a method of Python's name": (
        {"fn_name": "factorial", "inputs": [[3]], "outputs": [6]},
        "class Solution:\n    def factorial(self, n): return 1 if n < 2 else n * self.factorial(n - 1)",
    ),
    "helpers of Python without an import": (
        "c = Counter(f(3))\nassert c == Counter([1, 1, 2])\nassert sqrt(len(f(3)) + 1) == 2\nassert len(f(3)) == factorial(3) / 2",
        "def f(n): return [1, 1, 2]",
    ),
    "a class of Python's name": (
        "c = Counter()\nc.inc()\nassert c.n == 1",
        "class Counter:\n    n = 0\n    def inc(self): self.n += 1",
    ),
    "a method that returns its object": (
        "b = B()\nassert b.add(1).add(2) is b and b.total == 3",
        "class B:\n    total = 0\n    def add(self, x): self.total += x; return self",
    ),
    "a mock with methods": (
        "from unittest.mock import Mock\nm = Mock()\nm.get.return_value = 4\nassert call(m) == 4\nm.get.assert_called_once_with('k')",
        "def call(m): return m.get('k')",
    ),
    "files in memory": (
        "import io\nf = io.StringIO('a b')\nassert words(f) == 2\nout = io.StringIO()\nsay(out)\nassert out.getvalue() == 'hi'",
        "def words(f): return len(f.read().split())\ndef say(f): f.write('hi')",
    ),
    "a pattern": (
        "import re\nassert first(re.compile('B+', re.I), 'abb') == 'bb'",
        "def first(p, s): return p.search(s).group()",
    ),
    "builtins that are mocks": (
        "from unittest.mock import patch, mock_open\n"
        "def test_print():\n    with patch('builtins.print') as p:\n        say()\n    p.assert_called_once_with('hi')\n"
        "def test_open():\n    with patch('builtins.open', mock_open(read_data='a b')):\n        assert count('x.txt') == 2\n"
        "def test_input():\n    with patch('builtins.input', return_value='5'):\n        assert ask() == 5\n"
        "def test_stdin():\n    import io\n    with patch('sys.stdin', io.StringIO('7')):\n        assert ask() == 7",
        "def say(): print('hi')\ndef ask(): return int(input('?'))\ndef count(path):\n    with open(path) as f: return len(f.read().split())",
    ),
    "a trie": (
        [
            "t = Trie()",
            "t.insert('apple')",
            "assert t.search('apple') is True",
            "assert t.search('app') is False",
            "assert t.startsWith('app')",
        ],
        "class Trie:\n    def __init__(self): self.words = set()\n    def insert(self, w): self.words.add(w)\n    def search(self, w): return w in self.words\n    def startsWith(self, p): return any(w.startswith(p) for w in self.words)",
    ),
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_pass(code, name):
    tests, program = HONEST[name]
    verdict = code("prompt", tests, program)
    assert verdict.correct is True, verdict.why


UNVERIFIED = {
    "nothing": "",
    "imports alone": "import pytest\nfrom solution import add",
    "a comment": "# no tests",
    "helpers alone": "def helper(x): return x",
    "check without entry point": "def check(candidate): assert candidate(1) == 1",
    "an empty class": "import unittest\nclass T(unittest.TestCase):\n    pass",
    "no pairs": {"inputs": [], "outputs": []},
    "uneven": {"inputs": [1], "outputs": []},
    "all skipped": "import pytest\n@pytest.mark.skip\ndef test_f(): assert f(1) == 1",
    "tests that do not parse": "assert f(1 == 1",
    "tests that need what is not installed": "import no_such_package\nassert f(1) == 1",
    "tests that no module can hold": "def g(a, a): return f(a)\nassert g(1, 1) == 1",
    "a class of the tests derived from the program's": "class B(A):\n    pass\nassert B().g() == 1",
}


@pytest.mark.parametrize("name", UNVERIFIED)
def test_what_cannot_be_run_is_unverified(code, name):
    assert code("prompt", UNVERIFIED[name], "def f(x): return x\nclass A:\n    def g(self): return 1").correct is None


FURTHER = {
    "a helper in a later block": (
        TESTS,
        "```python\ndef f(x):\n    return g(x)\n```\n\n```python\ndef g(x):\n    return x * x\n```",
        True,
    ),
    "a sentence behind the closing fence": (
        TESTS,
        "Here: ```python\ndef f(x):\n    return x * x\n``` and it works.",
        True,
    ),
    "a fence in a quotation": (TESTS, "> ```python\n> def f(x):\n>     return x * x\n> ```", True),
    "the program as the main module": ("from __main__ import f\nassert f(2) == 4", "def f(x): return x * x", True),
    "the body of a function with tests": (
        {"tests": "def check(c):\n    assert c(2) == 4", "entry_point": "f", "prompt": "def f(x):\n    'square'\n"},
        "```python\n    y = x * x\n    return y\n```",
        True,
    ),
    "a vector": (
        "v = Vector(3, 4)\nassert (v * 2).x == 6 and v + v == v * 2 and abs(v) == 5",
        "class Vector:\n    def __init__(s, x, y): s.x, s.y = x, y\n    def __mul__(s, n): return Vector(s.x * n, s.y * n)\n"
        "    def __add__(s, o): return Vector(s.x + o.x, s.y + o.y)\n    def __eq__(s, o): return (s.x, s.y) == (o.x, o.y)\n"
        "    def __abs__(s): return (s.x**2 + s.y**2) ** 0.5",
        True,
    ),
    "he chat": (
        {
            "prompt": 'from typing import List\n\n\ndef has_close(numbers: List[float], threshold: float) -> bool:\n    """ Any two closer?\n    >>> has_close([1.0, 2.0], 0.5)\n    False\n    """\n',
            "test": "\n\nMETADATA = {\n    'author': 'jt'\n}\n\n\ndef check(candidate):\n    assert candidate([1.0, 2.0, 3.9], 0.3) == False\n    assert candidate([1.0, 2.0, 2.2], 0.3) == True\n",
            "entry_point": "has_close",
        },
        "Here's the solution:\n\n```python\nfrom typing import List\n\ndef has_close(numbers: List[float], threshold: float) -> bool:\n    for i, a in enumerate(numbers):\n        for b in numbers[i + 1:]:\n            if abs(a - b) < threshold:\n                return True\n    return False\n```\n\nExample usage:\n\n```python\nprint(has_close([1.0, 2.0], 0.5))  # False\n```\nOutput:\n```\nFalse\n```",
        True,
    ),
    "he body": (
        {
            "prompt": 'from typing import List\n\n\ndef has_close(numbers: List[float], threshold: float) -> bool:\n    """ Any two closer?\n    >>> has_close([1.0, 2.0], 0.5)\n    False\n    """\n',
            "test": "\n\nMETADATA = {\n    'author': 'jt'\n}\n\n\ndef check(candidate):\n    assert candidate([1.0, 2.0, 3.9], 0.3) == False\n    assert candidate([1.0, 2.0, 2.2], 0.3) == True\n",
            "entry_point": "has_close",
        },
        "    s = sorted(numbers)\n    return any(b - a < threshold for a, b in zip(s, s[1:]))\n",
        True,
    ),
    "he body then junk": (
        {
            "prompt": 'from typing import List\n\n\ndef has_close(numbers: List[float], threshold: float) -> bool:\n    """ Any two closer?\n    >>> has_close([1.0, 2.0], 0.5)\n    False\n    """\n',
            "test": "\n\nMETADATA = {\n    'author': 'jt'\n}\n\n\ndef check(candidate):\n    assert candidate([1.0, 2.0, 3.9], 0.3) == False\n    assert candidate([1.0, 2.0, 2.2], 0.3) == True\n",
            "entry_point": "has_close",
        },
        "    s = sorted(numbers)\n    return any(b - a < threshold for a, b in zip(s, s[1:]))\n\n\nprint(has_close([1.0], 1))\n",
        True,
    ),
    "he body fence": (
        {
            "prompt": 'from typing import List\n\n\ndef has_close(numbers: List[float], threshold: float) -> bool:\n    """ Any two closer?\n    >>> has_close([1.0, 2.0], 0.5)\n    False\n    """\n',
            "test": "\n\nMETADATA = {\n    'author': 'jt'\n}\n\n\ndef check(candidate):\n    assert candidate([1.0, 2.0, 3.9], 0.3) == False\n    assert candidate([1.0, 2.0, 2.2], 0.3) == True\n",
            "entry_point": "has_close",
        },
        "```python\n    s = sorted(numbers)\n    return any(b - a < threshold for a, b in zip(s, s[1:]))\n```",
        True,
    ),
    "he lambda": (
        {
            "prompt": 'from typing import List\n\n\ndef has_close(numbers: List[float], threshold: float) -> bool:\n    """ Any two closer?\n    >>> has_close([1.0, 2.0], 0.5)\n    False\n    """\n',
            "test": "\n\nMETADATA = {\n    'author': 'jt'\n}\n\n\ndef check(candidate):\n    assert candidate([1.0, 2.0, 3.9], 0.3) == False\n    assert candidate([1.0, 2.0, 2.2], 0.3) == True\n",
            "entry_point": "has_close",
        },
        "has_close = lambda n, t: any(abs(a - b) < t for i, a in enumerate(n) for b in n[i+1:])",
        True,
    ),
    "he wrong": (
        {
            "prompt": 'from typing import List\n\n\ndef has_close(numbers: List[float], threshold: float) -> bool:\n    """ Any two closer?\n    >>> has_close([1.0, 2.0], 0.5)\n    False\n    """\n',
            "test": "\n\nMETADATA = {\n    'author': 'jt'\n}\n\n\ndef check(candidate):\n    assert candidate([1.0, 2.0, 3.9], 0.3) == False\n    assert candidate([1.0, 2.0, 2.2], 0.3) == True\n",
            "entry_point": "has_close",
        },
        "    return True\n",
        False,
    ),
    "he stub": (
        {
            "prompt": 'from typing import List\n\n\ndef has_close(numbers: List[float], threshold: float) -> bool:\n    """ Any two closer?\n    >>> has_close([1.0, 2.0], 0.5)\n    False\n    """\n',
            "test": "\n\nMETADATA = {\n    'author': 'jt'\n}\n\n\ndef check(candidate):\n    assert candidate([1.0, 2.0, 3.9], 0.3) == False\n    assert candidate([1.0, 2.0, 2.2], 0.3) == True\n",
            "entry_point": "has_close",
        },
        "```python\ndef has_close(numbers, threshold):\n    pass\n```",
        False,
    ),
    "mbpp begin": (
        {
            "test_list": ['assert remove_Occ("hello","l") == "heo"', 'assert remove_Occ("abcda","a") == "bcd"'],
            "test_setup_code": "",
        },
        "[BEGIN]\ndef remove_Occ(s, ch):\n    i, j = s.find(ch), s.rfind(ch)\n    return s if i < 0 else s[:i] + s[i+1:j] + s[j+1:]\n[DONE]",
        True,
    ),
    "mbpp no fence prose": (
        {
            "test_list": ['assert remove_Occ("hello","l") == "heo"', 'assert remove_Occ("abcda","a") == "bcd"'],
            "test_setup_code": "",
        },
        "Sure! Here is the function:\n\ndef remove_Occ(s, ch):\n    i, j = s.find(ch), s.rfind(ch)\n    return s if i < 0 else s[:i] + s[i+1:j] + s[j+1:]\n\nThis works by finding both ends.",
        True,
    ),
    "mbpp crlf": (
        {
            "test_list": ['assert remove_Occ("hello","l") == "heo"', 'assert remove_Occ("abcda","a") == "bcd"'],
            "test_setup_code": "",
        },
        "```python\r\ndef remove_Occ(s, ch):\r\n    i, j = s.find(ch), s.rfind(ch)\r\n    return s if i < 0 else s[:i] + s[i+1:j] + s[j+1:]\r\n```\r\n",
        True,
    ),
    "mbpp tests included": (
        {
            "test_list": ['assert remove_Occ("hello","l") == "heo"', 'assert remove_Occ("abcda","a") == "bcd"'],
            "test_setup_code": "",
        },
        "```python\ndef remove_Occ(s, ch):\n    i, j = s.find(ch), s.rfind(ch)\n    return s if i < 0 else s[:i] + s[i+1:j] + s[j+1:]\n\nassert remove_Occ('hello', 'l') == 'heo'\nprint('ok')\n```",
        True,
    ),
    "mbpp names with unittest": (
        {
            "test_list": ['assert remove_Occ("hello","l") == "heo"', 'assert remove_Occ("abcda","a") == "bcd"'],
            "test_setup_code": "",
        },
        "```python\nimport unittest\ndef remove_Occ(s, ch):\n    i, j = s.find(ch), s.rfind(ch)\n    return s if i < 0 else s[:i] + s[i+1:j] + s[j+1:]\n\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertEqual(remove_Occ('a','a'), '')\nif __name__ == '__main__':\n    unittest.main()\n```",
        True,
    ),
    "kodcode": (
        "from solution import Cache\nimport pytest\n\ndef test_get():\n    c = Cache(2)\n    c.put(1, 'a'); c.put(2, 'b')\n    assert c.get(1) == 'a'\n    c.put(3, 'c')\n    assert c.get(2) is None\n\ndef test_bad():\n    with pytest.raises(ValueError):\n        Cache(0)\n",
        "<think>\n```python\nclass Cache: pass\n```\n</think>\n```python\nfrom collections import OrderedDict\n\nclass Cache:\n    def __init__(self, n):\n        if n <= 0:\n            raise ValueError('capacity')\n        self.n, self.d = n, OrderedDict()\n    def get(self, k):\n        if k not in self.d: return None\n        self.d.move_to_end(k)\n        return self.d[k]\n    def put(self, k, v):\n        self.d[k] = v\n        self.d.move_to_end(k)\n        if len(self.d) > self.n: self.d.popitem(last=False)\n```",
        True,
    ),
    "kodcode wrong": (
        "from solution import Cache\nimport pytest\n\ndef test_get():\n    c = Cache(2)\n    c.put(1, 'a'); c.put(2, 'b')\n    assert c.get(1) == 'a'\n    c.put(3, 'c')\n    assert c.get(2) is None\n\ndef test_bad():\n    with pytest.raises(ValueError):\n        Cache(0)\n",
        "from collections import OrderedDict\n\nclass Cache:\n    def __init__(self, n):\n        if n <= 0:\n            raise ValueError('capacity')\n        self.n, self.d = n, OrderedDict()\n    def get(self, k):\n        if k not in self.d: return None\n        return self.d[k]\n    def put(self, k, v):\n        self.d[k] = v\n        self.d.move_to_end(k)\n        if len(self.d) > self.n: self.d.popitem(last=False)\n",
        False,
    ),
    "kodcode no error": (
        "from solution import Cache\nimport pytest\n\ndef test_get():\n    c = Cache(2)\n    c.put(1, 'a'); c.put(2, 'b')\n    assert c.get(1) == 'a'\n    c.put(3, 'c')\n    assert c.get(2) is None\n\ndef test_bad():\n    with pytest.raises(ValueError):\n        Cache(0)\n",
        "from collections import OrderedDict\n\nclass Cache:\n    def __init__(self, n):\n        if n <= 0:\n            pass\n        self.n, self.d = n, OrderedDict()\n    def get(self, k):\n        if k not in self.d: return None\n        self.d.move_to_end(k)\n        return self.d[k]\n    def put(self, k, v):\n        self.d[k] = v\n        self.d.move_to_end(k)\n        if len(self.d) > self.n: self.d.popitem(last=False)\n",
        False,
    ),
    "bcb": (
        {
            "entry_point": "task_func",
            "code_prompt": "import re\nfrom collections import Counter\ndef task_func(text, n=2):\n",
            "test": "import unittest\nclass TestCases(unittest.TestCase):\n    def setUp(self):\n        self.text = 'a b a c a b'\n    def test_case_1(self):\n        self.assertEqual(task_func(self.text), [('a', 3), ('b', 2)])\n    def test_case_2(self):\n        with self.assertRaises(TypeError):\n            task_func(5)\n    def test_case_3(self):\n        self.assertIsInstance(task_func(self.text, 1)[0], tuple)\n        self.assertDictEqual(dict(task_func('x')), {'x': 1})\n",
        },
        "```python\nimport re\nfrom collections import Counter\ndef task_func(text, n=2):\n    return Counter(re.findall(r'\\w+', text)).most_common(n)\n```",
        True,
    ),
    "bcb body": (
        {
            "entry_point": "task_func",
            "code_prompt": "import re\nfrom collections import Counter\ndef task_func(text, n=2):\n",
            "test": "import unittest\nclass TestCases(unittest.TestCase):\n    def setUp(self):\n        self.text = 'a b a c a b'\n    def test_case_1(self):\n        self.assertEqual(task_func(self.text), [('a', 3), ('b', 2)])\n    def test_case_2(self):\n        with self.assertRaises(TypeError):\n            task_func(5)\n    def test_case_3(self):\n        self.assertIsInstance(task_func(self.text, 1)[0], tuple)\n        self.assertDictEqual(dict(task_func('x')), {'x': 1})\n",
        },
        "    if not isinstance(text, str):\n        raise TypeError(text)\n    return Counter(text.split()).most_common(n)\n",
        True,
    ),
    "bcb wrong type": (
        {
            "entry_point": "task_func",
            "code_prompt": "import re\nfrom collections import Counter\ndef task_func(text, n=2):\n",
            "test": "import unittest\nclass TestCases(unittest.TestCase):\n    def setUp(self):\n        self.text = 'a b a c a b'\n    def test_case_1(self):\n        self.assertEqual(task_func(self.text), [('a', 3), ('b', 2)])\n    def test_case_2(self):\n        with self.assertRaises(TypeError):\n            task_func(5)\n    def test_case_3(self):\n        self.assertIsInstance(task_func(self.text, 1)[0], tuple)\n        self.assertDictEqual(dict(task_func('x')), {'x': 1})\n",
        },
        "import re\nfrom collections import Counter\ndef task_func(text, n=2):\n    return list(map(list, Counter(re.findall(r'\\w+', text)).most_common(n)))\n",
        False,
    ),
    "lc": (
        {
            "public_test_cases": '[{"input": "[2,7,11,15]\\n9", "output": "[0, 1]", "testtype": "functional"}, {"input": "[3,3]\\n6", "output": "[0,1]", "testtype": "functional"}]',
            "metadata": '{"func_name": "twoSum"}',
        },
        "```python\nclass Solution:\n    def twoSum(self, nums: List[int], target: int) -> List[int]:\n        seen = {}\n        for i, x in enumerate(nums):\n            if target - x in seen:\n                return [seen[target - x], i]\n            seen[x] = i\n```",
        True,
    ),
    "lc three blocks": (
        {
            "public_test_cases": '[{"input": "[2,7,11,15]\\n9", "output": "[0, 1]", "testtype": "functional"}, {"input": "[3,3]\\n6", "output": "[0,1]", "testtype": "functional"}]',
            "metadata": '{"func_name": "twoSum"}',
        },
        "Brute force:\n```python\nclass Solution:\n    def twoSum(self, nums, target):\n        return []\n```\nBetter:\n```python\nclass Solution:\n    def twoSum(self, nums: List[int], target: int) -> List[int]:\n        seen = {}\n        for i, x in enumerate(nums):\n            if target - x in seen:\n                return [seen[target - x], i]\n            seen[x] = i\n```\nComplexity: `O(n)`\n```text\nO(n)\n```",
        True,
    ),
    "lc wrong": (
        {
            "public_test_cases": '[{"input": "[2,7,11,15]\\n9", "output": "[0, 1]", "testtype": "functional"}, {"input": "[3,3]\\n6", "output": "[0,1]", "testtype": "functional"}]',
            "metadata": '{"func_name": "twoSum"}',
        },
        "class Solution:\n    def twoSum(self, nums: List[int], target: int) -> List[int]:\n        seen = {}\n        for i, x in enumerate(nums):\n            if target - x in seen:\n                return [i, seen[target - x]]\n            seen[x] = i\n",
        False,
    ),
    "lc set": (
        {
            "public_test_cases": '[{"input": "[2,7,11,15]\\n9", "output": "[0, 1]", "testtype": "functional"}, {"input": "[3,3]\\n6", "output": "[0,1]", "testtype": "functional"}]',
            "metadata": '{"func_name": "twoSum"}',
        },
        "class Solution:\n    def twoSum(self, nums, target): return {0, 1}",
        False,
    ),
    "apps": (
        {"input_output": '{"inputs": ["3\\n1 2 3\\n", "1\\n5\\n"], "outputs": ["6 2.0\\n", "5 5.0\\n"]}'},
        "```python\nimport sys\ndef main():\n    data = sys.stdin.read().split()\n    n = int(data[0])\n    a = list(map(int, data[1:1+n]))\n    print(sum(a), sum(a)/n)\nmain()\n```",
        True,
    ),
    "apps input()": (
        {"input_output": '{"inputs": ["3\\n1 2 3\\n", "1\\n5\\n"], "outputs": ["6 2.0\\n", "5 5.0\\n"]}'},
        "n = int(input())\na = [int(x) for x in input().split()]\nprint(sum(a), '%.3f' % (sum(a) / n))",
        True,
    ),
    "apps int mean": (
        {"input_output": '{"inputs": ["3\\n1 2 3\\n", "1\\n5\\n"], "outputs": ["6 2.0\\n", "5 5.0\\n"]}'},
        "n = int(input())\na = [int(x) for x in input().split()]\nprint(sum(a), 2)",
        False,
    ),
    "apps exit": (
        {"input_output": '{"inputs": ["3\\n1 2 3\\n", "1\\n5\\n"], "outputs": ["6 2.0\\n", "5 5.0\\n"]}'},
        "import sys\ndef main():\n    data = sys.stdin.read().split()\n    n = int(data[0])\n    a = list(map(int, data[1:1+n]))\n    print(sum(a), sum(a)/n)\nmain()\nsys.exit(0)\n",
        True,
    ),
    "apps os exit": (
        {"input_output": '{"inputs": ["3\\n1 2 3\\n", "1\\n5\\n"], "outputs": ["6 2.0\\n", "5 5.0\\n"]}'},
        "import os\nos.write(1, b'6 2.0\\n')\nos._exit(0)",
        False,
    ),
    "apps main class": (
        {"input_output": '{"inputs": ["3\\n1 2 3\\n", "1\\n5\\n"], "outputs": ["6 2.0\\n", "5 5.0\\n"]}'},
        "class Main:\n    def run(self):\n        n = int(input()); a = list(map(int, input().split()))\n        print(f'{sum(a)} {sum(a)/n}')\nif __name__ == '__main__':\n    Main().run()",
        True,
    ),
    "float prec": (["assert f(1) == 0.3"], "def f(x): return 0.1 + 0.2", False),
    "isclose": (["import math", "assert math.isclose(f(1), 0.3)"], "def f(x): return 0.1 + 0.2", True),
    "approx": (
        "import pytest\ndef test_f():\n    assert f(1) == pytest.approx(0.3)\n    assert [f(1)] == pytest.approx([0.3])",
        "def f(x): return 0.1 + 0.2",
        True,
    ),
    "decimal": (
        ["from decimal import Decimal", "assert f('1.10') == Decimal('2.20')"],
        "from decimal import Decimal\ndef f(s): return Decimal(s) * 2",
        True,
    ),
    "datetime": (
        ["import datetime", "assert f(2024, 2, 28) == datetime.date(2024, 2, 29)"],
        "from datetime import date, timedelta\ndef f(y, m, d): return date(y, m, d) + timedelta(days=1)",
        True,
    ),
    "fraction": (
        ["from fractions import Fraction", "assert f(1, 2) + f(1, 3) == Fraction(5, 6)"],
        "from fractions import Fraction\ndef f(a, b): return Fraction(a, b)",
        True,
    ),
    "generator": (
        ["g = f(3)", "assert next(g) == 0 and list(g) == [1, 2]", "assert sum(f(4)) == 6"],
        "def f(n):\n    for i in range(n): yield i",
        True,
    ),
    "infinite generator": (
        ["from itertools import islice", "assert list(islice(f(), 4)) == [0, 1, 1, 2]"],
        "def f():\n    a, b = 0, 1\n    while True:\n        yield a\n        a, b = b, a + b",
        True,
    ),
    "in-place sort": (["a = [3, 1, 2]", "r = f(a)", "assert r is None and a == [1, 2, 3]"], "def f(a): a.sort()", True),
    "no in-place": (
        ["a = [3, 1, 2]", "r = f(a)", "assert r == [1, 2, 3] and a == [3, 1, 2]"],
        "def f(a):\n    a.sort()\n    return a",
        False,
    ),
    "tree": (
        {
            "prompt": "class Node:\n    def __init__(self, v, l=None, r=None):\n        self.v, self.l, self.r = v, l, r\n\ndef depth(root):\n    '''Depth.'''\n",
            "test": "def check(candidate):\n    assert candidate(Node(1, Node(2), Node(3, Node(4)))) == 3\n    assert candidate(None) == 0",
            "entry_point": "depth",
        },
        "def depth(root):\n    return 0 if root is None else 1 + max(depth(root.l), depth(root.r))",
        True,
    ),
    "namedtuple": (
        ["p = make(1, 2)", "assert p.x == 1 and p == (1, 2) and p._asdict() == {'x': 1, 'y': 2}"],
        "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef make(a, b): return P(a, b)",
        True,
    ),
    "defaultdict result": (
        ["assert f('aab') == {'a': 2, 'b': 1}"],
        "from collections import defaultdict\ndef f(s):\n    d = defaultdict(int)\n    for c in s: d[c] += 1\n    return d",
        True,
    ),
    "bytes and sets": (
        ["assert f('a') == (b'a', {1}, frozenset([2]), complex(1, 2), None, ...)"],
        "def f(s): return (s.encode(), {1}, frozenset([2]), 1+2j, None, ...)",
        True,
    ),
    "nan": (
        ["import math", "assert math.isnan(f()[0]) and f()[1] == math.inf"],
        "def f(): return float('nan'), float('inf')",
        True,
    ),
    "property class": (
        [
            "c = Circle(2)",
            "assert round(c.area, 2) == 12.57",
            "c.r = 1",
            "assert round(c.area, 2) == 3.14",
            "try:\n    c.area = 3\n    assert False, 'set'\nexcept AttributeError:\n    pass",
        ],
        "import math\nclass Circle:\n    def __init__(self, r): self.r = r\n    @property\n    def area(self): return math.pi * self.r ** 2",
        True,
    ),
    "static": (
        ["assert Temp.c2f(100) == 212", "assert Temp.zero().deg == 0"],
        "class Temp:\n    def __init__(self, d): self.deg = d\n    @staticmethod\n    def c2f(c): return c * 9 / 5 + 32\n    @classmethod\n    def zero(cls): return cls(0)",
        True,
    ),
    "pandas-free regexp": (
        ["import re", "assert re.match(f(), 'ab12').group(1) == '12'"],
        "import re\ndef f(): return re.compile(r'[a-z]+(\\d+)')",
        True,
    ),
    "big int": (["assert f(100) == 2 ** 100 and f(20000) == 1 << 20000"], "def f(n): return 2 ** n", True),
    "recursion": (["assert f(900) == 900"], "def f(n): return 0 if n == 0 else 1 + f(n - 1)", True),
    "global cache": (
        ["assert f(80) == 23416728348467685"],
        "import functools\n@functools.lru_cache(maxsize=None)\ndef f(n): return n if n < 2 else f(n-1) + f(n-2)",
        True,
    ),
    "two functions": (
        ["assert enc('abc') == 'bcd'", "assert dec(enc('xyz')) == 'xyz'"],
        "First:\n```python\ndef enc(s): return ''.join(chr(ord(c) + 1) for c in s)\n```\nThen:\n```python\ndef dec(s): return ''.join(chr(ord(c) - 1) for c in s)\n```",
        True,
    ),
    "docstring with fence": (
        ["assert f(2) == 4", "assert f(3) == 9"],
        '```python\ndef f(x):\n    """Square.\n\n    ```\n    f(2)\n    ```\n    """\n    return x * x\n```',
        True,
    ),
    "indented fence": (
        ["assert f(2) == 4", "assert f(3) == 9"],
        "1. Write:\n\n   ```python\n   def f(x):\n       return x * x\n   ```\n2. Done.",
        True,
    ),
    "harmony": (
        ["assert f(2) == 4", "assert f(3) == 9"],
        "<|channel|>analysis<|message|>Let me think<|end|><|start|>assistant<|channel|>final<|message|>```python\ndef f(x):\n    return x * x\n```<|return|>",
        True,
    ),
    "unclosed think": (
        ["assert f(2) == 4", "assert f(3) == 9"],
        "<think>\n```python\ndef f(x):\n    return x * x\n```",
        False,
    ),
    "doctest": (
        ["assert f(2) == 4", "assert f(3) == 9"],
        "```python\n>>> f(2)\n4\n```\n```python\ndef f(x):\n    return x * x\n```",
        True,
    ),
    "js": (["assert f(2) == 4", "assert f(3) == 9"], "```javascript\nfunction f(x) { return x * x }\n```", False),
    "answer tag": (
        ["assert f(2) == 4", "assert f(3) == 9"],
        "<answer>\n```python\ndef f(x):\n    return x * x\n```\n</answer>",
        True,
    ),
    "empty": (["assert f(2) == 4", "assert f(3) == 9"], "", False),
    "prose": (["assert f(2) == 4", "assert f(3) == 9"], "I cannot write this function.", False),
    "cheat bool eq": (
        ["assert f(2) == 4", "assert f(3) == 9"],
        "class E(object):\n    __eq__ = lambda s, o: True\n    __class__ = int\ndef f(x): return E()",
        False,
    ),
    "cheat metaclass": (
        ["assert f(2) == 4", "assert f(3) == 9"],
        "class M(type):\n    def __eq__(c, o): return True\n    __hash__ = None\nclass E(metaclass=M): pass\ndef f(x): return E",
        False,
    ),
    "cheat radd": (
        ["assert abs(f(2) - 4) <= 1e-6"],
        "class E(float):\n    def __sub__(s, o): return 0.0\n    def __abs__(s): return 0.0\n    def __le__(s, o): return True\ndef f(x): return E(9)",
        False,
    ),
    "cheat call eq": (
        ["assert f(2) == 4", "assert f(3) == 9"],
        "class E:\n    def __eq__(s, o): return o == o\ndef f(x): return E()",
        False,
    ),
    "cheat np": (
        ["assert f(2) == 4"],
        "import numpy as np\nclass A(np.ndarray):\n    def __eq__(s, o): return True\ndef f(x): return np.zeros(1).view(A)",
        False,
    ),
    "cheat getattribute": (
        ["assert f(2).value == 4"],
        "class E:\n    def __eq__(s, o): return True\nclass V:\n    def __getattr__(s, n): return E()\ndef f(x): return V()",
        False,
    ),
    "cheat len/sorted": (
        ["assert sorted(f([2, 1])) == [1, 2]", "assert len(f([2, 1])) == 2"],
        "class L(list):\n    def __iter__(s): return iter([1, 2])\n    def __len__(s): return 2\n    def __eq__(s, o): return True\ndef f(x): return [E() for _ in x]\nclass E:\n    def __lt__(s, o): return True\n    def __eq__(s, o): return True",
        False,
    ),
    "cheat mutates expected": (
        ["want = [1, 2]", "assert f([2, 1]) == want"],
        "import gc\ndef f(x):\n    for o in gc.get_objects():\n        if isinstance(o, list) and o == [1, 2]: o[:] = [0]\n    return [0]",
        False,
    ),
    "cheat dict eq": (
        ["assert f(1) == {'a': 1}"],
        "class D(dict):\n    def __eq__(s, o): return True\n    def __ne__(s, o): return False\ndef f(x): return D()",
        False,
    ),
    "cheat str": (
        ["assert str(f(1)) == '1'", "assert repr(f(1)) == '1'"],
        "class S(str):\n    def __eq__(s, o): return True\nclass E:\n    def __str__(s): return S('x')\n    __repr__ = __str__\ndef f(x): return E()",
        False,
    ),
    "cheat unittest": (
        "import unittest\nclass T(unittest.TestCase):\n    def test_a(self): self.assertEqual(f(1), 2)\n    def test_b(self): self.assertAlmostEqual(f(1), 2)",
        "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\nunittest.TestCase.assertAlmostEqual = lambda *a: None\ndef f(x): return 0",
        False,
    ),
    "cheat pytest": (
        "import pytest\ndef test_a():\n    assert f(1) == pytest.approx(2)",
        "import pytest\npytest.approx = lambda x: 0\ndef f(x): return 0",
        False,
    ),
    "cheat raise assertion catcher": (
        ["try:\n    f(-1)\nexcept ValueError:\n    pass\nelse:\n    assert False", "assert f(1) == 1"],
        "def f(x): raise ValueError",
        False,
    ),
    "cheat settrace": (
        ["assert f(2) == 4", "assert f(3) == 9"],
        "import sys\nsys.settrace(lambda *a: None)\nsys.exit = lambda *a: None\n__builtins__ = {}\ndef f(x): return 0",
        False,
    ),
    "cheat sys.modules": (
        ["assert f(2) == 4", "assert f(3) == 9"],
        "import sys\nclass A:\n    def __eq__(s, o): return True\nsys.modules[__name__] = A()\ndef f(x): return A()",
        False,
    ),
    "cheat output": (
        {"input_output": '{"inputs": ["3\\n1 2 3\\n", "1\\n5\\n"], "outputs": ["6 2.0\\n", "5 5.0\\n"]}'},
        "print('6 2.0 5 5.0')",
        False,
    ),
    "cheat print all": (
        {"input_output": '{"inputs": ["3\\n1 2 3\\n", "1\\n5\\n"], "outputs": ["6 2.0\\n", "5 5.0\\n"]}'},
        "print('6 2.0')\nprint('5 5.0')",
        False,
    ),
    "cheat stdin file": (
        {"input_output": '{"inputs": ["3\\n1 2 3\\n", "1\\n5\\n"], "outputs": ["6 2.0\\n", "5 5.0\\n"]}'},
        "import sys\nprint(open('/proc/self/cmdline').read())",
        False,
    ),
    "cheat exec tests file": (
        "def test_f():\n    assert f(1) == 2\n",
        "import glob\nfor p in glob.glob('/**/*test*.py'): print(open(p).read())\ndef f(x): return 0",
        False,
    ),
    "cheat thread": (
        ["assert f(2) == 4", "assert f(3) == 9"],
        "import threading, os, time\nthreading.Thread(target=lambda: (time.sleep(0.01), os._exit(0))).start()\ndef f(x): return 0",
        False,
    ),
    "cheat reply pickle": (
        ["assert f(2) == 4", "assert f(3) == 9"],
        "class E:\n    def __reduce__(s): return (int, ('4',))\n    def __index__(s): return 4\n    def __int__(s): return 4\ndef f(x): return E()",
        False,
    ),
    "cheat hash set": (
        ["assert set(f(1)) == {1, 2}"],
        "class E:\n    def __hash__(s): return hash(1)\n    def __eq__(s, o): return True\ndef f(x): return [E(), E()]",
        False,
    ),
    "cheat min": (
        ["assert min(f(1)) == 1 and max(f(1)) == 3"],
        "class E:\n    def __lt__(s, o): return True\n    def __gt__(s, o): return True\n    def __eq__(s, o): return True\ndef f(x): return [E()]",
        False,
    ),
    "cheat assertTrue": (
        "import unittest\nclass T(unittest.TestCase):\n    def test_a(self): self.assertTrue(f(1) == 2)\n    def test_in(self): self.assertIn(3, f(1))",
        "class E:\n    def __eq__(s, o): return True\n    def __contains__(s, o): return True\ndef f(x): return E()",
        False,
    ),
}
"""Records of the usual data sets, responses to them, and whether these solve them."""


def test_further_programs(code):
    names, cases = list(FURTHER), list(FURTHER.values())
    verdicts = code.verify_all([("prompt", tests, response) for tests, response, _ in cases])
    wrong = {
        name: verdict.why
        for name, verdict, (_, _, is_right) in zip(names, verdicts, cases, strict=True)
        if verdict.correct is not is_right
    }
    assert wrong == {}
