"""Each instruction against numpy, PyTorch or the C library, on random and on extreme operands."""

import ctypes
import operator

import numpy as np
import pytest
import torch

from tests.gpu_emulator.errors import Unsupported
from tests.gpu_emulator.programs import evaluate, run_ptx
from tests.gpu_emulator.settings import SETTINGS

THREADS = 256
EXTREMES = {
    "f4": [0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 3e38, -3e38, 1e-40, -1e-40, 1e-45, np.inf, -np.inf, np.nan, 65504, 65520],
    "i4": [0, 1, -1, 2, 7, 31, 32, 33, 255, -(2**31), 2**31 - 1],
    "i8": [0, 1, -1, 63, 64, -(2**63), 2**63 - 1, 2**32, -(2**32)],
    "i2": [0, 1, -1, 2**15 - 1, -(2**15)],
}


def draw(kind, seed):
    """Operands of a numpy type: every pair of extremes may meet, and random bits."""
    generator = np.random.default_rng(seed)
    dtype = np.dtype(kind)
    signed = "i" + kind[1] if kind[0] == "u" else kind
    extremes = np.array(EXTREMES[signed], signed).view(dtype)
    bits = generator.integers(0, 256, THREADS * dtype.itemsize, np.uint8).view(dtype)
    if kind == "f4":
        bits = np.where(np.arange(THREADS) % 2, bits, generator.normal(size=THREADS) * 3).astype(dtype)
    return np.where(generator.random(THREADS) < 0.5, generator.choice(extremes, THREADS), bits).astype(dtype)


def towards_zero(a, b):
    """Quotients as C has them, in Python's integers."""
    quotients = [
        abs(int(x)) // max(abs(int(y)), 1) * (1 if (x < 0) == (y < 0) else -1) for x, y in zip(a, b, strict=True)
    ]
    return np.array([q % 2**32 for q in quotients], np.uint32).view(a.dtype)


def high_half(a, b):
    return np.array([(int(x) * int(y) >> 32) % 2**32 for x, y in zip(a, b, strict=True)], np.uint32).view(a.dtype)


def field(a, start, length):
    """`bfe` bit by bit, as the PTX manual describes it."""
    results = []
    for value, first, count in zip(a.tolist(), start.tolist(), length.tolist(), strict=True):
        first, count = first & 255, count & 255
        is_signed = a.dtype.kind == "i"
        sign = value >> min(first + count - 1, 31) & 1 if is_signed and count else 0
        bits = [value >> first + i & 1 if i < count and first + i <= 31 else sign for i in range(32)]
        results.append(sum(bit << i for i, bit in enumerate(bits)))
    return np.array(results, np.uint32).view(a.dtype)


def inserted(a, b, start, length):
    results = []
    for bits, into, first, count in zip(a.tolist(), b.tolist(), start.tolist(), length.tolist(), strict=True):
        for i in range(min(count & 255, 32)):
            place = (first & 255) + i
            if place < 32:
                into = into & ~(1 << place) | (bits >> i & 1) << place
        results.append(into)
    return np.array(results, np.uint32)


def permuted(a, b, selector):
    results = []
    for low, high, choices in zip(a.tolist(), b.tolist(), selector.tolist(), strict=True):
        both = (low | high << 32).to_bytes(8, "little")
        chosen = [(both[c & 7] >> 7) * 255 if c & 8 else both[c & 7] for c in (choices >> 4 * i & 15 for i in range(4))]
        results.append(int.from_bytes(bytes(chosen), "little"))
    return np.array(results, np.uint32)


def shifted(a, count, left):
    """A shift whose count may be beyond the bits; in Python's integers."""
    bits = 8 * a.itemsize
    results = [
        int(x) << min(int(n), 2 * bits) if left else int(x) >> min(int(n), 2 * bits)
        for x, n in zip(a, count, strict=True)
    ]
    return np.array([r % 2**bits for r in results], f"u{a.itemsize}").view(a.dtype)


def funnel(a, b, count, left, wrap):
    results = []
    for low, high, n in zip(a.tolist(), b.tolist(), count.tolist(), strict=True):
        n = n & 31 if wrap else min(n, 32)
        both = low | high << 32
        results.append(((both << n) >> 32 if left else both >> n) % 2**32)
    return np.array(results, np.uint32)


