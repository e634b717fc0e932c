"""What a second busy process costs on a CPU: the torch backend alone, and beside a copy of itself.

    python -m benchmarks.busy

Two processes, each with a thread for every core, take turns: one alone for a second, then both at once, and so on for
every contender. Nothing else should run. Takes a minute and writes benchmarks/results/busy-cpu.json.
"""

import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.loss import Problem, Shape, draw_problem, fused_loss, loss_of_logits, selected
from benchmarks.tools.measure import environment, summary, time_on_cpu, write_json
from tabom_kernels.backends.torch import vocabulary_gradient, vocabulary_statistics

CPU = torch.device("cpu")
SHAPE = Shape(sequences=4, length=16, window=16, width=512, vocabulary=152064)
TURNS, SECONDS = 4, 1.0


def contenders(problem: Problem) -> dict[str, Callable[[], Any]]:
    """The two sweeps over logits, the fused loss with its floor, and the loss as one writes it in PyTorch."""
    hidden, weight = selected(problem).detach(), problem.weight
    logits = hidden @ weight.T
    statistics = vocabulary_statistics(logits, problem.labels, -100)
    out = torch.empty_like(logits)
    row_grads = (torch.ones_like(statistics.entropy),) * 2

    def gradient_of(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, problem.hidden)[0]

    return {
        "statistics": lambda: vocabulary_statistics(logits, problem.labels, -100),
        "gradient": lambda: vocabulary_gradient(logits, problem.labels, -100, statistics, *row_grads, out),
        "fused loss": lambda: gradient_of(fused_loss(problem)),
        "its two matmuls": lambda: (hidden @ weight.T) @ weight,
        "reference loss": lambda: gradient_of(loss_of_logits(problem, backend="reference")),
    }


def answer(parent: Connection, threads: int, shape: Shape) -> None:
    """A process that times the contender it is sent, for so many seconds, until it is sent None."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    calls = contenders(draw_problem(shape, CPU))
    for call in calls.values():
        call()
    parent.send(list(calls))
    for name, seconds in iter(parent.recv, None):
        timings, end = [], time.perf_counter() + seconds
        while not timings or time.perf_counter() < end:
            timings.append(time_on_cpu(calls[name]))
        parent.send(timings)


def measure(shape: Shape, turns: int, seconds: float) -> list[dict[str, Any]]:
    """Seconds of every contender, alone and beside another process that does the same."""
    context = get_context("spawn")
    ends, processes = [], []
    for _ in range(2):
        end, other = context.Pipe()
        processes.append(context.Process(target=answer, args=(other, torch.get_num_threads(), shape)))
        processes[-1].start()
        ends.append(end)
    [names, _] = [end.recv() for end in ends]
    found = {(name, mode): [] for name in names for mode in ("alone", "busy")}
    for _ in range(turns):
        for name in names:
            for mode, at_work in (("alone", ends[:1]), ("busy", ends)):
                for end in at_work:
                    end.send((name, seconds))
                for end in at_work:
                    found[name, mode] += end.recv()
    for end, process in zip(ends, processes, strict=True):
        end.send(None)
        process.join()
    return [
        {"contender": name, "mode": mode, "seconds": summary(timings)._asdict() | {"fastest": min(timings)}}
        for (name, mode), timings in found.items()
    ]


def print_table(records: list[dict[str, Any]]) -> None:
    """Milliseconds, and how many times as long it takes beside another process."""
    table = Table(title="milliseconds: median (10th to 90th percentile)")
    for head in ("", "alone", "busy", "factor"):
        table.add_column(head, justify="right" if head else "left")
    for alone, busy in zip(records[::2], records[1::2], strict=True):
        cells = [
            f"{1e3 * s['median']:.1f} ({1e3 * s['low']:.1f} to {1e3 * s['high']:.1f})"
            for s in (alone["seconds"], busy["seconds"])
        ]
        table.add_row(alone["contender"], *cells, f"{busy['seconds']['median'] / alone['seconds']['median']:.1f}")
    Console().print(table)


def main() -> None:
    """Measure, print and write."""
    records = measure(SHAPE, TURNS, SECONDS)
    print_table(records)
    path = write_json("busy-cpu", environment(CPU) | {"shape": SHAPE._asdict(), "figures": records})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
