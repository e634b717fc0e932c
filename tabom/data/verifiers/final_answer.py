"""Where in a response its final answer stands.

A delimited answer decides: the last of `\\boxed{}`, `<answer>`, a JSON field `answer` and the line after `####`. Else
the prose states one (see prose.py).
"""

import re

from tabom.data.verifiers.prose import ANNOUNCEMENT, Reading, prose_answer
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
RUN_ON = re.compile(r"\n\s*(?:Question|Problem|Q)(?: \d+)?: ")
"""How a base model goes on with a problem of its own after its answer."""


def final_answer(response: str) -> Reading | None:
    """The final answer of a response or of a full solution, None where there is none."""
    text = without_thoughts(response).strip()
    first = RUN_ON.split(text)[0]
    found = delimited(first) or (prose_answer(first) if first else None)
    if first == text or (found and found.mark != "last sentence"):
        return found
    return delimited(text) or prose_answer(text)


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