INTEGERS = [
    ("add.s32", "i4 i4", np.add),
    ("sub.s64", "i8 i8", np.subtract),
    ("mul.lo.s32", "i4 i4", np.multiply),
    ("mul.lo.s64", "i8 i8", np.multiply),
    ("mad.lo.s32", "i4 i4 i4", lambda a, b, c: a * b + c),
    ("mad.lo.s64", "i8 i8 i8", lambda a, b, c: a * b + c),
    ("mul.hi.s32", "i4 i4", high_half),
    ("mul.hi.u32", "u4 u4", high_half),
    ("mad.hi.u32", "u4 u4 u4", lambda a, b, c: high_half(a, b) + c),
    ("mul.wide.s32", "i4 i4", lambda a, b: a.astype("i8") * b),
    ("mul.wide.u32", "u4 u4", lambda a, b: a.astype("u8") * b),
    ("mad.wide.s32", "i4 i4 i8", lambda a, b, c: a.astype("i8") * b + c),
    ("mad.wide.u32", "u4 u4 u8", lambda a, b, c: a.astype("u8") * b + c),
    ("div.s32", "i4 i4", towards_zero),
    ("div.u32", "u4 u4", towards_zero),
    ("rem.s32", "i4 i4", lambda a, b: a - towards_zero(a, b) * b),
    ("rem.u32", "u4 u4", lambda a, b: a - towards_zero(a, b) * b),
    ("and.b32", "u4 u4", np.bitwise_and),
    ("or.b64", "u8 u8", np.bitwise_or),
    ("or.b16", "u2 u2", np.bitwise_or),
    ("xor.b64", "u8 u8", np.bitwise_xor),
    ("not.b32", "u4", np.invert),
    ("neg.s32", "i4", np.negative),
    ("abs.s32", "i4", np.abs),
    ("min.s32", "i4 i4", np.minimum),
    ("min.u32", "u4 u4", np.minimum),
    ("max.s64", "i8 i8", np.maximum),
    ("max.u32", "u4 u4", np.maximum),
    ("popc.b32", "u4", lambda a: np.array([bin(x).count("1") for x in a.tolist()], "u4")),
    ("shl.b32", "u4 u4", lambda a, n: shifted(a, n, True)),
    ("shl.b16", "u2 u4", lambda a, n: shifted(a, n, True)),
    ("shl.b64", "u8 u4", lambda a, n: shifted(a, n, True)),
    ("shr.u32", "u4 u4", lambda a, n: shifted(a, n, False)),
    ("shr.s32", "i4 u4", lambda a, n: shifted(a, n, False)),
    ("shr.s64", "i8 u4", lambda a, n: shifted(a, n, False)),
    ("shr.u64", "u8 u4", lambda a, n: shifted(a, n, False)),
    ("bfe.u32", "u4 u4 u4", field),
    ("bfe.s32", "i4 u4 u4", field),
    ("bfi.b32", "u4 u4 u4 u4", inserted),
    ("prmt.b32", "u4 u4 u4", permuted),
    ("shf.l.wrap.b32", "u4 u4 u4", lambda a, b, n: funnel(a, b, n, True, True)),
    ("shf.l.clamp.b32", "u4 u4 u4", lambda a, b, n: funnel(a, b, n, True, False)),
    ("shf.r.wrap.b32", "u4 u4 u4", lambda a, b, n: funnel(a, b, n, False, True)),
    ("shf.r.clamp.b32", "u4 u4 u4", lambda a, b, n: funnel(a, b, n, False, False)),
]


@pytest.mark.parametrize("opcode, kinds, expected", INTEGERS, ids=[case[0] for case in INTEGERS])
def test_integers(opcode, kinds, expected):
    operands = [draw(kind, seed) for seed, kind in enumerate(kinds.split())]
    if opcode.startswith(("shl", "shr", "shf", "bfe", "bfi")):
        operands[1 if opcode[:2] == "sh" and len(operands) == 2 else -1] = np.arange(THREADS, dtype="u4") % 70
        if opcode.startswith("bf"):
            operands[-2] = np.arange(THREADS, dtype="u4") // 3 % 40
    if opcode.startswith(("div", "rem")):
        operands[1] = np.where(operands[1] == 0, 3, operands[1]).astype(operands[1].dtype)  # by 0: undefined
    with np.errstate(all="ignore"):
        want = expected(*operands)
    statement = f"{opcode} {{to}}, " + ", ".join(f"{{{name}}}" for name in "abcd"[: len(operands)]) + ";"
    got = evaluate(statement, want.dtype, *operands)
    assert (got == want).all(), np.flatnonzero(got != want)[:5]


