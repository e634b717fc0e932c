"""Choosing a backend: modules whose functions share their names and signatures.

`torch_backend` holds closed forms that know nothing of autograd; the Triton launchers will stand beside it.
"""

from types import ModuleType
from typing import Literal

from torch import Tensor

from tabom_kernels import torch_backend

Backend = Literal["triton", "torch", "reference"]

CLOSED_FORMS: dict[str, ModuleType] = {"torch": torch_backend}


def backend_for(tensor: Tensor) -> str:
    """The name of the backend that a call on `tensor` takes when it is not told one."""
    return "torch"


def closed_form(backend: str | None, tensor: Tensor) -> ModuleType | None:
    """The module of closed forms to use, None for `reference`, which differentiates by autograd.

    Raises:
        ValueError: there is no such backend.
    """
    name = backend or backend_for(tensor)
    if name == "reference":
        return None
    if name not in CLOSED_FORMS:
        available = ", ".join([*CLOSED_FORMS, "reference"])
        raise ValueError(f"backend={name!r}: this release has {available}")
    return CLOSED_FORMS[name]
