"""Arithmetic on fp32, and on the pairs of fp32 of Blackwell."""

from collections.abc import Callable
from functools import reduce

import numpy as np

from tests.gpu_emulator import numbers
from tests.gpu_emulator.errors import Unsupported
from tests.gpu_emulator.instructions.table import elementwise, emulates, refuse
from tests.gpu_emulator.numbers import canonical, flush, multiply_add
from tests.gpu_emulator.operands import Execution, Operands
from tests.gpu_emulator.program import Instruction

DIRECTED = ("rz", "rm", "rp", "sat", "abs", "xorsign")
"""Modifiers that Triton's kernels do not use."""

FUNCTIONS = {
    "add": lambda a, b: canonical(a + b),
    "sub": lambda a, b: canonical(a - b),
    "mul": lambda a, b: canonical(a * b),
    "fma": multiply_add,
    "mad": multiply_add,
    "max": lambda *terms: canonical(reduce(np.fmax, terms)),
    "min": lambda *terms: canonical(reduce(np.fmin, terms)),
    "max.NaN": lambda *terms: canonical(reduce(np.maximum, terms)),
    "min.NaN": lambda *terms: canonical(reduce(np.minimum, terms)),
    "sqrt": lambda a: canonical(np.sqrt(a)),
    "neg": np.negative,
    "abs": np.abs,
    "ex2": numbers.exp2,
    "lg2": numbers.log2,
    "tanh": numbers.tanh,
    "rcp": numbers.reciprocal,
    "rcp.rn": lambda a: canonical(np.float32(1) / a),
    "div": numbers.divide,
    "div.rn": lambda a, b: canonical(a / b),
    "fma.neg_a": lambda a, b, c: multiply_add(-a, b, c),
    "fma.neg_c": lambda a, b, c: multiply_add(a, b, -c),
}
"""Of fp32, by the operation and the one modifier that chooses another function."""

WIDENED = {"bf16": numbers.from_bfloat16, "f16": lambda a: a.astype(np.float32)}
"""fp32 of the types of half precision."""


@emulates("ex2", "lg2", "tanh", "rcp", "sqrt", "fma")
def arithmetic(instruction: Instruction, operands: Operands) -> Execution:
    """An operation on floating-point numbers."""
    refuse(instruction, *DIRECTED)
    kind = instruction.modifiers[-1]
    if kind == "f32x2":
        return on_pairs(instruction, operands)
    if kind in WIDENED and "f32" in instruction.modifiers:
        return mixed(instruction, operands)
    if kind not in ("f32", "neg_a", "neg_c"):
        raise Unsupported(str(instruction))
    readers = operands.readers(instruction.operands[1:], np.float32)
    return elementwise(instruction, operands, function_of(instruction), *readers)


def function_of(instruction: Instruction) -> Callable[..., np.ndarray]:
    """The function of fp32 that an instruction computes; `.ftz` flushes denormal numbers."""
    names = [f"{instruction.kind}.{modifier}" for modifier in instruction.modifiers]
    function = FUNCTIONS[next((name for name in names if name in FUNCTIONS), instruction.kind)]
    return flushing(function) if "ftz" in instruction.modifiers else function


def flushing(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """The same function with denormal operands and results as zeros."""
    return lambda *arguments: flush(function(*map(flush, arguments)))


def mixed(instruction: Instruction, operands: Operands) -> Execution:
    """fp32 of Blackwell whose terms but the last are of half precision, as in `sub.rn.f32.bf16`."""
    kind = instruction.modifiers[-1]
    *narrow, last = instruction.operands[1:]
    readers = operands.readers(narrow, np.uint16 if kind == "bf16" else np.float16)
    function, widen = FUNCTIONS[instruction.kind], WIDENED[kind]
    return elementwise(
        instruction,
        operands,
        lambda *terms: function(*map(widen, terms[:-1]), terms[-1]),
        *readers,
        operands.reader(last, np.float32),
    )


def on_pairs(instruction: Instruction, operands: Operands) -> Execution:
    """Two fp32 in a register of 64 bits."""
    function = function_of(instruction)
    write = operands.writer(instruction.operands[0])
    readers = operands.readers(instruction.operands[1:], np.uint64)

    def run(machine, at) -> None:
        pairs = [machine.for_each(at, read(machine, at)).view(np.float32) for read in readers]
        write(machine, at, function(*pairs).view(np.uint64))

    return run
