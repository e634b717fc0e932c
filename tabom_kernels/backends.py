"""Choosing a backend: modules whose functions share their names and signatures and know nothing of autograd."""

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["triton", "torch", "reference"]

HAS_TRITON = find_spec("triton") is not None


def backend_for(tensor: Tensor) -> str:
    """The name of the backend that a call on `tensor` takes when it is not told one.

    "triton" for a CUDA tensor, where Triton is installed, unless it is fp64; else "torch".
    """
    fits = tensor.is_cuda and tensor.dtype != torch.float64
    return "triton" if fits and HAS_TRITON else "torch"


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
    """Triton is installed and runs on this tensor."""
    if not HAS_TRITON:
        raise ValueError("backend='triton': Triton is not installed; pip install triton, or use 'torch'")
    if tensor.dtype == torch.float64:
        raise TypeError("backend='triton': its kernels take bfloat16, float16 and float32, got float64; use 'torch'")
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"backend='triton': expected a CUDA tensor, got {tensor.device}; use 'torch'")


@cache
def closed_forms(backend: str) -> ModuleType:
    """The module of closed forms: Triton is imported by the first call that needs it."""
    return import_module(f"tabom_kernels.{backend}_backend")
