"""The whole loss, forward and backward from the hidden states, in the ways that people compute it.

    python -m benchmarks.loss        (also part of `make gpu`)

Everything is timed in one run on the same inputs, after a check that all give the same loss and gradient. The head is
frozen, as under LoRA. Writes benchmarks/results/loss-<device>.json and the picture beside it.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import psutil
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.measure import RESULTS, Contender, environment, peak_memory_of, time_interleaved, write_json
from tabom.released import released_loss
from tabom_kernels import fused_linear_tabom_loss, tabom_loss

SETTINGS = {"form": "hinge", "margin": 0.1, "rank_weight": 1.0}


class Shape(NamedTuple):
    """A batch: sequences of `length` positions, of which the last `window` are in both windows."""

    sequences: int
    length: int
    window: int
    width: int
    vocabulary: int

    @property
    def rows(self) -> int:
        """Rows that the loss needs."""
        return self.sequences * self.window

    @property
    def authors_bytes(self) -> int:
        """What the authors' way needs at least: six fp32 copies of all logits."""
        return 6 * 4 * self.sequences * self.length * self.vocabulary


class Problem(NamedTuple):
    """Inputs that all contenders share."""

    hidden: Tensor  # (B, L, D), requires a gradient
    weight: Tensor  # (V, D)
    rows: Tensor  # (N,) of the flattened positions
    labels: Tensor  # (N,)
    steps: Tensor  # (N,)
    cu_seqlens: Tensor  # (B + 1,)


def draw_problem(shape: Shape, device: torch.device) -> Problem:
    """Random hidden states and head in bf16, logits of about unit size, every row with its own step."""
    hidden = torch.randn(shape.sequences, shape.length, shape.width, device=device).bfloat16()
    weight = (torch.randn(shape.vocabulary, shape.width, device=device) * shape.width**-0.5).bfloat16()
    positions = torch.arange(shape.length - shape.window, shape.length, device=device)
    rows = (torch.arange(shape.sequences, device=device)[:, None] * shape.length + positions).flatten()
    steps = torch.rand(shape.sequences, shape.window, device=device).argsort(1).flatten()
    labels = torch.randint(shape.vocabulary, (shape.rows,), device=device)
    offsets = torch.arange(0, shape.rows + 1, shape.window, dtype=torch.int32, device=device)
    return Problem(hidden.requires_grad_(), weight, rows, labels, steps, offsets)


def authors_loss(problem: Problem) -> Tensor:
    """As published, on the logits of all positions."""
    logits = F.linear(problem.hidden, problem.weight)
    return released_loss(logits, *problem[2:], margin=SETTINGS["margin"], rank_weight=SETTINGS["rank_weight"])


def selected(problem: Problem) -> Tensor:
    """(N, D) hidden states of the rows that the loss needs."""
    return problem.hidden.flatten(0, 1)[problem.rows]


def loss_of_logits(problem: Problem, **options: Any) -> Tensor:
    """`tabom_loss` of the logits of the rows."""
    logits = F.linear(selected(problem), problem.weight)
    return tabom_loss(logits, *problem[3:], **SETTINGS, **options).loss


def fused_loss(problem: Problem) -> Tensor:
    """`fused_linear_tabom_loss`."""
    return fused_linear_tabom_loss(selected(problem), problem.weight, *problem[3:], **SETTINGS).loss


LOSSES: dict[str, Callable[[Problem], Tensor]] = {
    "authors' way": authors_loss,
    "reference": lambda problem: loss_of_logits(problem, backend="reference"),
    "torch.compile": torch.compile(lambda problem: loss_of_logits(problem, backend="reference")),
    "ours, logits": lambda problem: loss_of_logits(problem, inplace_backward=True),
    "ours, fused": fused_loss,
}
WAIT_FOR_HOST = {"authors' way", "reference", "torch.compile"}


def two_matmuls(problem: Problem) -> Tensor:
    """The floor: logits, and the gradient of the hidden states."""
    with torch.no_grad():
        return F.linear(selected(problem), problem.weight) @ problem.weight


def check_agreement(problem: Problem, losses: dict[str, Callable[[Problem], Tensor]]) -> None:
    """All losses and gradients are those of the reference, within bf16.

    Raises:
        AssertionError: they are not.
    """
    expected, expected_grad = value_and_gradient(problem, LOSSES["reference"])
    for name, loss in losses.items():
        value, grad = value_and_gradient(problem, loss)
        error = (grad - expected_grad).norm() / expected_grad.norm()
        assert abs(value - expected) < 1e-3 * abs(expected), (name, value, expected)
        assert error < 2e-2, (name, error)


