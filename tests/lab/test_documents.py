"""The figures in documents are those of the committed JSON."""

import json
from pathlib import Path

from tabom.lab.report import markdown_table
from tabom.lab.study_report import tables
from tabom.sampling.collect import read_lines

ROOT = Path(__file__).parents[2]


def test_the_table_of_the_demo_is_what_its_json_says():
    measures = json.loads((ROOT / "docs" / "quickstart_results.json").read_text())["measures"]
    assert markdown_table(measures) in (ROOT / "README.md").read_text()


def test_the_tables_of_the_study_are_what_its_json_lines_say():
    assert tables(read_lines(ROOT / "docs" / "study_results.jsonl")).strip() in (ROOT / "docs" / "study.md").read_text()
