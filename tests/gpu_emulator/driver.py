"""A Triton driver without a device: Triton compiles every launch as for a GPU, and the PTX runs on the emulator.

Everything before the launch is Triton's own: how it binds and specialises arguments, the grid, the compiler.
"""

import gc
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler.compiler import CompiledKernel
from triton.runtime.driver import driver

from tabom_kernels.backends import selection
from tests.gpu_emulator.machine import Code, Launch, Observer, run
from tests.gpu_emulator.memory import GlobalMemory
from tests.gpu_emulator.program import Parameter
from tests.gpu_emulator.settings import SETTINGS

OBSERVERS: list[Observer] = []
"""See every launch."""

REWRITES: list[Any] = []
"""Functions from PTX to PTX that are applied before it runs: how tests break kernels."""

SCALARS = {
    **{"i1": np.uint8, "i8": np.int8, "i16": np.int16, "i32": np.int32, "i64": np.int64},
    **{"u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64, "fp32": np.float32, "fp64": np.float64},
}
"""Triton's names of argument types."""


class Properties(NamedTuple):
    """What Triton asks of a device."""

    max_shared_mem: int = 227 * 1024
    multiprocessor_count: int = 132
    max_num_regs: int = 65536
    warpSize: int = 32


class Utilities:
    """Takes the place of Triton's bindings to the CUDA driver."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        """The limits that Triton holds launches to."""
        return Properties()._asdict()

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills and most threads: no binary is loaded."""
        return 1, 1, 0, 0, 1024


class EmulatedLauncher:
    """Called with what Triton's own launcher is called with."""

    def __init__(self, source: Any, metadata: Any):
        self.source, self.metadata, self.ptx = source, metadata, ""

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
        """Runs one launch; before the kernel's arguments stand metadata and two hooks."""
        _packed, _metadata, _enter, _exit, *arguments = rest
        signature = self.source.signature
        given = [
            (name, kind, argument)
            for (name, kind), argument in zip(signature.items(), arguments, strict=True)
            if kind != "constexpr"
        ]
        text = self.ptx
        for rewrite in REWRITES:
            text = rewrite(text)
        launch_ptx(text, (x, y, z), given, self.metadata.shared)


class EmulatedDriver:
    """Triton's active driver."""

    launcher_cls = EmulatedLauncher
    utils = Utilities()

    def get_current_device(self) -> int:
        """One device an architecture, so that compiled kernels are not mixed up."""
        return SETTINGS.architecture

    def set_current_device(self, device: int) -> None:
        """There is no choice."""

    def get_current_stream(self, device: int) -> int:
        """Launches run at once."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """What Triton compiles for."""
        return GPUTarget("cuda", SETTINGS.architecture, 32)

    def get_active_torch_device(self) -> torch.device:
        """Where the tensors are."""
        return torch.device("cpu")


def install() -> None:
    """Makes the emulator Triton's driver, for kernels on tensors of the CPU.

    Compiled kernels have a cache of their own: as they stop at PTX, a compiler that found them in the common cache
    would miss their machine code. Processes that a test starts keep the common cache.
    """
    driver.set_active(EmulatedDriver())
    selection.KERNEL_DEVICE = "cpu"
    triton.knobs.propagate_env = False
    triton.knobs.cache.dir = str(Path.home() / ".triton" / "emulated")
    CUDABackend.make_cubin = lambda *arguments, **keywords: b""  # the emulator needs no machine code
    initialise = CompiledKernel._init_handles

    def initialise_and_keep_the_ptx(kernel: CompiledKernel) -> None:
        initialise(kernel)
        kernel._run.ptx = kernel.asm["ptx"]

    CompiledKernel._init_handles = initialise_and_keep_the_ptx


@cache
def code_of(text: str) -> Code:
    """The executable form of PTX, made once.

    It is thousands of small functions that stay: to look for garbage among them takes longer than to make them.
    """
    gc.disable()
    try:
        return Code(text)
    finally:
        gc.enable()


def launch_ptx(text: str, grid: tuple[int, int, int], given: list[tuple[str, str, Any]], shared_bytes: int) -> None:
    """Runs PTX with (name, Triton's type, value) of each argument: tensors, numbers.

    Triton's compiler appends pointers to scratch memory, which our kernels do not use, to the kernel's parameters.
    """
    code, memory = code_of(text), GlobalMemory()
    values = [argument_bytes(memory, *argument) for argument in given]
    values += [np.zeros(8, np.uint8)] * (len(code.program.parameters) - len(values))
    memory.close(code.program.threads)
    parameters = {
        parameter.name: checked(parameter, value)
        for parameter, value in zip(code.program.parameters, values, strict=True)
    }
    run(code, Launch(grid, parameters, memory, shared_bytes), OBSERVERS)


def argument_bytes(memory: GlobalMemory, name: str, kind: str, value: Any) -> np.ndarray:
    """An argument as the bytes that a GPU is given."""
    if isinstance(value, torch.Tensor):
        return np.array([memory.address_of(name, value)], np.uint64).view(np.uint8)
    return np.array([value], SCALARS[kind]).view(np.uint8)


def checked(parameter: Parameter, value: np.ndarray) -> np.ndarray:
    """The bytes of an argument, which are as many as the kernel expects."""
    assert int(parameter.type[1:]) == 8 * len(value), (parameter, value)
    return value
