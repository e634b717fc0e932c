"""The whole loss, forward and backward from the hidden states: ours, its peers, and the ways that people write it.

    python -m benchmarks.loss        (--ours in `make gpu`, all in `make gpu-peers`)

Everything is timed in one run on the same inputs, after a check that all give the same loss and gradient. The head is
frozen, as under LoRA (`benchmarks.trained_head`: one with a gradient). A peer that knows no ranking is timed at the
cross-entropy alone, and so are we beside it. Writes benchmarks/results/loss-<device>.json after every shape;
`python -m benchmarks.tools.pictures` draws it.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import psutil
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.tools.measure import (
    Contender,
    ceilings,
    environment,
    is_gpu,
    peak_memory_of,
    result_name,
    this_device,
    time_interleaved,
    write_json,
)
from tabom.training.released import released_loss
from tabom_kernels import fused_linear_tabom_loss, reference, tabom_loss, trajectory_rank_loss

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
    return tabom_loss(logits, *problem[3:], **SETTINGS | options).loss


def fused_loss(problem: Problem, rank_weight: float = SETTINGS["rank_weight"]) -> Tensor:
    """`fused_linear_tabom_loss`."""
    settings = SETTINGS | {"rank_weight": rank_weight}
    sequences = problem.cu_seqlens.shape[0] - 1
    settings["lengths"] = [problem.rows.shape[0] // sequences] * sequences
    return fused_linear_tabom_loss(selected(problem), problem.weight, *problem[3:], **settings).loss


CHECKPOINT_ROWS = 512


def checkpointed_loss(problem: Problem) -> Tensor:
    """Plain PyTorch a chunk of rows at a time, whose logits are thrown away and computed again in backward."""

    def statistics(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return reference.cross_entropy_with_entropy(F.linear(hidden, problem.weight), labels, -100)

    chunks = zip(selected(problem).split(CHECKPOINT_ROWS), problem.labels.split(CHECKPOINT_ROWS), strict=True)
    parts = [checkpoint(statistics, *chunk, use_reentrant=False) for chunk in chunks]
    cross_entropy, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
    return with_ranking(problem, cross_entropy, entropy)


def with_ranking(problem: Problem, cross_entropy: Tensor, entropy: Tensor) -> Tensor:
    """The loss from the statistics of the rows, for peers that have no ranking of their own."""
    rank = trajectory_rank_loss(
        entropy, problem.steps, problem.cu_seqlens, form=SETTINGS["form"], margin=SETTINGS["margin"]
    )
    return cross_entropy.mean() + SETTINGS["rank_weight"] * rank.mean()


Loss = Callable[[Problem], Tensor]

LOSSES: dict[str, Loss] = {
    "authors' way": authors_loss,
    "reference": lambda problem: loss_of_logits(problem, backend="reference"),
    "torch.compile": torch.compile(lambda problem: loss_of_logits(problem, backend="reference"), dynamic=False),
    "checkpoint": checkpointed_loss,
    "ours, logits": lambda problem: loss_of_logits(problem, inplace_backward=True),
    "ours, fused": fused_loss,
}
CROSS_ENTROPY_ALONE: dict[str, Loss] = {
    "ours, fused, CE alone": lambda problem: fused_loss(problem, rank_weight=0.0),
}
OURS = ["ours, logits", "ours, fused"]
WAIT_FOR_HOST = {"authors' way", "reference", "torch.compile", "checkpoint", "Liger CE + entropy", "Liger CE", "Cut CE"}


def add_peers(device: torch.device) -> None:
    """The other libraries that are installed and run here."""
    has_gpu = is_gpu(device)
    # Liger's entropy op is its own kernel on Hopper, where it needs the CUTLASS DSL, and chunked PyTorch elsewhere.
    needs_cutlass = has_gpu and torch.cuda.get_device_capability(device) == (9, 0)
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        def liger_entropy(problem: Problem) -> Tensor:
            statistics = LigerFusedLinearScaledCrossEntropyFunction.apply(
                selected(problem), problem.weight, problem.labels, 1.0, -100, 1, True
            )
            return with_ranking(problem, *(part.float() for part in statistics))

        if not needs_cutlass or importlib.util.find_spec("cutlass"):
            LOSSES["Liger CE + entropy"] = liger_entropy
        if has_gpu:
            liger = LigerFusedLinearCrossEntropyLoss()
            CROSS_ENTROPY_ALONE["Liger CE"] = lambda problem: liger(problem.weight, selected(problem), problem.labels)
    if importlib.util.find_spec("trl"):
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        def trl_entropy(problem: Problem) -> Tensor:
            """Tiles of 32768 columns, as TRL's trainers take them."""
            log_probability, entropy, *_ = ChunkedLogProbFunction.apply(
                selected(problem), problem.weight, None, problem.labels, 1.0, 32768, None, 1.0, ("entropy",)
            )
            return with_ranking(problem, -log_probability, entropy)

        LOSSES["TRL CE + entropy"] = trl_entropy
    if has_gpu and importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        CROSS_ENTROPY_ALONE["Cut CE"] = lambda problem: linear_cross_entropy(
            selected(problem), problem.weight, problem.labels
        )


FLOOR = "two matmuls"


def matmuls(problem: Problem) -> Tensor:
    """The floor: logits, and the gradient of the hidden states."""
    with torch.no_grad():
        return F.linear(selected(problem), problem.weight) @ problem.weight


