"""Which expression a sentence states: what stands in LaTeX, the whole sentence, or one of the numbers in it.

A sentence is judged by simple signs: a number after "for", "of" or "in" is usually not what it states, and one after
the last "so ... are" usually is. Where several numbers remain, the sentence states none.
"""

import re

from tabom.data.verifiers.formulas import COMMAND, are_prices
from tabom.data.verifiers.numerals import in_digits
from tabom.data.verifiers.prose import COMPARISON, Reading
from tabom.data.verifiers.quantities import compound

LATEX = re.compile(r"(?<![\\\d])\$((?:\\.|[^$\n\\])+)\$|\\\(((?:(?!\\\)).)+)\\\)")
FUNCTION = re.compile(
    r"\s*\\(?:sin|cos|tan|cot|sec|csc|log|ln|det|angle|gcd|lfloor|lceil|overline|int|sum|prod|lim|max|min|text|mathrm|operatorname)\b"
    r"|\s*[a-zA-Z]+\["
)
UNIT = re.compile(r"[^.,;:()$\\]*(?:(?<=times )[$\\].*)?")
DERIVATION = re.compile(r"(?!\\?[a-zA-Z]+(?:_\{?\w+\}?)?(?:\([^()]*\))?\s*=|\s*\()[^=]+=")
"""An equation that is solved further: its left side is no name."""
BETWEEN_MEMBERS = re.compile(r"[\s,]*(?:and|or)?\s*")
WORD = re.compile(
    r"(?<![\\a-zA-Z])(?!and\b|or\b|[a-zA-Z]?matrix\b|sin\b|cos\b|tan\b|log\b|exp\b|cup\b|sqrt\b)"
    r"(?:[a-zA-Z]{3,}|(?i:it|no|we|he|so|by|is)\b)"
    r"|[^\W\d_\x00-\x7f\u0370-\u03ff]"  # a letter of another script, but not a Greek one
)
SYSTEM = re.compile(r"(?<![\w\\])[a-zA-Z] ?= ?[^=a-z]+?(?:,| and|, and) [a-zA-Z] ?= ?[^=a-z]+$")
"""The values of two unknowns, as in `x = 2 and y = -1`."""
NUMBER = re.compile(
    r"(?<![A-Za-z\d_.])(?<![A-Za-z)][-+*/^])(?<![a-zA-Z] [-+*/^] )(?<!\d:)(?!\d+:\d)[-+]?[$\u20ac\u00a3\u00a5\u20b9]?-?"
    r"(?:\d+\\frac\{\d+\}\{\d+\}|\\frac\{\d+\}\{\d+\}|\d[\d,]*(?:\.\d+)?(?:/\d+)?|\.\d+)"
    r"(?: \\times 10\^\{-?\d+\})?(?:\s*\\?%|\s*percent\b)?"
)
COPULA = re.compile(r"^.*?\b(?:is|are|was|were|be|equals|becomes)\b\s*:?\s*|^.*(?:=|(?<!\d):|:(?!\d))\s*", re.DOTALL)
VERB = re.compile(
    r"(?:\b(?:is|are|was|be|equals?|equal to|becomes?|makes?|gives?|get|find|have|has|obtain|yields?|total of|(?:reduces|simplifies|evaluates|amounts|comes|equivalent) to|(?:has|have|had) (?:an? |the )?[a-z]+|(?<!such )that)\s*:?|:)(?:\s+(?:exactly|only|just|precisely|thus|therefore|then))?\s*$",
    re.IGNORECASE,
)
PLACE_BEFORE = re.compile(r"\b(?:at|when|for|if|where|with) $")
PLACE = re.compile(r"^(?:at |in |the (?:point|interval|set|pair|ordered pair|vector) )+(?=[(\[{\\])")
LABEL = re.compile(
    r"\b(?:page|case|formula|equation|figure|chapter|question|step|grade|table|part|problem) \(?$",
    re.IGNORECASE,
)
VARIABLE = re.compile(r"\d[xyzn]\b|\b[xyzn] [-+*/^] |[-+*/^] ?[xyzn]\b(?! ?\d)")
ADJUNCT = re.compile(
    r"\b(?:(?:for|of|in|after|from|per|among|with|by|(?<!equal )to(?: \w+ all)?|at|on|every|within|during|between|each|over|before|until|since|across|into|out of|than)\s+(?:(?:the|his|her|their|its|these|those|all|each|every|an?|only|just|age|first|last|next|other)\s+)*|(?:the|his|her|their|its|my|our|these|those|all|an?)\s+(?:[a-z]+\s+)?|(?:first|last|next|other)\s+|\w+['\u2019]s?\s+)$",
    re.IGNORECASE,
)
"""What comes before a number that is not stated but given: a preposition, or a determiner as in `the 16 glasses`."""
DEFINITE = re.compile(r"\b(?:the|his|their|its|these|those) $", re.IGNORECASE)
QUANTITY = re.compile(
    r"\b(?:total(?: [a-z]+)?|sum|average|mean|median|profit|loss|commission|distance|area|volume|perimeter|length|width|height|speed|rate|price|cost|value|salary|score|weight|probability|chance|balance|difference|increase|decrease|discount|deficit|minimum|maximum|revenue|income|amount|temperature|ratio|radius|diameter|degree|age) of\s+$"
    r"|\blast[^\d]*\bfor\s+$",
    re.IGNORECASE,
)
"""What comes before a number that is stated although it follows a preposition."""
PURPOSE = re.compile(
    r"(\d|\b(?:one|two|three|four|five|six|seven|eight|nine|ten)\b)([^,\d]*?)\s+"
    r"(?:(?:in order )?to (?!(?:the|her|his|their|its|an?|my|each|all|every)\b)[a-z]+|(?:by|for|from|after|before|when|while|without) [a-z]+ing) (?:[^,]|,(?=\d))*"
)
CALCULATING = re.compile(
    r"\b(?:add(?:s|ed|ing)?\b|plus|sum|multipl|divid|subtract|\d times \d|minus|combin|convert|simplif|round)",
    re.IGNORECASE,
)
"""Verbs of a calculation, whose result follows `to get`."""
TOTAL = re.compile(
    r".*\b(?:total|sum) of (?=[\\$\d])"
    r"|.*\b(?:drop|f[ea]ll|ris|ros|increas|decreas|reduc|gr[eo]w|go|went|chang|improv|climb|jump|cut|shr[iau]nk|lower|rais)\w* from [^,]*?\d\S* to (?=\S*\d)"
)
"""What comes before a total, or before the end of a change such as `drops from 20 to 15`."""
CONCLUSION = re.compile(
    r".*\b(?:so|thus|hence|therefore|then|leaving|(?<!to )(?:make|give|get)|to (?:get|obtain|give)|makes|gives|gets|equals?|totals|costs?|is|are|be|has|have|was|lasts|lasted)\b",
    re.IGNORECASE,
)


