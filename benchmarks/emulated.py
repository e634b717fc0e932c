"""What kernels execute a logit, counted on the emulator of a GPU, without one: ours beside TRL's and Liger's.

    python -m benchmarks.emulated        # writes results/emulated.json and prints the table of the notes

Every launch is compiled for the GPU, and its PTX is executed on a row of logits. Counts are not time: what a GPU makes
of them, `make gpu` measures. Instructions are those of PTX; machine code has a few fewer, as it needs no moves.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
import triton
from liger_kernel.ops.cross_entropy import cross_entropy_forward
from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

from benchmarks.tools.measure import RESULTS
from tabom_kernels.backends import triton as triton_backend
from tests.gpu_emulator.counters import Counters
from tests.gpu_emulator.driver import OBSERVERS, install
from tests.gpu_emulator.settings import SETTINGS

ARCHITECTURES = (80, 90, 100)
COLUMNS = 152064
RANKED_ROWS = 1024
"""Of one sequence, whose ordered pairs are counted; few enough that every row has one program."""
COUNTS = {
    "instructions": "instructions",
    "exponentials": "exponentials",
    "loaded_bytes": "bytes loaded",
    "stored_bytes": "bytes stored",
    "sectors": "sectors",
    "bank_conflicts": "bank conflicts",
}
"""Counts a logit, and what the table calls them; sectors are 32 bytes, of global memory."""


def ours(logits: torch.Tensor, label: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Each op on a row of logits."""
    statistics, one = triton_backend.vocabulary_statistics(logits, label, -100), torch.ones(1)
    copy, arguments = logits.clone(), (label, -100, statistics, one, one)
    return {
        "statistics": lambda: triton_backend.vocabulary_statistics(logits, label, -100),
        "gradient": lambda: triton_backend.vocabulary_gradient(copy, *arguments, copy, one[0]),
        "unmask greedy": lambda: triton_backend.unmask_statistics(logits, 0.0, None, None, None),
        "unmask sampled": lambda: triton_backend.unmask_statistics(logits, 0.8, None, None, label),
        "thresholds top-k": lambda: triton_backend.filter_thresholds(logits, 0.8, 50, None),
        "thresholds top-p": lambda: triton_backend.filter_thresholds(logits, 0.8, None, 0.9),
    }


def peers(logits: torch.Tensor, label: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """TRL's log-probability with entropy and its gradient; Liger's cross-entropy with its gradient, in one launch."""
    leaf = logits.clone().requires_grad_()
    outputs = selective_log_softmax_and_entropy(leaf[None], label[None])
    copy = logits.clone().requires_grad_()
    return {
        "TRL, log-probability and entropy": lambda: selective_log_softmax_and_entropy(logits[None], label[None]),
        "TRL, their gradient": lambda: torch.autograd.grad(sum(x.sum() for x in outputs), leaf, retain_graph=True),
        "Liger, cross-entropy and gradient, no entropy": lambda: cross_entropy_forward(
            copy, label, None, -100, 0.0, 0.0, "mean", None, False
        ),
    }


def count(call: Callable[[], Any], logits: int) -> dict[str, float]:
    """The counts a logit of all launches of a call."""
    counters = Counters()
    OBSERVERS.append(counters)
    call()
    OBSERVERS.clear()
    totals = counters.totals
    totals["sectors"] = totals["loaded_sectors"] + totals["stored_sectors"]
    return {name: round(totals[name] / logits, 4) for name in COUNTS}


def measure(columns: int) -> list[dict[str, Any]]:
    """A record of every op and architecture, for one row of bf16 logits."""
    install()
    torch.manual_seed(0)
    logits, label = (3 * torch.randn(1, columns)).bfloat16(), torch.tensor([columns // 2])
    records = []
    for architecture in ARCHITECTURES:
        SETTINGS.architecture = architecture
        for op, call in {**ours(logits, label), **peers(logits, label)}.items():
            records.append({"op": op, "architecture": f"sm_{architecture}", **count(call, columns)})
    return records


def measure_pairs(rows: int) -> list[dict[str, Any]]:
    """Instructions a pair of rows of one sequence, which the programs of both rows compute, for each form."""
    install()
    batch = torch.rand(rows), torch.arange(rows), torch.tensor([0, rows], dtype=torch.int32)
    records = []
    for architecture in ARCHITECTURES:
        SETTINGS.architecture = architecture
        for form in ("logistic", "hinge"):
            counts = count(lambda form=form: triton_backend.trajectory_rank_loss(*batch, form, 0.1, 0.7), rows**2)
            records.append({"form": form, "architecture": f"sm_{architecture}", "instructions": counts["instructions"]})
    return records


def counts_table(records: list[dict[str, Any]]) -> str:
    """Markdown of what sm_90 executes."""
    lines = ["| a logit | " + " | ".join(COUNTS.values()) + " |", "| --- |" + " ---: |" * len(COUNTS)]
    for record in records:
        if record["architecture"] == "sm_90":
            cells = [f"{record[name]:.3f}" if name == "bank_conflicts" else f"{record[name]:.2f}" for name in COUNTS]
            lines.append(f"| {record['op']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    result = {
        "triton": triton.__version__,
        "columns": COLUMNS,
        "figures": measure(COLUMNS),
        "pairs": measure_pairs(RANKED_ROWS),
    }
    (RESULTS / "emulated.json").write_text(json.dumps(result, indent=1) + "\n")
    print(counts_table(result["figures"]))
