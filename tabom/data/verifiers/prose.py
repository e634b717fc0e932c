"""The sentence of a text that states its answer: the last one that announces an answer, else the last one.

Formulas are hidden while sentences are taken apart (see formulas.py). A sentence that denies or asks is no answer.
"""

import re
from typing import NamedTuple

from tabom.data.verifiers.formulas import hide, show
from tabom.data.verifiers.sentences import EMPHASIS, END_OF_PROOF, sentences

OTHER_LANGUAGES = (
    r"(?:\u7b54\u3048|\u6b63\u89e3)\u306f?\s*[:\uff1a]?|(?:\uc815\ub2f5|\ub2f5)[\uc740\uc774]?\s*[:\uff1a]?"
    r"|(?:\u0627\u0644\u062c\u0648\u0627\u0628|\u0627\u0644\u0625\u062c\u0627\u0628\u0629)[^.\n:\d]{0,30}?(?:\u0647\u0648|\u0647\u064a|:)|\u0909\u0924\u094d\u0924\u0930\s*:?"
    r"|\u7b54\u6848(?:[\u662f\u4e3a\u70ba]|\u5e94\u4e3a)?\s*[:\uff1a]?"
    r"|\b(?:respuestas?|r\u00e9ponse|(?:End)?ergebnis|r\u00e9sultat|resultado|Antwort|resposta|risposta|risultato|antwoord"
    r"|svaret|odpowied\u017a|jawaban|cevap|\u0111\u00e1p \u00e1n|\u043e\u0442\u0432\u0435\u0442)\b[^.\n:=]{0,30}?"
    r"(?:\b(?:es|est|ist|lautet|betr\u00e4gt|\u00e8|\u00e9|to|adalah|l\u00e0)\b\s*:?|:)"
)
ANNOUNCEMENT = re.compile(
    r"\b(?<!to )(?<!this )(?<!each )(?:answers?|ans)\b(?! (?:choice|option)s? \(?[A-Z]\b)(?:(?!\b(?:how|what|which|whether|by)\b)[^.\n:=\uff1a]){0,80}?"
    r"(?:\b(?:is|are|was|be|equals)\b\s*:?|[:=\uff1a])|\banswer (?:of|as) (?=[$\ue000\d])"
    r"|\b(?:final|correct|right|best) (?:choice|option|letter|solution|result|value)\b[^.\n:=]{0,80}?(?:\b(?:is|are|be)\b\s*:?|[:=])"
    r"|\bI(?:['\u2019]ll| will| would)? (?:choose|pick|select|go with)\b|" + OTHER_LANGUAGES,
    re.IGNORECASE,
)
OUTCOME = re.compile(
    r"\b(?:choice|option|solution|result)s?\b(?: (?:to|of|for|in|set)\b[^.\n:=]{0,60}?)?,? (?:is|are|was|must be|equals)\b\s*:?",
    re.IGNORECASE,
)
"""What announces an answer where no later sentence holds a number."""
REVERSED = re.compile(
    r"^(?:so|thus|hence|therefore)?,?\s*(?!(?:I|it|this|that|which|what|here|your|my|the answer)\b)(?P<answer>[^.\n]{1,60}?)\s+is\s+(?:the\s+|our\s+|my\s+)?(?:final |correct |right |best )*(?:answer|correct|right|choice)\b[^.]*\.?$",
    re.IGNORECASE,
)
DENIAL = re.compile(
    r"\bnot\b|n['\u2019]t\b|\bnever\b|\bneither\b|\bnor\b|\bcannot\b|\bincorrect\b|\bwrong\b|\bunlikely\b"
    r"|\bunable\b|\d fails?\b|\bfalse that\b|\bdoubt\b|\bno way\b|\bby no means\b|\banything but\b"
    r"|\bfar from\b|\bif\b|\bunless\b|\bconsider\b|\bsuppose\b|\bassume\b|\bno longer\b|\bnicht\b|\bkein\w*"
    r"|\bno es\b|n\u00e3o|\bnon?\s+\u00e8\b|n['\u2019]est pas|\b\u043d\u0435\b|\u4e0d\u662f|\u5e76\u975e"
    r"|\u3067\u306f(?:\u306a|\u3042\u308a\u307e\u305b\u3093)|\uc544[\ub2c8\ub2d9]|\u0644\u064a\u0633"
    r"|\u0928\u0939\u0940\u0902",
    re.IGNORECASE,
)
DOUBT = re.compile(
    r"\b(?:doubt|false|wrongly|nobody|no one|suppose|assume|imagine|pretend|says?|said|claims?|claimed|thought|thinks|believed|(?:might|may|could|would) (?:think|say|believe|guess))\b(?:\s+(?:that|if|the|my|our|an?|final|correct))*\s*$"
    r"|\b(?:previous|earlier|initial|old|former|tempting)\s+$",
    re.IGNORECASE,
)
"""What comes before an announcement of somebody else's, of an earlier one or of a supposition."""
UNCOUNTED = re.compile(
    r"\b(?:that|who|which) (?:\w+ )?(?:neither\b.*|not|cannot|never|\w+n['\u2019]t)\b"
    r"|(?<=\d )[a-z ]+\bdid(?: not|n['\u2019]t)\b"
    r"|(?<=\d )(?!of )[a-z][^,.]*\b(?:are|were) not (?!(?:the|an?|correct|right|enough|possible|valid)\b)"
    r"|(?<=\d )(?:[a-z]+ ){1,3}not (?=(?:on|in|at|of|[a-z]+ed|[a-z]+ing)\b)"
    r"|\b(?:not|\w+n['\u2019]t) (?=[^,;]*\d[^,;]*=)"
    r"|^(?!.*\b(?:would|were|could|might)\b).*?\d[^,]*\sif\b"
    r"|^[Tt]he (?:(?!\b(?:is|are|was|were|be)\b).)*\b(?:not|if|unless|never|cannot|\w+n['\u2019]t)\b(?=.*\b(?:is|are|was|were) [^a-z]*\d)"
)
"""What is no denial of an answer: `218 seats that are not taken`, `did not use 243 - 125 = 118 cubes`."""
RETRACTION = re.compile(
    r"^\W*(?:oh\W+|hmm\W+|but\W+)*(?:wait|actually|no\b[,:]|however\b(?=.*(?:\b(?:is|be|get)\b|=)\W*\d)|oops|correction|let me re|my mistake|sorry|on second thought|I made (?:a mistake|an error)|(?:the|my) (?:new|real|right|true) one\b)",
    re.IGNORECASE,
)
"""How a sentence begins that takes back what was announced before it."""
CONTRAST = re.compile(
    r"not\s+(?:[^,;.\s]*\d[^,;.]*|[$\\(\ue000]\S*|[A-Z])(?:,?\s+but|[,;]\s+(?:but\s+)?it(?:['\u2019]s|\s+is))\s+(?P<answer>.*)"
)
REFUSAL = re.compile(
    r"\bI(?:['\u2019]m| am) (?:sorry|unable)|\bI can(?:['\u2019]t|not)|\bI do(?:n['\u2019]t| not) know"
)
CUT_OFF = re.compile(
    r"(?:(?<!\d)\s(?:and|or|of|the|to|is|are|with|from|by|at|in|for|which|that|so|we|than|per)|[-+*/=\u00d7\u00f7])$"
)
"""How a text ends that was cut off inside a sentence."""
ASIDE = re.compile(
    r"\s*\([^()]*=[^()]*\)\W*$|:\s+(?=[^,]*\d[^,]*,[^,]*\d[^,]*,)|(?:\s*[,;(\u2014-]+\s*(?:and\s+)?|\s+and\s+)not\b"
    r"|\s*[,;(\u2014-]*\s*\b(?:and\s+)?(?:because|since|rather than|instead of|so that)\b|\s*[,;(]*\s*\bi\.e\."
    r"|\s+[\u2014-]\s+[a-z]|\s*\((?!\s*-?[\d.]+\s*,)(?=[^)\\]*[a-z]{3})|\.\s*$|\s+(?:I hope|Have )|,\s+who\b[^,]*$"
)
ASIDE_AFTER_VALUE = re.compile(
    r"(?<=.)(?:\s+\u2014\s+|\s*[,;(\u2014-]*\s*\b(?:and\s+)?(?:such that|for which|for all|(?<!times )as|which(?! (?!is\b)\w+ [^.,]*\d)|where|including|given|if|(?:when|after)\b(?![^.]*\b(?:is|are|was|were|be)\b))\b)"
)
MAIN_CLAUSE = re.compile(r"\b(?:is|are|was|were|equals?) [^a-z]*\d\S*(?: [a-z]+)?\W*$|,\s+(?:and|but|so)\b.*\d")
"""How a sentence goes on behind an aside."""
VALUE = re.compile(
    r"\d|\ue001|\b(?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|dozen|half)\b",
    re.IGNORECASE,
)
CONCLUDING = re.compile(
    r"^\W*(?:so|thus|hence|therefore|finally|in conclusion|in total|altogether|overall|in summary|this means|that means)\b",
    re.IGNORECASE,
)
EXPLANATION = re.compile(r"\W*(?:explanation|reasoning|rationale|justification)\W*", re.IGNORECASE)
CHECK = re.compile(
    r"^\W*(?:note\b|to (?:check|verify|confirm)|(?:we|you) (?:can|may) (?:even |also |easily )?(?:check|verify|confirm)|let(?:'s| me|us) (?:double-)?(?:check|verify)|check\b|verification\b|indeed\b)",
    re.IGNORECASE,
)
NEW_TOTAL = re.compile(r"^\W*(?:so|therefore|thus|hence|in total|altogether)?,? ?(?:the |a )?total\b.*=", re.IGNORECASE)
"""How a sentence begins that goes on calculating with announced answers."""
CONNECTIVE = re.compile(
    r"^\W*(?:(?:step \d+:|so|thus|hence|therefore|finally|then|in conclusion|to answer (?:the|your|this) question|in total|overall|altogether|in summary|and|but|now|also|or|(?:this|that|which|it) (?:also )?means(?: that)?|we can (?:say|see|conclude) that)(?!\w)[,:\s]*)+",
    re.IGNORECASE,
)
CONSEQUENCE = re.compile(
    r"(?:[,;]\s*(?:and\s+)?|\s+and\s+)(?:so|thus|hence|therefore)\b,?\s+"
    r"|,\s*leaving (?:\w+ )?(?:with )?(?=[^,.]*\d|\(?[A-Z]\)?\W*$)"
    r"|,?\s+which (?:would |will )?(?:is|was|be|makes?|means?|gives?|leaves?|equals?)\s+(?=[^,.]*\d)(?!(?:\$?\d\S* )?(?:more|less|fewer|greater|larger|smaller|over|under|above|below)\b)"
    r"|,?\s+which (?:(?:amounts|comes|adds up|works out|sums up) to|totals?)\s+"
    r"|\s+and (?:we|you|I) (?:get|obtain)\s+"
    r"|,\s+(?:and\s+)?we (?:have|get|obtain|find|see|know)(?: that)?\s+(?=[^,.]*\d)"
    r"|,\s+(?:giving|yielding)(?: us)?\s+(?=[^,.]*\d)"
    r"|,?\s+(?:which (?:implies|yields|shows)|from which (?:we|it)) (?:\w+ )?(?:that )?(?=[^,.]*\d)"
    r"|,\s+and\s+(?:since|because|as|if|when)\b[^,]*,\s+(?=[^,.]*\d)"
    r"|;\s+(?=(?:since|because|as|given)\b[^,;]*,)"
    r"|\s(?:\u2192|\u21d2|\u27f9|=>)\s",
    re.IGNORECASE,
)
CONDITION = re.compile(
    r"^if\b.*?\bthen\b\s+"
    r"|^(?:if|since|as|because|when|after|before|once|with|without|given|for|in|at|on|out of|of|among|by|to|from|over|during|within|based|rounded|according|\w+ing)\b(?!(?<=ing)[^,]*\b(?:gives?|leaves?|yields?|makes?|results?|is|equals?)\b)[^,]*,\s+(?:then\s+)?",
    re.IGNORECASE,
)
VERDICT = re.compile(r"\W*(yes|no|true|false)\b(?=[.,:;!]|\s*(?:\n|$))", re.IGNORECASE)
RESTATED = re.compile(r"^(?:\D*,\s*(?:i\.e\.|that is),?\s+(?=[^a-z]*\d)|.*,\s*(?:i\.e\.|that is),?\s+(?=[^a-z]*=))")
"""What comes before the first number or before a calculation, as in `half a dozen, i.e. 6 eggs`."""
CALCULATION = re.compile(
    r"^(?!.*=.*(?:,|\b(?:and|or)\b)[^=()]{1,15}=).*(?:[-+*/x\u00d7\u00f7] ?[$\d(].*|[a-z]{3}\W*)=\s*(?=\S*\d)(?![^(]*\))",
    re.DOTALL,
)
"""A calculation in words up to its last sign of equality."""
COMPARISON = re.compile(
    r"\b(?:than(?: to)?|least|most|between|(?<!add )(?<!adds )(?<!sum )up to|nearly|under|over|above|below|fewer|not|never|no|minimum of|either|but|except|first|last|next|without|excluding|near|close to|different from|twice|thrice|double|triple|half|(?:root|square|cube|reciprocal|factorial|negative|opposite|inverse|logarithm|log|half|third|quarter|fourth) of(?: the| number)*)\s*$",
    re.IGNORECASE,
)


