"""Where in a response its final answer stands.

A delimited answer decides: the last of `\\boxed{}`, `<answer>`, a JSON field `answer` and the line after `####`. Else the
last sentence that announces an answer ("The answer is ..."), and else the last sentence. A sentence that denies or asks
is no answer.
"""

import re
from typing import NamedTuple

from tabom.data.verifiers.reasoning import without_thoughts

BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*(?=[{\d])")
GLUED = re.compile(r"\$?[0-9]|[a-zA-Z^!_]|[.,]\d|\s*\\(?:pi|sqrt|cdot|times|frac)")
"""What makes a box the beginning of something longer, as in `\\boxed{72}1`."""
BETWEEN_BOXES = re.compile(
    r"[\s$,;.~]*(?:\\[()\[\]])*[\s$,;]*(?:\\text\{\s*)?(?:and|or)?(?:\s*\})?[\s$,;~]*(?:\\[()\[\]])*[\s$]*"
)
TAG = re.compile(r"<(final_?)?answer>|\[ANSWER\]", re.IGNORECASE)
END_TAG = re.compile(r"</(final_?)?answer>|\[/ANSWER\]", re.IGNORECASE)
JSON_FIELD = re.compile(r'"(?:final_?)?answer"\s*:\s*(?:"((?:[^"\\]|\\.)*)"|(-?\d[\d.,/]*)(?=\s*[,}]))', re.IGNORECASE)
HASHES = re.compile(r"####[ \t]*([^\n#]*)")
HEADING = re.compile(r"(?:\d+[.)]\s+)?[A-Za-z]{3,}|\d+[.)]\s+\S")
SENTENCE_END = re.compile(
    r"(?<=[^\s.][.!?])(?<!i\.e\.)(?<!e\.g\.)(?<![ap]\.m\.)(?<!\bvs\.)(?<!^[A-Z]\.)\s+(?=[A-Z\\$(\"'*\d])|[\u3002\uff01\uff1f]|\n+",
    re.MULTILINE,
)
ANNOUNCEMENT = re.compile(
    r"\b(?<!to )(?:answers?|ans|choice|option|letter|solutions?|result)\b[^.\n:=\uff1a]{0,80}?(?:\b(?:is|are|was|be|equals)\b\s*:?|[:=\uff1a])"
    r"|\bI(?:['\u2019]ll| will| would)? (?:choose|pick|select|go with)\b"
    r"|(?:\u7b54\u3048|\u6b63\u89e3)\u306f?\s*[:\uff1a]?|(?:\uc815\ub2f5|\ub2f5)[\uc740\uc774]?\s*[:\uff1a]?"
    r"|(?:\u0627\u0644\u062c\u0648\u0627\u0628|\u0627\u0644\u0625\u062c\u0627\u0628\u0629)[^.\n:\d]{0,30}?(?:\u0647\u0648|\u0647\u064a|:)|\u0909\u0924\u094d\u0924\u0930\s*:?"
    r"|\u7b54\u6848(?:[\u662f\u4e3a\u70ba]|\u5e94\u4e3a)?\s*[:\uff1a]?|\b(?:respuesta|r\u00e9ponse|Antwort|resposta|risposta|\u043e\u0442\u0432\u0435\u0442)\b[^.\n:=]{0,30}?(?:\b(?:es|est|ist)\b|:)",
    re.IGNORECASE,
)
REVERSED = re.compile(
    r"^(?:so|thus|hence|therefore)?,?\s*(?!(?:I|it|this|that|which|what|here|your|my|the answer)\b)(?P<answer>[^.\n]{1,60}?)\s+is\s+(?:the\s+|our\s+|my\s+)?(?:final |correct |right |best )*"
    r"(?:answer|correct|right|choice)\b[^.]*\.?$",
    re.IGNORECASE,
)
RUN_ON = re.compile(r"\n\s*(?:Question|Problem|Q)(?: \d+)?: ")
"""How a base model goes on with a problem of its own after its answer."""
DENIAL = re.compile(
    r"\bnot\b|n['\u2019]t\b|\bnever\b|\bneither\b|\bnor\b|\bcannot\b|\bincorrect\b|\bwrong\b|\bunlikely\b|\bunable\b|\d fails?\b|\bfalse that\b|\bdoubt\b|\bno way\b|\bby no means\b"
    r"|\banything but\b|\bfar from\b|\bif\b|\bunless\b|\bconsider\b|\bsuppose\b|\bassume\b|\bno longer\b|nicht|kein\w*|\bno es\b|n\u00e3o|\bnon?\s+\u00e8\b|n['\u2019]est pas|\b\u043d\u0435\b|\u4e0d\u662f|\u5e76\u975e"
    r"|\u3067\u306f(?:\u306a|\u3042\u308a\u307e\u305b\u3093)|\uc544[\ub2c8\ub2d9]|\u0644\u064a\u0633|\u0928\u0939\u0940\u0902",
    re.IGNORECASE,
)
DOUBT = re.compile(
    r"\b(?:doubt|false|wrongly|nobody|no one|suppose|assume|imagine|pretend|says?|said|claims?|claimed|thought|thinks"
    r"|believed|(?:might|may|could|would) (?:think|say|believe|guess))\b(?:\s+(?:that|if|the|my|our|an?|final|correct))*\s*$"
    r"|\b(?:previous|earlier|initial|old|former|tempting)\s+$",
    re.IGNORECASE,
)
"""What comes before an announcement of somebody else's, of an earlier one or of a supposition."""
UNCOUNTED = re.compile(r"(?<=\d )[a-z ]+\b(?:(?:that|who) (?:\w+ )?not|did(?: not|n['\u2019]t))\b")
"""What follows a number of things that are or do not something: `218 seats that are not taken`."""
RETRACTION = re.compile(
    r"^\W*(?:oh\W+|hmm\W+|but\W+)*(?:wait|actually|no\b[,:]|however\b(?=.*(?:\b(?:is|be|get)\b|=)\W*\d)|oops|correction|let me re|my mistake|sorry"
    r"|on second thought|I made (?:a mistake|an error)|(?:the|my) (?:new|real|right|true) one\b)",
    re.IGNORECASE,
)
"""How a sentence begins that takes back what was announced before it."""
CONTRAST = re.compile(
    r"not\s+(?:[^,;.\s]*\d[^,;.]*|[$\\(]\S*|[A-Z])(?:,?\s+but|[,;]\s+(?:but\s+)?it(?:['\u2019]s|\s+is))\s+(?P<answer>.*)"
)
COURTESY = re.compile(
    r"(?:I )?hope (?:this|that|it)\b(?!\D*\d)|(?:please )?(?:let me know|feel free)|would you like|do you (?:want|have|need)"
    r"|if you (?:have|need|want|would|'d)\b|is there anything|(?:good luck|happy \w+ing|thank|you're welcome)\b",
    re.IGNORECASE,
)
REFUSAL = re.compile(
    r"\bI(?:['\u2019]m| am) (?:sorry|unable)|\bI can(?:['\u2019]t|not)|\bI do(?:n['\u2019]t| not) know"
)
ASIDE = re.compile(
    r"\s*\([^()]*=[^()]*\)\W*$|\s*[,;(\u2014-]*\s*\b(?:and\s+)?(?:not|because|since|including|(?<!times )as|which|where|rather than|instead of|so that|given|(?:when|after)\b(?![^.]*\b(?:is|are|was|were|be)\b))\b|\s*[,;(]*\s*\bi\.e\."
    r"|\s+[\u2014-]\s+[a-z]|(?<![\\\w])\s*(?<![\\])\((?!\s*-?[\d.]+\s*,)(?=[^)\\$]*[a-z]{3})|\.\s*$|\s+(?:I hope|Have )"
)
CONNECTIVE = re.compile(
    r"^\W*(?:(?:step \d+:|so|thus|hence|therefore|finally|then|in conclusion|to answer (?:the|your|this) question|in total|overall|and|but|now"
    r"|(?:this|that|which|it) (?:also )?means(?: that)?|we can (?:say|see|conclude) that)(?!\w)[,:\s]*)+",
    re.IGNORECASE,
)
CONSEQUENCE = re.compile(
    r"[,;]\s*(?:and\s+)?(?:so|thus|hence|therefore)\b,?\s+|,\s*leaving (?:\w+ )?(?:with )?(?=[^,.]*\d)|,?\s+which (?:would |will )?(?:is|was|be|makes?|means?|gives?|leaves?|equals?)\s+(?=[^,.]*\d)(?!(?:\$?\d\S* )?(?:more|less|fewer|greater|larger|smaller|over|under|above|below)\b)|\s+and (?:we|you|I) (?:get|obtain)\s+|\s(?:\u2192|\u21d2|\u27f9|=>)\s",
    re.IGNORECASE,
)
CONDITION = re.compile(
    r"^(?:if|since|as|because|when|after|with|given|for|in|at|on|out of|of|among|\w+ing)\b[^,]*,\s+(?:then\s+)?",
    re.IGNORECASE,
)
RESTATED = re.compile(r"^(?:\D*,\s*(?:i\.e\.|that is),?\s+(?=[^a-z]*\d)|.*,\s*(?:i\.e\.|that is),?\s+(?=[^a-z]*=))")
"""What comes before the first number or before a calculation, as in `half a dozen, i.e. 6 eggs`."""
END_OF_PROOF = re.compile(r"\s*\$?\\?(?:blacksquare|square|Box|qed|\u220e|\u25a0|QED|Q\.E\.D\.)\$?\s*$")
EMPHASIS = re.compile(r"\*\*|__|`+|\*(?=\S[^*\n]*\S\*|\S\*)|(?<=[^\s*])\*(?=[\s.,!]|$)")


class Reading(NamedTuple):
    """What was found: the text of the answer and how it was marked; `clauses` may come before it in a sentence."""

    text: str
    mark: str


def final_answer(response: str) -> Reading | None:
    """The final answer of a response or of a full solution, None where there is none."""
    text = RUN_ON.split(without_thoughts(response).strip())[0]
    found = delimited(text)
    if found is not None:
        return found
    lines = sentences(text)
    for place in range(len(lines) - 1, -1, -1):
        announced = announcement(lines, place)
        if announced is not None and is_retracted(announced, lines[place + 1 :]):
            break
        if announced is not None:
            return Reading(announced, "announced")
    if not lines:
        return None
    last = RESTATED.sub("", CONDITION.sub("", CONNECTIVE.sub("", CONSEQUENCE.split(lines[-1])[-1])))
    contrast = CONTRAST.search(last)
    if contrast:
        return Reading(without_aside(contrast["answer"]), "last sentence")
    is_denied = DENIAL.search(UNCOUNTED.sub("", last).partition(",")[0]) or ANNOUNCEMENT.search(
        lines[-1]
    )  # which was not accepted
    if is_denied or last.endswith("?") or REFUSAL.search(text):
        return Reading(lines[-1], "denied")
    return Reading(without_aside(last) if re.search(r"[A-Za-z]{3}", last) else last.rstrip("., "), "last sentence")


def delimited(text: str) -> Reading | None:
    """The last answer in a box, after `####` or in a tag."""
    found = [(start, content, "boxed") for start, content in boxes(text)]
    for tag in TAG.finditer(text):
        found.append((tag.start(), END_TAG.split(text[tag.end() :])[0].strip(), "<answer>"))
    for match in JSON_FIELD.finditer(text):
        found.append((match.start(), match[1] or match[2], "<answer>"))
    for match in HASHES.finditer(text):
        is_last = not text[match.end() :].strip()
        if match[1].strip() and (is_last or not HEADING.match(match[1])):
            found.append((match.start(), match[1].strip(), "####"))
    found = [each for each in found if each[1].strip()]
    if not found:
        return None
    _, content, mark = max(found)
    if ANNOUNCEMENT.search(content) or (mark == "<answer>" and "\n" in content):
        return final_answer(content)
    return Reading(content, mark)


def boxes(text: str) -> list[tuple[int, str]]:
    """Where boxes begin and what they hold; those that stand in one list are one."""
    found: list[tuple[int, int, str]] = []
    for match in BOX.finditer(text):
        if found and match.start() < found[-1][1]:
            found.pop()  # one box in another
        if text[match.end() : match.end() + 1] != "{":
            end = match.end() + 1
            content = text[match.end() : end]
        else:
            end = closing_brace(text, match.end())
            content = text[match.end() + 1 : end - 1]
        if end > 0 and GLUED.match(text, end):
            content += " \\dots"  # no expression
        if end > 0 and content.strip(" {}"):
            found.append((match.start(), end, content))
    joined: list[tuple[int, str]] = []
    last_end = None
    for start, end, content in found:
        between = text[last_end:start] if last_end is not None else None
        if between is not None and BETWEEN_BOXES.fullmatch(between) and re.search(r"and|or|,|;", between):
            joined.append((start, joined.pop()[1] + ", " + content))
        else:
            joined.append((start, content))
        last_end = end
    return joined


def closing_brace(text: str, start: int) -> int:
    """Where the group that opens at `start` has ended; 0 where it does not."""
    depth = 0
    for match in re.compile(r"(?<!\\)[{}]|\\\\[{}]").finditer(text, start):
        depth += 1 if match[0].endswith("{") else -1
        if depth == 0:
            return match.end()
    return 0


def sentences(text: str) -> list[str]:
    """The sentences of a text, without emphasis, empty ones and the courtesies at its end."""
    text = re.sub(r"(?<=[a-z)])\*\*(?=\d)", "^", text)
    text = re.sub(r"\$\$\s*(.*?)\s*\$\$", r"$\1$", text, flags=re.DOTALL)
    text = re.sub(r"\\\[\s*(.*?)\s*\\\]", r"\\(\1\\)", text, flags=re.DOTALL)
    text = re.sub(r"\s*\(not [^()]*\)", "", END_OF_PROOF.sub("", text))
    found = [part.strip() for part in SENTENCE_END.split(EMPHASIS.sub("", text)) if part.strip(" \t.#-")]
    while found and COURTESY.match(found[-1]):
        found.pop()
    return found


def announcement(lines: list[str], place: int) -> str | None:
    """What the sentence at this place announces as the answer, if it does."""
    sentence = re.sub(r"\b(is|are|was)n['\u2019]t\b", r"\1 not", lines[place])
    if sentence.endswith("?"):
        return None
    following = lines[place + 1] if place + 1 < len(lines) else ""
    conclusion = re.split(r",\s*but\s+", CONSEQUENCE.split(sentence)[-1])[-1]
    reverse = REVERSED.match(conclusion)
    if reverse and not ANNOUNCEMENT.search(reverse["answer"]):
        return None if DENIAL.search(conclusion) else reverse["answer"]
    for match in reversed(list(ANNOUNCEMENT.finditer(sentence))):
        rest = sentence[match.end() :].strip().removeprefix("}").strip()
        before = re.split(r"[,;:]|\b(?:so|thus|hence|therefore)\b", sentence[: match.start()])[-1]
        if DENIAL.search(sentence[: match.end()]) or DOUBT.search(before):
            return None
        contrast = CONTRAST.match(rest)
        if contrast:
            return without_aside(contrast["answer"])
        if DENIAL.match(rest):
            return None
        return without_aside(rest or following)
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
    return kept.strip().rstrip(".!,;: ") or clause.strip()
