"""What the documents point at is there."""

import dataclasses
import re
from pathlib import Path
from typing import get_args

import pytest

from tabom.cli.commands import COMMANDS
from tabom.cli.training_arguments import training_fields
from tabom.sampling.policies import POLICIES
from tabom.training.objectives import Objective

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(document):
    text = document.read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\((?!https?://|#)([^)\s]+)\)", text)]
    links += re.findall(r'(?:src|srcset)="([^"]+)"', text)
    missing = [link for link in links if not (document.parent / link).exists()]
    paths = re.findall(r"`((?:tabom|tabom_kernels|tests|benchmarks|docs)/[\w./-]+\.(?:py|yaml|md|json))`", text)
    missing += [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def test_every_policy_and_objective_has_its_paper():
    page = (ROOT / "docs" / "papers.md").read_text()
    missing = [name for name in (*POLICIES, *get_args(Objective)) if f"`{name}`" not in page]
    assert not missing


def command_lines():
    """The command lines of `tabom` in the documents, the Makefile and the recipes: where, the command, its words."""
    for path in (*DOCUMENTS, ROOT / "Makefile", *ROOT.glob("tabom/recipes/**/*.yaml")):
        for line in path.read_text().replace("\\\n", " ").splitlines():
            found = re.search(r"(?:^|[#($ ]|-m )tabom ((?:lab )?(?:\w+))( --.*)", line)
            if found and found[1] in COMMANDS:
                words = re.findall(r"--[\w-]+", found[2].partition("` ")[0])
                yield path.relative_to(ROOT), found[1], words


def test_the_documents_use_flags_that_there_are_in_one_spelling():
    lines = list(command_lines())
    assert len(lines) > 30
    for path, name, words in lines:
        known = {field.name for each in COMMANDS[name].types for field in dataclasses.fields(each)}
        known |= {"config", "recipe"} | (set(training_fields()) if name in ("train", "improve", "plan") else set())
        assert [word for word in words if word[2:] not in known] == [], (path, name)


def test_the_ways_through_the_code_name_files_and_functions_that_exist():
    """CONTRIBUTING.md states how many files each way takes, and lists them."""
    root = Path(__file__).parents[1]
    section = (root / "CONTRIBUTING.md").read_text().partition("## Where to start reading")[2].partition("\n## ")[0]
    ways = re.findall(r"- \*\*.*?: (\d+) files\.\*\*\n(.*?)(?=\n- |\Z)", section, re.DOTALL)
    assert len(ways) == 4
    for count, steps in ways:
        assert re.findall(r"^ +(\d+)\. ", steps, re.MULTILINE) == [str(i + 1) for i in range(int(count))]
        files = re.findall(r"^ +\d+\. `([\w/]+\.py)`(?: \(([^)]*)\))?", steps, re.MULTILINE)
        assert len(files) == int(count)
        for path, functions in files:
            [found] = [p for folder in ("", "tabom", "tabom_kernels") if (p := root / folder / path).is_file()]
            for name in re.findall(r"`([\w.]+)`", functions):
                assert re.search(rf"(def|class) {name.rpartition('.')[2]}\b", found.read_text()), (path, name)
