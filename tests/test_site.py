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


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    result = build(ROOT, folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


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


def test_the_site_builds_and_documents_every_public_name(site):
    api = "".join(page.read_text() for page in site.glob("api/*/index.html"))
    for package in (tabom, tabom_kernels):
        for name in package.__all__:
            assert re.search(rf'id="{package.__name__}\.[\w.]*\b{name}"', api), name


@pytest.mark.parametrize("width", [1280, 400])
def test_no_code_is_cut_or_behind_its_copy_button(site, browser, width):
    page = browser.new_context(viewport={"width": width, "height": 900}).new_page()
    for path in ("index.html", "tasks/index.html", "study/index.html", "recipes/index.html"):
        page.goto((site / path).as_uri())
        cut = page.evaluate(
            """() => [...document.querySelectorAll("pre > code")].filter((code) => {
                const room = parseFloat(getComputedStyle(code).paddingRight);
                return code.scrollWidth > code.clientWidth || room < 40;
            }).map((code) => code.textContent)"""
        )
        assert cut == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        broken = page.evaluate(
            """() => [...document.querySelectorAll("td code")].filter((code) => /^\\w+$/.test(code.textContent)
                && code.getClientRects().length > 1).map((code) => code.textContent)"""
        )
        assert broken == [], "a name stands on one line"


def test_the_front_page_shows_a_result_before_the_installation(site):
    page = (site / "index.html").read_text()
    before, _ = page.split('id="install"')
    assert "accuracy_by_pace.png" in before and "TABOM, parallel" in before