class Reading(NamedTuple):
    """What was found: the text of the answer and how it was marked."""

    text: str
    mark: str


def prose_answer(text: str) -> Reading | None:
    """What a text without a delimited answer states as its answer."""
    text = re.sub(r"[ \t]+", " ", re.sub(r"<<[^<>]*>>", "", text))
    hidden, formulas = hide(END_OF_PROOF.sub("", text))
    lines = sentences(hidden)
    found = announced_answer(lines, formulas) or last_statement(hidden, before_explanation(lines))
    return None if found is None else Reading(show(found.text, formulas), found.mark)


def before_explanation(lines: list[str]) -> list[str]:
    """The sentences before the heading `Explanation:`, if there are some."""
    start = next((place for place, line in enumerate(lines) if EXPLANATION.fullmatch(line)), 0)
    return lines[:start] or lines


def announced_answer(lines: list[str], formulas: list[str]) -> Reading | None:
    """What the last sentence that announces an answer says it is; None where a later one takes it back."""
    for place in range(len(lines) - 1, -1, -1):
        announced = announcement(lines, place)
        if announced is not None:
            later = [show(line, formulas) for line in lines[place + 1 :]]
            is_overridden = is_retracted(show(announced, formulas), later) or any(map(NEW_TOTAL.match, later))
            return None if is_overridden else Reading(announced, "announced")
    return None


