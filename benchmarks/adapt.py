"""Runs docs/adapt.md as it stands there, writes its figures to docs/adapt_results.json, and prints them for the page.

    python -m benchmarks.adapt

The commands run in build/adapt, which has to be empty, with `.venv` and `examples` linked into it.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import fill
from typing import Any

import torch

from tabom.evaluation.compare import comparison_table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "adapt.md"
FOLDER = ROOT / "build" / "adapt"
LINKS = (".venv", "examples")


def blocks(language: str) -> list[str]:
    """The code blocks of the page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def commands() -> Iterator[str]:
    """The command lines of the page in their order."""
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if line and not line.startswith("#"):
                yield line


def measure() -> dict[str, Any]:
    """Runs everything.

    Returns:
        seconds of each command, how many answers were kept, the share of pairs that each model decodes in the order of
        its entropies (one token a step), and the comparison of the two models.
    """
    FOLDER.mkdir(parents=True)
    for name in LINKS:
        (FOLDER / name).symlink_to(ROOT / name)
    for code in blocks("python"):
        subprocess.run([sys.executable, "-c", code], cwd=FOLDER, check=True)
    seconds = {}
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for line in commands():
        start = time.perf_counter()
        subprocess.run(["bash", "-c", line], cwd=FOLDER, env=environment, check=True)
        seconds[line] = time.perf_counter() - start
    return {
        "processor": processor(),
        "torch": torch.__version__,
        "seconds": seconds,
        "prompts": count_lines("train.jsonl"),
        "kept": count_lines("runs/own.jsonl"),
        "pair_order": {
            cell["model"]: cell["pair_order"]
            for cell in json.loads((FOLDER / "runs/evaluation/results.json").read_text())
            if cell["sampler"] == "tokens_per_step=1"
        },
        "comparisons": json.loads((FOLDER / "runs/evaluation/comparison.json").read_text())[0]["comparisons"],
    }


def count_lines(name: str) -> int:
    """The lines of a file in the folder."""
    return (FOLDER / name).read_text().count("\n")


def figures(results: dict[str, Any]) -> str:
    """The figures as the page has them."""
    minutes = sum(results["seconds"].values()) / 60
    before, after = results["pair_order"].values()
    text = (
        f"Measured on {results['processor']} with torch {results['torch']}. All commands together took {minutes:.0f} "
        f"minutes, beside other work on the same cores. `collect` kept {results['kept']} of {results['prompts']} "
        f"answers. At one token a step the share of pairs that are decoded in the order of their entropies rose from "
        f"{before:.1%} to {after:.1%}."
    )
    return f"{fill(text, 120)}\n\n{comparison_table(results['comparisons'])}"


def processor() -> str:
    """Cores and name of this machine's processor."""
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{len(os.sched_getaffinity(0))} cores of {names[0]}"


if __name__ == "__main__":
    results = measure()
    (PAGE.parent / "adapt_results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(figures(results))
