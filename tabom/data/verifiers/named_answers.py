"""Answers that are no expressions: words, choices, times of day and dates."""

import re

from tabom.data.verifiers.formulas import COMMAND
from tabom.data.verifiers.prose import CONSEQUENCE, Reading
from tabom.data.verifiers.stated import COPULA, latex

MONTHS = (
    "jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    "|nov(?:ember)?|dec(?:ember)?"
)
MONTH = re.compile(rf"\b(?:{MONTHS})\b", re.IGNORECASE)
DATE = re.compile(
    rf"\d{{4}}-\d\d?-\d\d?\b|\b\d\d?/\d\d?/\d{{4}}|(?:\b(?:\d{{1,4}}(?:st|nd|rd|th)?|of|the|{MONTHS})\b[\s,]*)+",
    re.IGNORECASE,
)
WEEKDAY = re.compile(r"\b(?:mon|tues|wednes|thurs|fri|satur|sun)day\b", re.IGNORECASE)
LAST_COPULA = re.compile(r"^.*\b(?:is|are|was|be|gives|equals|becomes)\b\s*", re.DOTALL)
SUPERLATIVE = re.compile(r"\s+(?:(?:is|was|has|had) the\b|\w+ the (?:\w+est|most|least|only)\b).*", re.DOTALL)
BESIDE = re.compile(
    r"\b(?:before|after|but|except|until|since|than|following|preceding|from|not|excluding)\s+(?:the\s+|a\s+|next\s+|on\s+)*$",
    re.IGNORECASE,
)
"""Words before a day or a time that say that another one is meant."""
TIME = re.compile(
    r"(?<![\d:])(\d{1,2})(?::(\d\d))?(?![\d:])\s*([aApP])\.?\s*[mM]\b\.?|(?<![\d:])(\d{1,2}):(\d\d)(?![\d:])"
)
LETTER = re.compile(
    r"^(?:(?:option|choice|answer|letter)\s+)?[(\[]?([A-Z])[)\]]?(?=$|\s*[.,:;)\]]|\s+(?:because|since|which)\b|\s+\()"
)
MARKED_LETTER = re.compile(
    r"\(([A-Z])\)|(?<![\w(])([B-H])\)|\bis ([A-Z])$"
    r"|\b(?:[Oo]ption|[Cc]hoice|[Oo]nly|[Ss]tatement|[Ff]igure|[Gg]raph|[Dd]iagram|labeled)\s+\(?([A-Z])\b"
)
ARTICLE = re.compile(r"^(?:the|a|an|on|in|option|choice|letter)\s+")
VERDICTS = ("yes", "no", "true", "false")
NO_SOLUTION = ("no solution", "no solutions", "no real solution", "no real solutions", "none", "empty set", "\\{\\}")
SYNONYMS = dict.fromkeys(("infinitely many solutions", "infinite", "infinitely many values"), "infinitely many")
SYNONYMS |= dict.fromkeys(NO_SOLUTION, "\\emptyset") | dict.fromkeys(("dne", "does not exist"), "undefined")


def words(text: str) -> str:
    """A text answer without LaTeX's markup, brackets, stops, articles and capitals."""
    plain = re.sub(r"\\[() ]", " ", COMMAND.sub(r" \1 ", text)).replace("\u2019", "'")
    plain = " ".join(plain.strip(" *()[]$\"'`").rstrip(" .,;:!*()[]$\"'`").casefold().split())
    plain = ARTICLE.sub("", plain)
    return SYNONYMS.get(plain, plain)


def has_words(gold: str) -> bool:
    """Whether an answer holds words beside LaTeX's commands, or says in a sign that there is no solution."""
    plain = re.sub(r"\\[a-zA-Z]+", "", COMMAND.sub(r" \1 ", gold).lower())
    return re.search(r"[a-z]{2}", plain) is not None or words(gold) == "\\emptyset"


def is_text(gold: str) -> bool:
    """Whether an answer is words alone, such as `even` or `\\text{no solution}`."""
    is_marked = COMMAND.search(gold) is not None
    return has_words(gold) and not re.search(r"\d", gold) and (is_marked or not re.search(r"[\\=^<>()]", gold))


def bare(text: str) -> str:
    """A text without dollars, spaces other than between digits, and `\\left` and `\\right`."""
    return re.sub(r"\\(?:left|right)(?![a-zA-Z])|\\[,;:! ]|\$|(?<!\d)\s+|\s+(?!\d)", "", text)


