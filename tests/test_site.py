"""The documentation builds as a site without a warning, and every public name is on it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import tabom
import tabom_kernels

ROOT = Path(__file__).parents[1]


def test_the_site_builds_and_documents_every_public_name(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    api = "".join(page.read_text() for page in tmp_path.glob("api/*/index.html"))
    for package in (tabom, tabom_kernels):
        for name in package.__all__:
            assert re.search(rf'id="{package.__name__}\.[\w.]*\b{name}"', api), name
