"""Numbers with units: what of an answer is the value, and whether two units are the same quantity."""

import re
from typing import NamedTuple

from sympy import Expr, Integer, Rational, Symbol
from sympy.physics import units
from sympy.physics.units import Quantity

from tabom.data.verifiers.numerals import NUMERAL
from tabom.data.verifiers.prose import DENIAL, UNCOUNTED

MULTIPLIERS = {
    "hundred": 10**2, "thousand": 10**3, "k": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12,
    "dozen": 12, "lakh": 10**5, "crore": 10**7, "\u4e07": 10**4, "\u842c": 10**4, "\u4ebf": 10**8,
}  # fmt: skip
OPERATORS = re.compile(
    r"(?:plus|minus|times(?=\s+(?:as|more|the|[\d$(\\]|[b-zB-Z]\b))|divided|multiplied|over|squared|cubed|factorial|mod|modulo|raised|to|or|and|out of|less than|"
    r"[ap]\.?m\b|(?:more|fewer) than(?! (?-i:[A-Z][a-z])| (?:his|her|their|last|the)\b)|point\s+\d|half|halves|thirds?|quarter|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|"
    r"tenths?|hundredths?|thousandths?|th|nd|rd|st|root|roots|choose)\b",
    re.IGNORECASE,
)
NO_UNIT = re.compile(
    r"(?:in|is|are|was|left|for|of|with|per|each|total|altogether|more|by|at|on|from|during|every|remain\w*|remaining|"
    r"units?|square units?|cubic units?|ways?|different|possible|such|who|that|will|can|have|has|ones?|people who)\b",
    re.IGNORECASE,
)
RATE = re.compile(r"\b(?:per|an?|each|every)\s+(?=[A-Za-z])")
"""What stands between an amount and the unit that it is for."""
FURTHER = re.compile(
    r"(?!(?:in|of|for|at|from|during|every|on|by|with|per|after|each|to)\b)[A-Za-z.]+,?(?:\s+and)?\s+\d|.*\b(?:by|x)\s+\d"
    r"|(?:in|of)\s+\d{1,3}$|.*\bof\s+[a-zA-Z]$"
)
"""Words after a number that hold another number of the same amount: `3 hours 20 minutes`, `12 cm by 5 cm`, `1 in 4`."""
JUDGED = re.compile(
    r"(?:is|are|was|can|could|would|will)\b.*\b(?:too|impossible|excluded|ruled out|invalid|insufficient|rejected"
    r"|eliminated|discarded|larger|smaller|bigger|greater|less|more)\b"
)
"""What is said of a number that is no answer, as in `8 is too large`."""
ALIASES = {
    "metre": "meter", "litre": "liter", "sec": "second", "min": "minute", "mins": "minute", "hr": "hour", "hrs": "hour",
    "in": "inch", "yd": "yard", "mi": "mile", "lb": "pound", "lbs": "pound", "kilometre": "kilometer",
    "centimetre": "centimeter", "millimetre": "millimeter", "yr": "year", "km": "km", "kg": "kg",
}  # fmt: skip
CURRENCIES = {"dollar": ("dollar", 100), "usd": ("dollar", 100), "buck": ("dollar", 100), "cent": ("dollar", 1),
    "\u00a2": ("dollar", 1), "$": ("dollar", 100), "\u20ac": ("euro", 100), "euro": ("euro", 100), "eur": ("euro", 100),
    "\u00a3": ("pound sterling", 100), "\u00a5": ("yen", 1), "yen": ("yen", 1), "\u20b9": ("rupee", 1), "rupee": ("rupee", 1),
    "yuan": ("yuan", 1), "\u5143": ("yuan", 1)}  # fmt: skip
MORE = {
    "week": (Integer(7), "day"), "month": (Rational(365, 12), "day"), "ton": (Integer(1000), "kilogram"),
    "tonne": (Integer(1000), "kilogram"), "ounce": (Rational(1, 16), "pound"), "oz": (Rational(1, 16), "pound"),
    "milligram": (Rational(1, 1000), "gram"), "hectare": (Integer(10000), "meter2"), "microsecond": (Rational(1, 10**6), "second"),
}  # fmt: skip
SINGLE = set("mgshLlVWJNACFK")
"""Letters that are units when they stand alone after a number."""

