"""Arithmetic of the kernels: base-2 exponentials of logits, exact logarithms near 1, and reads of logits."""

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

exp2 = libdevice.exp2
"""2^x with denormal results as 0, which saves three instructions a logit."""
rounded_product = libdevice.mul_rn
"""x * y, rounded to fp32: the compiler does not fuse it with an addition, which would leave it exact."""

LOG2E = tl.constexpr(1.44269502162933349609375)
"""log2 e, rounded to fp32 as the kernels multiply by it."""
LN2 = tl.constexpr(0.6931471805599453)

LOWEST_BITS = tl.constexpr(-256.0)
"""Replaces t = -inf: its power of 2 is exactly 0 in fp32, and 0 * LOWEST_BITS is 0, not NaN. NaN is not replaced."""

LOWEST = tl.constexpr(-3.4028234663852886e38)
"""The lowest finite number, the maximum of a row or chunk that holds only -inf."""

FAR = tl.constexpr(2.0**29)
"""At magnitudes of at least this, neighbouring fp32 numbers are 64 apart and c has an error of that size, so `base_of`
replaces log2 e by 1. A logit below the maximum has a negligible probability with either factor."""

PADDING = tl.constexpr(-60000.0)
"""The value read for columns behind the last one: finite in every dtype, with probability 0 in an ordinary chunk."""

ORDINARY = tl.constexpr(30000.0)
"""The largest absolute maximum of a chunk that one sweep can compute."""


@triton.jit
def add_both(S, U, other_S, other_U):
    return S + other_S, U + other_U


@triton.jit
def sum_both(S, U, axis: tl.constexpr):
    """Both sums in one reduction, which saves registers and one barrier."""
    return tl.reduce((S, U), axis, add_both)


@triton.jit
def widen(x):
    """Logits of any dtype in fp32; a pair of bf16 takes two instructions, where the compiler makes three."""
    if x.dtype == tl.bfloat16:
        asm: tl.constexpr = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
        bits = tl.inline_asm_elementwise(asm, "=r,=r,r", [x], dtype=tl.int32, is_pure=True, pack=2)
        return bits.to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def log1p(x):
    """log(1 + x), where Kahan's quotient corrects the rounding of 1 + x."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0, corrected in the same way."""
    u = tl.exp(x)
    near = tl.where(u == 1.0, x, (u - 1.0) * (x / tl.log(tl.maximum(u, 0.5))))
    return tl.where(u < 0.5, u - 1.0, near)


@triton.jit
def transformed(z, scale, softcap):
    """softcap * tanh(scale * z / softcap), or scale * z; a None leaves its part out."""
    if softcap is not None:
        return softcap * libdevice.tanh(z * scale / softcap)
    return z if scale is None else z * scale


@triton.jit
def slope_of(z, scale, softcap):
    """The derivative of `transformed`, at a logit z that is transformed."""
    slope = scale
    if softcap is not None:
        y = z / softcap
        slope = scale * (1.0 - y * y)
    return slope


@triton.jit
def base_of(m):
    """The scale, c and residual with which t = fma(z, scale, -c), and t = residual at z = m."""
    m = tl.maximum(m, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    scale = tl.where(tl.abs(m) < FAR, LOG2E, 1.0)
    c = m * scale
    return scale, c, tl.fma(m, scale, -c)


@triton.jit
def bits(z, scale, c):
    """t = z * log2 e - c of logits z, at least LOWEST_BITS."""
    return tl.maximum(tl.fma(z, scale, -c), LOWEST_BITS, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_logits(row_start, column, column_stride, inside):
    return widen(tl.load(row_start + column.to(tl.int64) * column_stride, inside, other=-float("inf")))
