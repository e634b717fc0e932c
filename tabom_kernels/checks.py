"""Argument checks: errors name the argument, its value and what was expected.

What can be read off shapes and dtypes is checked always. Checks of values would make a GPU wait for the host, so off
the CPU they run under TABOM_KERNELS_DEBUG=1 only.
"""

import os

import torch
from torch import Tensor

FORMS = ("logistic", "hinge", "plackett_luce")
INTEGERS = (torch.int32, torch.int64)


def check_logits(logits: Tensor) -> None:
    """(N, V), floating point, at least one column."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        found = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"logits: expected a floating-point tensor, got {found}")
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits: expected shape (N, V) with V >= 1, got {tuple(logits.shape)}")


def check_labels(labels: Tensor, logits: Tensor, ignore_index: int) -> None:
    """(N,) int64, each a column or `ignore_index`."""
    check_rows("labels", labels, len(logits), (torch.int64,), logits.device)
    if values_are_checked(labels):
        wrong = ((labels < 0) | (labels >= logits.shape[1])) & (labels != ignore_index)
        if wrong.any():
            raise ValueError(
                f"labels: {labels[wrong][0].item()} at row {wrong.nonzero()[0].item()}; expected 0 <= label < "
                f"{logits.shape[1]}, or ignore_index={ignore_index}"
            )


def check_sequences(steps: Tensor, cu_seqlens: Tensor, rows: int) -> None:
    """Steps (N,) and offsets (B + 1,) from 0 to N, none decreasing."""
    check_rows("steps", steps, rows, INTEGERS, cu_seqlens.device)
    if cu_seqlens.dtype not in INTEGERS:
        raise TypeError(f"cu_seqlens: expected int32, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"cu_seqlens: expected shape (B + 1,), got {tuple(cu_seqlens.shape)}")
    if values_are_checked(cu_seqlens):
        offsets = cu_seqlens.tolist()
        if offsets[0] != 0 or offsets[-1] != rows or offsets != sorted(offsets):
            raise ValueError(f"cu_seqlens: expected offsets rising from 0 to N={rows}, got {offsets}")


def check_entropy(entropy: Tensor) -> None:
    """(N,), floating point."""
    if not entropy.is_floating_point():
        raise TypeError(f"entropy: expected a floating-point tensor, got {entropy.dtype}")
    if entropy.ndim != 1:
        raise ValueError(f"entropy: expected shape (N,), got {tuple(entropy.shape)}")


def check_form(form: str, temperature: float | Tensor) -> None:
    """A known form and a positive temperature."""
    if form not in FORMS:
        raise ValueError(f"form={form!r}: expected one of {', '.join(FORMS)}")
    is_tensor = isinstance(temperature, Tensor)
    if is_tensor and temperature.ndim != 0:
        raise ValueError(f"temperature: expected a number or a 0-dim tensor, got shape {tuple(temperature.shape)}")
    if (not is_tensor or values_are_checked(temperature)) and not temperature > 0:
        raise ValueError(f"temperature={float(temperature)}: expected above 0")


def check_rows(name: str, tensor: Tensor, rows: int, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    """(N,) of one of `dtypes` on `device`."""
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected {expected}, got {tensor.dtype}")
    if tensor.shape != (rows,):
        raise ValueError(f"{name}: expected shape ({rows},), got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")


def values_are_checked(tensor: Tensor) -> bool:
    """Whether reading this tensor's values costs nothing, or was asked for."""
    return tensor.device.type == "cpu" or os.environ.get("TABOM_KERNELS_DEBUG") == "1"
