"""The figures in documents are those of the committed JSON."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

import benchmarks.pretrained.__main__ as pretrained
from benchmarks import rounds
from tabom.data.json_files import finished_lines
from tabom.lab.config import DEFAULT
from tabom.lab.quickstart import QuickstartConfig, inputs
from tabom.lab.report import markdown_table
from tabom.lab.study_report import attention_table, tables

ROOT = Path(__file__).parents[2]
STUDIES = {
    name: list(finished_lines(ROOT / "docs" / f"study_{name}.jsonl")) for name in ("results", "rank_losses", "parallel")
}
STUDY = STUDIES["results"]
LINES = (ROOT / "docs" / "study.md").read_text().splitlines()


def test_the_table_of_the_demo_is_what_its_json_says():
    measures = json.loads((ROOT / "docs" / "quickstart_results.json").read_text())["measures"]
    assert markdown_table(measures) in (ROOT / "docs" / "demo.md").read_text()


def test_what_the_demo_depends_on_is_what_its_json_was_made_from():
    """Else the figures are of an older demo: run `make demo`, and put its results.json, pictures and table here."""
    document = json.loads((ROOT / "docs" / "quickstart_results.json").read_text())
    assert document["config"] == asdict(QuickstartConfig())
    assert document["inputs"] == inputs(QuickstartConfig())


@pytest.mark.parametrize("name", STUDIES)
def test_the_tables_of_the_study_are_what_its_json_lines_say(name):
    assert tables(STUDIES[name]).strip() in (ROOT / "docs" / "study.md").read_text()


@pytest.mark.parametrize("base", rounds.TASKS)
def test_the_tables_of_learning_in_rounds_are_what_its_json_says(base):
    result = json.loads((rounds.RESULTS / "rounds-cpu.json").read_text())
    runs = [run for run in result["runs"] if run["base"] == base]
    assert {(run["method"], run["seed"]) for run in runs} == {
        ("base", 0),
        *((method, seed) for method in rounds.METHODS for seed in range(3)),
    }
    assert rounds.table(runs) in (ROOT / "docs" / "study.md").read_text()


OBJECTIVES = ("NELBO, exact weights", "whole path", DEFAULT, "TABOM, parallel")


@pytest.mark.parametrize(
    ("base", "task", "methods"),
    [
        ("smollm2", "repeat", OBJECTIVES),
        ("smollm2", "dates", OBJECTIVES),
        ("antiberty", "framework 3", pretrained.METHODS),
    ],
)
def test_the_tables_of_pretrained_models_are_what_its_json_says(base, task, methods):
    runs = [run for run in finished_lines(pretrained.RESULT) if (run["base"], run["task"]) == (base, task)]
    rate = pretrained.BASES[base].learning_rate
    made = {(run["method"], run["learning_rate"], run["seed"]) for run in runs}
    assert made >= {(method, rate, seed) for method in methods for seed in range(3)}
    assert pretrained.tables(runs) in (ROOT / "docs" / "study.md").read_text()


def test_the_prose_of_the_study_quotes_its_tables():
    """Every figure with an error over seeds or pairs stands in a table with the same digits."""
    prose = "\n".join(line for line in LINES if not line.startswith("|"))
    tables_of_study = "\n".join(line for line in LINES if line.startswith("|"))
    quoted = re.findall(r"[+-]?\d+\.\d ±\d+\.\d", prose)
    assert len(quoted) > 10
    shown = set(re.findall(r"[+-]?\d+\.\d ±\d+\.\d", tables_of_study))
    assert [each for each in quoted if not {each, f"+{each}"} & shown] == []


def test_what_the_study_says_of_block_causal_attention_stands_in_its_table():
    section = (ROOT / "docs" / "study.md").read_text().split("## Block-causal attention at equal compute\n")[1]
    quoted = re.findall(r"\d+\.\d+(?: ±\d+\.\d)?", section.split("\n## ")[0])
    shown = set(re.findall(r"\d+\.\d+(?: ±\d+\.\d)?", "\n".join(attention_table(STUDY))))
    assert len(quoted) > 10 and set(quoted) <= shown


def test_the_table_in_the_readme_is_that_of_the_demo():
    measures = json.loads((ROOT / "docs" / "quickstart_results.json").read_text())["measures"]
    rows = ("1 a step", "4 a step", "other tasks")
    assert markdown_table(measures, rows) in (ROOT / "README.md").read_text()
