"""Help and wrong arguments end before a command's imports begin."""

import dataclasses
import subprocess
import sys
from argparse import SUPPRESS

import pytest

from tabom.cli.arguments import Parser
from tabom.cli.main import COMMANDS
from tabom.cli.training_arguments import training_fields
from tabom.training.config import TabomConfig

HEAVY = ("torch", "transformers", "datasets", "accelerate", "peft", "triton", "matplotlib", "pyarrow", "pandas")

RUN = """
import sys
from tabom.cli.main import main
try:
    status = main(sys.argv[1:])
except SystemExit as exit:
    status = exit.code
print(status, *sys.modules)
"""


def imports_of(*arguments):
    """Status of a command line in a process of its own, its last words, and the packages of HEAVY that it imported."""
    command = [sys.executable, "-c", RUN, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    status, *modules = result.stdout.splitlines()[-1].split()
    return int(status), result.stdout + result.stderr, sorted(set(HEAVY) & set(modules))


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command):
    status, said, imported = imports_of(*command.split(), "--help")
    assert (status, imported) == (0, []) and f"usage: tabom {command}" in said


@pytest.mark.parametrize("command", ["train", "plan"])
def test_help_of_all_fields(command):
    status, said, imported = imports_of(command, "--help_all")
    assert (status, imported) == (0, []) and "--lr_scheduler_type {linear,cosine," in said


def test_fields_read_from_the_source_are_those_of_the_imported_dataclass():
    imported = {each.name: each for each in dataclasses.fields(TabomConfig)}
    parsed = {each.dest: each for each in Parser((TabomConfig,))._actions if "--no_" not in each.option_strings[0]}
    executed = set()
    for name, field in training_fields().items():
        assert field.help == imported[name].metadata.get("help", "")
        if field.default == SUPPRESS:
            executed.add(name)
        else:
            assert field.default == imported[name].default
        if name not in ("log_level", "log_level_replica"):  # their choices are the keys of a dict
            assert field.choices == parsed[name].choices
    assert executed == {"optim", "include_for_metrics"}


@pytest.mark.parametrize(
    "arguments, problem",
    [
        ("generate", "required: --prompt"),
        ("generate --prompt 1 --polcy margin", "unrecognized argument: --polcy; did you mean '--policy'?"),
        ("generate --prompt 1 --policy best", "invalid choice: 'best'"),
        ("generate --prompt 1 --steps 4 --tokens_per_step 2", "give only one of them"),
        ("generate --prompt 1 --config {tmp}/key.yaml", "unknown field 'max_new_token'; did you mean"),
        ("generate --prompt 1 --config {tmp}/none.yaml", "none.yaml"),
        ("collect --output o.jsonl --prompts {tmp}/none.jsonl", "none.jsonl: no such file"),
        ("evaluate --output_dir o --prompts {tmp}/none.csv", "none.csv: no such file"),
        ("generate --prmpt 1", "unrecognized argument: --prmpt; did you mean '--prompt'?"),
        ("train --data {tmp}/none.jsonl", "none.jsonl: no such file"),
        ("train --data x --objective best", "invalid choice: 'best'"),
        ("train --data x --rank_temperature 0 --output_dir x", "rank_temperature=0.0: expected above 0 nats"),
        ("train --recipe dream", "invalid choice: 'dream'"),
        (
            "train --data x --lerning_rate 1e-4",
            "unrecognized argument: --lerning_rate; did you mean '--learning_rate'?",
        ),
        ("train --data x --rank_margn=1", "unrecognized argument: --rank_margn; did you mean '--rank_margin'?"),
        ("train --data x --learning-rate high", "invalid float value: 'high'"),
        ("train --data x --lr_scheduler_type line", "invalid choice: 'line' (choose from 'linear', 'cosine'"),
        ("train --data x --eval-strategy epochs", "invalid choice: 'epochs' (choose from 'no', 'steps', 'epoch')"),
        ("train --data x --bf16 perhaps", "--bf16"),
        ("train --data x --eval_steps often", "invalid float value: 'often'"),
        ("train --data x --config {tmp}/choice.yaml", "save_strategy='never'; expected one of no, steps, epoch, best"),
        ("train --data x --config {tmp}/step.yaml", "unknown field 'max_step'; did you mean 'max_steps'?"),
        ("train --data x --config {tmp}/rate.yaml", "invalid float value: 'high'"),
        ("plan --num_prompts 8 --max_step 3", "unrecognized argument: --max_step; did you mean '--max_steps'?"),
        ("plan --gpus 0", "gpus=0: expected at least 1"),
        ("lab study --task chess", "task='chess'"),
    ],
)
def test_a_wrong_argument(tmp_path, arguments, problem):
    files = {"key": "max_new_token: 3", "step": "max_step: 3", "rate": "learning_rate: high"}
    for name, line in {**files, "choice": "save_strategy: never"}.items():
        (tmp_path / f"{name}.yaml").write_text(line + "\n")
    status, said, imported = imports_of(*arguments.replace("{tmp}", str(tmp_path)).split())
    assert (status, imported) == (2, []) and problem in said
