"""Turns the operands of an instruction into functions that read and write them for many threads at once.

An instruction becomes a function of the machine and of `at`, the threads that execute it: all of them as `slice(None)`
or some as an array of their lanes. A reader returns one value a thread, or one for all of them.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tests.gpu_emulator.errors import Unsupported
from tests.gpu_emulator.numbers import UNSIGNED
from tests.gpu_emulator.program import Register

if TYPE_CHECKING:
    from tests.gpu_emulator.machine import Machine

At = slice | np.ndarray
Reader = Callable[["Machine", At], np.ndarray]
Writer = Callable[["Machine", At, np.ndarray], None]
Execution = Callable[["Machine", At], None]

SHARED_MEMORY = "global_smem"
"""The name that Triton gives to shared memory, which begins at address 0."""


class Operands:
    """Makes readers and writers for the registers of one program."""

    def __init__(self, registers: dict[str, Register]):
        self.registers = registers

    def reader(self, operand: str, dtype: type) -> Reader:
        """Reads an operand as numbers of `dtype`; a register that is wider gives its low bytes."""
        if operand in self.registers:
            return self.register_reader(self.registers[operand], operand, np.dtype(dtype))
        if operand.startswith("%"):
            return lambda machine, at: machine.special_register(operand)[at].astype(dtype)
        value = constant(operand, np.dtype(dtype))
        return lambda machine, at: value

    def readers(self, operands: list[str], dtype: type) -> list[Reader]:
        """A reader of each operand, all of one type."""
        return [self.reader(operand, dtype) for operand in operands]

    @staticmethod
    def register_reader(register: Register, name: str, dtype: np.dtype) -> Reader:
        size, index = register
        if size == 0:
            return lambda machine, at: machine.registers[index][at]
        if size == dtype.itemsize:
            return lambda machine, at: machine.registers[index][at].view(dtype)
        if size > dtype.itemsize:
            narrow = UNSIGNED[dtype.itemsize]
            return lambda machine, at: machine.registers[index][at].astype(narrow).view(dtype)
        raise Unsupported(f"{name}, {size} bytes, read as {dtype}")

    def writer(self, operand: str) -> Writer:
        """Writes one value a thread to a register; a narrower integer is extended as its type says."""
        if operand == "_":
            return lambda machine, at, values: None
        size, index = self.registers[operand]
        dtype = np.dtype(UNSIGNED[size] if size else np.bool_)

        def write(machine: "Machine", at: At, values: np.ndarray) -> None:
            if values.dtype != dtype:
                values = values.view(dtype) if values.itemsize == size else extended(values, dtype)
            machine.registers[index][at] = values

        return write

    def writers(self, operand: str) -> list[Writer]:
        """A writer of each register of `{%r1, %r2}`, or of one register alone."""
        return [self.writer(name) for name in members(operand)]


def members(operand: str) -> list[str]:
    """The operands between the braces of a vector."""
    return [name.strip() for name in operand.strip("{} ").split(",")]


def extended(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Integers with the sign bit repeated if their type has one."""
    if values.dtype.kind not in "ui" or values.itemsize > dtype.itemsize:
        raise Unsupported(f"a result of {values.dtype} in a register of {dtype.itemsize} bytes")
    wide = np.int64 if values.dtype.kind == "i" else np.uint64
    return values.astype(wide).astype(dtype)


def constant(operand: str, dtype: np.dtype) -> np.ndarray:
    """(1,) value of an immediate."""
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", operand):
        bits = np.array([int(operand[2:], 16)], np.uint32)
        return bits.view(dtype) if dtype.itemsize == 4 else bits.view(np.float32).astype(dtype)
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", operand):
        return np.array([int(operand[2:], 16)], np.uint64).view(np.float64).astype(dtype)
    if operand == SHARED_MEMORY:
        return np.zeros(1, dtype)
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", operand):
        number = int(operand.rstrip("U"), 0)
        if dtype == np.bool_:
            return np.array([number != 0])
        return np.array([number % 2 ** (8 * dtype.itemsize)], UNSIGNED[dtype.itemsize]).view(dtype)
    raise Unsupported(f"the operand {operand!r}")


def address(operands: Operands, operand: str, dtype: type) -> Reader:
    """Reads `[%rd1+16]`: one address a thread."""
    found = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+)\s*)?\]", operand)
    if found is None:
        raise Unsupported(f"the address {operand!r}")
    base = operands.reader(found[1], dtype)
    offset = constant(found[2] or "0", np.dtype(dtype))
    return lambda machine, at: machine.for_each(at, base(machine, at) + offset)
