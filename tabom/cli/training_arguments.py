"""The fields of `TabomConfig` and of transformers' `TrainingArguments`, read from their source.

The import of transformers takes seconds. Help and most errors of a command line do not need it, because the name, type,
choices and help of each field stand in the source.
"""

import ast
from argparse import SUPPRESS
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple


class Field(NamedTuple):
    """A field of a dataclass: its annotation, and the literal values of the rest, as argparse takes them."""

    annotation: str
    default: Any
    help: str = ""
    nargs: str | None = None
    choices: list[str] | None = None


def training_fields() -> dict[str, Field]:
    """All fields that a command which trains takes from transformers, by name; `TabomConfig` overrides defaults."""
    enums = {
        each.name: [statement.value.value for statement in each.body if isinstance(statement, ast.Assign)]
        for module in ("training_args", "trainer_utils")
        for each in classes("transformers", module)
        if "ExplicitEnum" in map(ast.unparse, each.bases)
    }
    sources = (("transformers", "training_args", "TrainingArguments"), ("tabom", "training/config", "TabomConfig"))
    return {
        statement.target.id: read_field(statement, enums)
        for package, module, name in sources
        for each in classes(package, module)
        if each.name == name
        for statement in each.body
        if isinstance(statement, ast.AnnAssign)
    }


def classes(package: str, module: str) -> Iterator[ast.ClassDef]:
    """The classes that a module of an installed package defines."""
    [folder] = find_spec(package).submodule_search_locations
    tree = ast.parse((Path(folder) / f"{module}.py").read_text(encoding="utf-8"))
    return (each for each in tree.body if isinstance(each, ast.ClassDef))


def read_field(statement: ast.AnnAssign, enums: dict[str, list[str]]) -> Field:
    """The field that `name: annotation = default` or `name: annotation = field(default=..., metadata={...})` defines.

    A default that has to be executed is left out of the help.
    """
    annotation = ast.unparse(statement.annotation)
    if not isinstance(statement.value, ast.Call):
        return Field(annotation, literal(statement.value))
    keywords = {each.arg: each.value for each in statement.value.keywords}
    default = literal(keywords.get("default"), otherwise=SUPPRESS)
    metadata = keywords["metadata"]
    said = {literal(key): literal(value) for key, value in zip(metadata.keys, metadata.values, strict=True)}
    nargs = "*" if "list[" in annotation else said.get("nargs")
    return Field(annotation, default, said["help"], nargs, said.get("choices") or enums.get(annotation.split(" | ")[0]))


def literal(expression: ast.expr | None, otherwise: Any = None) -> Any:
    """The value of a literal expression, and another value in place of an expression that has to be executed."""
    try:
        return ast.literal_eval(expression)
    except ValueError:
        return otherwise
