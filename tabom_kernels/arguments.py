"""Argument checks: errors name the argument, its value and what was expected.

What can be read off shapes and dtypes is checked always. Checks of values would make a GPU wait for the host, so off
the CPU they run under TABOM_KERNELS_DEBUG=1 only.
"""

import math
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FORMS = ("logistic", "hinge", "plackett_luce")
INTEGERS = (torch.int32, torch.int64)


def check_logits(logits: Tensor) -> None:
    """(N, V), floating point, at least one column."""
    check_floating("logits", logits)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits: expected shape (N, V) with V >= 1, got {tuple(logits.shape)}")


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """(N, D) hidden states, (V, D) weight and (V,) bias of one floating dtype on one device, V >= 1."""
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
    """(N,) int64, each a column or `ignore_index`."""
    check_rows("labels", labels, rows, (torch.int64,), device)
    if values_are_checked(labels):
        wrong = ((labels < 0) | (labels >= columns)) & (labels != ignore_index)
        if wrong.any():
            raise ValueError(
                f"labels: {labels[wrong][0].item()} at row {wrong.nonzero()[0].item()}; expected 0 <= label < "
                f"{columns}, or ignore_index={ignore_index}"
            )


def check_token_weights(token_weights: Tensor | None, rows: int, device: torch.device) -> None:
    """None, or (N,) floating point."""
    if token_weights is not None:
        floating = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        check_rows("token_weights", token_weights, rows, floating, device)
        if token_weights.requires_grad:
            raise ValueError("token_weights: their gradient is not computed, and they require one; use .detach()")


def check_sequences(steps: Tensor, cu_seqlens: Tensor, rows: int, device: torch.device) -> None:
    """Steps (N,) and offsets (B + 1,) from 0 to N, none decreasing, all on `device`."""
    check_rows("steps", steps, rows, INTEGERS, device)
    check_dtype("cu_seqlens", cu_seqlens, INTEGERS)
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens: expected shape (B + 1,), got {tuple(cu_seqlens.shape)}")
    check_device("cu_seqlens", cu_seqlens, device)
    if values_are_checked(cu_seqlens):
        offsets = cu_seqlens.tolist()
        if offsets[0] != 0 or offsets[-1] != rows or offsets != sorted(offsets):
            raise ValueError(f"cu_seqlens: expected offsets rising from 0 to N={rows}, got {offsets}")


def check_lengths(lengths: Sequence[int] | None, sequences: int, rows: int) -> None:
    """Rows of each sequence, which add up to all rows."""
    if lengths is not None and (len(lengths) != sequences or sum(lengths) != rows):
        raise ValueError(
            f"lengths: expected the rows of {sequences} sequences, {rows} in all, as cu_seqlens has them; "
            f"got {len(lengths)} of them, {sum(lengths)} in all"
        )


def check_entropy(entropy: Tensor) -> None:
    """(N,), floating point."""
    check_floating("entropy", entropy)
    if entropy.ndim != 1:
        raise ValueError(f"entropy: expected shape (N,), got {tuple(entropy.shape)}")


def check_form(form: str, margin: float, temperature: float | Tensor) -> None:
    """A known form, a finite margin and a positive, finite temperature."""
    if form not in FORMS:
        raise ValueError(f"form={form!r}: expected one of {', '.join(FORMS)}")
    check_scalar("margin", margin, lambda x: -math.inf < x < math.inf, "a finite number of nats")
    check_scalar("temperature", temperature, lambda x: 0 < x < math.inf, "above 0 and finite")


def check_denominators(
    rank_weight: float, num_tokens: float | Tensor | None, num_sequences: float | Tensor | None
) -> None:
    """Finite numbers, none below 0."""
    check_scalar("rank_weight", rank_weight, lambda x: 0 <= x < math.inf, "0 or above, and finite")
    for name, count in (("num_tokens", num_tokens), ("num_sequences", num_sequences)):
        if count is not None:
            check_scalar(name, count, lambda x: 0 <= x < math.inf, "0 or above, and finite")


def check_transform(logit_scale: float, softcap: float | None) -> None:
    """Numbers above 0, finite; a soft-cap may be None."""
    check_scalar("logit_scale", logit_scale, lambda x: 0 < x < math.inf, "above 0 and finite")
    if softcap is not None:
        check_scalar("softcap", softcap, lambda x: 0 < x < math.inf, "None, or above 0 and finite")


def check_scalar(name: str, value: float | Tensor, is_right: Callable[[float], bool], expected: str) -> None:
    """A number, or a 0-dim tensor, whose value is right."""
    if isinstance(value, Tensor):
        if value.ndim != 0:
            raise ValueError(f"{name}: expected a number or a 0-dim tensor, got shape {tuple(value.shape)}")
        if not values_are_checked(value):
            return
    if not is_right(value):
        raise ValueError(f"{name}={value.item() if isinstance(value, Tensor) else value}: expected {expected}")


def check_overlap(logits: Tensor) -> None:
    """No two elements of (N, V) are in one place, so that each can be written over."""
    (rows, columns), (row_stride, column_stride) = logits.shape, logits.stride()
    # Elements (di, dj) apart are in one place if di * row_stride = -dj * column_stride: the smallest such step.
    common = math.gcd(row_stride, column_stride) or 1
    if column_stride // common < rows and row_stride // common < columns and logits.numel() > 1:
        raise ValueError(
            f"inplace_backward=True: expected logits whose elements are in different places, got shape "
            f"{tuple(logits.shape)} with strides {logits.stride()}; use logits.clone()"
        )


def check_rows(name: str, tensor: Tensor, rows: int, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    """(N,) of one of `dtypes` on `device`."""
    check_dtype(name, tensor, dtypes)
    if tensor.shape != (rows,):
        raise ValueError(f"{name}: expected shape ({rows},), got {tuple(tensor.shape)}")
    check_device(name, tensor, device)


def check_floating(name: str, tensor: Tensor) -> None:
    """A tensor of any floating dtype."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {kind_of(tensor)}")


def check_dtype(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """A tensor of one of `dtypes`."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected a tensor of {expected}, got {kind_of(tensor)}")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """A tensor on `device`."""
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")


def kind_of(value: object) -> str:
    """A tensor's dtype, or else the name of a value's type, for messages."""
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def values_are_checked(tensor: Tensor) -> bool:
    """Whether reading this tensor's values costs nothing, or was asked for; a compiled graph never reads them."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or os.environ.get("TABOM_KERNELS_DEBUG") == "1"
