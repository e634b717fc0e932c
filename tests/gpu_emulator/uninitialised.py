"""Marks what `torch.empty` gives with a pattern, by which the emulator knows memory that nothing has written.

The pattern is NaN in every floating-point type, and no arithmetic makes it: a GPU's NaN and PyTorch's have other bits.
"""

import ctypes
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import numpy as np
import pytest
import torch

BYTES = b"\xa5\xff"
PATTERN = {
    size: np.frombuffer((BYTES * 4)[:size], dtype)[0]
    for size, dtype in ((1, np.uint8), (2, np.uint16), (4, np.uint32), (8, np.uint64))
}
"""The pattern in elements of so many bytes."""

LARGEST = 2**28
"""Storages of more bytes are not filled: tests of large offsets touch only a little of theirs."""


def marking(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A function that allocates, and then fills what it allocated with the pattern."""

    @wraps(allocate)
    def allocate_marked(*arguments: Any, **keywords: Any) -> torch.Tensor:
        tensor = allocate(*arguments, **keywords)
        if not torch.compiler.is_compiling() and type(tensor) is torch.Tensor and tensor.device.type == "cpu":
            size = tensor.untyped_storage().nbytes()
            if 0 < size <= LARGEST:
                pointer = tensor.untyped_storage().data_ptr()
                ctypes.memmove(pointer, (BYTES * (size // 2 + 1))[:size], size)
        return tensor

    return allocate_marked


def marking_method(new_empty: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same for `torch.Tensor.new_empty`. Dynamo traces into methods and does not know the original."""
    marked = marking(new_empty)

    def allocate_marked(tensor: torch.Tensor, *size: Any, **keywords: Any) -> torch.Tensor:
        if torch.compiler.is_dynamo_compiling():
            return torch.empty(*size, **{"dtype": tensor.dtype, "device": tensor.device, **keywords})
        return marked(tensor, *size, **keywords)

    return allocate_marked


@cache
def replacements() -> list[tuple[Any, str, Callable[..., torch.Tensor]]]:
    """PyTorch's ways to get uninitialised memory, as (owner, name, function), with functions that mark it."""
    functions = [
        (torch, name, torch.compiler.allow_in_graph(marking(getattr(torch, name)))) for name in ("empty", "empty_like")
    ]
    return [*functions, (torch.Tensor, "new_empty", marking_method(torch.Tensor.new_empty))]


def mark_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that PyTorch allocates is marked until the end of the test."""
    for replacement in replacements():
        monkeypatch.setattr(*replacement)