def value_and_gradient(problem: Problem, loss: Callable[[Problem], Tensor]) -> tuple[float, Tensor]:
    """The loss, and its fp32 gradient by the rows."""
    problem.hidden.grad = None
    value = loss(problem)
    value.backward()
    return value.item(), problem.hidden.grad.flatten(0, 1)[problem.rows].float()


def measure(shape: Shape, device: torch.device, rounds: int, memory: int) -> list[dict[str, Any]]:
    """Time and incremental peak memory of every way that fits, in one run."""
    problem = draw_problem(shape, device)
    losses = {
        name: loss for name, loss in LOSSES.items() if name != "authors' way" or shape.authors_bytes < 0.8 * memory
    }
    check_agreement(problem, losses)

    def step(loss: Callable[[Problem], Tensor]) -> Callable[[], None]:
        def run() -> None:
            problem.hidden.grad = None
            loss(problem).backward()

        return run

    contenders = [Contender(name, step(loss), name not in WAIT_FOR_HOST) for name, loss in losses.items()]
    contenders.append(Contender("two matmuls", lambda: two_matmuls(problem)))
    timings = time_interleaved(contenders, device, rounds)
    return [
        {
            "shape": shape._asdict() | {"rows": shape.rows},
            "contender": contender.name,
            "seconds": timings[contender.name]._asdict(),
            "peak_bytes": peak_memory_of(contender.call, device),
        }
        for contender in contenders
    ]


def print_table(records: list[dict[str, Any]]) -> None:
    """Milliseconds, MiB, and both against the authors' way where it fits."""
    table = Table("V", "rows", "contender", "ms", "spread", "MiB", "x faster", "x less memory")
    for record in records:
        shape, seconds = record["shape"], record["seconds"]
        authors = next((r for r in records if r["shape"] == shape and r["contender"] == "authors' way"), None)
        faster = f"{authors['seconds']['median'] / seconds['median']:.1f}" if authors else ""
        smaller = f"{authors['peak_bytes'] / max(record['peak_bytes'], 1):.1f}" if authors else ""
        table.add_row(
            str(shape["vocabulary"]),
            str(shape["rows"]),
            record["contender"],
            f"{seconds['median'] * 1e3:.2f}",
            f"{seconds['low'] * 1e3:.2f}-{seconds['high'] * 1e3:.2f}",
            f"{record['peak_bytes'] / 2**20:.1f}",
            faster,
            smaller,
        )
    Console(width=110).print(table)


def draw_picture(records: list[dict[str, Any]], title: str, path: str) -> None:
    """Time and memory against the number of rows, at the largest vocabulary."""
    from matplotlib.figure import Figure

    vocabulary = max(record["shape"]["vocabulary"] for record in records)
    chosen = [record for record in records if record["shape"]["vocabulary"] == vocabulary]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    for name in dict.fromkeys(record["contender"] for record in chosen):
        lines = [record for record in chosen if record["contender"] == name]
        rows = [record["shape"]["rows"] for record in lines]
        style = {"marker": "o", "label": name}
        time_axes.plot(rows, [record["seconds"]["median"] * 1e3 for record in lines], **style)
        memory_axes.plot(rows, [record["peak_bytes"] / 2**20 for record in lines], **style)
    for axes, label in ((time_axes, "forward + backward, ms"), (memory_axes, "peak memory above the inputs, MiB")):
        ticks = sorted({record["shape"]["rows"] for record in chosen})
        axes.set(xscale="log", yscale="log", xlabel="rows in the windows", ylabel=label)
        axes.set_xticks(ticks, labels=[str(tick) for tick in ticks], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    memory_axes.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure all that fits on this machine."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 1024, 4096], help="rows in the windows")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[126464, 152064])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if torch.cuda.is_available():
        device, memory, rounds = torch.device("cuda"), torch.cuda.mem_get_info()[0], 30
        length, window, width = 512, 32, 3584  # Dream's width, the recipes' windows
    else:
        device, memory, rounds = torch.device("cpu"), psutil.virtual_memory().available, 5
        length, window, width = 128, 16, 512
    records = []
    for vocabulary in arguments.vocabulary:
        for rows in arguments.rows:
            shape = Shape(rows // window, length, window, width, vocabulary)
            print(f"V={vocabulary}, {rows} rows", file=sys.stderr, flush=True)
            records += measure(shape, device, rounds, memory)
    found = environment(device)
    name = "loss-" + (found["device"].lower().replace(" ", "-") if device.type == "cuda" else "cpu")
    path = write_json(name, found | {"figures": records})
    title = f"{found['device']}, V = {max(arguments.vocabulary)}, D = {width}, bf16, {length // window} positions a row"
    draw_picture(records, title, RESULTS / f"{name}.png")
    print_table(records)
    print(f"{found['device']}, torch {found['torch']}; wrote {path} and the picture beside it")


if __name__ == "__main__":
    main()
