"""A model of time: what every kernel should take on each GPU, before any has run it, and beside a run that has.

    python -m benchmarks.model                                        # the predictions
    python -m benchmarks.model results/kernels-nvidia-h100.json       # a run beside them, line by line

A launch takes the longest of its memory traffic, its issue slots and its exponentials, and a constant on top. The
instructions are those of the committed results/static.md, so a prediction follows the code.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.measure import RESULTS

SHAPES = [(64, 152064), (256, 152064), (2048, 152064), (4096, 126464)]
LAUNCH_SECONDS = 1.5e-6
"""Of a kernel in a graph, the ramp of its first and last blocks included; assumed."""


class Gpu(NamedTuple):
    """Rates of a data sheet, times the share of them that a copy reaches; `architecture` is that of static.md."""

    architecture: str
    bytes_per_second: float
    multiprocessors: int
    hertz: float

    @property
    def issue_slots_per_second(self) -> float:
        """Warp instructions: four schedulers a multiprocessor, one each a cycle, as far as they can be kept busy."""
        return ISSUE_SHARE * 4 * self.multiprocessors * self.hertz

    @property
    def exponentials_per_second(self) -> float:
        """Sixteen a multiprocessor and cycle."""
        return 16 * self.multiprocessors * self.hertz


COPY_SHARE = 0.9
"""4.3 of 4.8 TB/s, as measured on an H200 by a device copy."""

ISSUE_SHARE = 0.8
"""Of the issue slots that a kernel with many independent loads fills; assumed."""

GPUS = {
    "A100": Gpu("sm_80", COPY_SHARE * 2.039e12, 108, 1.41e9),
    "H100": Gpu("sm_90", COPY_SHARE * 3.35e12, 132, 1.98e9),
    "H200": Gpu("sm_90", COPY_SHARE * 4.8e12, 132, 1.98e9),
    "B200": Gpu("sm_100", COPY_SHARE * 8.0e12, 148, 1.96e9),
}


class Kernel(NamedTuple):
    """A pass over the logits: its row in static.md, how often it moves each logit, and the launches that go with it."""

    name: str
    moves: int
    launches: int


OPS = {
    ("statistics", "ours"): [Kernel("statistics", 1, 2)],
    ("gradient", "ours"): [Kernel("gradient", 2, 1)],
    ("whole_loss", "ours"): [Kernel("statistics", 1, 4), Kernel("gradient", 2, 1)],
    ("greedy", "ours"): [Kernel("unmask greedy", 1, 2)],
    ("drawn", "ours, temperature"): [Kernel("unmask sampled", 1, 2)],
    ("drawn", "ours, top-p"): [*[Kernel("masses top-p", 1, 2)] * 4, Kernel("unmask sampled", 1, 2)],
}
"""By the op and contender of `benchmarks.kernels`. Launches that do not pass over the logits go with one that does."""

RANK_LENGTHS = [[256] * 8, [8192]]
PAIR_INSTRUCTIONS = {"logistic": 100, "hinge": 32}
"""Of a pair, which both of its rows compute; counted in the machine code before 1/tau was taken out of the loop."""


class Prediction(NamedTuple):
    """Seconds, the share of the floor that they are, and what they wait for."""

    seconds: float
    share_of_floor: float
    bound: str


def read_static(path: Path = RESULTS / "static.md") -> dict[tuple[str, str], tuple[float, float]]:
    """(kernel, architecture) -> instructions and exponentials a logit, of the bf16 kernels that have a chunk."""
    found = {}
    for line in path.read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) > 8 and cells[1] == "bfloat16" and cells[7]:
            found[cells[0], cells[2]] = float(cells[7]), float(cells[8])
    return found


def predict(gpu: Gpu, kernels: Sequence[Kernel], logits: int, static: dict) -> Prediction:
    """What some passes over `logits` bf16 logits take together."""
    seconds, bounds = 0.0, []
    for kernel in kernels:
        instructions, exponentials = static[kernel.name, gpu.architecture]
        parts = {
            "memory": kernel.moves * 2 * logits / gpu.bytes_per_second,
            "issue": instructions * logits / 32 / gpu.issue_slots_per_second,
            "ex2": exponentials * logits / gpu.exponentials_per_second,
        }
        bound = max(parts, key=parts.get)
        if kernel.launches * LAUNCH_SECONDS > parts[bound]:
            bounds.append("launch")
        else:
            bounds.append(bound)
        seconds += parts[bound] + kernel.launches * LAUNCH_SECONDS
    floor = sum(kernel.moves for kernel in kernels) * 2 * logits / gpu.bytes_per_second
    return Prediction(seconds, floor / seconds, ", ".join(dict.fromkeys(bounds)))


def predict_ranking(gpu: Gpu, lengths: Sequence[int], form: str) -> float:
    """Seconds of the pairs of some sequences: instructions, and two launches; there is no traffic to speak of."""
    pairs = sum(length**2 for length in lengths)
    return pairs * PAIR_INSTRUCTIONS[form] / 32 / gpu.issue_slots_per_second + 2 * LAUNCH_SECONDS


def measured(path: Path) -> tuple[str, dict[tuple[str, str, str], float]]:
    """The device of a run of `benchmarks.kernels`, and (op, contender, size) -> seconds, of its graphs."""
    run = json.loads(path.read_text())
    figures = [figure for figure in run["figures"] if figure["mode"] == "graph"]
    return run["device"], {(f["op"], f["contender"], f["size"]): f["seconds"]["median"] for f in figures}


def table(gpus: dict[str, Gpu], seen: dict[tuple[str, str, str], float]) -> Table:
    """Every op and shape on every GPU; with what was measured, where it was."""
    static = read_static()
    lines = Table("op", "N x V, bf16", "GPU", "predicted µs", "of the floor", "bound by", "measured µs", "x predicted")
    for (op, contender), kernels in OPS.items():
        for rows, columns in SHAPES:
            size = f"{rows} x {columns}"
            found = seen.get((op, contender, size))
            for name, gpu in gpus.items():
                prediction = predict(gpu, kernels, rows * columns, static)
                lines.add_row(
                    f"{op} {contender.removeprefix('ours').removeprefix(', ')}".strip(),
                    size,
                    name,
                    f"{prediction.seconds * 1e6:.1f}",
                    f"{prediction.share_of_floor:.0%}",
                    prediction.bound,
                    *beside(found, prediction.seconds),
                )
    for lengths in RANK_LENGTHS:
        for form in PAIR_INSTRUCTIONS:
            size = f"{len(lengths)} x {lengths[0]} {form}"
            found = seen.get(("ranking", "ours", size))
            for name, gpu in gpus.items():
                seconds = predict_ranking(gpu, lengths, form)
                bound = "launch" if seconds < 4 * LAUNCH_SECONDS else "issue"
                lines.add_row("ranking", size, name, f"{seconds * 1e6:.1f}", "", bound, *beside(found, seconds))
    return lines


def beside(found: float | None, predicted: float) -> tuple[str, str]:
    """What was measured, in microseconds, and how many times the prediction it is."""
    return (f"{found * 1e6:.1f}", f"{found / predicted:.2f}") if found else ("", "")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the predictions, and the run of each file beside those of its GPU."""
    paths = sys.argv[1:] if arguments is None else arguments
    console = Console(width=120)
    if not paths:
        console.print(table(GPUS, {}))
    for path in paths:
        device, seen = measured(Path(path))
        names = {name: gpu for name, gpu in GPUS.items() if name in device}
        if not names:
            sys.exit(f"{path}: device {device!r}; the model knows {', '.join(GPUS)}")
        console.print(table(names, seen))


if __name__ == "__main__":
    main()
