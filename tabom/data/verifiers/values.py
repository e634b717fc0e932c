"""Expressions as sympy has them, and whether two are equal."""

import re

import sympy
from latex2sympy2_extended import NormalizationConfig
from latex2sympy2_extended.latex2sympy2 import is_expr_of_only_symbols, latex2sympy, normalize_latex
from math_verify import verify
from math_verify.grader import should_treat_as_complex
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

from tabom.data.verifiers.prose import Reading
from tabom.data.verifiers.quantities import conversion, split
from tabom.data.verifiers.stated import expression, result

NORMALIZATION = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
)
CONTAINER = re.compile(
    r"\\[{}]|^\{|[\[\]]|^\(.*,|\\cup|,(?!\d{3})|\b(?:or|and)\b|\\pm|matrix|<|>|\\l?eq?\b|\\g?eq?\b|\\emptyset"
)
PLUS_MINUS = "\\pm"
POINTS = [sympy.Rational(n, d) for n, d in ((-29, 10), (-13, 7), (-5, 11), (3, 13), (8, 9), (17, 11), (27, 8))]


def same_value_of(gold: str, reading: Reading) -> bool:
    """Whether the mathematics of a reading is the gold's."""
    found = expression(reading)
    mine = amount(gold, True)
    if found is None or mine is None:
        return False
    text, is_latex = found
    return any(
        same_amount(mine, amount(each, is_latex and not mine[1])) for each in dict.fromkeys((text, result(text)))
    )


def same_amount(gold, found) -> bool:  # noqa: ANN001
    """Whether two amounts (see below) are equal in the gold's unit."""
    factor = conversion(gold[1], found[1]) if found else None
    if factor is None:
        return False
    return same_value(gold[0], found[0] * factor if factor != 1 else found[0], gold[2], found[2])


def amount(text: str, is_latex: bool):  # noqa: ANN201
    """The value of a text as sympy has it, its unit, and the text of the value; None where it cannot be read whole."""
    text = text.strip().rstrip(".,;").strip()
    apart = split(text, is_latex)
    if apart is None:
        return None
    value = re.sub(r"\s*(?:percent|per cent|percentage|\\%|%)\s*$", r"\\%", apart.value)
    unit = apart.unit
    if re.match(r"percent|per cent|pct", unit):
        if re.search(r"\bof\s+(?:\$?\d|[a-zA-Z]$)", unit):
            return None
        value, unit = value + r"\%", ""
    parsed = parse(value)
    if parsed is None and (named := re.fullmatch(r"[^=<>\d]*=([^=<>]+)", value)):
        parsed = parse(named[1])  # of `P(A|B) = 1/3`
    if parsed is None:
        whole = parse(text) if unit else None
        return None if whole is None else (whole, "", text)
    return (parsed * apart.scale if apart.scale != 1 else parsed), unit, value


def parse(text: str) -> sympy.Basic | None:
    """What math-verify's parser reads; None unless it reads all of it."""
    text = repeating(text)
    text = re.sub(r"(?<=\d)\{?,\}?(?:\\!)?(?=\d{3}(?!\d))", "", text) if is_grouped(text) else text
    if re.fullmatch(r"-?\d{1,3}(?: \d{3})+(?:\.\d+)?", text):
        text = text.replace(" ", "")
    if re.search(r"\d\s+\d|\d\.\d+\.\d|\d,\d{3},\d{1,2}(?!\d)|\.\.\.|\\dots|\\ldots", text):
        return None
    if text.count("\\pm") == 1 and "," not in text:
        text = f"{text.replace(PLUS_MINUS, '+')}, {text.replace(PLUS_MINUS, '-')}"
    if re.search(r"\d\s*['\u2019\u2032\u2033]|!\s*!", text):  # feet, a derivative, a double factorial
        return None
    all_hold = re.search(r"\band\b|\\land\b|\\wedge\b", text)
    text = re.sub(r",?\s*(?:\\text\{\s*,?\s*(?:or|and)\s*\}|\bor\b|\band\b)|\\land\b|\\wedge\b", ",", text)
    normal = normalize_latex(text, NORMALIZATION)
    try:
        value = latex2sympy(
            normal, is_real=not should_treat_as_complex(normal), convert_degrees=False, normalization_config=None
        )
    except Exception:
        return None
    return (
        sympy.Intersection(*(each.as_set() for each in value.args)) if all_hold and are_inequalities(value) else value
    )


def are_inequalities(value: sympy.Basic) -> bool:
    """Whether math-verify's parser read several relations of one variable, of which not all are equations."""
    return (
        isinstance(value, sympy.FiniteSet)
        and all(isinstance(each, Relational) for each in value.args)
        and not all(isinstance(each, sympy.Eq) for each in value.args)
        and len(value.free_symbols) == 1
    )


def is_grouped(text: str) -> bool:
    """Whether the commas of a text group the digits of one number."""
    return re.search(
        r"(?<![\d(\[{,])\d{1,3}(?:\{?,\}?(?:\\!)?\d{3})+(?![\d,])(?!\s*[)\]}])", text.strip("$ ")
    ) is not None and not re.search(r"[(\[]\s*-?[\d.]+\s*,|,\s", text)


def repeating(text: str) -> str:
    """Repeating decimals as fractions."""

    def fraction(match: re.Match) -> str:
        whole, fixed, period = match[1] or "0", match[2], match[3] or match[4] or match[5]
        top = int(whole + fixed + period) - int(whole + fixed)
        return rf"\frac{{{top}}}{{{10 ** len(fixed) * (10 ** len(period) - 1)}}}"

    return re.sub(
        r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*\{(\d+)\}|\\(?:dot|bar|overline)\s*(\d)|\((\d+)\))", fraction, text
    )


