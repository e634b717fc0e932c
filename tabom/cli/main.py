"""Finds the command that is asked for and runs it; a command's module is imported only then."""

import atexit
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import tabom
from tabom.cli.orphans import end_with_parent
from tabom.data.text import printable

USAGE = """usage: tabom COMMAND [--config FILE.yaml] [--any-field value]

  generate      answer prompts; --animate shows the tokens appear
  collect       answer a prompt set and keep the right answers with their decoding order
  evaluate      measure models on prompt sets; --compare BASE TUNED
  export        trajectories as Parquet, CSV, JSON lines or a data set of the hub
  report        one HTML page of responses, training curves and evaluations
  train         post-train on trajectories; --recipe NAME as published
  plan          what a whole run computes, part by part; --recipe NAME --prompts N --gpus N
  quickstart    the whole path on the model that ships with the package, in some three minutes
  lab pretrain  make that model again, from nothing
  lab study     the objectives compared: a grid of runs, a table, two pictures

`tabom COMMAND --help` lists the fields of a command; `tabom --version` says which version this is."""

COMMANDS = {
    "generate": "tabom.cli.generate",
    "collect": "tabom.cli.collect",
    "evaluate": "tabom.cli.evaluate",
    "export": "tabom.cli.export",
    "report": "tabom.cli.report",
    "train": "tabom.cli.train",
    "plan": "tabom.cli.plan",
    "quickstart": "tabom.cli.quickstart",
    "lab pretrain": "tabom.cli.lab_pretrain",
    "lab study": "tabom.cli.lab_study",
}
"""The module of each command; its `run` takes the rest of the command line."""

GOES_ON = {
    "collect": "the same command goes on where it stopped",
    "evaluate": "the same command goes on where it stopped",
    "train": "the same command with --resume_from_checkpoint auto goes on from the newest checkpoint",
}
"""What to do after Ctrl-C."""

EXTRAS = {
    "datasets": "data",
    "lm_eval": "eval",
    "math_verify": "math",
    "matplotlib": "plot",
    "peft": "lora",
}
"""Packages that the core install leaves out, and the extra that brings each."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; wrong input ends with one line on stderr and status 2, Ctrl-C with status 130."""
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
        import_module(COMMANDS[name]).run(argv[words:])
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in EXTRAS:
            raise
        print(f"tabom {name}: error: needs {package}; pip install 'tabom[{EXTRAS[package]}]'", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(printable(f"tabom {name}: error: {' '.join(str(error).split())}"), file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"tabom {name}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ntabom {name}: interrupted; {GOES_ON.get(name, 'nothing is kept')}", file=sys.stderr)
        return 130
    except no_connection() as error:
        hint = "what was saved on this machine before is whole"
        print(f"tabom {name}: error: the hub cannot be reached: {error}; {hint}", file=sys.stderr)
        return 2
    if "LOCAL_RANK" in os.environ:
        atexit.register(leave_process_group)
    return 0


def no_connection() -> type[Exception]:
    """What the hub's client raises without a network; imported when it is needed, as most commands ask no hub."""
    from huggingface_hub.errors import HTTPError

    return HTTPError


def leave_process_group() -> None:
    """Ends torch.distributed while Python still runs; left to the interpreter's end, gloo's threads can abort it."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