def test_a_function_of_three_bits():
    a, b, c = (draw("u4", seed) for seed in range(3))
    assert (evaluate("lop3.b32 {to}, {a}, {b}, {c}, 0xE8;", np.uint32, a, b, c) == (a & b | a & c | b & c)).all()


def c_library(name, *operands):
    """A function of the C library, which rounds a fused multiply-add once."""
    function = getattr(ctypes.CDLL("libm.so.6"), name)
    function.restype, function.argtypes = ctypes.c_float, [ctypes.c_float] * len(operands)
    return np.array([function(*map(float, values)) for values in zip(*operands, strict=True)], np.float32)


def in_fp64(function):
    return lambda *operands: function(*(a.astype(np.float64) for a in operands)).astype(np.float32)


FLOATS = [
    ("add.f32", 2, np.add),
    ("sub.f32", 2, np.subtract),
    ("mul.f32", 2, np.multiply),
    ("mul.rn.f32", 2, np.multiply),
    ("fma.rn.f32", 3, lambda a, b, c: c_library("fmaf", a, b, c)),
    ("div.full.f32", 2, in_fp64(np.divide)),
    ("div.rn.f32", 2, np.divide),
    ("max.f32", 2, np.fmax),
    ("min.f32", 2, np.fmin),
    ("max.NaN.f32", 2, np.maximum),
    ("min.NaN.f32", 2, np.minimum),
    ("neg.f32", 1, np.negative),
    ("abs.f32", 1, np.abs),
    ("ex2.approx.f32", 1, in_fp64(np.exp2)),
    ("lg2.approx.f32", 1, in_fp64(np.log2)),
    ("rcp.approx.f32", 1, in_fp64(lambda a: 1 / a)),
    ("rcp.rn.f32", 1, lambda a: np.float32(1) / a),
    ("sqrt.rn.f32", 1, np.sqrt),
    ("tanh.approx.f32", 1, in_fp64(np.tanh)),
]


def same(got, want):
    """Equal bits, except that any NaN is as good as another."""
    return ((got.view(f"u{got.itemsize}") == want.view(f"u{want.itemsize}")) | (np.isnan(got) & np.isnan(want))).all()


@pytest.mark.parametrize("ftz", [False, True])
@pytest.mark.parametrize("opcode, count, expected", FLOATS, ids=[case[0] for case in FLOATS])
def test_floats(opcode, count, expected, ftz):
    """With .ftz, denormal operands and results are zeros of their sign."""
    operands = [draw("f4", seed) for seed in range(count)]
    statement = f"{opcode} {{to}}, " + ", ".join(f"{{{name}}}" for name in "abc"[:count]) + ";"

    def flush(x):
        return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x) if ftz else x

    with np.errstate(all="ignore"):
        want = flush(expected(*map(flush, operands)).astype(np.float32))
    got = evaluate(statement.replace(".f32", ".ftz.f32") if ftz else statement, np.float32, *operands)
    assert same(got, want)


def test_a_fused_multiply_add_next_to_a_tie():
    """The sum lies half-way between two fp32 numbers but for its last bits, which fp64 alone would lose."""
    generator = np.random.default_rng(0)
    a, b = (generator.normal(size=4096).astype(np.float32) for _ in range(2))
    c = (np.float32(2**-30) * generator.normal(size=4096) + np.float32(2**20) * (a * b)).astype(np.float32)
    for addend in (c, np.float32(1e9) * c, -(a * b)):
        got = np.concatenate(
            [
                evaluate("fma.rn.f32 {to}, {a}, {b}, {c};", np.float32, *part)
                for part in zip(*(np.split(x, 8) for x in (a, b, addend)), strict=True)
            ]
        )
        assert same(got, c_library("fmaf", a, b, addend))


