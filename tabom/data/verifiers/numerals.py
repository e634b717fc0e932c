"""Numbers that are written in words: `seven`, `twenty-five`, `one hundred and one`, `three quarters`."""

import re
from fractions import Fraction

WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
NUMBERS = {word: number for number, word in enumerate(WORDS.split())}
NUMBERS |= {word: 10 * number for number, word in enumerate(TENS.split(), start=2)}
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "dozen": 12}
PARTS = ["half", "third", "quarter", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"]
DENOMINATORS = dict(zip(PARTS, (2, 3, 4, 4, 5, 6, 7, 8, 9, 10), strict=True)) | {"halve": 2}

ONE_WORD = "|".join([*NUMBERS, *SCALES])
NUMERAL = re.compile(
    rf"\b(?P<half>half )?(?:a (?={'|'.join(SCALES)}))?(?P<words>(?:{ONE_WORD})(?:(?:-| and | )(?:{ONE_WORD}))*)"
    rf"(?:[- ](?P<part>{'|'.join(DENOMINATORS)})s?| and a (?P<rest>half|third|quarter))?\b|\b(?:a |one[- ])?half\b",
    re.IGNORECASE,
)
COUNTING = re.compile(r"\b(?:is|has|have|had|gets?|needs?|only|exactly|just|eats?) $", re.IGNORECASE)
COUNTED = re.compile(r" (?!(?:of|who|that|which|more than|less than)\b)[a-z]+")
SHARE = re.compile(rf" (?:in|out of) (?:\d|{ONE_WORD})", re.IGNORECASE)
"""What follows `one` where it is a number: `one in six`."""


def in_digits(text: str) -> str:
    """A text with its numerals in digits. `one` is left where it may be a pronoun.

    A number that is given twice, as in `eight (8)`, is written once.
    """

    def digits(match: re.Match) -> str:
        if match["words"] is None:
            return "1/2"
        value = number(re.findall(r"[a-z]+", match["words"].lower()))
        is_alone = match[0].strip() == text.strip(" .") or SHARE.match(text, match.end()) or is_counted(text, match)
        if value is None or (match[0].lower() == "one" and not is_alone):
            return match[0]
        part, rest = (DENOMINATORS.get((match[name] or "").lower()) for name in ("part", "rest"))
        scale = SCALES.get(match["words"].lower().split()[-1], 1)
        if part:
            return f"{value}/{part}"
        return str(Fraction(value, 2 if match["half"] else 1) + (Fraction(scale, rest) if rest else 0))

    text = re.sub(r"(?<![-\w])(?:minus|negative)\s+(?=\d)", "-", NUMERAL.sub(digits, text), flags=re.IGNORECASE)
    return re.sub(r"\b(\d+) \(\1\)", r"\1", text)


def is_counted(text: str, one: re.Match) -> bool:
    """Whether a `one` counts what follows, as in `has one apple`."""
    return COUNTING.search(text, 0, one.start()) is not None and COUNTED.match(text, one.end()) is not None


def number(words: list[str]) -> int | None:
    """The number that words say one after the other; None where they are several numbers, as in `five six`."""
    total = group = 0
    for word in words:
        if word == "hundred":
            group = 100 * max(group, 1)
        elif word in SCALES:
            total, group = total + SCALES[word] * max(group, 1), 0
        elif word in NUMBERS:
            follows_tens = group % 10 == 0 and group % 100 >= 20 and NUMBERS[word] < 10
            if group % 100 and not follows_tens:
                return None
            group += NUMBERS[word]
    return total + group
