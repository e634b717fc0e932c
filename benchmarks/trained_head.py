"""A trained head under the cross-entropy alone, forward and backward: ours, naive, TRL's op, and the three matmuls.

    python -m benchmarks.trained_head

Everything is timed in one run on the same inputs, after a check that all give the same loss and gradients. Memory is
beside what it takes at least: the gradient of the head, and a chunk of logits. A CPU has no matmul of fp16, so there
only the memory of fp16 is measured. Writes benchmarks/results/trained-head-<device>.json after every case.
"""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.tools.measure import (
    Contender,
    environment,
    is_gpu,
    peak_memory_of,
    result_name,
    this_device,
    time_interleaved,
    write_json,
)
from tabom_kernels import fused_linear_cross_entropy
from tabom_kernels.ops.fused_linear import LOGITS_BUDGET

VOCABULARY, WIDTH = 152064, 1024
TILE = 32768
"""Columns that TRL's trainers take at once."""


class Case(NamedTuple):
    """Rows and dtype of a batch, and how often each contender is timed; 0 for its memory alone."""

    rows: int
    dtype: torch.dtype
    rounds: int


CASES_ON_GPU = [
    Case(rows, dtype, 30) for rows in (64, 2048) for dtype in (torch.float32, torch.bfloat16, torch.float16)
]
CASES_ON_CPU = [
    Case(64, torch.float32, 10),
    Case(64, torch.bfloat16, 10),
    Case(64, torch.float16, 0),
    Case(2048, torch.bfloat16, 3),
]


class Problem(NamedTuple):
    """Inputs that all contenders share."""

    hidden: Tensor  # (N, D), requires a gradient
    weight: Tensor  # (V, D), requires a gradient
    labels: Tensor  # (N,)

    @property
    def least_bytes(self) -> int:
        """The gradient of the head and a chunk of logits, of the size that ours has."""
        logits = len(self.labels) * len(self.weight) * self.weight.itemsize
        return self.weight.nbytes + min(logits, LOGITS_BUDGET)


def draw_problem(rows: int, dtype: torch.dtype, vocabulary: int, width: int, device: torch.device) -> Problem:
    """Random hidden states and head, logits of about unit size."""
    hidden = torch.randn(rows, width, device=device).to(dtype)
    weight = (torch.randn(vocabulary, width, device=device) * width**-0.5).to(dtype)
    labels = torch.randint(vocabulary, (rows,), device=device)
    return Problem(hidden.requires_grad_(), weight.requires_grad_(), labels)


def trl_loss(problem: Problem) -> Tensor:
    """TRL's chunked log-probabilities, nothing beside them."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    hidden, weight, labels = problem
    return -ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, TILE, None, 1.0, ())[0].mean()


LOSSES: dict[str, Callable[[Problem], Tensor]] = {
    "ours": lambda problem: fused_linear_cross_entropy(*problem),
    "naive": lambda problem: F.cross_entropy(F.linear(*problem[:2]), problem.labels),
}
if find_spec("trl"):
    LOSSES["TRL's op"] = trl_loss


def matmuls(problem: Problem) -> tuple[Tensor, Tensor]:
    """The floor: logits, and both gradients from them."""
    with torch.no_grad():
        logits = F.linear(*problem[:2])
        return logits @ problem.weight, logits.T @ problem.hidden


def value_and_gradients(problem: Problem, loss: Callable[[Problem], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients by hidden and weight."""
    value = loss(problem)
    return value.detach(), *torch.autograd.grad(value, problem[:2])


def check_agreement(problem: Problem) -> None:
    """All losses and gradients are ours, within half precision.

    Raises:
        AssertionError: they are not.
    """
    expected = value_and_gradients(problem, LOSSES["ours"])
    for name, loss in LOSSES.items():
        for ours, theirs in zip(expected, value_and_gradients(problem, loss), strict=True):
            ours, theirs = ours.float(), theirs.float()
            assert (theirs - ours).norm() < 2e-2 * ours.norm(), (name, tuple(ours.shape))


def measure(case: Case, device: torch.device, vocabulary: int, width: int) -> list[dict[str, Any]]:
    """Time and incremental peak memory of every contender, in one run."""
    problem = draw_problem(case.rows, case.dtype, vocabulary, width, device)
    check_agreement(problem)
    contenders = [Contender("three matmuls", [lambda: matmuls(problem)])]
    contenders += [
        Contender(name, [lambda loss=loss: value_and_gradients(problem, loss)]) for name, loss in LOSSES.items()
    ]
    peaks = {contender.name: peak_memory_of(contender.calls[0], device) for contender in contenders}
    shape = {"rows": case.rows, "vocabulary": vocabulary, "width": width}
    timings = dict.fromkeys((name, "eager") for name in peaks)
    if case.rounds:
        timings = time_interleaved(contenders, device, case.rounds)
    return [
        {
            "shape": shape,
            "dtype": str(case.dtype).removeprefix("torch."),
            "contender": name,
            "mode": mode,
            "seconds": timing and timing._asdict(),
            "peak_bytes": peaks[name],
            "least_bytes": problem.least_bytes,
        }
        for (name, mode), timing in timings.items()
    ]


def costs_table(records: list[dict[str, Any]]) -> str:
    """Time beside that of the three matmuls, and memory beside the head's gradient and a chunk."""
    lines = [
        "| rows, dtype | | s | of the three matmuls | MiB | of gradient and chunk |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for record in records:
        case, spread, ratio, mode = "", "not timed", "", record["mode"]
        if record["contender"] == "three matmuls":
            floor, case = record["seconds"], f"{record['shape']['rows']}, {record['dtype']}"
            case += f", {mode}" * (mode == "graph")
        if record["seconds"]:
            median, low, high = record["seconds"].values()
            spread = f"{median:.3g} ({low:.3g} to {high:.3g})"
            ratio = f"{median / floor['median']:.2f}"
        memory = f"{record['peak_bytes'] / 2**20:.0f} | {record['peak_bytes'] / record['least_bytes']:.2f}"
        lines.append(f"| {case} | {record['contender']} | {spread} | {ratio} | {memory} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the table."""
    torch.manual_seed(0)
    device, records = this_device(), []
    for case in CASES_ON_GPU if is_gpu(device) else CASES_ON_CPU:
        print(f"{case.rows} rows, {case.dtype}", file=sys.stderr, flush=True)
        records += measure(case, device, VOCABULARY, WIDTH)
        path = write_json(result_name("trained-head", device), environment(device) | {"figures": records})
    print(costs_table(records))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