def same_words(gold: str, reading: Reading) -> bool:
    """Whether a reading is this text, says that something is, or names no other day of the week or month."""
    plain, clause = words(gold), reading.text
    ways = [clause, COPULA.sub("", clause, count=1), LAST_COPULA.sub("", clause), SUPERLATIVE.sub("", clause)]
    if plain in VERDICTS:
        ways.append(re.split(r"[\s,.:;](?!\s*(?:and|or)\b)", clause.strip(" ,"), maxsplit=1)[0])
        ways.append(re.split(r"[,.:;]", ways[1], maxsplit=1)[0])
    if not re.search(r"\d", plain):
        ways.append(re.split(r"\s+(?:with|by|at|in) (?=\S*\d)", ways[1])[0])  # `Omar with 31 points`
    ways += [CONSEQUENCE.split(clause)[-1], re.sub(r"^.*\b(?:has|have)\b\s*", "", clause)]
    segments = latex(clause)
    if len(segments) == 1:
        ways += segments
    if any(words(way) == plain for way in ways):
        return True
    names = WEEKDAY if WEEKDAY.fullmatch(plain) else MONTH
    named = [match for match in names.finditer(clause) if match[0] != "may"]
    return {match[0].casefold() for match in named} == {plain} and not any(
        BESIDE.search(clause[: match.start()]) for match in named
    )


def letter_of(gold: str) -> str | None:
    """The letter of an answer that is a choice, such as `(C)` or `\\text{C}`."""
    letter = re.fullmatch(r"[(\[]?([A-Z])[)\].]*", COMMAND.sub(r"\1", gold).strip(" $*."))
    return letter[1] if letter else None


def same_letter(letter: str, reading: Reading) -> bool:
    """Whether a reading chooses this letter and no other."""
    clause = re.sub(r"\\[()]|\$", "", COMMAND.sub(r"\1", reading.text)).strip(" *.\"'")
    if clause == letter or (letter in "ABCDE" and clause.strip("()[]. ") == letter.lower()):
        return True
    found = LETTER.match(clause)
    holder = re.fullmatch(r"(?:(?:the )?[a-z]+ )?([A-Z])", SUPERLATIVE.sub("", clause))
    if holder and holder[0] != clause:
        return holder[1] == letter
    if re.search(r"\bis (?:false|wrong|incorrect)\b", clause):
        return False
    if found:
        return found[1] == letter and not re.match(
            r"\s*[,&]?\s*(?:or|and)?\s*[(\[]?[A-Z][)\]]?(?:$|[\s.,])", clause[found.end(1) + 1 :]
        )
    marked = {"".join(groups) for groups in MARKED_LETTER.findall(clause)}
    return marked == {letter}


def option_of(letter: str, prompt: str, reading: Reading) -> str | None:
    """The text of a choice in the last question of a prompt; None for a reading that names a letter."""
    if LETTER.match(reading.text) or MARKED_LETTER.search(reading.text):
        return None
    options = re.findall(rf"(?:^|[\s(]){letter}[.):]\s*(.+?)(?=\s+\(?[A-Z][.):]\s|\n|$)", prompt)
    return options[-1] if options else None


def is_time(gold: str) -> bool:
    """Whether an answer is a time of day."""
    return TIME.fullmatch(words(gold)) is not None


def clock(match: re.Match) -> tuple[int, int, str]:
    """Hour, minute and half of the day that a time says."""
    hour, minute, half = int(match[1] or match[4]), int(match[2] or match[5] or 0), (match[3] or "").lower()
    if hour > 12:
        return hour - 12, minute, "p"
    return hour, minute, half


def same_time(gold: str, reading: Reading) -> bool:
    """Whether the one time of day in a reading is the gold's; who does not say which half of the day may mean both."""
    predicate = LAST_COPULA.sub("", reading.text)
    text = predicate if TIME.search(predicate) else reading.text
    matches = list(TIME.finditer(text))
    found = {clock(match) for match in matches}
    if len(found) != 1 or any(BESIDE.search(text[: match.start()]) for match in matches):
        return False
    (hour, minute, half), (gold_hour, gold_minute, gold_half) = found.pop(), clock(TIME.fullmatch(words(gold)))
    return (hour, minute) == (gold_hour, gold_minute) and (not half or not gold_half or half == gold_half)


def is_date(gold: str) -> bool:
    """Whether an answer is a date: a month's name and a number, or numbers as in `2024-07-04`."""
    return DATE.fullmatch(words(gold)) is not None and date_of(words(gold)) is not None


def date_of(text: str) -> tuple[int | None, int, int | None] | None:
    """Year, month and day of `2024-07-04`, `July 4, 2024`, `July 4`; the numbers of `7/4/2024` as they stand."""
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    name = MONTH.search(text)
    if name is None:
        return tuple(numbers) if re.search(r"\d[-/]", text) else None
    month = next(place for place, each in enumerate(MONTHS.split("|"), start=1) if name[0][:3].lower() == each[:3])
    year, day = ([number for number in numbers if (number > 31) is is_year] for is_year in (True, False))
    return (*(year or [None]), month, *(day or [None])) if numbers and len(year) < 2 and len(day) < 2 else None


def same_date(gold: str, reading: Reading) -> bool:
    """Whether the one date that a reading states is the gold's; a year may be added to it."""
    predicate = LAST_COPULA.sub("", reading.text)
    found = [{date_of(match[0]) for match in DATE.finditer(text)} - {None} for text in (predicate, reading.text)]
    found = found[0] or found[1]
    expected = date_of(words(gold))
    return len(found) == 1 and (expected in found or (expected[0] is None and expected[1:] == found.pop()[1:]))
