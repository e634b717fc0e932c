"""Arithmetic and logic on integers and predicates."""

import numpy as np

from tests.gpu_emulator.errors import Unsupported
from tests.gpu_emulator.instructions.floating import arithmetic
from tests.gpu_emulator.instructions.table import elementwise, emulates, refuse
from tests.gpu_emulator.numbers import TYPES, UNSIGNED
from tests.gpu_emulator.operands import Execution, Operands
from tests.gpu_emulator.program import Instruction

PREDICATE_FUNCTIONS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not}


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b towards 0; all bits set where b is 0."""
    magnitude = np.abs(a.astype(object)) // np.abs(np.where(b == 0, 1, b).astype(object))
    signed = np.where((a < 0) == (b < 0), magnitude, -magnitude)
    bits = np.where(b == 0, -1, signed) % 2 ** (8 * a.itemsize)  # the lowest number over -1 is itself
    return bits.astype(UNSIGNED[a.itemsize]).view(a.dtype)


FUNCTIONS = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mad": lambda a, b, c: a * b + c,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "neg": np.negative,
    "min": np.minimum,
    "max": np.maximum,
    "abs": np.abs,
    "div": quotient,
    "rem": lambda a, b: a - quotient(a, b) * b,
}


@emulates(*FUNCTIONS)
def number(instruction: Instruction, operands: Operands) -> Execution:
    """An operation that exists on integers, predicates and floating-point numbers."""
    kind = instruction.modifiers[-1]
    if kind == "pred":
        readers = operands.readers(instruction.operands[1:], np.bool_)
        return elementwise(instruction, operands, PREDICATE_FUNCTIONS[instruction.kind], *readers)
    if kind[0] == "f" or kind.startswith("bf") or kind.startswith("neg"):
        return arithmetic(instruction, operands)
    refuse(instruction, "sat", "cc")
    if "wide" in instruction.modifiers:
        return wide_product(instruction, operands)
    if "hi" in instruction.modifiers:
        return high_product(instruction, operands)
    readers = operands.readers(instruction.operands[1:], TYPES[kind])
    return elementwise(instruction, operands, FUNCTIONS[instruction.kind], *readers)


def wide_product(instruction: Instruction, operands: Operands) -> Execution:
    """`mul.wide` and `mad.wide`: twice as many bits as the factors have."""
    narrow = np.dtype(TYPES[instruction.modifiers[-1]])
    wide = np.dtype(f"{narrow.kind}{2 * narrow.itemsize}")
    readers = operands.readers(instruction.operands[1:3], narrow)
    if instruction.kind == "mul":
        return elementwise(instruction, operands, lambda a, b: a.astype(wide) * b, *readers)
    addend = operands.reader(instruction.operands[3], wide)
    return elementwise(instruction, operands, lambda a, b, c: a.astype(wide) * b + c, *readers, addend)


def high_product(instruction: Instruction, operands: Operands) -> Execution:
    """`mul.hi` and `mad.hi`: the upper half of the product's bits."""
    dtype = np.dtype(TYPES[instruction.modifiers[-1]])
    if dtype.itemsize > 4:
        raise Unsupported(str(instruction))
    wide, bits = np.dtype(f"{dtype.kind}8"), 8 * dtype.itemsize

    def high(a: np.ndarray, b: np.ndarray, c: np.ndarray | int = 0) -> np.ndarray:
        return (a.astype(wide) * b >> bits).astype(dtype) + np.asarray(c, dtype)

    return elementwise(instruction, operands, high, *operands.readers(instruction.operands[1:], dtype))


@emulates("shl", "shr")
def shift(instruction: Instruction, operands: Operands) -> Execution:
    """A shift by a count that is clamped to the number of bits; `shr` of a signed type repeats the sign."""
    dtype = np.dtype(TYPES[instruction.modifiers[-1]])
    bits, unsigned = 8 * dtype.itemsize, UNSIGNED[dtype.itemsize]

    def shifted(value: np.ndarray, count: np.ndarray) -> np.ndarray:
        near = np.minimum(count, bits - 1).astype(dtype)
        if instruction.kind == "shl":
            result = value.view(unsigned) << near.view(unsigned)
        elif dtype.kind == "i":
            return value >> near
        else:
            result = value >> near
        return np.where(count >= bits, unsigned(0), result)

    readers = operands.reader(instruction.operands[1], dtype), operands.reader(instruction.operands[2], np.uint32)
    return elementwise(instruction, operands, shifted, *readers)


