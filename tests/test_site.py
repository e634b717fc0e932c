"""The documentation builds as a site without a warning, and every public name is on it."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tabom
import tabom_kernels

ROOT = Path(__file__).parents[1]


def build(root, site):
    """As `make docs` does, whose options decide what is an error."""
    options = shlex.split(re.search(r"bin/mkdocs (build.*)", (ROOT / "Makefile").read_text())[1])
    command = [sys.executable, "-m", "mkdocs", *options, "--site-dir", str(site)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("link", ["nowhere.md", "loss.md#nowhere"])
def test_a_broken_link_is_an_error(tmp_path, link):
    for name in ("mkdocs.yml", "README.md", "benchmarks", "tabom", "tabom_kernels"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    with open(tmp_path / "docs" / "papers.md", "a") as page:
        page.write(f"\n[a page]({link})\n")
    result = build(tmp_path, tmp_path / "site")
    assert result.returncode == 1 and "nowhere" in result.stderr


def test_the_site_builds_and_documents_every_public_name(tmp_path):
    result = build(ROOT, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    api = "".join(page.read_text() for page in tmp_path.glob("api/*/index.html"))
    for package in (tabom, tabom_kernels):
        for name in package.__all__:
            assert re.search(rf'id="{package.__name__}\.[\w.]*\b{name}"', api), name
