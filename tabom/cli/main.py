"""Parses the arguments of a command, and only then imports its module and runs it."""

import atexit
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import tabom
from tabom.cli.commands import COMMANDS, name_inputs
from tabom.cli.orphans import end_with_parent
from tabom.data.text import printable
from tabom.sampling.termination import Terminated, termination
from tabom.training.settings import TabomSettings

USAGE = """usage: tabom COMMAND [--config FILE.yaml] [--any-field value]

  generate      answer prompts; --animate shows the tokens appear
  collect       answer a prompt set and keep the right answers with their decoding order
  evaluate      measure models on prompt sets; --model BASE TUNED compares them
  export        trajectories as Parquet, CSV, JSON lines or a data set of the hub
  report        one HTML page of responses, training curves and evaluations
  train         post-train on trajectories; --recipe NAME as published
  improve       rounds: answer prompts, judge the answers, train on them, again
  merge         an adapter and its base become one model, which loads everywhere
  plan          what a whole run computes, part by part; --recipe NAME --num_prompts N --gpus N
  recipe        where a YAML file of the package is: accelerate launch --config_file $(tabom recipe fsdp2)
  quickstart    the whole path on the model that ships with the package, in a few minutes
  lab pretrain  make that model again, from nothing
  lab study     the objectives compared: a grid of runs, a table, two pictures

`tabom COMMAND --help` lists the fields of a command; `tabom --version` says which version this is."""

GOES_ON = {
    "collect": "the same command goes on where it stopped",
    "evaluate": "the same command goes on where it stopped",
    "improve": "the same command goes on where it stopped",
    "train": "the same command with --resume_from_checkpoint auto goes on from the newest checkpoint",
}
"""How to continue after Ctrl-C or SIGTERM, by command."""

EXTRAS = {
    "lm_eval": "eval",
    "math_verify": "math",
    "matplotlib": "plot",
    "peft": "lora",
}
"""Packages that the core install leaves out, and the extra that brings each."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Wrong input ends with one line on stderr and status 2, Ctrl-C with status 130, SIGTERM with status 143.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    words = 2 if argv[:1] == ["lab"] else 1
    name = " ".join(argv[:words])
    if name in ("", "-h", "--help", "help"):
        print(USAGE)
        return 0
    if name == "--version":
        print(f"tabom {tabom.__version__}")
        return 0
    if name not in COMMANDS:
        print(f"tabom: unknown command {name!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    if "LOCAL_RANK" in os.environ:  # set by torchrun and accelerate launch
        end_with_parent()
    try:
        with termination.raised():
            arguments = parse(name, argv[words:])
            import_module(f"tabom.cli.{COMMANDS[name].module}").run(*arguments)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in EXTRAS:
            raise
        remedy = f"pip install {package.replace('_', '-')} (the extra {EXTRAS[package]})"
        print(f"tabom {name}: error: needs {package}; {remedy}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(printable(f"tabom {name}: error: {message_of(error)}"), file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"tabom {name}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ntabom {name}: interrupted; {GOES_ON.get(name, 'nothing is kept')}", file=sys.stderr)
        return 130
    except Terminated as end:
        said = f"{end.message}; " * bool(end.message)
        print(f"\ntabom {name}: ended by SIGTERM; {said}{GOES_ON.get(name, 'nothing is kept')}", file=sys.stderr)
        leave_process_group_at_exit()
        return end.code
    except no_connection() as error:
        hint = "what was saved on this machine before is whole"
        print(f"tabom {name}: error: the hub cannot be reached: {error}; {hint}", file=sys.stderr)
        return 2
    leave_process_group_at_exit()
    return 0


def parse(name: str, argv: Sequence[str]) -> tuple:
    """The instances of the command's dataclasses.

    `train` and `plan` also take transformers' `TrainingArguments`, whose import takes seconds. Their command line is
    first parsed without it, so that most errors are reported before this import.
    """
    from tabom.cli.arguments import parse_arguments
    from tabom.cli.training_arguments import training_fields

    _, types, *rest = COMMANDS[name]
    options = dict(zip(("description", "takes_recipe", "hidden", "epilog"), rest, strict=True), prog=f"tabom {name}")
    if name == "report":
        argv = name_inputs(argv)
    if name == "recipe":
        argv = ["--name", *argv] if argv and not argv[0].startswith("-") else argv
    if types[-1] is not TabomSettings:
        return parse_arguments(types, argv, **options)
    parse_arguments(types, argv, other_fields=training_fields(), **options)
    from tabom.training.config import TabomConfig

    return parse_arguments((*types[:-1], TabomConfig), argv, **options)


def message_of(error: ValueError | OSError) -> str:
    """The message of an error in one line; of an error of the system the file and what is wrong with it."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror.lower()}"
    return " ".join(str(error).split())


def no_connection() -> type[Exception]:
    """The error of the hub's client without a network; imported late, because most commands do not use the hub."""
    from huggingface_hub.errors import HTTPError

    return HTTPError


def leave_process_group_at_exit() -> None:
    """Lets torch.distributed end before the interpreter exits, because gloo's threads can abort its shutdown."""
    if "LOCAL_RANK" in os.environ:
        atexit.register(leave_process_group)


def leave_process_group() -> None:
    """Ends torch.distributed."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
