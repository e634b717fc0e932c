"""Argument checks, whose errors name the argument, its value and what was expected.

Shapes and dtypes are always checked. A check of values would make the host wait for a GPU, so off the CPU values are
checked under TABOM_KERNELS_DEBUG=1 only.
"""

import math
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FORMS = ("logistic", "hinge", "plackett_luce")
INTEGERS = (torch.int32, torch.int64)
POSITIVE = (lambda x: 0 < x < math.inf, "above 0 and finite")
NOT_NEGATIVE = (lambda x: 0 <= x < math.inf, "0 or above, and finite")


def check_logits(logits: Tensor) -> None:
    """Checks that logits are (N, V) floating point with at least one column."""
    check_floating("logits", logits)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits: expected shape (N, V) with V >= 1, got {tuple(logits.shape)}")


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Checks that hidden (N, D), weight (V, D) and bias (V,) have one floating dtype and one device; V >= 1."""
    check_floating("hidden", hidden)
    if hidden.ndim != 2:
        raise ValueError(f"hidden: expected shape (N, D), got {tuple(hidden.shape)}")
    check_dtype("weight", weight, (hidden.dtype,))
    if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"weight: expected shape (V, {hidden.shape[1]}) with V >= 1, as hidden is {tuple(hidden.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    check_device("weight", weight, hidden.device)
    if bias is not None:
        check_rows("bias", bias, weight.shape[0], (hidden.dtype,), hidden.device)


def check_labels(labels: Tensor, rows: int, columns: int, device: torch.device, ignore_index: int) -> None:
    """Checks that labels are (N,) int64, each a column or `ignore_index`."""
    check_rows("labels", labels, rows, (torch.int64,), device)
    if values_are_checked(labels) and rows:
        lowest, highest = (x.item() for x in labels.aminmax())
        if lowest >= 0 and highest < columns:
            return
        wrong = ((labels < 0) | (labels >= columns)) & (labels != ignore_index)
        if wrong.any():
            raise ValueError(
                f"labels: {labels[wrong][0].item()} at row {wrong.nonzero()[0].item()}; expected 0 <= label < "
                f"{columns}, or ignore_index={ignore_index}"
            )


def check_weights(name: str, weights: Tensor | None, count: int, device: torch.device) -> None:
    """Checks that weights are None, or (count,) floating point without a gradient."""
    if weights is not None:
        check_rows(name, weights, count, (torch.float32, torch.float64, torch.bfloat16, torch.float16), device)
        if weights.requires_grad:
            raise ValueError(f"{name}: their gradient is not computed, and they require one; use .detach()")


def check_sequences(steps: Tensor, cu_seqlens: Tensor, rows: int, device: torch.device) -> None:
    """Checks steps (N,), and offsets (B + 1,) that rise from 0 to N, all on `device`."""
    check_rows("steps", steps, rows, INTEGERS, device)
    check_dtype("cu_seqlens", cu_seqlens, INTEGERS)
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens: expected shape (B + 1,), got {tuple(cu_seqlens.shape)}")
    check_device("cu_seqlens", cu_seqlens, device)
    if values_are_checked(cu_seqlens):
        offsets = cu_seqlens.tolist()
        if offsets[0] != 0 or offsets[-1] != rows or offsets != sorted(offsets):
            raise ValueError(f"cu_seqlens: expected offsets rising from 0 to N={rows}, got {offsets}")


def check_lengths(lengths: Sequence[int], cu_seqlens: Tensor | None, rows: int) -> None:
    """Checks that there is a length for each sequence, and that they add up to all rows."""
    if cu_seqlens is None:
        raise ValueError("lengths: expected None, as cu_seqlens is None")
    sequences = cu_seqlens.shape[0] - 1
    if len(lengths) != sequences or sum(lengths) != rows:
        raise ValueError(
            f"lengths: expected the rows of {sequences} sequences, {rows} in all, as cu_seqlens has them; "
            f"got {len(lengths)} of them, {sum(lengths)} in all"
        )


def check_entropy(entropy: Tensor) -> None:
    """Checks that entropies are (N,) floating point."""
    check_floating("entropy", entropy)
    if entropy.ndim != 1:
        raise ValueError(f"entropy: expected shape (N,), got {tuple(entropy.shape)}")


def check_form(form: str, margin: float, temperature: float | Tensor) -> None:
    """Checks for a known form, a finite margin and a positive, finite temperature."""
    if form not in FORMS:
        raise ValueError(f"form={form!r}: expected one of {', '.join(FORMS)}")
    check_scalar("margin", margin, lambda x: -math.inf < x < math.inf, "a finite number of nats")
    check_scalar("temperature", temperature, *POSITIVE)


def check_transform(logit_scale: float, softcap: float | None) -> None:
    """Checks that scale and soft-cap are finite and above 0; the soft-cap may be None."""
    check_scalar("logit_scale", logit_scale, *POSITIVE)
    if softcap is not None:
        check_scalar("softcap", softcap, POSITIVE[0], "None, or above 0 and finite")


def check_scalar(name: str, value: float | Tensor, is_right: Callable[[float], bool], expected: str) -> None:
    """Checks that a number or a 0-dim tensor has a value that `is_right` accepts."""
    if isinstance(value, Tensor):
        if value.ndim != 0:
            raise ValueError(f"{name}: expected a number or a 0-dim tensor, got shape {tuple(value.shape)}")
        if not values_are_checked(value):
            return
    if not is_right(value):
        raise ValueError(f"{name}={value.item() if isinstance(value, Tensor) else value}: expected {expected}")


def check_overlap(logits: Tensor) -> None:
    """Checks that no two elements of (N, V) share memory, so that each can be overwritten."""
    (rows, columns), (row_stride, column_stride) = logits.shape, logits.stride()
    # Two elements (di, dj) apart share memory if di * row_stride = -dj * column_stride. This is the smallest such step.
    common = math.gcd(row_stride, column_stride) or 1
    if column_stride // common < rows and row_stride // common < columns and logits.numel() > 1:
        raise ValueError(
            f"inplace_backward=True: expected logits whose elements are in different places, got shape "
            f"{tuple(logits.shape)} with strides {logits.stride()}; use logits.clone()"
        )


def check_rows(name: str, tensor: Tensor, rows: int, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    """Checks that a tensor is (N,) of one of `dtypes` on `device`."""
    check_dtype(name, tensor, dtypes)
    if tensor.shape != (rows,):
        raise ValueError(f"{name}: expected shape ({rows},), got {tuple(tensor.shape)}")
    check_device(name, tensor, device)


def check_floating(name: str, tensor: Tensor) -> None:
    """Checks that a value is a tensor of a floating dtype."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {kind_of(tensor)}")


def check_dtype(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Checks that a value is a tensor of one of `dtypes`."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected a tensor of {expected}, got {kind_of(tensor)}")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Checks that a tensor is on `device`."""
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")


def kind_of(value: object) -> str:
    """The dtype of a tensor, or the type of another value, for error messages."""
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def values_are_checked(tensor: Tensor) -> bool:
    """Whether values are checked: on a CPU, or under TABOM_KERNELS_DEBUG=1; never in a compiled graph."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or os.environ.get("TABOM_KERNELS_DEBUG") == "1"
