"""The table of instructions: from an operation's name to what makes an executable function of it."""

from collections.abc import Callable

import numpy as np

from tests.gpu_emulator.errors import Unsupported
from tests.gpu_emulator.operands import At, Execution, Operands, Reader
from tests.gpu_emulator.program import Instruction

Builder = Callable[[Instruction, Operands], Execution]
BUILDERS: dict[str, Builder] = {}


def emulates(*kinds: str) -> Callable[[Builder], Builder]:
    """Registers a builder for the operations of these names."""

    def register(builder: Builder) -> Builder:
        for kind in kinds:
            BUILDERS[kind] = builder
        return builder

    return register


def build(instruction: Instruction, operands: Operands) -> Execution:
    """The function that executes an instruction, its guard included.

    Raises:
        Unsupported: the emulator does not know the instruction, or this form of it.
    """
    if instruction.kind not in BUILDERS:
        raise Unsupported(str(instruction))
    try:
        execute = BUILDERS[instruction.kind](instruction, operands)
    except (KeyError, IndexError, ValueError) as error:
        raise Unsupported(str(instruction)) from error
    return guarded(instruction, operands, execute) if instruction.guard else execute


def guarded(instruction: Instruction, operands: Operands, execute: Execution) -> Execution:
    """The same for the threads whose guard holds."""
    guard = operands.reader(instruction.guard, np.bool_)

    def run(machine, at: At) -> None:
        holds = guard(machine, at) != instruction.negated
        if holds.all():
            execute(machine, at)
        elif holds.any():
            execute(machine, machine.lanes[at][holds])

    return run


def elementwise(
    instruction: Instruction, operands: Operands, function: Callable[..., np.ndarray], *readers: Reader
) -> Execution:
    """Writes a function of the operands that are read to the first operand."""
    write = operands.writer(instruction.operands[0])
    if len(readers) == 1:
        [only] = readers
        return lambda machine, at: write(machine, at, function(only(machine, at)))
    if len(readers) == 2:
        first, second = readers
        return lambda machine, at: write(machine, at, function(first(machine, at), second(machine, at)))
    return lambda machine, at: write(machine, at, function(*[read(machine, at) for read in readers]))


def refuse(instruction: Instruction, *modifiers: str) -> None:
    """Raises where an instruction has a modifier that would change what it does."""
    if set(modifiers) & set(instruction.modifiers):
        raise Unsupported(str(instruction))