def announcement(lines: list[str], place: int) -> str | None:
    """What the sentence at this place announces as the answer, if it does."""
    sentence = re.sub(r"\b(is|are|was)n['\u2019]t\b", r"\1 not", lines[place])
    if sentence.endswith("?"):
        return None
    conclusion = re.split(r",\s*but\s+", CONSEQUENCE.split(sentence)[-1])[-1]
    reverse = REVERSED.match(conclusion)
    if reverse and not ANNOUNCEMENT.search(reverse["answer"]):
        return None if DENIAL.search(conclusion) else reverse["answer"]
    matches = list(ANNOUNCEMENT.finditer(sentence))
    if not matches and not any(map(VALUE.search, lines[place + 1 :])):
        matches = list(OUTCOME.finditer(sentence))
    for match in reversed(matches):
        rest = sentence[match.end() :].lstrip(" :}").strip()
        before = re.split(r"[,;:]|\b(?:so|thus|hence|therefore)\b", sentence[: match.start()])[-1]
        if DENIAL.search(re.split(r",\s*but\b", sentence[: match.end()])[-1]) or DOUBT.search(before):
            return None
        contrast = CONTRAST.match(rest)
        if contrast:
            return without_aside(contrast["answer"])
        if DENIAL.match(rest):
            return None
        if not rest:
            return under_heading(lines[place + 1 :])
        announced = without_aside(outcome(rest))
        return None if VALUE.search(announced) and DENIAL.search(UNCOUNTED.sub("", announced)) else announced
    return None


