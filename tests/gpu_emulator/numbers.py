"""The arithmetic of a GPU on numpy arrays: rounding, NaN, denormals, and the approximate functions."""

import numpy as np

from tests.gpu_emulator.settings import SETTINGS

np.seterr(all="ignore")  # as on a GPU, which raises nothing

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
"""The unsigned type of so many bytes, as which registers and memory hold everything."""

TYPES = {
    "pred": np.bool_,
    **{f"{kind}{8 * size}": UNSIGNED[size] for kind in "bu" for size in (1, 2, 4, 8)},
    **{"s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64},
    **{"f16": np.float16, "f32": np.float32, "f64": np.float64},
}
"""PTX's types; bf16 has none in numpy, and stands as 16 bits."""

NAN = np.uint32(0x7FFFFFFF)
"""What an fp32 instruction gives for NaN, whatever NaN it was given."""

NAN_16 = np.uint16(0x7FFF)
"""The same of a conversion to fp16 or bf16."""


def canonical(x: np.ndarray) -> np.ndarray:
    """fp32 with every NaN replaced by the one that a GPU gives."""
    lost = np.isnan(x)
    return np.where(lost, NAN, x.view(np.uint32)).view(np.float32) if lost.any() else x


def flush(x: np.ndarray) -> np.ndarray:
    """fp32 with denormal numbers as zeros of their sign: what `.ftz` does to operands and results."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    return np.where(bits & 0x7F800000, bits, bits & 0x80000000).astype(np.uint32).view(np.float32)


def multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of fp32, rounded once.

    The product is exact in fp64 and the sum is rounded to fp64. Rounding that to fp32 is wrong only where the sum lies
    half-way between two fp32 numbers and its own rounding error e decides, so the sum is rounded to odd first: where e
    is not 0 and the last bit is even, it moves by one unit towards e.
    """
    product = a.astype(np.float64) * b
    total = product + c
    rest = total - product
    error = (product - (total - rest)) + (c - rest)
    bits = total.view(np.int64)
    to_odd = (error != 0) & (bits & 1 == 0) & np.isfinite(total)
    if to_odd.any():
        away = np.where((error > 0) == (total > 0), 1, -1)
        total = (bits + to_odd * away).view(np.float64)
    return canonical(total.astype(np.float32))


def deviation(exact: np.ndarray) -> np.ndarray:
    """Numbers from -1 to 1 that look random and depend on fp64 results alone.

    An instruction is a function, so threads that compute the same get the same error.
    """
    bits = exact.view(np.uint64)
    scrambled = (bits ^ bits >> 29) * np.uint64(0x9E3779B97F4A7C15)
    return (scrambled >> 11).astype(np.float64) * 2.0**-52 - 1


def approximate(exact: np.ndarray, units: int, is_exact: np.ndarray | bool = False) -> np.ndarray:
    """fp32 of an fp64 result; under `perturb` off by up to so many units in the last place, where it is not exact."""
    result = exact.astype(np.float32)
    if SETTINGS.perturb:
        bits = result.view(np.int32)
        varies = np.isfinite(result) & (bits & 0x7F800000 != 0) & ~np.asarray(is_exact)
        error = np.floor(deviation(exact) * (units + 0.5) + 0.5).astype(np.int32)
        result = (bits + varies * error).view(np.float32)
    return canonical(result)


def exp2(x: np.ndarray) -> np.ndarray:
    """`ex2.approx`: within 2 units in the last place."""
    return approximate(np.exp2(x.astype(np.float64)), 2, x == 0)


def log2(x: np.ndarray) -> np.ndarray:
    """`lg2.approx`: as exact as `ex2.approx`, and 0 at 1."""
    return approximate(np.log2(x.astype(np.float64)), 2, x == 1)


def reciprocal(x: np.ndarray) -> np.ndarray:
    """`rcp.approx`: within 1 unit in the last place."""
    return approximate(1.0 / x.astype(np.float64), 1)


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`div.full` and `div.approx`: within 2 units in the last place."""
    return approximate(a.astype(np.float64) / b, 2)


def tanh(x: np.ndarray) -> np.ndarray:
    """`tanh.approx`: within 2^-11, relative."""
    exact = np.tanh(x.astype(np.float64))
    if SETTINGS.perturb:
        exact = exact * (1 + 2.0**-11 * deviation(exact))
    return canonical(exact.astype(np.float32))


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """The bits of fp32 numbers rounded to the nearest bf16, ties to even."""
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), NAN_16, rounded)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """fp32 of the bits of bf16 numbers."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_float16(x: np.ndarray) -> np.ndarray:
    """The bits of fp32 numbers rounded to the nearest fp16, ties to even."""
    return np.where(np.isnan(x), NAN_16, x.astype(np.float16).view(np.uint16))