def check_agreement(problem: Problem, losses: dict[str, Loss], rank_weight: float) -> None:
    """All losses and gradients are those of the reference, within bf16.

    Raises:
        AssertionError: they are not.
    """
    naive = lambda problem: loss_of_logits(problem, backend="reference", rank_weight=rank_weight)  # noqa: E731
    expected, expected_grad = value_and_gradient(problem, naive)
    for name, loss in losses.items():
        value, grad = value_and_gradient(problem, loss)
        error = (grad - expected_grad).norm() / expected_grad.norm()
        assert abs(value - expected) < 1e-3 * abs(expected), (name, value, expected)
        assert error < 2e-2, (name, error)


def value_and_gradient(problem: Problem, loss: Loss) -> tuple[float, Tensor]:
    """The loss, and its fp32 gradient by the rows."""
    problem.hidden.grad = None
    value = loss(problem)
    value.backward()
    return value.item(), problem.hidden.grad.flatten(0, 1)[problem.rows].float()


def measure(
    shape: Shape, device: torch.device, rounds: int, memory: int, names: list[str] | None = None
) -> list[dict[str, Any]]:
    """Time and incremental peak memory of every way (or of those named) that fits, in one run."""
    torch.compiler.reset()  # each shape is compiled for itself
    problem = draw_problem(shape, device)
    whole, alone = (
        {
            name: loss
            for name, loss in losses.items()
            if (names is None or name in names) and (name != "authors' way" or shape.authors_bytes < 0.8 * memory)
        }
        for losses in (LOSSES, CROSS_ENTROPY_ALONE)
    )
    check_agreement(problem, whole, SETTINGS["rank_weight"])
    check_agreement(problem, alone, 0.0)

    def step(loss: Loss) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(loss(problem), problem.hidden)

    contenders = [Contender(name, [step(loss)], name not in WAIT_FOR_HOST) for name, loss in (whole | alone).items()]
    contenders.append(Contender(FLOOR, [lambda: matmuls(problem)]))
    timings = time_interleaved(contenders, device, rounds)
    computes = dict.fromkeys(whole, "everything") | dict.fromkeys(alone, "cross-entropy alone")
    peaks = {contender.name: peak_memory_of(contender.calls[0], device) for contender in contenders}
    return [
        {
            "shape": shape._asdict() | {"rows": shape.rows},
            "contender": name,
            "mode": mode,
            "computes": computes.get(name, "the floor"),
            "seconds": timing._asdict(),
            "peak_bytes": peaks[name],
        }
        for (name, mode), timing in timings.items()
    ]


def print_table(records: list[dict[str, Any]], matmul_rate: float) -> None:
    """Milliseconds, MiB, the time against the floor and the ceiling, and both against the authors' way if it fits.

    Args:
        matmul_rate: FLOP/s that the device reached in the same run.
    """
    heads = ("V", "rows", "contender", "mode", "computes", "ms", "spread", "x the floor", "of matmul rate", "MiB")
    table = Table(*heads, "x faster", "x less memory")
    for record in records:
        shape, seconds = record["shape"], record["seconds"]
        beside = {r["contender"]: r for r in records if (r["shape"], r["mode"]) == (shape, record["mode"])}
        authors, floor = beside.get("authors' way"), beside[FLOOR]
        faster = f"{authors['seconds']['median'] / seconds['median']:.1f}" if authors else ""
        smaller = f"{authors['peak_bytes'] / max(record['peak_bytes'], 1):.1f}" if authors else ""
        table.add_row(
            str(shape["vocabulary"]),
            str(shape["rows"]),
            *(record[name] for name in ("contender", "mode", "computes")),
            f"{seconds['median'] * 1e3:.2f}",
            f"{seconds['low'] * 1e3:.2f}-{seconds['high'] * 1e3:.2f}",
            f"{seconds['median'] / floor['seconds']['median']:.2f}",
            f"{4 * shape['rows'] * shape['vocabulary'] * shape['width'] / seconds['median'] / matmul_rate:.0%}",
            f"{record['peak_bytes'] / 2**20:.1f}",
            faster,
            smaller,
        )
    Console(width=140).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all that fits on this machine."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 1024, 4096], help="rows in the windows")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[126464, 152064])
    parser.add_argument("--ours", action="store_true", help="no peers, and not the ways that people write it")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    device, memory, rounds, (length, window, width) = machine()
    add_peers(device)
    limits = ceilings(device)
    found = environment(device) | {"ceilings": limits}
    name = result_name("loss" + "-ours" * options.ours, device)
    records = []
    for vocabulary in options.vocabulary:
        for rows in options.rows:
            shape = Shape(rows // window, length, window, width, vocabulary)
            print(f"V={vocabulary}, {rows} rows", file=sys.stderr, flush=True)
            records += measure(shape, device, rounds, memory, OURS if options.ours else None)
            path = write_json(name, found | {"figures": records})
    print_table(records, limits["matmul_flop_per_second"])
    print(f"{found['device']}, torch {found['torch']}; wrote {path}")


def machine() -> tuple[torch.device, int, int, tuple[int, int, int]]:
    """The device, its free bytes, rounds, and the length, window and width of a sequence that suit it."""
    device = this_device()
    if is_gpu(device):
        return device, torch.cuda.mem_get_info()[0], 30, (512, 32, 3584)  # Dream, as in the recipes
    return device, psutil.virtual_memory().available, 5, (128, 16, 512)


if __name__ == "__main__":
    main()
