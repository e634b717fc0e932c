"""Every op and the whole loss under pytest-benchmark: forward and backward, each backend, real shapes.

    make bench                                        # a CPU or a GPU
    make bench ARGS="--benchmark-save=before"         # keep a run
    make bench ARGS="--benchmark-compare"             # beside the last one kept

On a GPU a figure is a launch and the wait for its end; `benchmarks.kernels` times without the host.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tabom_kernels import (
    cross_entropy_with_entropy,
    fused_linear_tabom_loss,
    softmax_entropy,
    tabom_loss,
    trajectory_rank_loss,
    unmask_statistics,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ["triton", "torch", "reference"] if DEVICE.type == "cuda" else ["torch", "reference"]
SHAPES = {"Dream 32 x 152064": (32, 152064), "LLaDA 64 x 126464": (64, 126464), "256 x 32000": (256, 32000)}
WIDTH = 512
WINDOW = 16

each_backend = pytest.mark.parametrize("backend", BACKENDS)


class Rows:
    """Logits and what the loss knows of their rows: sequences of WINDOW rows, each with its own step."""

    def __init__(self, shape: tuple[int, int]) -> None:
        torch.manual_seed(0)
        rows, columns = shape
        self.logits = (3 * torch.randn(shape, device=DEVICE)).bfloat16().requires_grad_()
        self.labels = torch.randint(columns, (rows,), device=DEVICE)
        self.steps = torch.rand(rows // WINDOW, WINDOW, device=DEVICE).argsort(1).flatten()
        self.cu_seqlens = torch.arange(0, rows + 1, WINDOW, dtype=torch.int32, device=DEVICE)
        self.batch = (self.labels, self.steps, self.cu_seqlens)


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES)
def rows(request: pytest.FixtureRequest) -> Rows:
    """Made once for all ops."""
    return Rows(request.param)


def run(benchmark: Any, call: Callable[[], Any]) -> None:
    """Times a call to its end on the device."""

    def to_the_end() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(to_the_end, rounds=5 if DEVICE.type == "cpu" else 50, warmup_rounds=1)


def backward(benchmark: Any, loss: Callable[[], Tensor], leaf: Tensor) -> None:
    """Times backward alone."""
    value = loss()
    run(benchmark, lambda: torch.autograd.grad(value, leaf, retain_graph=True))


@each_backend
def test_softmax_entropy(benchmark: Any, rows: Rows, backend: str) -> None:
    run(benchmark, lambda: softmax_entropy(rows.logits.detach(), backend=backend))


@each_backend
def test_cross_entropy_with_entropy(benchmark: Any, rows: Rows, backend: str) -> None:
    run(benchmark, lambda: cross_entropy_with_entropy(rows.logits.detach(), rows.labels, backend=backend))


@each_backend
def test_cross_entropy_with_entropy_backward(benchmark: Any, rows: Rows, backend: str) -> None:
    def loss() -> Tensor:
        ce, entropy = cross_entropy_with_entropy(rows.logits, rows.labels, backend=backend)
        return ce.sum() + entropy.sum()

    backward(benchmark, loss, rows.logits)


@each_backend
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "top_p": 0.95}], ids=["greedy", "top-p"])
def test_unmask_statistics(benchmark: Any, rows: Rows, backend: str, settings: dict[str, float]) -> None:
    keys = torch.arange(len(rows.labels), device=DEVICE)
    run(benchmark, lambda: unmask_statistics(rows.logits.detach(), generator=keys, backend=backend, **settings))


@each_backend
def test_tabom_loss(benchmark: Any, rows: Rows, backend: str) -> None:
    """Forward and backward."""
    run(benchmark, lambda: tabom_loss(rows.logits, *rows.batch, backend=backend).loss.backward())


@each_backend
def test_fused_linear_tabom_loss(benchmark: Any, rows: Rows, backend: str) -> None:
    """Forward and backward to the hidden states, frozen head."""
    hidden = torch.randn(len(rows.labels), WIDTH, device=DEVICE).bfloat16().requires_grad_()
    weight = (torch.randn(rows.logits.shape[1], WIDTH, device=DEVICE) * WIDTH**-0.5).bfloat16()
    run(benchmark, lambda: fused_linear_tabom_loss(hidden, weight, *rows.batch, backend=backend).loss.backward())


@each_backend
@pytest.mark.parametrize("form", ["logistic", "hinge", "plackett_luce"])
@pytest.mark.parametrize("sequences, length", [(8, 256), (1, 2048)])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_trajectory_rank_loss(
    benchmark: Any, backend: str, form: str, sequences: int, length: int, direction: str
) -> None:
    torch.manual_seed(0)
    entropy = (5 * torch.rand(sequences * length, device=DEVICE)).requires_grad_()
    steps = torch.randint(0, 64, (sequences * length,), device=DEVICE)
    cu_seqlens = torch.arange(0, len(steps) + 1, length, dtype=torch.int32, device=DEVICE)

    def loss() -> Tensor:
        return trajectory_rank_loss(entropy, steps, cu_seqlens, form=form, backend=backend).sum()

    if direction == "forward":
        run(benchmark, loss)
    else:
        backward(benchmark, loss, entropy)
