"""docs/adapt.md: the benchmark runs its commands, and each of them is one that the command line takes."""

import json
import shlex

import pytest

from benchmarks.adapt import PAGE, blocks, commands, figures
from tabom.cli.main import COMMANDS, main


def test_the_benchmark_runs_the_commands_of_the_page():
    names = [line.split()[1] for line in commands() if line.startswith("tabom ")]
    assert names == ["train", "collect", "train", "evaluate", "train", "merge"]


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("tabom ")])
def test_a_command_of_the_page_fails_only_because_its_files_are_not_there(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _, name, *words = shlex.split(line)
    assert name in COMMANDS
    assert main([name, *words]) == 2
    said = capsys.readouterr().err
    assert any(
        reason in said for reason in ("no such file", "nothing of this name", "not found", "expected a folder")
    ), said


def test_the_prompts_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [code] = blocks("python")
    exec(code, {})
    train, test = ([json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()] for name in ("train", "test"))
    assert (len(train), len(test)) == (400, 64)
    for record in train + test:
        words = record["answer"].split()
        assert record["prompt"] == f"Repeat these words: {record['answer']}"
        assert 3 <= len(words) == len(set(words)) <= 5
    assert not {record["prompt"] for record in train} & {record["prompt"] for record in test}


def test_the_figures_of_the_page_are_those_of_the_json():
    results = json.loads((PAGE.parent / "adapt_results.json").read_text())
    assert figures(results) in PAGE.read_text()