def same_value(gold: sympy.Basic, found: sympy.Basic, gold_text: str, found_text: str) -> bool:
    """Whether two expressions are equal, of the same kind, and as exactly as they are small."""
    if any(value.has(sympy.nan, sympy.zoo) for value in (gold, found)):
        return False
    gold, found = as_container(gold), as_container(found)
    if len({base(text) for text in (gold_text, found_text)} - {None}) == 2:
        return False
    is_list = isinstance(found, sympy.Tuple | sympy.Set) and "," in found_text and not is_grouped(found_text)
    if is_list and not CONTAINER.search(gold_text):
        return False
    if ":" in found_text and not re.search(r"[:/]|frac", gold_text):
        return False
    if isinstance(found, sympy.Eq) and not isinstance(gold, Relational):
        left = found.lhs
        if equal(left, found.rhs):
            found = found.rhs
        elif left.has(sympy.Abs) or not (
            is_expr_of_only_symbols(left) or isinstance(left, AppliedUndef | sympy.Tuple) or left.is_number
        ):
            return False
    if {text.strip().lstrip("\\")[:1] for text in (gold_text, found_text)} in ({"{", "("}, {"{", "["}):
        return False
    percent = [part for part in (gold, found) if is_percentage(part)]
    if len(percent) == 1:
        whole = percent[0].args[0]
        if whole.is_number and abs(whole) >= 1 and equal(whole, found if percent[0] is gold else gold):
            return True
    return equal(gold, found) or equal_where_real(gold, found)


def base(text: str) -> str | None:
    """The base of a number such as `2516_8`, where one is given."""
    subscript = re.fullmatch(r"[\dA-F.]+_\{?(\d+)\}?", text.strip())
    return subscript[1] if subscript else None


def is_percentage(value: sympy.Basic) -> bool:
    """Whether math-verify's parser read a per cent sign."""
    return isinstance(value, sympy.Mul) and value.args[1:] == (sympy.UnevaluatedExpr(sympy.Rational(1, 100)),)


def as_container(value: sympy.Basic) -> sympy.Basic:
    """A column or row as a tuple, inequalities joined by "or" as a union."""
    if isinstance(value, sympy.MatrixBase) and 1 in value.shape:
        return sympy.Tuple(*value)
    if (
        isinstance(value, sympy.Eq)
        and isinstance(value.lhs, sympy.Tuple)
        and isinstance(value.rhs, sympy.Set | sympy.Tuple)
    ):
        return value.rhs
    return sympy.Union(*(each.as_set() for each in value.args)) if are_inequalities(value) else value


def equal(gold: sympy.Basic, found: sympy.Basic) -> bool:
    """Whether math-verify finds them equal, with six digits of the smallest number in them.

    It calculates with so many digits; exact numbers have to be equal in sixty.
    """
    digits = decimals(gold, found)
    if (
        is_exact(gold)
        and is_exact(found)
        and abs((gold - found).evalf(20)) > abs(gold.evalf(20)) * sympy.Rational(1, 10**60)
    ):
        return False
    return verify(
        gold,
        found,
        float_rounding=6 + digits,
        numeric_precision=15 + digits,
        allow_set_relation_comp=True,
        timeout_seconds=None,
    )


def is_exact(value: sympy.Basic) -> bool:
    """Whether a value is a real number without a decimal fraction."""
    return (
        isinstance(value, sympy.Expr)
        and value.is_number
        and value.is_finite is True
        and value.is_real is True
        and not value.has(sympy.Float)
    )


def decimals(*values: sympy.Basic) -> int:
    """How many zeros follow the decimal point of the smallest number in these expressions."""
    zeros = [0]
    for value in values:
        for part in sympy.preorder_traversal(value):
            if isinstance(part, sympy.Basic) and getattr(part, "is_number", False) and part.is_finite:
                size = abs(part.evalf(5))
                if size.is_Float and size > 0:
                    zeros.append(int(-sympy.log(size, 10).evalf(5)) if size < sympy.Rational(1, 10) else 0)
    return min(max(zeros), 4000)


def equal_where_real(gold: sympy.Basic, found: sympy.Basic) -> bool:
    """Whether two formulas are equal at every point that both have a real value at, as 1/sqrt(n) and sqrt(1/n) are."""
    if isinstance(gold, Relational | sympy.Set | sympy.Tuple | sympy.MatrixBase) or isinstance(
        found, Relational | sympy.Set | sympy.Tuple | sympy.MatrixBase
    ):
        return False
    symbols = sorted(gold.free_symbols, key=sympy.default_sort_key)
    if (
        not symbols
        or set(symbols) != found.free_symbols
        or gold.has(sympy.I)
        or found.has(sympy.I, sympy.oo, sympy.Float)
    ):
        return False
    agreed = 0
    for shift in range(len(POINTS)):
        point = {symbol: POINTS[(shift + 3 * place) % len(POINTS)] for place, symbol in enumerate(symbols)}
        here, there = gold.subs(point).evalf(20), found.subs(point).evalf(20)
        if not (here.is_real and there.is_real):
            continue
        if abs(here - there) > abs(here) * sympy.Rational(1, 10**12):
            return False
        agreed += 1
    return agreed >= 2
