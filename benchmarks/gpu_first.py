"""The first 45 minutes on a GPU, in the order of what is most worth knowing: `make gpu-first`.

    python -m benchmarks.gpu_first [--only PART ...]

Each part is a command with a time limit of its own; its output goes to benchmarks/results/gpu-first/PART.log while it
runs, and after every part gpu-first-<device>.json says how each ended. A part that fails costs the others nothing.
"""

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.tools import measure
from benchmarks.tools.measure import ceilings, environment, is_gpu, result_name, this_device, write_json

PYTHON = sys.executable


class Part(NamedTuple):
    """A command, and the seconds that it may take."""

    command: list[str]
    seconds: int


KERNELS = [PYTHON, "-m", "benchmarks.kernels"]
FIRST, THEN = ("statistics", "gradient", "greedy"), ("whole_loss", "drawn", "ranking")
LOSS = [PYTHON, "-m", "benchmarks.loss"]
CHECK = [PYTHON, "-m", "tabom_kernels.check"]
PROFILE = ["ncu", "--set", "basic", "--kernel-name", "regex:_kernel$"]
PARTS = {
    "tests-gpu": Part([PYTHON, "-m", "pytest", "tests/kernels/test_gpu.py", "-q"], 300),
    "tests": Part([PYTHON, "-m", "pytest", "tests/kernels", "-q"], 420),
    "check": Part(CHECK, 120),
    "kernels": Part([*KERNELS, "--ops", *FIRST, "--rows", "64", "256", "2048"], 240),
    "old-form": Part([PYTHON, "-m", "benchmarks.old_form"], 120),
    "ncu": Part([*PROFILE, *KERNELS, "--once", "--rows", "64"], 240),
    "loss": Part([*LOSS, "--ours", "--rows", "64", "256", "1024"], 240),
    "trained-head": Part([PYTHON, "-m", "benchmarks.trained_head"], 120),
    "kernels-then": Part([*KERNELS, "--ops", *THEN, "--rows", "64", "256", "2048"], 180),
    "sampler": Part([PYTHON, "-m", "benchmarks.sampler"], 180),
    "sanitizer": Part(["compute-sanitizer", *CHECK], 180),
    "kernels-peers": Part([*KERNELS, "--peers", "--rows", "64", "2048"], 180),
    "loss-peers": Part([*LOSS, "--rows", "64", "256"], 180),
}
"""By name, the most worth knowing first; 45 minutes, if every part runs into its limit."""


def run_part(part: Part, log: Path) -> dict[str, Any]:
    """How it ended: `rc` 124 for out of time, None for a tool that is not on this machine."""
    if shutil.which(part.command[0]) is None:
        return {"rc": None, "seconds": 0.0, "tail": f"{part.command[0]} is not installed"}
    start = time.perf_counter()
    with log.open("w") as output:
        try:
            rc = subprocess.run(part.command, stdout=output, stderr=subprocess.STDOUT, timeout=part.seconds).returncode
        except subprocess.TimeoutExpired:
            rc = 124
    tail = log.read_text(errors="replace")[-2000:]
    return {"rc": rc, "seconds": time.perf_counter() - start, "tail": tail}


def main(arguments: Sequence[str] | None = None) -> None:
    """Versions and ceilings first, then part after part."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    options = parser.parse_args(arguments)
    device = this_device()
    if not is_gpu(device):
        sys.exit("benchmarks.gpu_first: needs a CUDA GPU")
    name = result_name("gpu-first", device)
    found = environment(device) | {"ceilings": ceilings(device), "parts": {}}
    torch.cuda.empty_cache()  # the parts are processes of their own
    write_json(name, found)
    logs = measure.RESULTS / "gpu-first"
    logs.mkdir(exist_ok=True)
    for part in options.only:
        found["parts"][part] = run_part(PARTS[part], logs / f"{part}.log")
        print(f"{part}: rc {found['parts'][part]['rc']}, {found['parts'][part]['seconds']:.0f} s", flush=True)
        path = write_json(name, found)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
