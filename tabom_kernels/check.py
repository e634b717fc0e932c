"""`python -m tabom_kernels.check` checks that the kernels are right on this machine, and shows how much time they save.

Every op runs on the device that calls would take. Its gradients are compared with autograd through the naive loss in
fp64, and the error is shown beside that of the naive loss in the same dtype.
"""

import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

import tabom_kernels
from tabom_kernels import (
    backend_for,
    cross_entropy_with_entropy,
    fused_linear_tabom_loss,
    softmax_entropy,
    tabom_loss,
    trajectory_rank_loss,
    unmask_statistics,
)
from tabom_kernels.backends.selection import HAS_TRITON

DREAM_VOCABULARY, DREAM_WIDTH = 152064, 3584
LENGTHS = (40, 1, 0, 87)
"""Numbers of rows of the sequences on which gradients are checked."""

ROUNDS = 10

Call = Callable[[], None]
Case = Callable[[str | None, torch.dtype], list[Tensor]]
"""Runs an op with a backend in a dtype. Returns the gradients, or the values of an op that has no gradient."""


class Errors(NamedTuple):
    """The largest absolute errors against fp64, and by how much ours exceeds what is allowed (at most 0 if right)."""

    ours: float
    naive: float
    excess: float


def main() -> int:
    """Prints errors and times. Returns 1 if a gradient is wrong, else 0."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(describe(device))
    print(f"\n{'largest error against fp64 autograd':50}{'ours':9}naive")
    wrong = 0
    for name, case in make_cases(device).items():
        for dtype in dtypes_of(name):
            errors = compare(case, dtype)
            is_wrong = not errors.excess <= 0  # also where it is NaN
            wrong += is_wrong
            verdict = "  WRONG" if is_wrong else ""
            print(f"  {name:36}{short_name(dtype):9}{errors.ours:9.1e}{errors.naive:9.1e}{verdict}")
    print("\nloss and gradient, milliseconds: median (least to most)")
    for name, calls in make_timings(device).items():
        own, naive = time_in_turns(calls, device)
        print(
            f"  {name}\n    ours {spread(own)}, naive {spread(naive)}: {median(naive) / median(own):.1f} times as long"
        )
    print(f"\n{wrong} checks failed" if wrong else "\nall gradients are right")
    return 1 if wrong else 0


def describe(device: torch.device) -> str:
    """The versions, the device, and the backend that a call takes there."""
    lines = [f"tabom_kernels {tabom_kernels.__version__}, torch {torch.__version__}"]
    lines.append(f"Triton {version('triton')}" if HAS_TRITON else "Triton is not installed")
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        lines.append(f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}, driver {driver_version()}")
    else:
        lines.append(f"no GPU; CPU with {torch.get_num_threads()} threads")
    lines.append(f"backend: {backend_for(torch.empty(0, device=device))}")
    return "\n".join(lines)


def short_name(dtype: torch.dtype) -> str:
    """The name of a dtype without `torch.`."""
    return str(dtype).removeprefix("torch.")


def driver_version() -> str:
    """The driver of the first GPU, as nvidia-smi prints it."""
    if shutil.which("nvidia-smi") is None:
        return "unknown (no nvidia-smi)"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()


def dtypes_of(name: str) -> tuple[torch.dtype, ...]:
    """The dtypes in which an op is checked. The rank loss takes entropies, which are fp32 in training."""
    if name.startswith("trajectory_rank_loss"):
        return (torch.float32,)
    return (torch.float32, torch.bfloat16, torch.float16)


def make_cases(device: torch.device) -> dict[str, Case]:
    """Every op on random inputs, in which half of the rows are confident."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        """Random numbers with few digits, so that they are the same in every dtype."""
        return torch.randn(*shape, generator=generator).bfloat16().double().to(device)

    rows, columns, width = sum(LENGTHS), 10_007, 64
    logits = 4 * draw(rows, columns)
    logits[::2, 5] = 30
    hidden, weight = draw(rows, width), draw(columns, width) / 4
    entropy, upstream = draw(rows).abs(), draw(2, rows)
    labels = torch.randint(columns, (rows,), generator=generator).to(device)
    labels[::4], labels[1::4] = 5, -100
    steps = torch.randint(-1, 20, (rows,), generator=generator).to(device)
    cu_seqlens = torch.tensor([0, *LENGTHS], device=device).cumsum(0).int()
    packed = (labels, steps, cu_seqlens)

    def entropy_case(backend: str | None, dtype: torch.dtype) -> list[Tensor]:
        leaf = leaf_of(logits, dtype)
        softmax_entropy(leaf, backend=backend).backward(upstream[0].to(result_dtype(dtype)))
        return [leaf.grad]

    def cross_entropy_case(backend: str | None, dtype: torch.dtype) -> list[Tensor]:
        leaf = leaf_of(logits, dtype)
        outputs = cross_entropy_with_entropy(leaf, labels, backend=backend)
        torch.autograd.backward(outputs, list(upstream.to(result_dtype(dtype))))
        return [leaf.grad]

    def rank_case(form: str) -> Case:
        def case(backend: str | None, dtype: torch.dtype) -> list[Tensor]:
            leaf, temperature = leaf_of(entropy, dtype), leaf_of(torch.tensor(0.7, device=device), dtype)
            options = {"form": form, "margin": 0.1, "temperature": temperature, "backend": backend}
            trajectory_rank_loss(leaf, steps, cu_seqlens, **options).sum().backward()
            return [leaf.grad] if form == "hinge" else [leaf.grad, temperature.grad]

        return case

    def loss_case(backend: str | None, dtype: torch.dtype) -> list[Tensor]:
        leaf = leaf_of(logits, dtype)
        tabom_loss(leaf, *packed, backend=backend).loss.backward()
        return [leaf.grad]

    def fused_linear_case(backend: str | None, dtype: torch.dtype) -> list[Tensor]:
        leaves = [leaf_of(tensor, dtype) for tensor in (hidden, weight)]
        fused_linear_tabom_loss(*leaves, *packed, backend=backend).loss.backward()
        return [leaf.grad for leaf in leaves]

    def statistics_case(backend: str | None, dtype: torch.dtype) -> list[Tensor]:
        return list(unmask_statistics(logits.to(dtype), backend=backend)[1:])

    return {
        "softmax_entropy": entropy_case,
        "cross_entropy_with_entropy": cross_entropy_case,
        **{f"trajectory_rank_loss {form}": rank_case(form) for form in ("logistic", "hinge", "plackett_luce")},
        "tabom_loss": loss_case,
        "fused_linear_tabom_loss": fused_linear_case,
        "unmask_statistics (values)": statistics_case,
    }


def leaf_of(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy that requires a gradient."""
    return tensor.to(dtype, copy=True).requires_grad_()


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses and entropies."""
    return torch.promote_types(dtype, torch.float32)


def compare(case: Case, dtype: torch.dtype) -> Errors:
    """The worst result of an op. An error of twice the naive one plus one rounding of the largest value is allowed."""
    exact = case("reference", torch.float64)
    found = []
    for ours, naive, e in zip(case(None, dtype), case("reference", dtype), exact, strict=True):
        own, others = largest(ours - e), largest(naive - e)
        found.append(Errors(own, others, own - 2 * others - torch.finfo(ours.dtype).eps * largest(e)))
    return max(found, key=lambda errors: math.inf if math.isnan(errors.excess) else errors.excess)


def largest(tensor: Tensor) -> float:
    """The largest absolute value, or NaN if the tensor holds NaN."""
    return tensor.double().abs().max().item()


def make_timings(device: torch.device) -> dict[str, tuple[Call, Call]]:
    """Our loss and gradient and the naive ones at the shape of Dream's head; from hidden states only on a GPU."""
    rows, dtype = (256, torch.bfloat16) if device.type == "cuda" else (64, torch.float32)
    logits = torch.randn(rows, DREAM_VOCABULARY, device=device, dtype=dtype).requires_grad_()
    labels = torch.randint(DREAM_VOCABULARY, (rows,), device=device)
    steps = torch.arange(rows, device=device) % 32
    cu_seqlens = torch.arange(0, rows + 1, 32, device=device, dtype=torch.int32)
    packed = (labels, steps, cu_seqlens)

    def of_logits(backend: str | None) -> None:
        torch.autograd.grad(tabom_loss(logits, *packed, backend=backend).loss, logits)

    shape = f"{rows} x {DREAM_VOCABULARY} logits, {short_name(dtype)}"
    timings = {f"tabom_loss, {shape}": (partial(of_logits, None), partial(of_logits, "reference"))}
    if device.type == "cuda":
        hidden = torch.randn(rows, DREAM_WIDTH, device=device, dtype=dtype).requires_grad_()
        weight = torch.randn(DREAM_VOCABULARY, DREAM_WIDTH, device=device, dtype=dtype) / DREAM_WIDTH**0.5

        def of_hidden(backend: str | None) -> None:
            torch.autograd.grad(fused_linear_tabom_loss(hidden, weight, *packed, backend=backend).loss, hidden)

        name = f"fused_linear_tabom_loss, {rows} x {DREAM_WIDTH} hidden states, the head frozen"
        timings[name] = (partial(of_hidden, None), partial(of_hidden, "reference"))
    return timings


def time_in_turns(calls: tuple[Call, Call], device: torch.device) -> list[list[float]]:
    """Milliseconds of each call, round after round, after one round of warm-up."""
    milliseconds: list[list[float]] = [[] for _ in calls]
    for round in range(ROUNDS + 1):
        for call, times in zip(calls, milliseconds, strict=True):
            start = now(device)
            call()
            if round > 0:
                times.append(1000 * (now(device) - start))
    return milliseconds


def now(device: torch.device) -> float:
    """The time in seconds after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def spread(milliseconds: list[float]) -> str:
    """The median, the smallest and the largest value."""
    return f"{median(milliseconds):.3g} ({min(milliseconds):.3g} to {max(milliseconds):.3g})"


if __name__ == "__main__":
    sys.exit(main())
