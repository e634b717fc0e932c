"""What each PTX instruction does, one module a family; importing this package registers all of them."""

from tests.gpu_emulator.instructions import floating, integers, memory, moves, warps  # noqa: F401
from tests.gpu_emulator.instructions.table import build

__all__ = ["build"]
