"""Selects the backend of a call.

A backend is a module of functions without autograd. The functions of `torch` and `triton` have the same names and
signatures, so an op is written once for both.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["triton", "torch", "reference"]

HAS_TRITON = find_spec("triton") is not None

KERNEL_DEVICE = "cuda"
"""The type of the device on which Triton launches kernels. It is "cpu" in the tests, which emulate a GPU."""


def backend_for(tensor: Tensor) -> str:
    """The name of the backend that a call on `tensor` takes when it is not told one.

    "triton" for a CUDA tensor, where Triton is installed, unless it is fp64; else "torch".
    """
    has_kernels = tensor.is_cuda and tensor.dtype != torch.float64
    return "triton" if has_kernels and HAS_TRITON else "torch"


def resolve(backend: str | None, tensor: Tensor) -> str:
    """The name of the backend to use.

    Raises:
        TypeError: the Triton kernels do not take this dtype.
        ValueError: there is no such backend, or not for this device.
    """
    if backend is None:
        return backend_for(tensor)
    if backend not in ("triton", "torch", "reference"):
        raise ValueError(f"backend={backend!r}: expected triton, torch or reference")
    if backend == "triton":
        check_triton(tensor)
    return backend


def check_triton(tensor: Tensor) -> None:
    """Raises an error unless Triton is installed and its kernels run on this tensor."""
    if not HAS_TRITON:
        raise ValueError("backend='triton': Triton is not installed; pip install triton, or use 'torch'")
    if tensor.dtype == torch.float64:
        raise TypeError("backend='triton': its kernels take bfloat16, float16 and float32, got float64; use 'torch'")
    if tensor.device.type != KERNEL_DEVICE:
        raise ValueError(f"backend='triton': expected a CUDA tensor, got {tensor.device}; use 'torch'")


@cache
def load(backend: str) -> ModuleType:
    """The module of a backend's closed forms. Triton is imported by the first call that needs it."""
    return import_module(f"tabom_kernels.backends.{backend}")
