"""Every kernel on a GPU, against its floor; with --peers also the reference, torch.compile of it and Liger-Kernel.

    python -m benchmarks.kernels [--peers]        (part of `make gpu`, with peers of `make gpu-peers`)
    ncu python -m benchmarks.kernels --once       (every kernel, for a profiler)

Writes benchmarks/results/kernels-<device>.json after every op of every shape. The floor of a kernel is the bytes it
must move over the copy bandwidth measured in the same run; benchmarks/NOTES.md derives them.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.tools.measure import (
    Contender,
    ceilings,
    copies_for,
    environment,
    is_gpu,
    result_name,
    this_device,
    time_interleaved,
    write_json,
)
from tabom_kernels import (
    cross_entropy_with_entropy,
    reference,
    softmax_entropy,
    tabom_loss,
    unmask_statistics,
)
from tabom_kernels import trajectory_rank_loss as rank_loss
from tabom_kernels.backends import selection

SHAPES = [(64, 152064), (256, 152064), (2048, 152064), (4096, 126464)]
RANK_LENGTHS = [[256] * 8, [8192]]
FORMS = ("logistic", "hinge", "plackett_luce")
DRAWN = {"temperature": {"temperature": 0.8}, "top-p": {"temperature": 0.8, "top_p": 0.95}}

Batch = tuple[Tensor, Tensor]
"""Logits (N, V) and labels (N,)."""


def contender(name: str, call: Callable[..., Any], inputs: Sequence[tuple], capture: bool = True) -> Contender:
    """`call` on each copy of its inputs."""
    return Contender(name, [partial(call, *arguments) for arguments in inputs], capture)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for this shape alone."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def statistics(batches: list[Batch], peers: bool) -> tuple[list[Contender], int]:
    """Forward cross-entropy and entropy: reads the logits once."""
    contenders = [
        contender("ours", cross_entropy_with_entropy, batches),
        contender("entropy alone", softmax_entropy, [(logits,) for logits, _ in batches]),
    ]
    if peers:
        naive = partial(reference.cross_entropy_with_entropy, ignore_index=-100)
        contenders.append(contender("reference", naive, batches, capture=False))
        contenders.append(contender("torch.compile", compiled(naive), batches, capture=False))
    return contenders, batches[0][0].nbytes


def gradient(batches: list[Batch], peers: bool) -> tuple[list[Contender], int]:
    """Backward: reads the logits once and writes as much (in one place, so that every round finds the same logits)."""
    backend = selection.load(selection.backend_for(batches[0][0]))
    upstream = torch.rand(2, len(batches[0][0]), device=batches[0][0].device)
    target = torch.empty_like(batches[0][0])
    inputs = [(*batch, -100, backend.vocabulary_statistics(*batch, -100), *upstream, target) for batch in batches]
    return [contender("ours", backend.vocabulary_gradient, inputs)], 2 * target.nbytes


def whole_loss(batches: list[Batch], peers: bool) -> tuple[list[Contender], int]:
    """tabom_loss forward and backward: two reads and one write. Liger's cross-entropy has no entropy and no ranking."""
    rows, device = len(batches[0][0]), batches[0][0].device
    steps = torch.randint(0, 32, (rows,), device=device)
    cu_seqlens = torch.arange(0, rows + 1, 32, dtype=torch.int32, device=device)
    inputs = [(logits.detach().requires_grad_(), labels, steps, cu_seqlens) for logits, labels in batches]

    def train(loss: Callable[..., Any], *batch: Tensor, **options: Any) -> None:
        batch[0].grad = None
        loss(*batch, **options).loss.backward()

    contenders = [contender("ours", partial(train, tabom_loss), inputs)]
    if peers:
        naive = partial(tabom_loss, backend="reference")
        contenders.append(contender("reference", partial(train, naive), inputs, capture=False))
        contenders.append(contender("torch.compile", partial(train, compiled(naive)), inputs, capture=False))
    if peers and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerCrossEntropyLoss

        liger = LigerCrossEntropyLoss()

        def liger_step(logits: Tensor, labels: Tensor, *_: Tensor) -> None:
            # Its backward writes over the logits, so it gets a copy, which is timed apart.
            liger(logits * 1, labels).backward()

        def copy_step(logits: Tensor, *_: Tensor) -> None:
            (logits * 1).backward(logits.detach())

        contenders += [contender("Liger CE + copy", liger_step, inputs, capture=False)]
        contenders += [contender("copy", copy_step, inputs, capture=False)]
    return contenders, 3 * batches[0][0].nbytes


def greedy(batches: list[Batch], peers: bool) -> tuple[list[Contender], int]:
    """unmask_statistics at temperature 0: reads the logits once."""
    return sampling(batches, peers, {"": {}})


def drawn(batches: list[Batch], peers: bool) -> tuple[list[Contender], int]:
    """unmask_statistics above: reads the logits once, and filters read them again from the cache."""
    return sampling(batches, peers, DRAWN)


