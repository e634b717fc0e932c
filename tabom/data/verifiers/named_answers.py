"""Answers that are no expressions: words, choices, times of day and dates."""

import re

from tabom.data.verifiers.final_answer import CONSEQUENCE, Reading
from tabom.data.verifiers.stated import COPULA, TEXT, latex

MONTHS = (
    "jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    "|nov(?:ember)?|dec(?:ember)?"
)
MONTH = re.compile(rf"\b(?:{MONTHS})\b", re.IGNORECASE)
DATE_WORDS = re.compile(rf"(?:\b(?:\d{{1,4}}(?:st|nd|rd|th)?|of|the|{MONTHS})\b[\s,]*)+", re.IGNORECASE)
WEEKDAY = re.compile(r"\b(?:mon|tues|wednes|thurs|fri|satur|sun)day\b", re.IGNORECASE)
LAST_COPULA = re.compile(r"^.*\b(?:is|are|was|be)\b\s*", re.DOTALL)
SUPERLATIVE = re.compile(r"\s+(?:is|was) the\b.*", re.DOTALL)
BESIDE = re.compile(
    r"\b(?:before|after|but|except|until|since|than|following|preceding|from|not|excluding)\s+(?:the\s+|a\s+|next\s+|on\s+)*$",
    re.IGNORECASE,
)
"""Words before a day or a time that say that another one is meant."""
ISO_DATE = re.compile(r"\d{4}-\d\d?-\d\d?|\d\d?/\d\d?/\d{4}")
TIME = re.compile(
    r"(?<![\d:])(\d{1,2})(?::(\d\d))?(?![\d:])\s*([aApP])\.?\s*[mM]\b\.?|(?<![\d:])(\d{1,2}):(\d\d)(?![\d:])"
)
LETTER = re.compile(
    r"^(?:(?:option|choice|answer|letter)\s+)?[(\[]?([A-Z])[)\]]?(?=$|\s*[.,:;)\]]|\s+(?:because|since|is|which)\b|\s+\()"
)
MARKED_LETTER = re.compile(r"\(([A-Z])\)|\b(?:[Oo]ption|[Cc]hoice|[Oo]nly)\s+\(?([A-Z])\b")
CHOICES = "ABCDE"
"""Letters that are choices in lower case too; others may be variables."""

ARTICLE = re.compile(r"^(?:the|a|an|on|in|option|choice|letter)\s+")
NO_SOLUTION = ("no solution", "no solutions", "no real solution", "no real solutions", "none", "empty set", "\\{\\}")
SYNONYMS = dict.fromkeys(("infinitely many solutions", "infinite", "infinitely many values"), "infinitely many")
SYNONYMS |= dict.fromkeys(NO_SOLUTION, "\\emptyset") | dict.fromkeys(("dne", "does not exist"), "undefined")


def words(text: str) -> str:
    """A text answer without LaTeX's markup, brackets, stops, articles and capitals."""
    plain = TEXT.sub(r" \1 ", text).replace("\\ ", " ").replace("\u2019", "'")
    plain = " ".join(plain.strip(" *()[]$\"'`").rstrip(" .,;:!*()[]$\"'`").casefold().split())
    plain = ARTICLE.sub("", plain)
    return SYNONYMS.get(plain, plain)


def has_words(gold: str) -> bool:
    """Whether an answer holds words beside LaTeX's commands, or says in a sign that there is no solution."""
    plain = re.sub(r"\\[a-zA-Z]+", "", TEXT.sub(r" \1 ", gold).lower())
    return re.search(r"[a-z]{2}", plain) is not None or words(gold) == "\\emptyset"


def is_text(gold: str) -> bool:
    """Whether an answer is words alone, such as `even` or `\\text{no solution}`."""
    is_marked = TEXT.search(gold) is not None
    return has_words(gold) and not re.search(r"\d", gold) and (is_marked or not re.search(r"[\\=^<>()]", gold))


def same_literally(gold: str, reading: Reading) -> bool:
    """Whether a reading or its LaTeX is the same text, but for spaces and the size of brackets."""
    texts = [reading.text, *latex(reading.text)]
    return bare(gold) in map(bare, texts)