TRAILING = re.compile(
    r"^(?P<value>.*?(?:[\d})\]%\u00b0]|\\pi)(?:\^\{?\\circ\}?)?)(?P<gap>\s*)(?P<words>(?:[A-Za-z\u00a2$\u20ac]|[^\W\d_\x00-\x7f\u0370-\u03ff])[^\\{}=<>+*!\u221a]*)$",
    re.DOTALL,
)
MEMBERS = re.compile(r"\d\s*,?\s*(?:and|or)\s+(?:-?[\d$]|\\(?!text))")
MARKUP = re.compile(
    r"(?:\\[ ,;:!]|~|\s)*\\(?:text|mathrm|mbox|textrm|textbf|textit|mathbf|operatorname|rm|hbox|mathit)\s*\{([^{}]*)\}"
)


class Amount(NamedTuple):
    """A value in LaTeX, the words after it, and the scale that these or a currency's sign give."""

    value: str
    unit: str
    scale: int


def split(text: str, is_latex: bool) -> "Amount | None":
    """A number apart from its unit; None where the words after it make another number of it.

    Args:
        is_latex: letters right behind a number are variables, as in `5x`, rather than units, as in `5km`.
    """
    sign = re.match(r"^\s*([-+\u2212]?)\s*(?:US)?\\?([$\u20ac\u00a3\u00a5\u20b9])\s*(?=[\d.])", text)
    prefix = ""
    if sign:
        prefix, text = sign[2], sign[1] + text[sign.end() :]
    text = re.sub(r"(?<!\\)\\ ", " ", text)
    marked = MARKUP.search(text)
    text = MARKUP.sub(lambda match: f" {match[1].strip()} ", text)
    if found := compound(" ".join(text.split())):
        return found
    if MEMBERS.search(text):
        return Amount(text.strip(), prefix, 1)
    found = TRAILING.match(text.strip())
    if not found or re.search(r"[A-Za-z]{2}", re.sub(r"\\[a-zA-Z]+", "", found["value"])):
        return Amount(text.strip(), prefix, 1)
    words = found["words"].strip(" .,")
    if (
        JUDGED.match(words)
        or FURTHER.match(words)
        or DENIAL.search(UNCOUNTED.sub("", f"0 {words}"))
        or (found["value"].endswith("%") and re.match(r"of\s+\$?\d", words))
    ):
        return None
    scale = 1
    first, _, rest = words.partition(" ")
    while first.lower() in MULTIPLIERS and (found["gap"] or marked or first.lower() == "k" or len(first) > 1):
        scale *= MULTIPLIERS[first.lower()]
        words, found_rest = rest, rest.partition(" ")
        first, rest = found_rest[0], found_rest[2]
    if words[:1] in MULTIPLIERS and words[:1] > "\u4e00":
        scale, words = scale * MULTIPLIERS[words[0]], words[1:]
    if scale != 1 and NUMERAL.match(words):
        return None
    if not words:
        return Amount(found["value"], prefix, scale)
    is_attached = not found["gap"] and not marked
    if is_attached and first.isascii() and (is_latex or not is_unit(first)):
        return Amount(text.strip(), prefix, 1)
    if not is_attached and re.fullmatch(r"(?:[a-z]+ )?[a-zA-Z]", words) and words[-1] not in SINGLE:
        return Amount(text.strip(), prefix, 1)
    if OPERATORS.match(words):
        return None
    if RATE.match(words):
        return Amount(found["value"], f"{prefix} {words}".strip(), scale)
    if NO_UNIT.match(words) and words != "in":
        words = ""
    return Amount(found["value"], words or prefix, scale)


def is_unit(word: str) -> bool:
    """Whether letters right behind a number are a unit: `5km`, `5m`, `12cm^2`, and not `5x`."""
    letters = re.match(r"[A-Za-z]*", word)[0]
    rest = word[len(letters) :].rstrip(".")
    return (letters in SINGLE if len(letters) == 1 else known(letters) is not None) and (
        re.fullmatch(r"(?:\^?[23\u00b2\u00b3])?(?:/[A-Za-z]+(?:\^?[23])?)?", rest) is not None
    )