def sampling(batches: list[Batch], peers: bool, ways: dict[str, dict]) -> tuple[list[Contender], int]:
    """unmask_statistics with some settings."""
    keys = torch.arange(len(batches[0][0]), device=batches[0][0].device)
    inputs = [(logits,) for logits, _ in batches]
    contenders = []
    for name, options in ways.items():
        call = partial(unmask_statistics, generator=keys, **options)
        suffix = name and f", {name}"
        contenders.append(contender(f"ours{suffix}", call, inputs))
        if peers:
            naive = partial(call, backend="reference")
            contenders.append(contender(f"reference{suffix}", naive, inputs, capture=False))
    return contenders, batches[0][0].nbytes


OPS = {op.__name__: op for op in (statistics, gradient, greedy, whole_loss, drawn)}


def ranking(lengths: list[int], form: str, device: torch.device, peers: bool) -> list[Contender]:
    """Loss and gradient of the entropies; launch-bound, so there is no floor in bytes."""
    rows = sum(lengths)
    entropy = torch.rand(rows, device=device) * 5
    steps = torch.randint(0, 64, (rows,), device=device)
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    inputs = [(entropy, steps, cu_seqlens)]
    contenders = [contender("ours", partial(rank_loss, form=form), inputs)]
    if peers:
        naive = partial(rank_loss, form=form, backend="reference")
        contenders.append(contender("reference", naive, inputs, capture=False))
    return contenders


def draw_batches(device: torch.device, rows: int, columns: int, copies: int) -> list[Batch]:
    """Copies of a problem."""
    return [
        ((3 * torch.randn(rows, columns, device=device)).bfloat16(), torch.randint(columns, (rows,), device=device))
        for _ in range(copies)
    ]


def measure_op(op: str, device: torch.device, rows: int, columns: int, peers: bool) -> list[dict]:
    """An op on logits of one shape."""
    batches = draw_batches(device, rows, columns, copies_for(2 * rows * columns, device))
    contenders, floor_bytes = OPS[op](batches, peers)
    return to_records(op, f"{rows} x {columns}", contenders, device, floor_bytes)


def call_once(device: torch.device, rows: int, columns: int) -> None:
    """Every op on logits of one shape, and the pairs of every form."""
    for op in OPS.values():
        for contender in op(draw_batches(device, rows, columns, 1), peers=False)[0]:
            contender.calls[0]()
    for form in FORMS:
        ranking(RANK_LENGTHS[0], form, device, peers=False)[0].calls[0]()


def measure_ranking(device: torch.device, lengths: list[int], peers: bool) -> list[dict]:
    """Every form on sequences of some lengths."""
    records = []
    for form in FORMS:
        size = f"{len(lengths)} x {lengths[0]} {form}"
        records += to_records("ranking", size, ranking(lengths, form, device, peers), device, None)
    return records


def to_records(
    op: str, size: str, contenders: list[Contender], device: torch.device, floor_bytes: int | None
) -> list[dict]:
    """One record a figure."""
    timings = time_interleaved(contenders, device)
    common = {"op": op, "size": size, "floor_bytes": floor_bytes}
    return [
        common | {"contender": name, "mode": mode, "seconds": timing._asdict()}
        for (name, mode), timing in timings.items()
    ]


def print_table(records: list[dict], copy_bandwidth: float) -> None:
    """Microseconds, and the share of the floor that was reached."""
    table = Table("op", "size", "contender", "mode", "µs", "spread", "of copy bandwidth")
    for record in records:
        seconds = record["seconds"]
        floor = record["floor_bytes"]
        share = f"{floor / copy_bandwidth / seconds['median']:.0%}" if floor else ""
        table.add_row(
            *(record[name] for name in ("op", "size", "contender", "mode")),
            f"{seconds['median'] * 1e6:.1f}",
            f"{seconds['low'] * 1e6:.1f}-{seconds['high'] * 1e6:.1f}",
            share,
        )
    Console(width=120).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything on the GPU of this machine."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peers", action="store_true", help="the reference, torch.compile and Liger beside it")
    parser.add_argument("--rows", type=int, nargs="+", help="only shapes of so many rows")
    parser.add_argument("--ops", nargs="+", choices=[*OPS, "ranking"], help="only these")
    parser.add_argument("--once", action="store_true", help="call every op once, and time nothing")
    options = parser.parse_args(arguments)
    device = this_device()
    if not is_gpu(device):
        sys.exit("benchmarks.kernels: needs a CUDA GPU")
    shapes = [shape for shape in SHAPES if options.rows is None or shape[0] in options.rows]
    if options.once:
        for shape in shapes:
            call_once(device, *shape)
        return
    limits = ceilings(device)
    found = environment(device) | {"ceilings": limits}
    ops = options.ops or [*OPS, "ranking"]
    parts = ["kernels", *(options.ops or []), *(["and-peers"] if options.peers else [])]
    name = result_name("-".join(parts).replace("_", "-"), device)
    records = []
    for shape in shapes:
        for op in ops:
            if op in OPS:
                records += measure_op(op, device, *shape, options.peers)
                path = write_json(name, found | {"figures": records})
    for lengths in RANK_LENGTHS if "ranking" in ops else []:
        records += measure_ranking(device, lengths, options.peers)
        path = write_json(name, found | {"figures": records})
    print_table(records, limits["copy_bytes_per_second"])
    print(f"{found['device']}, copy {limits['copy_bytes_per_second'] / 1e12:.2f} TB/s; wrote {path}")


if __name__ == "__main__":
    main()