@pytest.mark.parametrize(
    "sum_of",
    ["add.f32 {to}, %r90, {b}", "add.f32 {to}, {b}, %r90", "sub.f32 {to}, %r90, {b}", "sub.f32 {to}, {b}, %r90"],
)
def test_a_product_that_is_used_once_is_fused_as_ptxas_does(sum_of):
    """(1 + 2^-12)^2 less its own rounding is 2^-24 in one step and 0 in two; .rn asks for two."""
    a = np.float32([1 + 2**-12])
    b = np.float32([1 + 2**-11]) * (-1 if sum_of.startswith("add") else 1)
    sign = -1 if sum_of.startswith("sub.f32 {to}, {b}") else 1
    assert evaluate(f"mul.f32 %r90, {{a}}, {{a}}; {sum_of};", np.float32, a, b) == [sign * 2**-24]
    assert evaluate(f"mul.rn.f32 %r90, {{a}}, {{a}}; {sum_of};", np.float32, a, b) == [0]
    used_twice = f"mul.f32 %r90, {{a}}, {{a}}; {sum_of}; add.f32 %r91, %r90, %r90;"
    assert evaluate(used_twice, np.float32, a, b) == [0]


def test_two_floats_at_once():
    a, b, c = (draw("f4", seed) for seed in range(3))
    pairs = [x.view(np.uint64) for x in (a, b, c)]
    got = evaluate("fma.rn.f32x2 {to}, {a}, {b}, {c};", np.uint64, *pairs).view(np.float32)
    assert same(got, c_library("fmaf", a, b, c))
    with np.errstate(all="ignore"):
        for name, function in (("add.rn", np.add), ("sub", np.subtract), ("mul", np.multiply)):
            got = evaluate(f"{name}.f32x2 {{to}}, {{a}}, {{b}};", np.uint64, *pairs[:2]).view(np.float32)
            assert same(got, function(a, b))


def test_the_largest_of_three():
    a, b, c = (draw("f4", seed) for seed in range(3))
    assert same(evaluate("max.f32 {to}, {a}, {b}, {c};", np.float32, a, b, c), np.fmax(np.fmax(a, b), c))
    got = evaluate("min.NaN.f32 {to}, {a}, {b}, {c};", np.float32, a, b, c)
    assert same(got, np.minimum(np.minimum(a, b), c))


@pytest.mark.parametrize("kind, dtype", [("bf16", torch.bfloat16), ("f16", torch.half)])
def test_half_precision_beside_fp32(kind, dtype):
    """The last term is fp32, and the others are widened exactly."""
    a, b, c = draw("i2", 0), draw("i2", 1), draw("f4", 2)
    wide_a, wide_b = (torch.from_numpy(x).view(dtype).float().numpy() for x in (a, b))
    with np.errstate(all="ignore"):
        assert same(evaluate(f"sub.rn.f32.{kind} {{to}}, {{a}}, {{b}};", np.float32, a, c), wide_a - c)
    got = evaluate(f"fma.rn.f32.{kind} {{to}}, {{a}}, {{b}}, {{c}};", np.float32, a, b, c)
    assert same(got, c_library("fmaf", wide_a, wide_b, c))


RELATIONS = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


@pytest.mark.parametrize("name", RELATIONS)
@pytest.mark.parametrize(
    "kind, type_name", [("i2", "s16"), ("i4", "s32"), ("u4", "u32"), ("i8", "s64"), ("u8", "u64"), ("f4", "f32")]
)
def test_comparisons(name, kind, type_name):
    a, b = draw(kind, 0), draw(kind, 1)
    b = np.where(np.arange(THREADS) % 3 == 0, a, b)
    is_nan = np.isnan(a) | np.isnan(b) if kind == "f4" else np.zeros(THREADS, bool)
    ordered = RELATIONS[name](a, b) & ~is_nan
    got = evaluate(f"setp.{name}.{type_name} %p1, {{a}}, {{b}}; selp.b32 {{to}}, 1, 0, %p1;", np.uint32, a, b)
    assert (got == ordered).all()
    if kind == "f4":
        got = evaluate(f"setp.{name}u.f32 %p1, {{a}}, {{b}}; selp.b32 {{to}}, 1, 0, %p1;", np.uint32, a, b)
        assert (got == (ordered | is_nan)).all()
        got = evaluate(f"set.{name}.f32.f32 {{to}}, {{a}}, {{b}};", np.float32, a, b)
        assert (got == ordered).all()
        for nan, want in (("nan", is_nan), ("num", ~is_nan)):
            got = evaluate(f"setp.{nan}.f32 %p1, {{a}}, {{b}}; selp.b32 {{to}}, 1, 0, %p1;", np.uint32, a, b)
            assert (got == want).all()