def expression(reading: Reading) -> tuple[str, bool] | None:
    """The mathematics that a reading states, and whether it is LaTeX; None where there is none or no single one."""
    if reading.mark == "denied":
        return None
    if reading.mark == "boxed":
        content = without_dollars(reading.text.strip())
        text = COMMAND.fullmatch(content)
        return in_digits(text[1]) if text else content, True
    clause = reading.text.strip()
    found = segments(clause)
    calculations = [content for _, _, content in found if result(content) != content]
    if len(calculations) == 1 and NUMBER.search(LATEX.sub(" ", clause)):
        return result(calculations[0]), True
    has_number_after = found and NUMBER.search(in_digits(clause[found[-1][1] :]))
    if found and not has_number_after and not NUMBER.search(LATEX.sub(" ", clause)):
        stated = found[:1] if reading.mark == "announced" else stated_segments(clause, found)
        if len(stated) != 1 or COMPARISON.search(clause[: stated[0][0]]):
            return None
        _, end, content = stated[0]
        unit = UNIT.match(clause, end)[0] if re.search(r"(?:[\d)}\]%]|\\pi)\s*$", content) else ""
        return (content + unit).strip(), True
    clause = re.sub(r"\\[()]", "", re.sub(r"^\w+ in (?=[(\[\\])", "", clause.replace("\\$", "$")))
    if has_number_after or not re.search(r"\d", re.sub(r"\(\d+\)", "", clause)):  # `seven`, or `seven (7)`
        clause = in_digits(clause)
    stated = whole(clause) or number_at_start(clause, reading.mark) or only_number(clause)
    return None if stated is None else (stated, False)


