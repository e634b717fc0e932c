"""Instructions of whole warps: shuffles, reductions, and the barrier of a warp."""

import numpy as np

from tests.gpu_emulator.errors import Unsupported
from tests.gpu_emulator.instructions.table import emulates, refuse
from tests.gpu_emulator.numbers import TYPES
from tests.gpu_emulator.operands import At, Execution, Operands
from tests.gpu_emulator.program import Instruction

LANE = np.arange(32)
WHOLE_WARP = np.uint32(0xFFFFFFFF)
REDUCTIONS = {
    **{"add": np.add, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor},
    **{"min": np.minimum, "max": np.maximum},
}


def whole_warps(instruction: Instruction, operands: Operands, mask: str, execute: Execution) -> Execution:
    """The same after a check that the member mask names all 32 threads."""
    members = operands.reader(mask, np.uint32)

    def run(machine, at: At) -> None:
        if (members(machine, at) != WHOLE_WARP).any():
            raise Unsupported(f"{instruction}: some threads of a warp alone")
        execute(machine, at)

    return run


@emulates("shfl")
def shuffle(instruction: Instruction, operands: Operands) -> Execution:
    """Each thread reads a register of another of its warp.

    Of the third operand the bits 0 to 4 bound the lane that is read, and the bits 8 to 12 cut the warp into segments.
    A thread whose source is out of bounds reads its own.
    """
    mode = instruction.modifiers[1]
    value_to, _, in_bounds_to = (part.strip() for part in instruction.operands[0].partition("|"))
    write = operands.writer(value_to)
    write_in_bounds = operands.writer(in_bounds_to or "_")
    read = operands.reader(instruction.operands[1], np.uint32)
    by, bound = operands.readers(instruction.operands[2:4], np.int32)

    def run(machine, at: At) -> None:
        values, distance, clamp = (machine.for_each(at, r(machine, at)).reshape(-1, 32) for r in (read, by, bound))
        distance, limit, segment = distance & 31, clamp & 31, clamp >> 8 & 31
        highest = LANE & segment | limit & ~segment
        if mode == "up":
            source = LANE - distance
            in_bounds = source >= highest
        else:
            source = {
                "down": LANE + distance,
                "bfly": LANE ^ distance,
                "idx": LANE & segment | distance & ~segment,
            }[mode]
            in_bounds = source <= highest
        source = np.where(in_bounds, source, LANE)
        write(machine, at, np.take_along_axis(values, source, 1).reshape(-1))
        write_in_bounds(machine, at, in_bounds.reshape(-1))

    return whole_warps(instruction, operands, instruction.operands[4], run)


@emulates("redux")
def reduce(instruction: Instruction, operands: Operands) -> Execution:
    """One number from those of all threads of a warp."""
    refuse(instruction, "NaN", "abs")
    kind = instruction.modifiers[-1]
    write = operands.writer(instruction.operands[0])
    read = operands.reader(instruction.operands[1], TYPES[kind])
    function = REDUCTIONS[instruction.modifiers[1]]
    if kind == "f32":
        function = {"min": np.fmin, "max": np.fmax}[instruction.modifiers[1]]

    def run(machine, at: At) -> None:
        values = machine.for_each(at, read(machine, at)).reshape(-1, 32)
        write(machine, at, np.repeat(function.reduce(values, axis=1, dtype=values.dtype), 32))

    return whole_warps(instruction, operands, instruction.operands[2], run)


@emulates("bar")
def synchronise_warp(instruction: Instruction, operands: Operands) -> Execution:
    """`bar.warp.sync`: what a warp's threads wrote before, the others see after. The machine runs `bar.sync` itself."""
    if not instruction.opcode.startswith("bar.warp.sync"):
        raise Unsupported(str(instruction))

    def run(machine, at: At) -> None:
        machine.warp_epoch[at] += 1

    return whole_warps(instruction, operands, instruction.operands[0], run)