def test_a_comparison_that_flushes_takes_denormal_numbers_for_zero():
    a = np.float32([1e-40, 1e-30])
    for ftz, want in (("", [0, 0]), (".ftz", [1, 0])):
        got = evaluate(f"setp.eq{ftz}.f32 %p1, {{a}}, 0f00000000; selp.b32 {{to}}, 1, 0, %p1;", np.uint32, a)
        assert got.tolist() == want


@pytest.mark.parametrize("name", ["and", "or", "xor"])
def test_predicates(name):
    """A comparison combined with a predicate, and an operation on two of them."""
    a, b = draw("i4", 0), draw("i4", 1)
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[name]
    statement = f"""
setp.lt.s32 %p1, {{a}}, 5;
setp.gt.{name}.s32 %p2, {{b}}, 7, %p1;
not.pred %p3, %p1;
{name}.pred %p4, %p2, %p3;
mov.pred %p5, %p4;
selp.b32 {{to}}, 1, 0, %p5;"""
    want = combine(combine(b > 7, a < 5), a >= 5)
    assert (evaluate(statement, np.uint32, a, b) == want).all()


def test_guards():
    a = draw("i4", 0)
    got = evaluate(
        "mov.b32 {to}, 1; setp.gt.s32 %p1, {a}, 5; @%p1 mov.b32 {to}, 2; @!%p1 add.s32 {to}, {to}, 7;", np.int32, a
    )
    assert (got == np.where(a > 5, 2, 8)).all()


def test_registers_are_taken_apart_and_put_together():
    a = draw("u8", 0)
    assert (
        evaluate("mov.b64 {{%r90, %r91}}, {a}; mov.b64 {to}, {{%r91, %r90}};", np.uint64, a) == (a << 32 | a >> 32)
    ).all()
    b = draw("u4", 0)
    assert (
        evaluate("mov.b32 {{%rs90, %rs91}}, {a}; mov.b32 {to}, {{%rs91, %rs90}};", np.uint32, b) == (b << 16 | b >> 16)
    ).all()


def bits_of(x):
    return x.view(torch.int16).numpy().view(np.uint16)


CONVERSIONS = [
    ("cvt.rn.bf16.f32", "f4", lambda a: bits_of(torch.from_numpy(a).bfloat16())),
    ("cvt.rn.f16.f32", "f4", lambda a: bits_of(torch.from_numpy(a).half())),
    ("cvt.f32.bf16", "i2", lambda a: torch.from_numpy(a).view(torch.bfloat16).float().numpy()),
    ("cvt.f32.f16", "i2", lambda a: torch.from_numpy(a).view(torch.half).float().numpy()),
    ("cvt.rn.f32.s32", "i4", lambda a: a.astype(np.float32)),
    ("cvt.rn.f32.u32", "u4", lambda a: a.astype(np.float32)),
    ("cvt.rn.f32.s64", "i8", lambda a: a.astype(np.float32)),
    ("cvt.rn.f32.u64", "u8", lambda a: a.astype(np.float32)),
    ("cvt.s64.s32", "i4", lambda a: a.astype(np.int64)),
    ("cvt.u64.u32", "u4", lambda a: a.astype(np.uint64)),
    ("cvt.u32.u64", "u8", lambda a: a.astype(np.uint32)),
    ("cvt.u16.u64", "u8", lambda a: a.astype(np.uint16)),
    ("cvt.u16.u32", "u4", lambda a: a.astype(np.uint16)),
    ("cvt.u32.u16", "u2", lambda a: a.astype(np.uint32)),
    ("cvt.s64.s16", "i2", lambda a: a.astype(np.int64)),
    ("cvt.rni.f32.f32", "f4", np.rint),
    ("cvt.rmi.f32.f32", "f4", np.floor),
    ("cvt.rpi.f32.f32", "f4", np.ceil),
    (
        "cvt.rzi.s32.f32",
        "f4",
        lambda a: np.clip(
            np.nan_to_num(np.trunc(a.astype(np.float64)), posinf=2**31 - 1, neginf=-(2**31)), -(2**31), 2**31 - 1
        ).astype(np.int32),
    ),
]


