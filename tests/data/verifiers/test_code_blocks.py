"""Which part of a response is the program."""

import pytest

from tabom.data.verifiers.code_blocks import complete, find_program, parse

F = "def f(x):\n    return x * x\n"
FENCED = f"```python\n{F}```\n"
FENCED_DOCSTRING = '''```python
def f(x):
    """Squares.

    ```
    >>> f(2)
    4
    ```
    """
    return x * x
```
It works.'''

RESPONSES = {
    "alone": F,
    "fenced": FENCED,
    "no language": f"```\n{F}```",
    "tildes": f"~~~\n{F}~~~",
    "four backticks": f"````python\n{F}````",
    "Python 3": f"```Python3\n{F}```",
    "cut off": f"Sure:\n```python\n{F}",
    "the last of several": f"```python\ndef f(x):\n    return x\n```\nBetter:\n```py\n{F}```",
    "an example after it": f"{FENCED}Example:\n```python\nprint(f(2))  # 4\n```",
    "an example that parses as a value": f"{FENCED}```python\nf(2)\n```",
    "an output after it": f"{FENCED}Output:\n```\n4\n```",
    "a list as output": f"{FENCED}Output:\n```\n[1, 2]\n```",
    "a text as output": f"{FENCED}Output:\n```text\nresult = 4\n```",
    "bash after it": f"{FENCED}Run it:\n```bash\npython f.py\n```",
    "bash before it": f"```bash\npip install numpy\n```\n{FENCED}",
    "shell without a language": f"{FENCED}```\n$ python f.py\n```",
    "tests after it": f"{FENCED}```python\nassert f(2) == 4\n```",
    "imports in an earlier block": "```python\nimport math\n```\n```python\ndef f(x):\n    return int(math.pow(x, 2))\n```",
    "a constant in an earlier block": "```python\nTWO = int(round(2.0))\n```\n```python\ndef f(x):\n    return x**TWO\n```",
    "a helper in an earlier block": "```python\ndef g(x): return x * x\n```\nThen\n```python\ndef f(x):\n    return g(x)\n```",
    "a closing fence alone": f"{F}```",
    "a closing fence alone and words": f"{F}```\nThis squares x.",
    "indented in a list": "1. Write it:\n   ```python\n   def f(x):\n       return x * x\n   ```\n2. Done.",
    "in a list item": "- ```python\n  def f(x):\n      return x * x\n  ```",
    "a fence in a docstring": FENCED_DOCSTRING,
    "thoughts before it": f"<think>Maybe\n```python\ndef f(x): return 0\n```\n</think>\n{FENCED}",
    "thoughts right before it": f"<think>hm</think>{FENCED}",
    "the end of thoughts alone": f"hm\n```python\ndef f(x): return 0\n```\n</think>\n{FENCED}",
    "a final channel": f"<|channel|>analysis<|message|>```python\ndef f(x): return 0\n```<|end|><|channel|>final<|message|>{FENCED}<|return|>",
    "[PYTHON]": f"[PYTHON]\n{F}[/PYTHON]\n[TESTS]\nassert f(2) == 4\n[/TESTS]",
    "[BEGIN]": f"[BEGIN]\n{F}[DONE]",
    "fences in [BEGIN]": f"[BEGIN]\n{FENCED}[DONE]",
    "<code>": f"<code>\n{F}</code>",
    "<answer>": f"<answer>\n{FENCED}</answer>",
    "words around it": f"Here is the function:\n\n{F}\nIt squares x.",
    "words before the fence": f"Here it is: {FENCED}",
    "indented among words": "It is:\n\n    def f(x):\n        return x * x\n\nThis squares x.",
    "Windows line ends": FENCED.replace("\n", "\r\n"),
    "from __future__": f"```python\nfrom __future__ import annotations\n{F}```",
    "end token": f"{FENCED}<|im_end|>",
    "a class": "```python\nclass Solution:\n    def f(self, x):\n        return x * x\nf = Solution().f\n```",
    "a table of backticks": f"Use `f`.\n\n{FENCED}\nThe complexity is `O(1)`.",
    "indented whole": "```python\n    def f(x):\n        return x * x\n```",
    "tabs": "```python\ndef f(x):\n\treturn x * x\n```",
}


@pytest.mark.parametrize("name", RESPONSES)
def test_the_program_is_found(name):
    names = {"__name__": "program"}
    exec(compile(complete(find_program(RESPONSES[name], ["f"]), "", None)[-1], name, "exec"), names)
    assert names["f"](3) == 9


def test_a_program_without_a_name_is_the_last_block_that_does_something():
    answer = "```python\nprint(int(input()) * 2)\n```\nFor the input\n```\n3\n```\nit prints\n```\n6\n```"
    assert find_program(answer) == "print(int(input()) * 2)\n"


def test_what_the_tests_use_is_taken_from_earlier_blocks_too():
    answer = "First\n```python\ndef g(x): return x + 1\n```\nthen\n```python\ndef f(x): return x\n```"
    names = {}
    exec(find_program(answer, ["f", "g"]), names)
    assert names["f"](1) == 1 and names["g"](1) == 2


def test_thoughts_that_do_not_end_are_no_program():
    assert "def" not in find_program(f"<think>{FENCED}", ["f"])


HEADER = 'from typing import List\n\ndef total(numbers: List[int]) -> int:\n    """The sum."""\n'


@pytest.mark.parametrize(
    "block",
    [
        "    return sum(numbers)\n",
        "return sum(numbers)\n",
        "    result = sum(numbers)\n    return result",
        "result = 0\n    for n in numbers:\n        result += n\n    return result",
        "result = 0\nfor n in numbers:\n    result += n\nreturn result",
        "\n\n    return sum(numbers)",
        "def total(numbers):\n    return sum(numbers)",
        "  def total(numbers):\n      return sum(numbers)",
        "from __future__ import annotations\ndef total(numbers: List[int]) -> int:\n    return sum(numbers)",
        HEADER + "    return sum(numbers)",
        "class Helper: pass\n\ndef total(numbers: List[int]):\n    return sum(numbers)",
    ],
)
@pytest.mark.parametrize("header", [HEADER, HEADER.rstrip(), HEADER + "    "])
def test_a_block_continues_its_header(block, header):
    names = {}
    for source in complete(block, header, "total"):
        exec(compile(source, "program", "exec"), names)
    assert names["total"]([1, 2]) == 3


ODD = {
    "blank lines": "\n" * 16000 + F,
    "closing fences": "```\n" * 1000,
    "opening fences": "```python\n" * 2000,
    "parentheses": "(" * 5000,
    "brackets": "[" * 100000,
    "spaces": "    " * 30000,
    "thoughts": "<think>" * 5000 + F,
    "dashes": "- " * 20000,
    "quotes": "x\n```python\n'''\n" * 300,
}


@pytest.mark.parametrize("name", ODD)
def test_odd_responses_are_read_without_failure(name):
    """A pattern that is quadratic in one of these takes minutes."""
    find_program(ODD[name], ["f"])


def test_what_does_not_parse_has_no_tree():
    assert parse("def f(:") is None and parse("x = 1") is not None