def result(formula: str) -> str:
    """The last side of a calculation such as `2 + 3 = 5`; an equation such as `x = 5` or `2x = 6` stays whole."""
    if "\\equiv" in formula:
        formula = re.sub(r"\\p?mod\s*(?:\{.*?\}|\d+)|\(\\bmod[^)]*\)", "", formula).replace("\\equiv", "=")
    first, *others = re.split(r"(?<![<>!])=|(?<=\d!)=(?=\d)", formula)
    if not others or re.search(r"[,;]|\b(?:and|or)\b", "=".join(others[:-1])):
        return formula
    is_equation = re.search(r"(?<![a-zA-Z])[a-zA-Z](?![a-zA-Z])", re.sub(r"\\[a-zA-Z]+", "", COMMAND.sub("", first)))
    return others[-1].strip() if len(others) > 1 or not is_equation or FUNCTION.match(first) else formula


def stated_segments(clause: str, found: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """The last formula that follows a verb such as "is" or ends a derivation, else those with numbers, else the last."""
    if all("=" in content for _, _, content in found):
        return found[-1:]
    numbers = [each for each in found if re.search(r"\d", each[2])]
    candidates = [each for each in numbers or found if not PLACE_BEFORE.search(clause[: each[0]])] or numbers or found
    after_verb = [each for each in candidates if any(kind.search(clause[: each[0]]) for kind in (VERB, QUANTITY))]
    return after_verb[-1:] or (candidates if numbers else candidates[-1:])


def without_dollars(text: str) -> str:
    """A text without the dollars of LaTeX around it; one in front of a price stays."""
    return text if text.startswith(("\\$", "$")) else text.replace("\\$", "$").strip("$ ")


def latex(clause: str) -> list[str]:
    """What stands between LaTeX's delimiters."""
    return [content for _, _, content in segments(clause)]


def segments(clause: str) -> list[tuple[int, int, str]]:
    """Where LaTeX begins and ends, and what it is; neighbours that a comma or "and" joins are one."""
    found: list[tuple[int, int, str]] = []
    for match in LATEX.finditer(clause):
        content = match[1] or match[2]
        if match[1] and are_prices(content):
            continue
        is_member = found and BETWEEN_MEMBERS.fullmatch(clause[found[-1][1] : match.start()])
        if is_member and content.count("=") < 2 and not DERIVATION.match(found[-1][2]):
            found[-1] = (found[-1][0], match.end(), found[-1][2] + ", " + content)
        else:
            found.append((match.start(), match.end(), content))
    return found


def whole(clause: str) -> str | None:
    """A clause that has no words, or what follows its "is" where that has none; of `2 + 3 = 5` the last side.

    Words may follow a formula in LaTeX's commands, as in `2\\sqrt{5} units`.
    """
    if not WORD.search(COMMAND.sub("", clause)) and re.search(r"[\d\\a-zA-Z]", clause):
        bare = re.sub(r"^[a-zA-Z]:\s+", "", clause.rstrip(" .,").lstrip("= "))
        first, *others = re.split(r",? and |, ", bare)
        bare = others[-1] if others and "=" in others[-1] and DERIVATION.match(first) else bare
        return bare.rpartition("=")[2].strip() if re.search(r"(?:\d|\\circ)\s*=[^=]*$", bare) else bare
    if system := SYSTEM.search(clause):
        return system[0]
    predicate = PLACE.sub("", COPULA.sub("", clause, count=1))
    if (
        predicate != clause
        and not WORD.search(COMMAND.sub("", predicate))
        and re.match(r"[({\[\\$\d-]|[a-zA-Z]\s*[-+*/^=<>]", predicate)
    ):
        return predicate.rstrip(" .,")
    value, *unit = WORD.split(predicate, maxsplit=1)
    if re.match(r"[\\$\d-][^a-zA-Z]*\\(?:sqrt|frac|pi)\b|\[[\d., ]+\]", value) and not re.search(r"\d", "".join(unit)):
        return predicate
    return None


def number_at_start(clause: str, mark: str) -> str | None:
    """An announced clause from the number on that it starts with."""
    if mark == "last sentence" or not re.match(r"[^a-z]*\d", clause):
        return None
    start = NUMBER.match(clause) or NUMBER.search(clause)
    if (
        start
        and not compound(clause)
        and any(not is_given(clause, other) for other in NUMBER.finditer(clause, start.end()))
    ):
        return None
    return clause[start.start() :] if start else clause


def only_number(clause: str) -> str | None:
    """A clause from the one number on that it states: what follows its last `=`, else the one that is no adjunct."""
    if VARIABLE.search(clause):
        return None
    if not CALCULATING.search(clause):
        clause = PURPOSE.sub(r"\1\2", clause)
    if total := TOTAL.match(clause):
        clause = clause[total.end() :]
    _, sign, result = clause.rpartition("=")
    if sign and not CONCLUSION.match(result) and (NUMBER.match(result.strip()) or len(NUMBER.findall(result)) < 2):
        return up_to_comma(result.strip())
    numbers = [match for match in NUMBER.finditer(clause) if not LABEL.search(clause[: match.start()])]
    numbers = [match for match in numbers if not re.match(r"-[a-z]", clause[match.end() :])] or numbers
    stated: list[re.Match] = []
    for before, match in zip([None, *numbers], numbers, strict=False):
        is_listed = before and re.fullmatch(r"[^,.]* and ", clause[before.end() : match.start()])
        if before not in stated if is_listed else is_given(clause, match):
            continue
        stated.append(match)
    stated = stated or [match for match in numbers if not DEFINITE.search(clause[: match.start()])]
    if total := re.search(r"(?:in total|altogether|in all)\W*$", clause):
        stated = [match for match in numbers if match.end() <= total.start()]
    if len(stated) > 1 and (conclusion := total or CONCLUSION.match(clause)):
        stated = stated[-1:] if total else [match for match in stated if match.start() >= conclusion.end()]
        if not stated or re.search(r"\d\D*\b(?:and|but|while|whereas)\b\D*$", clause[: stated[0].start()]):
            return None  # `5 apples and 4 pears in total`
    if len({match[0] for match in stated}) != 1 or COMPARISON.search(clause[: stated[-1].start()]):
        return None
    return up_to_comma(clause[stated[-1].start() :])


def is_given(clause: str, number: re.Match) -> bool:
    """Whether the words before a number say that it is given rather than stated."""
    before = clause[max(0, number.start() - 80) : number.start()]
    is_part = re.match(r" (?:out )?of (?:the|these|those|his|her|their) \d", clause[number.end() :])
    return not is_part and ADJUNCT.search(before) is not None and QUANTITY.search(before) is None


def up_to_comma(clause: str) -> str:
    """A clause up to a comma before a word, as in `20, apples and pears alike`."""
    return re.split(r",\s+(?=[a-z])", clause)[0]
