"""The host's time of an op: all of Python and PyTorch between the call and its last launch, with no GPU behind them.

    python -m benchmarks.host [--profile]

Triton's own Python runs as it would, up to the driver: its kernels are neither compiled nor launched, and tensors are
on the CPU. What a GPU adds are the driver's calls, one a launch, and the allocator's way of finding memory.
"""

import argparse
import cProfile
import os
import pstats
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks.tools.measure import summary
from tabom_kernels import arguments, cross_entropy_with_entropy, tabom_loss, unmask_statistics
from tabom_kernels.backends import selection

ROWS, COLUMNS, CALLS = 64, 64, 20


class NoDriver:
    """Device 0 is an H100 that does nothing."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class NoKernel(CompiledKernel):
    """What Triton knows of a compiled kernel, without the code and without the launch."""

    module = function = packed_metadata = None

    def __init__(self, source: ASTSource) -> None:
        self.src, self.name = source, source.name

    def _init_handles(self) -> None:
        pass

    def run(self, *launch: Any) -> None:
        pass


def without_a_gpu() -> None:
    """From now on, what Triton would compile and launch on a GPU is forgotten."""

    def compile_nothing(
        kernel: JITFunction, key: Any, signature: Any, device: int, constants: Any, options: Any, attrs: Any, _: Any
    ) -> NoKernel:
        source = ASTSource(kernel, signature, constants, attrs)
        source.hash()  # finds the globals that every launch looks at
        return kernel.device_caches[device][0].setdefault(key, NoKernel(source))

    driver.set_active(NoDriver())
    arguments.values_are_checked = lambda tensor: os.environ.get("TABOM_KERNELS_DEBUG") == "1"  # as on a GPU
    JITFunction._do_compile = compile_nothing
    selection.KERNEL_DEVICE = "cpu"


def calls() -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    logits = torch.randn(ROWS, COLUMNS).bfloat16().requires_grad_()
    labels, steps = torch.randint(COLUMNS, (ROWS,)), torch.randint(0, 32, (ROWS,))
    cu_seqlens, keys = torch.tensor([0, 32, 64], dtype=torch.int32), torch.arange(ROWS)

    def statistics() -> None:
        ce, entropy = cross_entropy_with_entropy(logits, labels, backend="triton")
        torch.autograd.grad((ce, entropy), logits, (ce.detach(), entropy.detach()))

    def loss(**options: Any) -> None:
        logits.grad = None
        tabom_loss(logits, labels, steps, cu_seqlens, backend="triton", **options).loss.backward()

    return {
        "cross_entropy_with_entropy": statistics,
        "tabom_loss": loss,
        "tabom_loss, counts given": lambda: loss(num_tokens=64, num_sequences=2),
        "unmask_statistics, greedy": lambda: unmask_statistics(logits, backend="triton"),
        "unmask_statistics, drawn": lambda: unmask_statistics(
            logits, temperature=0.8, generator=keys, backend="triton"
        ),
    }


def seconds_of(call: Callable[[], Any]) -> float:
    """Processor time of a call: other processes may be running."""
    start = time.process_time()
    for _ in range(CALLS):
        call()
    return (time.process_time() - start) / CALLS


def main(command: Sequence[str] | None = None) -> None:
    """Print microseconds of each call, the backward included."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--profile", action="store_true", help="where tabom_loss spends it")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args(command)
    torch.set_num_threads(1)
    without_a_gpu()
    timed = calls()
    for call in timed.values():
        call()  # imports, and Triton's caches
    seconds = {name: [] for name in timed}
    for _ in range(options.rounds):
        for name, call in timed.items():
            seconds[name].append(seconds_of(call))
    for name, found in seconds.items():
        median, low, high = (f"{x * 1e6:.0f}" for x in summary(found))
        print(f"{name}: {median} µs ({low} to {high})")
    if options.profile:
        with cProfile.Profile() as profile:
            for _ in range(CALLS * options.rounds):
                timed["tabom_loss"]()
        pstats.Stats(profile).sort_stats("tottime").print_stats(40)


if __name__ == "__main__":
    main()
