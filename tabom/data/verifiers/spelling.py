"""Signs and spellings that people use without LaTeX, as math-verify reads them."""

import re
from fractions import Fraction

ASCII = {0xFEE0 + code: code for code in range(0x21, 0x7F)}  # full-width digits, letters and signs


def share(match: re.Match) -> str:
    """What a percentage of a number is."""
    value = Fraction(match[1]) * Fraction(match[2]) / 100
    return str(value) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


OPERATION = (
    r"((?:[-+*/\u00d7]|times|by|plus|minus|(?:%|percent) of)(?: the)? ?\$?\d[\d,.]*?\)?(?: [a-z]+)?)"  # and its result
)
RESPELT = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"`|(?<!\S)~", " "),
        (r"(?:^|(?<=\\\())\s*(?:≈|\\approx)", ""),
        (r"(?i)\b(that|it|there)['\u2019]s\b", r"\1 is"),
        (r"(?<=[\d}$)])( [a-z]+)?,? \(?(?:or |which is )?(?:about|approximately|roughly) (?=\$?[\d\\])", r"\1 ≈ "),
        (OPERATION + r",? or (?=\$?\d)", r"\1 = "),
        (r"\\langle\b", "("),
        (r"\\rangle\b", ")"),
        (r"~", r"\\ "),
        (r"\s*(?:°|\^\{?\\circ\}?|degrees?)\s*(?:\\(?:text|mathrm)\{\s*)?C(?:elsius)?\b\}?", " celsius"),
        (r"\s*(?:°|\^\{?\\circ\}?|degrees?)\s*(?:\\(?:text|mathrm)\{\s*)?F(?:ahrenheit)?\b\}?", " fahrenheit"),
        (r"°", r"^\\circ"),
        (r"(?<!\d)[\u2212\u2013](?=[\d.\\])", "-"),  # minus and dash
        (r"(\d+(?:\.\d+)?)\s*(?:\\?%|percent) of \\?\$?(\d+(?:\.\d+)?)(?=[\s.]*$)", share),
        (r"(?<![-\w])(?:minus|negative)\s+(?=[\d$\\])", "-"),
        (r"(?<=\d)(?:_|\\[,!;: ])(?=\d{3}(?!\d))", ""),
        (r"<<[^<>]*>>", ""),
        (r"(?<=\d)/(?=(?:second|minute|hour|day|week|month|year)\b)", " per "),
        (r"≤", r"\\le "),
        (r"≥", r"\\ge "),
        (r"≠", r"\\ne "),
        (r"\\mathbb\{?R\}?|\u211d|\ball real numbers\b", r"(-\\infty, \\infty)"),
        (r"∞", r"\\infty "),
        (r"\u222a", r"\\cup "),
        (r"∩", r"\\cap "),
        (r"∈", r"\\in "),
        (r"±", r"\\pm "),
        (r"\u00d7", r"\\times "),
        (r"÷", "/"),
        (r"⋅|·", r"\\cdot "),
        (r"π", r"\\pi "),
        (r"θ", r"\\theta "),
        (r"∅|\\varnothing|\\O(?![a-zA-Z])", r"\\emptyset "),
        (r"(?<!\\)\bsqrt\{", r"\\sqrt{"),
        (r"²", "^2"),
        (r"³", "^3"),
        (r"½", " 1/2"),
        (r"¼", " 1/4"),
        (r"¾", " 3/4"),
        (r"(?<![\d./])(\d+) +(?:and +)?(\d+)/(\d+)(?![\d./]*\d)", r"\1\\frac{\2}{\3}"),
        (r"(?:√|(?<![\\a-zA-Z])sqrt)\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?:√|(?<![\\a-zA-Z])sqrt) ?(\d+|[a-zA-Z]\b)", r"\\sqrt{\1}"),
        (r"(?<![\\a-zA-Z])(sin|cos|tan|log|ln|exp)(?=\()", r"\\\1"),
        (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi"),
        (r"(?<=\d)[eE]([+-]?\d+)(?![\w.])", r" \\times 10^{\1}"),
        (r"(?<=\d) ?[x\u00d7] ?10\^\{?(-?\d+)\}?", r" \\times 10^{\1}"),
        (r"(?<=[a-z)])\*\*(?=\d)", "^"),
        (r"(?<![\d./])(\d+) and a half\b", r"\1.5"),
        (r"\\log_(?:\{(\w+)\}|(\w))\s*(\d+|[a-z])", r"\\log_{\1\2}(\3)"),
        (r"\\(?:textbf|textit|bold)(?![a-z])", r"\\text"),
    )
]
"""What people write without LaTeX, and how math-verify reads it."""


def respell(text: str) -> str:
    """Signs and spellings as math-verify reads them."""
    text = re.sub(r"\d", lambda digit: str(int(digit[0])), text.translate(ASCII))
    for pattern, replacement in RESPELT:
        text = pattern.sub(replacement, text)
    return text
