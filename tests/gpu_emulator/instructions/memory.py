"""Loads, stores, and the matrices that a warp loads and stores together."""

import re

import numpy as np

from tests.gpu_emulator.errors import Unsupported
from tests.gpu_emulator.instructions.table import emulates
from tests.gpu_emulator.instructions.warps import LANE
from tests.gpu_emulator.numbers import TYPES, UNSIGNED
from tests.gpu_emulator.operands import At, Execution, Operands, address, members
from tests.gpu_emulator.program import Instruction


def space_of(instruction: Instruction) -> str:
    """global, shared or param."""
    for modifier in instruction.modifiers:
        space = modifier.split("::")[0]
        if space in ("global", "shared", "param"):
            return space
    raise Unsupported(f"{instruction}: a memory that Triton does not use")


@emulates("ld")
def load(instruction: Instruction, operands: Operands) -> Execution:
    """One element, or a vector of up to eight, from memory to registers."""
    to, source = instruction.operands
    dtype, space, writers = np.dtype(TYPES[instruction.modifiers[-1]]), space_of(instruction), operands.writers(to)
    if space == "param":
        [name, _, offset] = re.fullmatch(r"\[\s*(\w+)\s*(\+(\d+))?\s*\]", source).groups()
        [write] = writers
        return lambda machine, at: write(machine, at, machine.parameter(name, int(offset or 0), dtype))
    address_of = address(operands, source, np.uint64 if space == "global" else np.uint32)

    def run(machine, at: At) -> None:
        found = machine.load(space, address_of(machine, at), dtype.itemsize, len(writers), at, instruction)
        for write, values in zip(writers, found, strict=True):
            write(machine, at, values.view(dtype) if dtype.kind == "i" else values)

    return run


@emulates("st")
def store(instruction: Instruction, operands: Operands) -> Execution:
    """One element, or a vector of up to eight, from registers to memory."""
    to, source = instruction.operands
    size, space = np.dtype(TYPES[instruction.modifiers[-1]]).itemsize, space_of(instruction)
    readers = operands.readers(members(source), UNSIGNED[size])
    address_of = address(operands, to, np.uint64 if space == "global" else np.uint32)

    def run(machine, at: At) -> None:
        values = [machine.for_each(at, read(machine, at)) for read in readers]
        machine.store(space, address_of(machine, at), values, at, instruction)

    return run


def elements_of(instruction: Instruction, addresses: np.ndarray, matrix: int) -> tuple[list[np.ndarray], int]:
    """The addresses at which each thread has its part of a matrix of 8 x 8 numbers of 16 bits, and the bytes of each.

    The threads 8 * matrix and following give the addresses of its rows. A thread holds two neighbours of a row, which
    are one access, or of a column of the transposed matrix, which are two.
    """
    rows = addresses.reshape(-1, 32)[:, 8 * matrix : 8 * matrix + 8]
    if "trans" not in instruction.modifiers:
        return [(rows[:, LANE // 4] + (LANE % 4 * 4).astype(np.uint32)).reshape(-1)], 4
    column = (LANE // 4 * 2).astype(np.uint32)
    return [(rows[:, LANE % 4 * 2 + place] + column).reshape(-1) for place in (0, 1)], 2


@emulates("ldmatrix", "stmatrix")
def matrix(instruction: Instruction, operands: Operands) -> Execution:
    """One, two or four matrices, each with one register a thread."""
    if not re.search(r"\.m8n8\.x[124]\.(trans\.)?shared(::cta)?\.b16$", instruction.opcode):
        raise Unsupported(str(instruction))
    is_load = instruction.kind == "ldmatrix"
    registers, place = instruction.operands if is_load else reversed(instruction.operands)
    address_of = address(operands, place, np.uint32)
    writers, readers = operands.writers(registers), operands.readers(members(registers), np.uint32)

    def run(machine, at: At) -> None:
        addresses = address_of(machine, at)
        machine.check_rows(addresses.reshape(-1, 32)[:, : 8 * len(writers)], instruction)
        for index, (write, read) in enumerate(zip(writers, readers, strict=True)):
            parts, size = elements_of(instruction, addresses, index)
            if is_load:
                halves = [machine.load("shared", part, size, 1, at, instruction)[0].astype(np.uint32) for part in parts]
                write(machine, at, halves[0] if size == 4 else halves[0] | halves[1] << 16)
            else:
                whole = machine.for_each(at, read(machine, at))
                for half, part in enumerate(parts):
                    values = whole if size == 4 else (whole >> 16 * half).astype(np.uint16)
                    machine.store("shared", part, [values], at, instruction)

    return run
