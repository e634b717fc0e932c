"""Command lines from dataclasses, with YAML files of defaults: `--config FILE.yaml [--any-field value]`."""

import argparse
import dataclasses
from argparse import ArgumentParser
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml
from transformers import HfArgumentParser

RECIPES = Path(__file__).parents[1] / "recipes"
"""YAML files that ship with the package, for `--recipe`."""


def parse_arguments(
    dataclass_types: Sequence[type], argv: Sequence[str], prog: str, description: str, takes_recipe: bool = False
) -> tuple:
    """One instance of each dataclass; the command line wins over the YAML file, it over the recipe and its defaults.

    Args:
        takes_recipe: `--recipe NAME` reads a YAML file of the package.

    Raises:
        ValueError: the file is not a mapping, or has a field that no dataclass knows.
        SystemExit: the command line is wrong (argparse has printed why).
    """
    usage = f"{prog} [--config FILE.yaml]{' [--recipe NAME]' if takes_recipe else ''} [--FIELD VALUE ...]"
    parser = Parser(dataclass_types, prog=prog, usage=usage, description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="Fields and their values; the command line wins.")
    files = {"config": parser.parse_option("--config", argv)}
    if takes_recipe:
        names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
        parser.add_argument("--recipe", choices=names, help="Fields and their values as published; --config wins.")
        recipe = parser.parse_option("--recipe", argv, choices=names)
        files = {"recipe": recipe and str(RECIPES / f"{recipe}.yaml"), **files}
    for path in files.values():
        if path:
            apply_config(parser, read_config(path, dataclass_types))
    *instances, _files, unknown = parser.parse_args_into_dataclasses(
        list(argv), look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return tuple(instances)


class Parser(HfArgumentParser):
    """Says what is wrong in one line; the usage of a hundred fields would push it off the screen."""

    def _add_dataclass_arguments(self, dtype: type) -> None:
        """In groups: its own fields, then those that it has from transformers."""
        own = self.add_argument_group((dtype.__doc__ or dtype.__name__).partition("\n")[0].rstrip("."))
        inherited: dict[str, argparse._ArgumentGroup] = {}
        for base in dtype.__mro__:
            if dataclasses.is_dataclass(base) and not base.__module__.startswith("tabom"):
                group = self.add_argument_group(f"{base.__name__} of {base.__module__.partition('.')[0]}")
                inherited |= dict.fromkeys((field.name for field in dataclasses.fields(base)), group)
        types = get_type_hints(dtype)
        for field in dataclasses.fields(dtype):
            if field.init:
                field.type = types[field.name]
                self._parse_dataclass_field(inherited.get(field.name, own), field)

    @staticmethod
    def _parse_dataclass_field(parser: ArgumentParser, field: dataclasses.Field) -> None:
        if field.type == int | str:  # of which HfArgumentParser would take integers alone
            field.type = str
        HfArgumentParser._parse_dataclass_field(parser, field)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def parse_option(self, option: str, argv: Sequence[str], **settings: Any) -> str | None:
        """The value of one option, before the others are parsed."""
        parser = Parser((), prog=self.prog, add_help=False, allow_abbrev=False)
        parser.add_argument(option, dest="value", **settings)
        return parser.parse_known_args(argv)[0].value


def read_config(path: str, dataclass_types: Sequence[type]) -> dict[str, Any]:
    """The fields of a YAML file, all of them known."""
    try:
        fields = yaml.safe_load(Path(path).read_bytes())
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"config={path}: not valid YAML: {problem:.200}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"config={path}: expected `field: value` lines, got a {type(fields).__name__}")
    known = {field.name for cls in dataclass_types for field in dataclasses.fields(cls) if field.init}
    for name in fields:
        if name not in known:
            similar = get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {similar[0]!r}?" if similar else ""
            raise ValueError(f"config={path}: unknown field {name!r}{hint}")
    return fields


def apply_config(parser: HfArgumentParser, fields: dict[str, Any]) -> None:
    """Makes the values of the file the defaults of the parser, checked as if typed on the command line."""
    for action in parser._actions:
        if action.dest in fields:
            value = fields[action.dest]
            check_shape(action, value)
            # argparse runs `type` on text defaults only: YAML reads 2e-5 as text, and 3 where a float is meant
            action.default = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
            action.required = False
            if action.choices is not None and value not in action.choices:
                choices = ", ".join(map(str, action.choices))
                raise ValueError(f"config: {action.dest}={value!r}; expected one of {choices}")


def check_shape(action: argparse.Action, value: Any) -> None:
    """Refuses a list where one value belongs, and anything nested where plain values do."""
    takes_mapping = action.dest.endswith(("_config", "_kwargs"))
    values = value if isinstance(value, list) and action.nargs in ("*", "+") else [value]
    if not takes_mapping and not all(each is None or isinstance(each, str | int | float) for each in values):
        raise ValueError(f"config: {action.dest}: expected a plain value, got a {type(value).__name__}")
