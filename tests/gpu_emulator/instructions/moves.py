"""Moves, conversions, comparisons and choices."""

import operator
from collections.abc import Callable

import numpy as np

from tests.gpu_emulator.errors import Unsupported
from tests.gpu_emulator.instructions.table import elementwise, emulates, refuse
from tests.gpu_emulator.numbers import TYPES, UNSIGNED, canonical, flush, from_bfloat16, to_bfloat16, to_float16
from tests.gpu_emulator.operands import Execution, Operands, members
from tests.gpu_emulator.program import Instruction

ORDERED = {"eq": operator.eq, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge}
ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def comparison(name: str, is_float: bool) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The relation of a comparison; one that ends in u also holds where a number is NaN."""
    if not is_float:
        return operator.ne if name == "ne" else ORDERED[name]
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name == "ne":
        return lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)
    if name == "neu":
        return lambda a, b: a != b
    if name in ORDERED:
        return ORDERED[name]
    relation = ORDERED[name.removesuffix("u")]
    return lambda a, b: relation(a, b) | np.isnan(a) | np.isnan(b)


@emulates("setp")
def set_predicate(instruction: Instruction, operands: Operands) -> Execution:
    """A comparison, and its combination with a predicate."""
    name, *combined, kind = instruction.modifiers
    if "|" in instruction.operands[0]:
        raise Unsupported(str(instruction))
    relation = comparison(name, kind[0] == "f")
    readers = operands.readers(instruction.operands[1:3], TYPES[kind])
    flushes = "ftz" in combined

    def compare(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return relation(flush(a), flush(b)) if flushes else relation(a, b)

    combination = next((modifier for modifier in combined if modifier in ("and", "or", "xor")), None)
    if combination is None:
        return elementwise(instruction, operands, compare, *readers)
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[combination]
    other = operands.reader(instruction.operands[3], np.bool_)
    return elementwise(instruction, operands, lambda a, b, p: combine(compare(a, b), p), *readers, other)


@emulates("set")
def set_number(instruction: Instruction, operands: Operands) -> Execution:
    """A comparison of fp32 as 1.0 or 0.0."""
    name, *_, result, kind = instruction.modifiers
    if (result, kind) != ("f32", "f32"):
        raise Unsupported(str(instruction))
    relation = comparison(name, True)
    readers = operands.readers(instruction.operands[1:], np.float32)
    return elementwise(instruction, operands, lambda a, b: relation(a, b).astype(np.float32), *readers)


@emulates("selp")
def select(instruction: Instruction, operands: Operands) -> Execution:
    """One of two values by a predicate."""
    readers = operands.readers(instruction.operands[1:3], TYPES[instruction.modifiers[-1]])
    predicate = operands.reader(instruction.operands[3], np.bool_)
    return elementwise(instruction, operands, lambda a, b, p: np.where(p, a, b), *readers, predicate)


@emulates("mov")
def move(instruction: Instruction, operands: Operands) -> Execution:
    """A copy, or the parts of a register taken apart or put together."""
    to, source = instruction.operands
    dtype = np.dtype(TYPES[instruction.modifiers[-1]])
    if to.startswith("{"):
        return take_apart(operands, to, source, dtype)
    if source.startswith("{"):
        return put_together(instruction, operands, dtype)
    return elementwise(instruction, operands, lambda a: a, operands.reader(source, dtype))


def take_apart(operands: Operands, to: str, source: str, dtype: np.dtype) -> Execution:
    """`mov.b64 {%r1, %r2}, %rd1`: the low bits go to the first register."""
    writers, read = operands.writers(to), operands.reader(source, dtype)
    size = dtype.itemsize // len(writers)

    def run(machine, at) -> None:
        whole = read(machine, at)
        for place, write in enumerate(writers):
            write(machine, at, (whole >> dtype.type(8 * size * place)).astype(UNSIGNED[size]))

    return run


def put_together(instruction: Instruction, operands: Operands, dtype: np.dtype) -> Execution:
    """`mov.b64 %rd1, {%r1, %r2}`."""
    names = members(instruction.operands[1])
    size = dtype.itemsize // len(names)

    def join(*parts: np.ndarray) -> np.ndarray:
        whole = dtype.type(0)
        for place, part in enumerate(parts):
            whole = whole | part.astype(dtype) << dtype.type(8 * size * place)
        return whole

    return elementwise(instruction, operands, join, *operands.readers(names, UNSIGNED[size]))


@emulates("cvt")
def convert(instruction: Instruction, operands: Operands) -> Execution:
    """A conversion between types."""
    refuse(instruction, "sat", "relu", "rz", "rm", "rp", "satfinite")
    *modifiers, to, source = instruction.modifiers
    if to in ("bf16x2", "f16x2"):
        half = to_bfloat16 if to == "bf16x2" else to_float16
        readers = operands.readers(instruction.operands[1:], np.float32)
        return elementwise(
            instruction, operands, lambda high, low: half(high).astype(np.uint32) << 16 | half(low), *readers
        )
    read = operands.reader(instruction.operands[1], np.uint16 if source == "bf16" else TYPES[source])
    return elementwise(instruction, operands, conversion(instruction, modifiers, to, source), read)


def conversion(instruction: Instruction, modifiers: list[str], to: str, source: str) -> Callable:
    """The function from numbers of one type to those of another."""
    if source == "bf16" and to == "f32":
        return from_bfloat16
    if source == "f32" and to in ("bf16", "f16"):
        return to_bfloat16 if to == "bf16" else to_float16
    if "bf16" in (to, source):
        raise Unsupported(str(instruction))
    dtype = TYPES[to]
    rounding = next((ROUNDINGS[modifier] for modifier in modifiers if modifier in ROUNDINGS), None)
    if source[0] == "f" and to[0] in "su":
        return lambda a: to_integer(rounding(a.astype(np.float64)), np.dtype(dtype), instruction)
    if rounding is not None:
        return lambda a: rounding(a).astype(dtype)
    if source == "f16" and to == "f32":
        return lambda a: canonical(a.astype(dtype))
    return lambda a: a.astype(dtype)


def to_integer(whole: np.ndarray, dtype: np.dtype, instruction: Instruction) -> np.ndarray:
    """Whole numbers as integers: the nearest one that exists, and 0 for NaN."""
    limits = np.iinfo(dtype)
    if limits.bits == 64:
        raise Unsupported(str(instruction))
    finite = np.nan_to_num(whole, nan=0, posinf=limits.max, neginf=limits.min)
    return np.clip(finite, limits.min, limits.max).astype(dtype)
