"""Which expression a sentence states: what stands in LaTeX, the whole sentence, or one of the numbers in it.

A sentence is judged by simple signs: a number after "for", "of" or "in" is usually not what it states, and one after
the last "so ... are" usually is. Where several numbers remain, the sentence states none.
"""

import re

from tabom.data.verifiers.final_answer import Reading
from tabom.data.verifiers.numerals import in_digits

TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname|boxed|fbox)\s*\{([^{}]*)\}")
LATEX = re.compile(r"(?<![\\\d])\$((?:\\.|[^$\n\\])+)\$|\\\(((?:(?!\\\)).)+)\\\)")
BETWEEN_MEMBERS = re.compile(r"[\s,]*(?:and|or)?\s*")
WORD = re.compile(
    r"(?<![\\a-zA-Z])(?!and\b|or\b|[a-zA-Z]?matrix\b|sin\b|cos\b|tan\b|log\b|exp\b|cup\b|sqrt\b)"
    r"(?:[a-zA-Z]{3,}|(?i:it|no|we|he|so|by|is)\b)"
    r"|[^\W\d_\x00-\x7f\u0370-\u03ff]"  # a letter of another script, but not a Greek one
)
NUMBER = re.compile(
    r"(?<![A-Za-z\d_.])[-+]?[$\u20ac\u00a3\u00a5\u20b9]?-?"
    r"(?:\d+\\frac\{\d+\}\{\d+\}|\\frac\{\d+\}\{\d+\}|\d[\d,]*(?:\.\d+)?(?:/\d+)?|\.\d+)"
    r"(?: \\times 10\^\{-?\d+\})?(?:\s*\\?%|\s*percent\b)?"
)
COPULA = re.compile(r"^.*?\b(?:is|are|was|were|be|equals|becomes)\b\s*:?\s*|^.*[=:]\s*", re.DOTALL)
PLACE = re.compile(r"^(?:at |in |the (?:point|interval|set|pair|ordered pair|vector) )+(?=[(\[{\\])")
HEDGE = re.compile(
    r"^(?:about|approximately|exactly|around|roughly|simply|just|only|equal to|therefore|that)\s+", re.IGNORECASE
)
MEMBERSHIP = re.compile(r"^\w+ (?:in|\\in) (?=[(\[\\])")
COMPARISON = re.compile(
    r"\b(?:than|least|most|between|up to|nearly|under|over|above|below|fewer|not|never|no|minimum of|either"
    r"|but|except|without|excluding|near|close to|different from|twice|thrice|double|triple|half"
    r"|(?:root|square|cube|reciprocal|factorial|negative|opposite|inverse|logarithm|log|half|third|quarter|fourth)"
    r" of(?: the| number)*)\s*$",
    re.IGNORECASE,
)
ADJUNCT = re.compile(
    r"\b(?:for|(?<!\btotal )(?<!\bsum )(?<!\baverage )of|in|after|from|per|among|with|by|to(?: \w+ all)?|at|on|every"
    r"|within|during|between|each)\s+"
    r"(?:(?:the|his|her|their|its|these|those|all|each|every|a|only|just|age)\s+)*$",
    re.IGNORECASE,
)
CONCLUSION = re.compile(
    r".*\b(?:so|thus|hence|therefore|then|leaving|which is|that is|makes|is|are|has|have|was)\b", re.IGNORECASE
)


def expression(reading: Reading) -> tuple[str, bool] | None:
    """The mathematics that a reading states, and whether it is LaTeX; None where there is none or no single one."""
    if reading.mark == "denied":
        return None
    if reading.mark == "boxed":
        content = without_dollars(reading.text.strip())
        text = TEXT.fullmatch(content)
        return in_digits(text[1]) if text else content, True
    clause = reading.text.strip()
    segments = latex(clause)
    if segments and not NUMBER.search(LATEX.sub(" ", clause)):
        return segments[0 if reading.mark == "announced" else -1].strip(), True
    clause = HEDGE.sub("", clause.replace("\\$", "$"))
    if not re.search(r"\d", re.sub(r"\(\d+\)", "", clause)):  # `seven`, or `seven (7)`
        clause = in_digits(clause)
    clause = MEMBERSHIP.sub("", clause)
    stated = whole(clause) or number_at_start(clause, reading.mark) or only_number(clause)
    return None if stated is None else (stated, False)


def without_dollars(text: str) -> str:
    """A text without the dollars of LaTeX around it; one in front of a price stays."""
    return text if text.startswith(("\\$", "$")) else text.replace("\\$", "$").strip("$ ")


def latex(clause: str) -> list[str]:
    """What stands between LaTeX's delimiters; neighbours that a comma or "and" joins are one."""
    found: list[tuple[int, str]] = []
    for match in LATEX.finditer(clause):
        content = match[1] or match[2]
        if match[1] and (WORD.search(TEXT.sub("", content)) and "\\" not in content):
            continue  # the dollars of two prices
        if found and BETWEEN_MEMBERS.fullmatch(clause[found[-1][0] : match.start()]):
            found[-1] = (match.end(), found[-1][1] + ", " + content)
        else:
            found.append((match.end(), content))
    return [content for _, content in found]


def whole(clause: str) -> str | None:
    """A clause that has no words, or what follows its "is" where that has none; of `2 + 3 = 5` the last side."""
    if not WORD.search(TEXT.sub("", clause)) and re.search(r"[\d\\a-zA-Z]", clause):
        bare = clause.rstrip(" .,").lstrip("= ")
        return bare.rpartition("=")[2].strip() if re.search(r"\d\s*=[^=]*$", bare) else bare
    predicate = PLACE.sub("", COPULA.sub("", clause, count=1))
    if (
        predicate != clause
        and not WORD.search(TEXT.sub("", predicate))
        and re.match(r"[({\[\\$\d-]|[a-zA-Z]\s*[-+*/^=<>]", predicate)
    ):
        return predicate.rstrip(" .,")
    return None


def number_at_start(clause: str, mark: str) -> str | None:
    """An announced clause from the number on that it starts with."""
    if mark == "last sentence" or not re.match(r"[^a-z]*\d", clause):
        return None
    start = NUMBER.match(clause) or NUMBER.search(clause)
    return clause[start.start() :] if start else clause


def only_number(clause: str) -> str | None:
    """A clause from the one number on that it states: that after its last `=`, else the one that is no adjunct."""
    _, sign, result = clause.rpartition("=")
    if sign and len(NUMBER.findall(result)) < 2:
        return result.strip()
    numbers = list(NUMBER.finditer(clause))
    stated = [match for match in numbers if not ADJUNCT.search(clause[: match.start()])] or numbers
    conclusion = CONCLUSION.match(clause)
    if len(stated) > 1 and conclusion:
        stated = [match for match in stated if match.start() >= conclusion.end()] or stated
    if len({match[0] for match in stated}) != 1 or COMPARISON.search(clause[: stated[-1].start()]):
        return None
    return clause[stated[-1].start() :]
