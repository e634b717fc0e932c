"""Every kernel on a GPU, against its floor, the reference, torch.compile of it and, where installed, Liger-Kernel.

    python -m benchmarks.kernels        (part of `make gpu`)

Writes benchmarks/results/kernels-<device>.json. The floor of a kernel is the bytes it must move over the copy bandwidth
measured in the same run; benchmarks/NOTES.md derives them.
"""

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.measure import Contender, ceilings, environment, result_name, time_interleaved, write_json
from tabom_kernels import (
    backends,
    cross_entropy_with_entropy,
    reference,
    softmax_entropy,
    tabom_loss,
    unmask_statistics,
)
from tabom_kernels import trajectory_rank_loss as rank_loss

SHAPES = [(64, 152064), (256, 152064), (2048, 152064), (4096, 126464)]
RANK_LENGTHS = [[256] * 8, [8192]]


def statistics(logits: Tensor, labels: Tensor) -> tuple[list[Contender], int]:
    """Forward cross-entropy and entropy: reads the logits once."""
    compiled = torch.compile(reference.cross_entropy_with_entropy)
    contenders = [
        Contender("ours", lambda: cross_entropy_with_entropy(logits, labels)),
        Contender("entropy alone", lambda: softmax_entropy(logits)),
        Contender("reference", lambda: reference.cross_entropy_with_entropy(logits, labels, -100)),
        Contender("torch.compile", lambda: compiled(logits, labels, -100)),
    ]
    return contenders, logits.nbytes


def gradient(logits: Tensor, labels: Tensor) -> tuple[list[Contender], int]:
    """In-place backward: reads the logits once and writes them once."""
    forms = backends.closed_forms(backends.backend_for(logits))
    saved = forms.vocabulary_statistics(logits, labels, -100)
    upstream = torch.rand(2, len(logits), device=logits.device)
    target = torch.empty_like(logits)  # not in place, so that every round finds the same logits; the same bytes
    contenders = [Contender("ours", lambda: forms.vocabulary_gradient(logits, labels, -100, saved, *upstream, target))]
    return contenders, 2 * logits.nbytes


def whole_loss(logits: Tensor, labels: Tensor) -> tuple[list[Contender], int]:
    """tabom_loss forward and backward: two reads and one write. Liger's cross-entropy has no entropy and no ranking."""
    leaf = logits.detach().requires_grad_()
    rows = len(logits)
    steps = torch.randint(0, 32, (rows,), device=logits.device)
    cu_seqlens = torch.arange(0, rows + 1, 32, dtype=torch.int32, device=logits.device)

    def train(loss: Callable[..., Any], **options: Any) -> Callable[[], None]:
        def step() -> None:
            leaf.grad = None
            loss(leaf, labels, steps, cu_seqlens, **options).loss.backward()

        return step

    contenders = [
        Contender("ours", train(tabom_loss)),
        Contender("reference", train(tabom_loss, backend="reference"), capture=False),
        Contender("torch.compile", train(torch.compile(tabom_loss), backend="reference"), capture=False),
    ]
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerCrossEntropyLoss

        liger = LigerCrossEntropyLoss()

        def liger_step() -> None:
            # Its backward writes over the logits, so it gets a copy, which is timed apart.
            liger(leaf * 1, labels).backward()

        def copy_step() -> None:
            (leaf * 1).backward(leaf.detach())

        contenders += [Contender("Liger CE + copy", liger_step, capture=False), Contender("copy", copy_step)]
    return contenders, 3 * logits.nbytes


def sampling(logits: Tensor, labels: Tensor) -> tuple[list[Contender], int]:
    """unmask_statistics: reads the logits once, filters read them again from the cache."""
    keys = torch.arange(len(logits), device=logits.device)
    contenders = [Contender("entropy alone", lambda: softmax_entropy(logits))]
    for name, options in {
        "greedy": {},
        "temperature": {"temperature": 0.8},
        "top-p": {"temperature": 0.8, "top_p": 0.95},
    }.items():
        for backend, label in ((None, "ours"), ("reference", "reference")):
            contenders.append(
                Contender(
                    f"{label}, {name}",
                    lambda o=options, b=backend: unmask_statistics(logits, generator=keys, backend=b, **o),
                )
            )
    return contenders, logits.nbytes


def ranking(lengths: list[int], form: str, device: torch.device) -> list[Contender]:
    """Loss and gradient of the entropies; launch-bound, so there is no floor in bytes."""
    rows = sum(lengths)
    entropy = torch.rand(rows, device=device) * 5
    steps = torch.randint(0, 64, (rows,), device=device)
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    return [
        Contender("ours", lambda: rank_loss(entropy, steps, cu_seqlens, form=form)),
        Contender(
            "reference", lambda: rank_loss(entropy, steps, cu_seqlens, form=form, backend="reference"), capture=False
        ),
    ]


def measure_all(device: torch.device, shapes: list[tuple[int, int]], rank_lengths: list[list[int]]) -> list[dict]:
    """One record a figure."""
    records = []

    def add(op: str, size: str, contenders: list[Contender], floor_bytes: int | None) -> None:
        for name, timing in time_interleaved(contenders, device).items():
            records.append(
                {"op": op, "size": size, "contender": name, "seconds": timing._asdict(), "floor_bytes": floor_bytes}
            )

    for rows, columns in shapes:
        for op in (statistics, gradient, whole_loss, sampling):
            logits = (3 * torch.randn(rows, columns, device=device)).bfloat16()
            labels = torch.randint(columns, (rows,), device=device)
            add(op.__name__, f"{rows} x {columns}", *op(logits, labels))
    for lengths in rank_lengths:
        for form in ("logistic", "hinge", "plackett_luce"):
            size = f"{len(lengths)} x {lengths[0]} {form}"
            add("ranking", size, ranking(lengths, form, device), None)
    return records


def print_table(records: list[dict], copy_bandwidth: float) -> None:
    """Microseconds, and the share of the floor that was reached."""
    table = Table("op", "size", "contender", "µs", "spread", "of copy bandwidth")
    for record in records:
        seconds = record["seconds"]
        floor = record["floor_bytes"]
        share = f"{floor / copy_bandwidth / seconds['median']:.0%}" if floor else ""
        table.add_row(
            record["op"],
            record["size"],
            record["contender"],
            f"{seconds['median'] * 1e6:.1f}",
            f"{seconds['low'] * 1e6:.1f}-{seconds['high'] * 1e6:.1f}",
            share,
        )
    Console(width=110).print(table)


def main() -> None:
    """Measure everything on the GPU of this machine."""
    if not torch.cuda.is_available():
        sys.exit("benchmarks.kernels: needs a CUDA GPU")
    device = torch.device("cuda")
    limits = ceilings(device)
    records = measure_all(device, SHAPES, RANK_LENGTHS)
    found = environment(device)
    path = write_json(result_name("kernels", device), found | {"ceilings": limits, "figures": records})
    print_table(records, limits["copy_bytes_per_second"])
    print(f"{found['device']}, copy {limits['copy_bytes_per_second'] / 1e12:.2f} TB/s; wrote {path}")


if __name__ == "__main__":
    main()
