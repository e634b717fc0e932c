"""The kernels before base 2 beside those of today, in turns in one process: statistics, gradient, greedy sampling.

    make old-kernels                  (their last commit, from git's history into .old-kernels)
    python -m benchmarks.old_form     (part of `make gpu-first`)

Writes benchmarks/results/old-form-<device>.json after every op of every shape, timed as in benchmarks.kernels.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks import kernels
from benchmarks.kernels import Batch
from benchmarks.tools.measure import ceilings, copies_for, environment, is_gpu, result_name, this_device, write_json
from tabom_kernels.backends.selection import backend_for, load

FOLDER = Path(__file__).parent.parent / ".old-kernels"
PACKAGE = "tabom_kernels"
ROWS = (64, 256, 2048)

Calls = tuple[Callable[..., Any], list[tuple]]
"""A function, and its arguments on each batch."""


def load_backend(folder: Path) -> ModuleType:
    """The Triton backend of the package in `folder`, without the ops around it, whose names are taken."""
    ours = take_modules()
    package = sys.modules[PACKAGE] = ModuleType(PACKAGE)
    package.__path__ = [str(folder / PACKAGE)]
    try:
        return import_module(f"{PACKAGE}.triton_backend")
    finally:
        take_modules()
        sys.modules.update(ours)


def take_modules() -> dict[str, ModuleType]:
    """Those of the package, which from then on are not imported."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == PACKAGE}


def statistics(backend: ModuleType, batches: list[Batch]) -> Calls:
    return backend.vocabulary_statistics, [(*batch, -100) for batch in batches]


def gradient(backend: ModuleType, batches: list[Batch]) -> Calls:
    upstream, out = torch.rand(2, len(batches[0][0]), device=batches[0][0].device), torch.empty_like(batches[0][0])
    saved = [backend.vocabulary_statistics(*batch, -100) for batch in batches]
    return backend.vocabulary_gradient, [(*batches[i], -100, saved[i], *upstream, out) for i in range(len(batches))]


def greedy(backend: ModuleType, batches: list[Batch]) -> Calls:
    return backend.unmask_statistics, [(logits, 0.0, None, None, None) for logits, _ in batches]


FLOOR = {statistics: 1, gradient: 2, greedy: 1}
"""How often each must read or write the logits."""


def main() -> None:
    """Measure on the GPU of this machine."""
    device = this_device()
    if not is_gpu(device):
        sys.exit("benchmarks.old_form: needs a CUDA GPU")
    if not (FOLDER / PACKAGE).is_dir():
        sys.exit(f"benchmarks.old_form: {FOLDER.name} is not there; run `make old-kernels` where git has the history")
    backends = {"before base 2": load_backend(FOLDER)}
    limits, records = ceilings(device), []
    found = environment(device) | {"ceilings": limits}
    for rows, columns in (shape for shape in kernels.SHAPES if shape[0] in ROWS):
        batches = kernels.draw_batches(device, rows, columns, copies_for(2 * rows * columns, device))
        backends["now"] = load(backend_for(batches[0][0]))
        for op, passes in FLOOR.items():
            contenders = [kernels.contender(name, *op(backends[name], batches)) for name in backends]
            size = f"{rows} x {columns}"
            records += kernels.to_records(op.__name__, size, contenders, device, passes * batches[0][0].nbytes)
            path = write_json(result_name("old-form", device), found | {"figures": records})
    kernels.print_table(records, limits["copy_bytes_per_second"])
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