@pytest.mark.parametrize("opcode, kind, expected", CONVERSIONS, ids=[case[0] for case in CONVERSIONS])
def test_conversions(opcode, kind, expected):
    a = draw(kind, 0)
    with np.errstate(all="ignore"):
        want = expected(a)
    got = evaluate(f"{opcode} {{to}}, {{a}};", want.dtype, a)
    if opcode in ("cvt.rn.bf16.f32", "cvt.rn.f16.f32"):
        assert (got[np.isnan(a)] == 0x7FFF).all()
        got, want = got[~np.isnan(a)], want[~np.isnan(a)]
    assert same(got, want) if want.dtype.kind == "f" else (got == want).all()


@pytest.mark.parametrize("kind, dtype", [("bf16", torch.bfloat16), ("f16", torch.half)])
def test_a_pair_of_halves(kind, dtype):
    a, b = draw("f4", 0), draw("f4", 1)
    a, b = (np.where(np.isnan(x), np.float32(3), x) for x in (a, b))
    got = evaluate(f"cvt.rn.{kind}x2.f32 {{to}}, {{a}}, {{b}};", np.uint32, a, b)
    high, low = (bits_of(torch.from_numpy(x).to(dtype)).astype(np.uint32) for x in (a, b))
    assert (got == (high << 16 | low)).all()


@pytest.mark.parametrize(
    "mode, by, clamp",
    [
        ("bfly", 5, 31),
        ("bfly", 16, 31),
        ("up", 3, 0),
        ("down", 7, 31),
        ("idx", 9, 31),
        ("bfly", 3, 0x181F),
        ("idx", 2, 0x181F),
    ],
)
def test_shuffles(mode, by, clamp):
    """By the manual's description, lane for lane."""
    a = draw("u4", 0)
    limit, segment = clamp & 31, clamp >> 8 & 31
    want, in_bounds = a.copy(), np.zeros(THREADS, bool)
    for thread in range(THREADS):
        lane = thread % 32
        lowest, highest = lane & segment, lane & segment | limit & ~segment
        source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": lowest | by & ~segment}[mode]
        in_bounds[thread] = source >= highest if mode == "up" else source <= highest
        if in_bounds[thread]:
            want[thread] = a[thread - lane + source]
    shuffle = f"shfl.sync.{mode}.b32 %r90|%p1, {{a}}, {by}, {clamp}, -1;"
    assert (evaluate(f"{shuffle} mov.b32 {{to}}, %r90;", np.uint32, a) == want).all()
    assert (evaluate(f"{shuffle} selp.b32 {{to}}, 1, 0, %p1;", np.uint32, a) == in_bounds).all()


@pytest.mark.parametrize("name, function", [("add", np.add), ("min", np.minimum), ("max", np.maximum)])
def test_reductions_of_a_warp(name, function):
    a = draw("i4", 0)
    want = np.repeat(function.reduce(a.reshape(-1, 32), 1, dtype=a.dtype), 32)
    assert (evaluate(f"redux.sync.{name}.s32 {{to}}, {{a}}, -1;", np.int32, a) == want).all()


