"""Parses command lines into dataclasses, with defaults from YAML files: `--config FILE.yaml [--any-field value]`."""

import argparse
import dataclasses
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, get_type_hints

import yaml

from tabom.cli.training_arguments import Field
from tabom.training.renamed import options_under_new_names, under_new_names
from tabom.training.settings import TabomSettings


def load_module(package: str, name: str) -> ModuleType:
    """Imports a module of a package without importing the package."""
    [folder] = find_spec(package).submodule_search_locations
    spec = spec_from_file_location(f"{package}.{name}", Path(folder) / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hf_argparser = load_module("transformers", "hf_argparser")
HfArgumentParser, string_to_bool = hf_argparser.HfArgumentParser, hf_argparser.string_to_bool
"""transformers' parser, without the import of transformers, which takes most of a second."""

OUTPUTS = ("output", "output_dir")
"""Where a command writes, a file or a folder; `-o` in every command."""

RECIPES = Path(__file__).parents[1] / "recipes"
"""YAML files that ship with the package, for `--recipe`."""


def parse_arguments(
    dataclass_types: Sequence[type],
    argv: Sequence[str],
    prog: str,
    description: str,
    takes_recipe: bool = False,
    other_fields: Mapping[str, Field] | None = None,
    hidden: Sequence[type] = (),
    epilog: str | None = None,
) -> tuple:
    """Returns an instance of each dataclass. The command line overrides the YAML file, which overrides the recipe.

    Args:
        takes_recipe: `--recipe NAME` reads a YAML file of the package.
        other_fields: fields of a dataclass that is not imported. Their names, numbers and choices are checked; the
            rest is left to a later call with this dataclass. `--help_all` lists them, `--help` does not.
        hidden: dataclasses whose fields `--help_all` lists and `--help` does not.
        epilog: what `--help` says of the fields that it does not list.

    Raises:
        ValueError: the file is not a mapping, or has a field that no dataclass knows.
        SystemExit: the command line is wrong (the parser has printed why).
    """
    usage = f"{prog} [--config FILE.yaml]{' [--recipe NAME]' if takes_recipe else ''} [--FIELD VALUE ...]"
    show_all = "--help_all" in argv
    parser = Parser(
        dataclass_types,
        prog=prog,
        usage=usage,
        description=description,
        allow_abbrev=False,
        formatter_class=Formatter,
        hidden=() if show_all else hidden,
    )
    if other_fields is not None:
        parser.add_others(other_fields, show_all)
        parser.add_argument("--help_all", action="help", help=argparse.SUPPRESS)
        parser.epilog = None if show_all else epilog
    parser.add_argument("--config", metavar="FILE.yaml", help="Fields and their values; the command line wins.")
    files = {"config": parser.parse_option("--config", argv)}
    if takes_recipe:
        names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
        parser.add_argument("--recipe", choices=names, help="Fields and their values as published; --config wins.")
        recipe = parser.parse_option("--recipe", argv, choices=names)
        files = {"recipe": recipe and str(RECIPES / f"{recipe}.yaml"), **files}
    takes_training_settings = any(issubclass(each, TabomSettings) for each in dataclass_types)
    for path in files.values():
        if path:
            fields = read_config(path)
            if takes_training_settings:
                fields = under_new_names(fields)
            check_known(path, fields, [action.dest for action in parser._actions])
            apply_config(parser, fields)
    if takes_training_settings:
        argv = options_under_new_names(argv)
    parser.check_known_options(argv)
    *instances, _files, unknown = parser.parse_args_into_dataclasses(
        list(argv), look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return tuple(instances)


class Formatter(argparse.HelpFormatter):
    """Help with one name and one default for each option."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """`-o, --output TEXT`: without the spelling with dashes."""
        names = [name for name in action.option_strings if name[:2] != "--"]
        names += [name for name in action.option_strings if name[:2] == "--"][:1]
        value = (
            "" if action.nargs == 0 else f" {self._format_args(action, self._get_default_metavar_for_optional(action))}"
        )
        return ", ".join(names) + ("" if action.type is string_to_bool else value)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        """What kind of value an option takes."""
        return {int: "N", float: "X"}.get(action.type, "TEXT")

    def _get_help_string(self, action: argparse.Action) -> str:
        """The help, with the default unless the help says it or there is none."""
        says = action.help or ""
        if action.required:
            return f"{says} Required."
        has_default = not any(action.default is each for each in (None, False, argparse.SUPPRESS))
        if not has_default or "Default" in says or action.nargs == 0:
            return says
        return f"{says} Default: %(default)s."


class Parser(HfArgumentParser):
    """A parser whose errors are one line, without the usage, which has a hundred fields."""

    def __init__(self, dataclass_types: Sequence[type], hidden: Sequence[type] = (), **options: Any) -> None:
        self.hidden = hidden
        super().__init__(dataclass_types, **options)

    def _add_dataclass_arguments(self, dtype: type) -> None:
        """Adds the fields of a dataclass as a group with the title of its docstring; `output` is `-o` too."""
        group = self.add_argument_group((dtype.__doc__ or dtype.__name__).partition("\n")[0].rstrip("."))
        types = get_type_hints(dtype)
        own = vars(dtype).get("__annotations__", {})
        for field in sorted(
            dataclasses.fields(dtype), key=lambda field: field.name not in own
        ):  # before inherited ones
            if field.init:
                field.type = types[field.name]
                self._parse_dataclass_field(group, field)
        for action in group._group_actions:
            if dtype in self.hidden or action.option_strings[0].startswith("--no_"):
                action.help = argparse.SUPPRESS

    def check_known_options(self, argv: Sequence[str]) -> None:
        """Ends with an error for an option that there is not, before one that is missing is asked for."""
        known = [name for name in self._option_string_actions if name.startswith("--")]
        for word in argv:
            name = word.partition("=")[0]
            if name.startswith("--") and name not in known:
                self.error(f"unrecognized argument: {name}{suggestion(name, known)}")

    @staticmethod
    def _parse_dataclass_field(parser: ArgumentParser, field: dataclasses.Field) -> None:
        if field.type in (int | str, int | str | None):  # HfArgumentParser would accept only integers
            field.type = str if field.type == int | str else str | None
        if field.name in OUTPUTS:
            field.metadata = {**field.metadata, "aliases": "-o"}
        HfArgumentParser._parse_dataclass_field(parser, field)

    def add_others(self, fields: Mapping[str, Field], show: bool) -> None:
        """Adds fields of a dataclass that is not imported, shown in the help or not."""
        group = self.add_argument_group("TrainingArguments of transformers")
        known = {action.dest for action in self._actions}
        types = {"int": int, "float": float, "bool": string_to_bool}
        for name, field in fields.items():
            if name in known:
                continue
            options = [f"--{name}", f"--{name.replace('_', '-')}"]
            if field.annotation == "bool":
                options += [f"--no_{name}", f"--no-{name.replace('_', '-')}"]
            group.add_argument(
                *dict.fromkeys(options),
                *(["-o"] if name in OUTPUTS else []),
                default=field.default,
                type=types.get(field.annotation.partition(" | ")[0], str),
                nargs="?" if "bool" in field.annotation else field.nargs,
                choices=field.choices,
                help=field.help.replace("%", "%%") if show else argparse.SUPPRESS,
            )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def parse_option(self, option: str, argv: Sequence[str], **settings: Any) -> str | None:
        """The value of one option, before the others are parsed."""
        parser = Parser((), prog=self.prog, add_help=False, allow_abbrev=False)
        parser.add_argument(option, dest="value", **settings)
        return parser.parse_known_args(argv)[0].value


def read_config(path: str) -> dict[str, Any]:
    """The fields of a YAML file.

    Raises:
        ValueError: the file is not YAML, or not a mapping.
    """
    try:
        fields = yaml.safe_load(Path(path).read_bytes())
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"config={path}: not valid YAML: {problem:.200}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"config={path}: expected `field: value` lines, got a {type(fields).__name__}")
    return fields


def check_known(path: str, fields: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raises a ValueError if a field of a YAML file is not among the known ones."""
    for name in fields:
        if name not in known:
            raise ValueError(f"config={path}: unknown field {name!r}{suggestion(str(name), known)}")


def suggestion(name: str, known: Sequence[str]) -> str:
    """Ends an error message with the known name that is most similar, if one is."""
    similar = get_close_matches(name, known, n=1)
    return f"; did you mean {similar[0]!r}?" if similar else ""


def apply_config(parser: HfArgumentParser, fields: dict[str, Any]) -> None:
    """Makes the values of a file the parser's defaults, checked like values of the command line."""
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
    """Raises a ValueError for a list in place of one value, or a nested value in place of a plain one."""
    takes_mapping = action.dest.endswith(("_config", "_kwargs"))
    values = value if isinstance(value, list) and action.nargs in ("*", "+") else [value]
    if not takes_mapping and not all(each is None or isinstance(each, str | int | float) for each in values):
        raise ValueError(f"config: {action.dest}: expected a plain value, got a {type(value).__name__}")