def bare(text: str) -> str:
    """A text without dollars, spaces other than between digits, and `\\left` and `\\right`."""
    return re.sub(r"\\(?:left|right)(?![a-zA-Z])|\\[,;:! ]|\$|(?<!\d)\s+|\s+(?!\d)", "", text)


def same_words(gold: str, reading: Reading) -> bool:
    """Whether a reading is this text, says that something is, or names no other day of the week or month."""
    plain, clause = words(gold), reading.text
    ways = [clause, COPULA.sub("", clause, count=1), LAST_COPULA.sub("", clause), SUPERLATIVE.sub("", clause)]
    if plain in ("yes", "no", "true", "false"):
        ways.append(re.split(r"[\s,.:;](?!\s*(?:and|or)\b)", clause.strip(), maxsplit=1)[0])
    ways.append(CONSEQUENCE.split(clause)[-1])
    segments = latex(clause)
    if len(segments) == 1:
        ways += segments
    if any(words(way) == plain for way in ways):
        return True
    named = [match for days in (WEEKDAY, MONTH) for match in days.finditer(clause) if match[0] != "may"]
    return {match[0].casefold() for match in named} == {plain} and not any(
        BESIDE.search(clause[: match.start()]) for match in named
    )


def letter_of(gold: str) -> str | None:
    """The letter of an answer that is a choice, such as `(C)` or `\\text{C}`."""
    letter = re.fullmatch(r"[(\[]?([A-Z])[)\].]*", TEXT.sub(r"\1", gold).strip(" $*."))
    return letter[1] if letter else None


def same_letter(letter: str, reading: Reading) -> bool:
    """Whether a reading chooses this letter and no other."""
    clause = TEXT.sub(r"\1", reading.text).strip(" $*\"'")
    clause = clause.replace("$", "")
    if clause == letter or (letter in CHOICES and clause.strip("()[]. ") == letter.lower()):
        return True
    found = LETTER.match(clause)
    if re.search(r"\bis (?:false|wrong|incorrect)\b", clause):
        return False
    if found:
        return found[1] == letter and not re.match(
            r"\s*[,&]?\s*(?:or|and)?\s*[(\[]?[A-Z][)\]]?(?:$|[\s.,])", clause[found.end(1) + 1 :]
        )
    marked = {first or second for first, second in MARKED_LETTER.findall(clause)}
    return marked == {letter}


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
    matches = list(TIME.finditer(reading.text))
    found = {clock(match) for match in matches}
    if len(found) != 1 or any(BESIDE.search(reading.text[: match.start()]) for match in matches):
        return False
    (hour, minute, half), (gold_hour, gold_minute, gold_half) = found.pop(), clock(TIME.fullmatch(words(gold)))
    return (hour, minute) == (gold_hour, gold_minute) and (not half or not gold_half or half == gold_half)


def is_date(gold: str) -> bool:
    """Whether an answer is a date: a month's name and a number, or numbers as in `2024-07-04`."""
    plain = words(gold)
    return (MONTH.search(plain) is not None and re.search(r"\d", plain) is not None) or (
        ISO_DATE.fullmatch(plain) is not None
    )


def same_date(gold: str, reading: Reading) -> bool:
    """Whether a reading has the words of a date, in whatever order."""

    plain = words(gold)

    def parts(text: str) -> list[str]:
        text = re.sub(r"(?<=\d)(?:st|nd|rd|th)\b", "", text.casefold())
        found = re.findall(r"\d+|[a-z]+", text)
        return sorted(
            part[:3] if MONTH.fullmatch(part) else part.lstrip("0")
            for part in found
            if part not in ("the", "of", "on", "in")
        )

    if ISO_DATE.fullmatch(plain):
        return words(reading.text) == plain or (plain in reading.text and len(ISO_DATE.findall(reading.text)) == 1)
    dates = [run for run in DATE_WORDS.findall(words(reading.text)) if MONTH.search(run)]
    return len(dates) == 1 and parts(dates[0]) == parts(plain)
