"""Verifiers by name, and the one that the shape of the data asks for."""

import inspect
import re
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from tabom.data.verifiers.mathematics import Math
from tabom.data.verifiers.programs import Code
from tabom.data.verifiers.texts import Contains, Exact, Regex
from tabom.data.verifiers.verdict import Answer, Custom, Verifier

VERIFIERS: dict[str, type[Verifier]] = {
    "exact": Exact,
    "contains": Contains,
    "regex": Regex,
    "math": Math,
    "code": Code,
}
CUSTOM = "python:"
MATHEMATICS = re.compile(r"####|\\[a-zA-Z]+")
NUMBER = re.compile(r"\s*[-+]?\$?(\d[\d,]*\.?\d*|\.\d+)%?\s*")


def make_verifier(name: str, **settings: Any) -> Verifier:
    """A function of (prompt, answer, response) that gives a `Verdict(correct, why)`.

    Args:
        name: `exact`, `contains`, `regex` (with `pattern`), `math`, `code`, or `python:module.function` for one's own.
        settings: of the verifier; see its class.

    Raises:
        ValueError: no verifier has this name or takes this setting, or the function is not found.
        ModuleNotFoundError: `math` without math-verify.
    """
    if name.startswith(CUSTOM):
        return Custom(find_function(name))
    if name not in VERIFIERS:
        raise ValueError(f"verifier={name!r}: expected one of {', '.join(VERIFIERS)}, or python:module.function")
    known = settings_of(name)
    for setting in settings:
        if setting not in known:
            raise ValueError(
                f"{setting}={settings[setting]!r}: the verifier {name!r} takes {', '.join(known) or 'none'}"
            )
    for setting, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and setting not in settings:
            raise ValueError(f"verifier={name!r} needs {setting}")
    return VERIFIERS[name](**settings)


def settings_of(name: str) -> Mapping[str, inspect.Parameter]:
    """What the verifier of this name can be given."""
    return inspect.signature(VERIFIERS[name]).parameters


def find_function(name: str) -> Any:
    """The function of `python:module.function`."""
    module, _, function = name.removeprefix(CUSTOM).rpartition(".")
    if not module:
        raise ValueError(f"verifier={name!r}: expected python:module.function")
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"verifier={name!r}: {error} (its folder must be on PYTHONPATH)") from error
    return found


def verifier_for(answers: Iterable[Answer]) -> str:
    """The name of the verifier that the answers' shape asks for.

    Tests (a list or an object) ask for `code`; solutions with `#### 42` or `\\boxed{}` at their end, LaTeX, and answers
    that are all numbers for `math`; any other text for `exact`.
    """
    known = [answer for answer in answers if answer is not None]
    if any(isinstance(answer, list | dict) for answer in known):
        return "code"
    texts = [str(answer) for answer in known]
    is_mathematics = any(MATHEMATICS.search(text) for text in texts) or all(NUMBER.fullmatch(text) for text in texts)
    return "math" if texts and is_mathematics else "exact"