def known(word: str) -> tuple[Expr, object] | None:
    """The scale and dimension of a unit's name; None where it is none."""
    lower = word if len(word) < 3 else word.lower()
    for name in (word, lower, lower.removesuffix("s"), lower.removesuffix("es")):
        name = ALIASES.get(name, name)
        if name in CURRENCIES:
            return Integer(CURRENCIES[name][1]), CURRENCIES[name][0]
        if name in MORE:
            factor, base = MORE[name]
            scale, dimension = unit(base.removesuffix("2") + ("^2" if base.endswith("2") else ""))
            return factor * scale, dimension
        found = getattr(units, name, None)
        if isinstance(found, Quantity):
            return found.scale_factor, found.dimension.name
    return None


def unit(words: str) -> tuple[Expr, object] | None:
    """The scale and dimension of a unit such as `km/h`, `square meters`, `meters per second`, `cm^2`."""
    words = re.sub(r"\b(?:mph|mi/h)\b", "miles per hour", words)
    words = re.sub(r"\bkm/?h\b|\bkph\b|\bkmph\b", "km per hour", words).replace("\u00b2", "^2").replace("\u00b3", "^3")
    scale, dimension, power, sign = Integer(1), Integer(1), 1, 1
    tokens = re.findall(r"per|/|[A-Za-z\u00a2$\u20ac\u5143]+|\^\s*\{?\d\}?", words)
    found_one = False
    for place, token in enumerate(tokens):
        if token in ("per", "/"):
            sign = -1
        elif token.lower() in ("square", "sq", "cubic", "cu"):
            power = 2 if token.lower().startswith("sq") else 3
        elif not token.startswith("^"):
            each = known(token)
            if each is None:
                break
            following = tokens[place + 1] if place + 1 < len(tokens) else ""
            exponent = int(re.sub(r"\D", "", following)) if following.startswith("^") else power
            scale *= each[0] ** (sign * exponent)
            base = each[1] if isinstance(each[1], Expr) else Symbol(str(each[1]))  # sympy has no currencies
            dimension *= base ** (sign * exponent)
            power, found_one = 1, True
    return (scale, dimension) if found_one else None


def without_rate(words: str, other: str) -> str:
    """A unit without what it is for, as in `$ per month`, where the other unit does not say what it is for."""
    rate = RATE.search(words)
    if rate is None or RATE.search(other):
        return words
    counted = words[: rate.start()].strip()
    found = unit(counted)
    currencies = {name for name, _ in CURRENCIES.values()}
    return counted if found is None or str(found[1]) in currencies else words


def compound(text: str) -> "Amount | None":
    """An amount in two units of one quantity, such as `3 hours 20 minutes`, in the first of them."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+),?\s*(?:and\s+)?(\d+(?:\.\d+)?)\s*([A-Za-z]+)\.?", text)
    first, second = (known(match[2]), known(match[4])) if match else (None, None)
    if not first or not second or first[1] != second[1]:
        return None
    total = Rational(match[1]) + Rational(match[3]) * second[0] / first[0]
    return Amount(rf"\frac{{{total.p}}}{{{total.q}}}", match[2], 1)


def conversion(gold: str, answer: str) -> Expr | None:
    """By how much the answer's value is to be multiplied to be in the gold's unit; None where they do not fit."""
    gold, answer = without_rate(gold, answer), without_rate(answer, gold)
    if not gold or not answer:
        return Integer(1)
    gold, answer = (RATE.sub("per ", words) for words in (gold, answer))
    mine, theirs = unit(gold), unit(answer)
    if mine and theirs:
        return theirs[0] / mine[0] if mine[1] == theirs[1] else None
    if mine or theirs:
        return None
    heads = [re.split(r"(?<=\w)\s+(?:of|for|in|with|from|to|by|at|on)\b", words)[0] for words in (gold, answer)]
    stems = [{word.casefold().rstrip("s") for word in re.findall(r"\w+", head)} - {"per"} for head in heads]
    return Integer(1) if stems[0] & stems[1] else None