@pytest.mark.parametrize("name, function", [("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)])
def test_reductions_of_the_bits_of_a_warp(name, function):
    a = draw("u4", 0)
    want = np.repeat(function.reduce(a.reshape(-1, 32), 1), 32)
    assert (evaluate(f"redux.sync.{name}.b32 {{to}}, {{a}}, -1;", np.uint32, a) == want).all()


@pytest.mark.parametrize("name, function", [("min", np.fmin), ("max", np.fmax)])
def test_reductions_of_floats_of_a_warp(name, function):
    a = draw("f4", 0)
    want = np.repeat(function.reduce(a.reshape(-1, 32), 1), 32)
    assert same(evaluate(f"redux.sync.{name}.f32 {{to}}, {{a}}, -1;", np.float32, a), want)


def test_vectors_go_through_registers_and_shared_memory():
    """Four words of a thread are written at once, and read as two of 64 bits."""
    numbers = torch.arange(128, dtype=torch.int32)
    copy = torch.zeros_like(numbers)
    body = """
mad.wide.u32 %rd1, %r100, 16, %rd101;
ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];
shl.b32 %r5, %r100, 4;
st.shared.v4.b32 [%r5], {%r1, %r2, %r3, %r4};
ld.shared.v2.b64 {%rd2, %rd3}, [%r5];
mad.wide.u32 %rd4, %r100, 16, %rd102;
st.global.v2.b64 [%rd4], {%rd2, %rd3};
"""
    run_ptx(body, numbers, copy, shared_bytes=512)
    assert torch.equal(copy, numbers)


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("matrices", [1, 2, 4])
def test_matrices_go_to_shared_memory_and_back(matrices, trans):
    """Thread t holds the elements (t / 4, 2 (t mod 4)) and the next; with .trans of the transposed matrix."""
    registers = np.arange(32 * matrices, dtype=np.uint32).reshape(matrices, 32) * 2
    registers = registers | registers + 1 << 16
    memory = torch.zeros(matrices * 64, dtype=torch.int16)
    loads = "".join(
        f"mad.wide.u32 %rd1, %r100, 4, %rd101; ld.global.b32 %r{i + 1}, [%rd1+{128 * i}];\n" for i in range(matrices)
    )
    names = ", ".join(f"%r{i + 1}" for i in range(matrices))
    others = ", ".join(f"%r{i + 11}" for i in range(matrices))
    stores = "".join(f"st.global.b32 [%rd3+{128 * i}], %r{i + 11};\n" for i in range(matrices))
    copies = "".join(
        f"ld.shared.b32 %r30, [%r22+{128 * i}];\nst.global.b32 [%rd2+{128 * i}], %r30;\n" for i in range(matrices)
    )
    body = f"""
{loads}
shl.b32 %r20, %r100, 4;
and.b32 %r20, %r20, {128 * matrices - 1};
stmatrix.sync.aligned.m8n8.x{matrices}{trans}.shared.b16 [%r20], {{{names}}};
bar.sync 0;
ldmatrix.sync.aligned.m8n8.x{matrices}{trans}.shared.b16 {{{others}}}, [%r20];
shl.b32 %r22, %r100, 2;
mad.wide.u32 %rd2, %r100, 4, %rd102;
mad.wide.u32 %rd3, %r100, 4, %rd103;
{stores}
{copies}
"""
    back = torch.zeros(matrices * 32, dtype=torch.int32)
    run_ptx(body, torch.from_numpy(registers.reshape(-1).view(np.int32)), memory, back, shared_bytes=128 * matrices)
    want = np.arange(64 * matrices).reshape(matrices, 8, 8)
    assert (memory.numpy().reshape(matrices, 8, 8) == (want.transpose(0, 2, 1) if trans else want)).all()
    assert (back.numpy().view(np.uint32) == registers.reshape(-1)).all()


@pytest.mark.parametrize(
    "opcode, exact, units",
    [("ex2.approx.f32", np.exp2, 2), ("lg2.approx.f32", np.log2, 2), ("rcp.approx.f32", lambda a: 1 / a, 1)],
)
def test_perturbed_functions_stay_within_their_bound(monkeypatch, opcode, exact, units):
    monkeypatch.setattr(SETTINGS, "perturb", True)
    a = np.abs(draw("f4", 0)) % 50 + np.float32(0.01)
    a = a[np.isfinite(a)]
    want = exact(a.astype(np.float64)).astype(np.float32)
    got = evaluate(f"{opcode} {{to}}, {{a}};", np.float32, a)
    assert np.abs(got.view(np.int32) - want.view(np.int32)).max() == units
    assert (got == evaluate(f"{opcode} {{to}}, {{a}};", np.float32, a)).all()


def test_a_perturbed_hyperbolic_tangent_stays_within_its_bound(monkeypatch):
    monkeypatch.setattr(SETTINGS, "perturb", True)
    a = np.linspace(0.01, 4, 256, dtype=np.float32)
    error = evaluate("tanh.approx.f32 {to}, {a};", np.float32, a) / np.tanh(a.astype(np.float64)) - 1
    assert 0.9 * 2**-11 < np.abs(error).max() < 1.01 * 2**-11


@pytest.mark.parametrize(
    "statement",
    [
        "foo.b32 %r1, %r2;",
        "add.rz.f32 %r1, %r2, %r2;",
        "ld.local.b32 %r1, [%rd101];",
        "shfl.sync.idx.b32 %r1, %r100, 0, 31, 1;",
    ],
)
def test_what_it_does_not_know_is_refused(statement):
    with pytest.raises(Unsupported):
        run_ptx(f"mov.b32 %r2, 0; {statement}", torch.zeros(1))