def outcome(clause: str) -> str:
    """The end of a clause that calculates what it states, as in `4 times 5, which is 20`."""
    parts = CONSEQUENCE.split(clause)
    is_value = re.fullmatch(r"[^a-z]*(?:[a-z]+\W*)?", parts[0]) is not None
    return CALCULATION.sub("", parts[0] if is_value else parts[-1])


def under_heading(lines: list[str]) -> str | None:
    """What stands under the heading `Answer:`: one short line, else the last sentence."""
    if lines and re.match(r"[^a-z]*[\d\ue000]\S*(?: [a-z]+)?\W*$|\W*\w+\W*$", lines[0]):
        return without_aside(lines[0])
    found = last_statement("", lines)
    return None if found is None or found.mark == "denied" else found.text


def last_statement(text: str, lines: list[str]) -> Reading | None:
    """What the last sentence states, or a conclusion before remarks without any number."""
    if not lines:
        return None
    place = len(lines) - 1
    while place and is_remark(lines[place]):
        place -= 1
    is_conclusion = VALUE.search(lines[place]) and (CONCLUDING.match(lines[place]) or CHECK.match(lines[-1]))
    sentence = lines[place] if is_conclusion else lines[-1]
    last = CONNECTIVE.sub("", sentence)
    if not VERDICT.match(last):
        last = RESTATED.sub("", CONDITION.sub("", CONNECTIVE.sub("", CONSEQUENCE.split(sentence)[-1])))
    contrast = CONTRAST.search(last)
    if contrast:
        return Reading(without_aside(contrast["answer"]), "last sentence")
    is_denied = DENIAL.search(UNCOUNTED.sub("", last).partition(",")[0]) or ANNOUNCEMENT.search(
        sentence
    )  # which was not accepted
    if is_denied or last.endswith("?") or REFUSAL.search(" ".join(lines)) or CUT_OFF.search(lines[-1]):
        return Reading(sentence, "denied")
    last = emphasized(text, last) or CALCULATION.sub("", last)
    return Reading(without_aside(last) if re.search(r"[A-Za-z]{3}", last) else last.rstrip("., "), "last sentence")