@emulates("shf")
def funnel_shift(instruction: Instruction, operands: Operands) -> Execution:
    """Shifts the 64 bits of two registers and keeps 32 of them."""
    direction, mode = instruction.modifiers[:2]

    def shifted(low: np.ndarray, high: np.ndarray, count: np.ndarray) -> np.ndarray:
        count = (count & 31 if mode == "wrap" else np.minimum(count, 32)).astype(np.uint64)
        both = low.astype(np.uint64) | high.astype(np.uint64) << 32
        return ((both << count) >> 32 if direction == "l" else both >> count).astype(np.uint32)

    return elementwise(instruction, operands, shifted, *operands.readers(instruction.operands[1:], np.uint32))


@emulates("bfe")
def extract_bits(instruction: Instruction, operands: Operands) -> Execution:
    """`length` bits from `start` on; a signed type repeats the highest of them, which is at most the value's own."""
    dtype = np.dtype(TYPES[instruction.modifiers[-1]])
    if dtype.itemsize != 4:
        raise Unsupported(str(instruction))

    def extract(value: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        start, length = (np.minimum(x & 255, 32).astype(np.int64) for x in (start, length))
        wide, mask = value.astype(np.int64), (np.int64(1) << length) - 1
        found = wide >> start & mask
        if dtype.kind == "i":
            sign = wide >> np.minimum(start + length - 1, 31) & 1
            found = np.where((length > 0) & (sign == 1), found | ~mask, found)
        return found.astype(np.uint32)

    readers = operands.reader(instruction.operands[1], dtype), *operands.readers(instruction.operands[2:], np.uint32)
    return elementwise(instruction, operands, extract, *readers)


@emulates("bfi")
def insert_bits(instruction: Instruction, operands: Operands) -> Execution:
    """The second operand with `length` bits from `start` on replaced by the low bits of the first."""
    if instruction.modifiers[-1] != "b32":
        raise Unsupported(str(instruction))

    def insert(bits: np.ndarray, into: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        start, length = (np.minimum(x & 255, 32).astype(np.uint64) for x in (start, length))
        mask = (np.uint64(1) << length) - np.uint64(1) << start
        return (into & ~mask | bits.astype(np.uint64) << start & mask).astype(np.uint32)

    return elementwise(instruction, operands, insert, *operands.readers(instruction.operands[1:], np.uint32))


@emulates("prmt")
def permute_bytes(instruction: Instruction, operands: Operands) -> Execution:
    """Each byte of the result is one of the eight of two registers, or its sign bit eight times."""
    if len(instruction.modifiers) > 1:
        raise Unsupported(str(instruction))

    def permute(low: np.ndarray, high: np.ndarray, selector: np.ndarray) -> np.ndarray:
        both = low.astype(np.uint64) | high.astype(np.uint64) << 32
        result = np.uint32(0)
        for place in range(4):
            choice = selector >> 4 * place & 15
            byte = (both >> 8 * (choice & 7).astype(np.uint64) & 255).astype(np.uint32)
            byte = np.where(choice & 8, (byte >> 7) * 255, byte)
            result = result | byte.astype(np.uint32) << 8 * place
        return result

    return elementwise(instruction, operands, permute, *operands.readers(instruction.operands[1:], np.uint32))


@emulates("lop3")
def three_input_logic(instruction: Instruction, operands: Operands) -> Execution:
    """Any function of three bits, given as a table of its eight values."""
    table = int(instruction.operands[4], 0)

    def look_up(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        result = np.uint32(0)
        for place in range(8):
            if table >> place & 1:
                result = result | (a if place & 4 else ~a) & (b if place & 2 else ~b) & (c if place & 1 else ~c)
        return np.asarray(result, np.uint32)

    return elementwise(instruction, operands, look_up, *operands.readers(instruction.operands[1:4], np.uint32))


@emulates("popc")
def count_bits(instruction: Instruction, operands: Operands) -> Execution:
    """The number of bits that are set."""
    read = operands.reader(instruction.operands[1], TYPES[instruction.modifiers[-1]])
    return elementwise(instruction, operands, lambda a: np.bitwise_count(a).astype(np.uint32), read)
