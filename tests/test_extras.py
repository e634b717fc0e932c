"""Every extra that a message or a document recommends exists, and brings what it is recommended for."""

import re
import tomllib
from pathlib import Path

import pytest

from tabom.cli.main import EXTRAS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = PROJECT["optional-dependencies"]
NAMED = re.compile(r"tabom\[([a-z,]+)\]|\(extra `([a-z]+)`\)")


def package_names(requirements):
    """Names of the packages that requirements ask for, as Python imports them."""
    return {re.match(r"[\w-]+", requirement)[0].replace("-", "_") for requirement in requirements}


def test_every_extra_that_is_named_exists():
    sources = [
        path
        for folder in ("tabom", "tabom_kernels", "docs", "examples", "benchmarks")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".md", ".yaml", ".html")
    ]
    named = {
        (path.relative_to(ROOT), extra)
        for path in (*sources, *ROOT.glob("*.md"), ROOT / "pyproject.toml")
        for found in NAMED.finditer(path.read_text(encoding="utf-8"))
        for extra in (found[1] or found[2]).split(",")
    }
    assert len(named) > 5, "the pattern finds the places that are known"
    assert not [(path, extra) for path, extra in named if extra not in OPTIONAL]


@pytest.mark.parametrize("package", EXTRAS)
def test_a_missing_package_is_of_the_extra_that_the_error_recommends(package):
    assert package in package_names(OPTIONAL[EXTRAS[package]])
    assert package not in package_names(PROJECT["dependencies"]), "the core install brings it"