def is_remark(sentence: str) -> bool:
    """Whether a sentence only checks or comments on an answer: it holds no number, denies and concludes nothing."""
    if CHECK.match(sentence):
        return True
    return len(sentence.split()) > 3 and not any(
        pattern.search(sentence) for pattern in (VALUE, DENIAL, CONCLUDING, RETRACTION)
    )


def emphasized(text: str, sentence: str) -> str | None:
    """The one part of a sentence that is printed in bold, if it is a value or a name."""
    for line in reversed(text.split("\n")):
        if sentence not in EMPHASIS.sub("", line):
            continue
        bold = [part.strip(" .,") for part in re.findall(r"\*\*(.+?)\*\*", line) if part.strip()[-1] != ":"]
        bold = [part for part in bold if part in sentence]
        if len(bold) != 1 or COMPARISON.search(sentence.partition(bold[0])[0]):
            return None
        is_name = re.match(r"[A-Z]", bold[0]) and not VALUE.search(sentence)
        return bold[0] if VALUE.search(bold[0]) or is_name else None
    return None


def is_retracted(announced: str, later: list[str]) -> bool:
    """Whether one of the later sentences takes back what was announced: another number is the last one after it."""
    start = next((place for place, sentence in enumerate(later) if RETRACTION.search(sentence)), None)
    if start is None:
        return False
    numbers = re.findall(r"\d+(?:[.,/]\d+)*", " ".join(later[start:]))
    return numbers[-1] not in announced if numbers else re.search(r"wrong|incorrect|mistake", later[start]) is not None


def without_aside(clause: str) -> str:
    """A clause up to where it explains itself."""
    aside = ASIDE.search(clause, 1)
    kept = clause[: aside.start()] if aside else clause
    value = VALUE.search(kept)
    aside = ASIDE_AFTER_VALUE.search(kept, value.end()) if value else ASIDE_AFTER_VALUE.search(kept)
    if aside and not (MAIN_CLAUSE if value else re.compile(r"\d|\ue001|\b(?:is|are|was|be)\b")).search(
        kept, aside.end()
    ):
        kept = kept[: aside.start()]
    return kept.strip().rstrip(".!,;: ") or clause.strip()
