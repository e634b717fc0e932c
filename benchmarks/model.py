"""A model of time: what every kernel should take on each GPU, before any has run it, and beside a run that has.

    python -m benchmarks.model                                        # the predictions
    python -m benchmarks.model results/kernels-nvidia-h100.json       # a run beside them, line by line

A launch takes the longest of its memory traffic, its issue slots and its exponentials, and a constant on top. Bytes,
instructions and exponentials a logit, and instructions a ranked pair, are those of results/emulated.json. They were
counted as the compiled kernels ran on an emulator, so a prediction follows the code.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.tools.measure import RESULTS

SHAPES = [(64, 152064), (256, 152064), (2048, 152064), (4096, 126464)]
LAUNCH_SECONDS = 1.5e-6
"""Of a kernel in a graph, the ramp of its first and last blocks included; assumed."""


class Gpu(NamedTuple):
    """Rates of a data sheet, times the share of them that a copy reaches; `architecture` is that of emulated.json."""

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
    """Launches that pass over the logits: their name in emulated.json and their number."""

    name: str
    launches: int


OPS = {
    ("statistics", "ours"): [Kernel("statistics", 2)],
    ("gradient", "ours"): [Kernel("gradient", 1)],
    ("whole_loss", "ours"): [Kernel("statistics", 4), Kernel("gradient", 1)],
    ("greedy", "ours"): [Kernel("unmask greedy", 2)],
    ("drawn", "ours, temperature"): [Kernel("unmask sampled", 2)],
    ("drawn", "ours, top-p"): [Kernel("thresholds top-p", 8), Kernel("unmask sampled", 2)],
}
"""By the op and contender of `benchmarks.kernels`. Launches that do not pass over the logits go with one that does."""

RANK_LENGTHS = [[256] * 8, [8192]]


class Prediction(NamedTuple):
    """Seconds, the share of the floor that they are, and what they wait for."""

    seconds: float
    share_of_floor: float
    bound: str


class Counts(NamedTuple):
    """What an op does a bf16 logit."""

    moved_bytes: float
    instructions: float
    exponentials: float


def read_counts(path: Path = RESULTS / "emulated.json") -> dict[tuple[str, str], Counts]:
    """The counts by op and architecture."""
    return {
        (figure["op"], figure["architecture"]): Counts(
            figure["loaded_bytes"] + figure["stored_bytes"], figure["instructions"], figure["exponentials"]
        )
        for figure in json.loads(path.read_text())["figures"]
    }


def read_pair_instructions(path: Path = RESULTS / "emulated.json") -> dict[tuple[str, str], float]:
    """The instructions of a pair of rows, which both of its rows compute, by form and architecture."""
    pairs = json.loads(path.read_text())["pairs"]
    return {(figure["form"], figure["architecture"]): figure["instructions"] for figure in pairs}


def predict(gpu: Gpu, kernels: Sequence[Kernel], logits: int, counts: dict[tuple[str, str], Counts]) -> Prediction:
    """What some passes over `logits` bf16 logits take together."""
    seconds, floor, bounds = 0.0, 0.0, []
    for kernel in kernels:
        of_logit = counts[kernel.name, gpu.architecture]
        parts = {
            "memory": of_logit.moved_bytes * logits / gpu.bytes_per_second,
            "issue": of_logit.instructions * logits / 32 / gpu.issue_slots_per_second,
            "ex2": of_logit.exponentials * logits / gpu.exponentials_per_second,
        }
        bound = max(parts, key=parts.get)
        launches = kernel.launches * LAUNCH_SECONDS
        bounds.append("launch" if launches > parts[bound] else bound)
        seconds += parts[bound] + launches
        floor += parts["memory"]
    return Prediction(seconds, floor / seconds, ", ".join(dict.fromkeys(bounds)))


def predict_ranking(gpu: Gpu, lengths: Sequence[int], instructions: float) -> float:
    """Seconds of the pairs of some sequences: instructions, and two launches; there is no traffic to speak of."""
    pairs = sum(length**2 for length in lengths)
    return pairs * instructions / 32 / gpu.issue_slots_per_second + 2 * LAUNCH_SECONDS


def measured(path: Path) -> tuple[str, dict[tuple[str, str, str], float]]:
    """The device of a run of `benchmarks.kernels`, and (op, contender, size) -> seconds, of its graphs."""
    run = json.loads(path.read_text())
    figures = [figure for figure in run["figures"] if figure["mode"] == "graph"]
    return run["device"], {(f["op"], f["contender"], f["size"]): f["seconds"]["median"] for f in figures}


def table(gpus: dict[str, Gpu], seen: dict[tuple[str, str, str], float]) -> Table:
    """Every op and shape on every GPU; with what was measured, where it was."""
    counts, pair_instructions = read_counts(), read_pair_instructions()
    lines = Table("op", "N x V, bf16", "GPU", "predicted µs", "of the floor", "bound by", "measured µs", "x predicted")
    for (op, contender), kernels in OPS.items():
        for rows, columns in SHAPES:
            size = f"{rows} x {columns}"
            found = seen.get((op, contender, size))
            for name, gpu in gpus.items():
                prediction = predict(gpu, kernels, rows * columns, counts)
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
        for form in ("logistic", "hinge"):
            size = f"{len(lengths)} x {lengths[0]} {form}"
            found = seen.get(("ranking", "ours", size))
            for name, gpu in gpus.items():
                seconds = predict_ranking(gpu, lengths, pair_instructions[form, gpu.architecture])
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
