"""A process that compares mathematical answers with math-verify: a JSON line in, a JSON line out.

Started by `mathematics.py` as a process of its own, because parsing LaTeX and comparing expressions can take for ever,
take all memory or crash, and because math-verify's own timeouts are signals, which threads cannot use. One comparison
has a number of seconds of computing time, which a busy machine does not shorten; then the process dies of SIGPROF.
"""

import json
import logging
import re
import resource
import signal
import sys

from latex2sympy2_extended import NormalizationConfig
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

MEMORY = 4 * 2**30
EXTRACTION = [
    LatexExtractionConfig(
        boxed_match_priority=0,
        normalization_config=NormalizationConfig(
            basic_latex=True, units=True, malformed_operators=True, nits=True, boxed="last", equations=False
        ),
    ),
    ExprExtractionConfig(),
]
ASCII = {0xFEE0 + code: code for code in range(0x21, 0x7F)}  # full-width digits, letters and signs
RESPELT = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\\$|[`≈]|(?<!\S)~", " "),
        (r"~", r"\\ "),
        (r"°", r"^\\circ"),
        (r"(?<!\d)[\u2212\u2013](?=[\d.\\])", "-"),  # minus and dash
        (r"(?<=\d)[.,](?=\s*\})", ""),
        (r"²", "^2"),
        (r"³", "^3"),
        (r"½", " 1/2"),
        (r"¼", " 1/4"),
        (r"¾", " 3/4"),
        (r"(?<![\d./])(\d+) +(\d+)/(\d+)(?![\d./]*\d)", r"\1\\frac{\2}{\3}"),
        (r"(?:√|(?<![\\a-zA-Z])sqrt)\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"√(\d+|[a-zA-Z])", r"\\sqrt{\1}"),
        (r"(?<![\\a-zA-Z])(sin|cos|tan|log|ln|exp)(?=\()", r"\\\1"),
        (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi"),
        (r"(?<=\d)[eE]([+-]?\d+)(?![\w.])", r" \\times 10^{\1}"),
        (r"(?<=\d) ?[x\u00d7] ?10\^\{?(-?\d+)\}?", r" \\times 10^{\1}"),
        (r"(?<=[a-z)])\*\*(?=\d)", "^"),
        (r"\\(?:textbf|textit|bold)(?![a-z])", r"\\text"),
    )
]
"""What people write without LaTeX, and how math-verify reads it."""

ANSWER_PHRASE = re.compile(r"\banswer\b(?:\s+is|\s*[:=])?[\s:*]*([^\n]+)", re.IGNORECASE)
WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")
SEVERAL = re.compile(r",(?!\d{3})|\b(?:and|or)\b")
NUMBER_WITH_UNIT = re.compile(r"\\boxed\{\s*\\?\$?(-?[\d.,/]+)\s+([a-zA-Z]{2}[a-zA-Z /]*)\}")
MEMBER = re.compile(r"^\w+ (?:in|\\in) ")
TEXT = re.compile(r"\\text\{([^{}]*)\}|\\boxed\{([^{}]*)\}")


def candidates(text: str) -> list[str]:
    """What of a response or of a full solution may be its final answer, the most explicit form first, for math-verify.

    An explicit form hides the others: `\\boxed{}`, then what follows the last `####`, then `<answer>` tags. Else
    what follows the last "answer is", or the last line, as LaTeX without delimiters if no words are in it; or
    whatever math-verify finds in the whole text. What was thought before `</think>` does not count.
    """
    text = mark_unit(text.rpartition("</think>")[2].replace("\\fbox", "\\boxed").strip())
    if "\\boxed" in text:
        return [text[text.rindex("\\boxed") :], text]
    if "####" in text:
        return bare(text.rsplit("####", 1)[1].strip().partition("\n")[0])
    if "<answer>" in text:
        return bare(text.rsplit("<answer>", 1)[1].partition("</answer>")[0])
    line = closing_line(text)
    if WORD.search(line) or "$" in line:
        return [text]
    return bare(line)[:1] if SEVERAL.search(line) else [bare(line)[0], text]


def respell(text: str) -> str:
    """Signs and spellings as math-verify reads them."""
    text = text.translate(ASCII)
    for pattern, replacement in RESPELT:
        text = pattern.sub(replacement, text)
    return text


def closing_line(text: str) -> str:
    """What follows the last "answer is", else the last line."""
    phrases = ANSWER_PHRASE.findall(text)
    return phrases[-1] if phrases else text.strip().rpartition("\n")[2]


def bare(expression: str) -> list[str]:
    """An expression without delimiters, and the same in a box, which is tried first."""
    expression = MEMBER.sub("", expression.strip(" *").rstrip(" .,*"))
    return [mark_unit(f"\\boxed{{{expression}}}"), expression]


def mark_unit(text: str) -> str:
    """Words after a number in a box are a unit, not a product of variables."""
    return NUMBER_WITH_UNIT.sub(r"\\boxed{\1\\text{ \2}}", text)


def words(text: str) -> str:
    """A text answer without LaTeX's markup, brackets, stops and capitals."""
    return TEXT.sub(lambda match: match[1] or match[2], text).strip(" *()$").rstrip(" .*()$").casefold()


def compare(answer: str, response: str) -> tuple[bool | None, str]:
    """Whether some reading of the response equals the answer, and what was read."""
    answer, response = respell(answer), respell(response)
    if words(answer) and words(answer) == words(closing_line(response)):
        return True, f"{answer!r:.80} is the answer as it is written"
    golds = candidates(answer) if is_solution(answer) else bare(answer)
    golds = [parsed for parsed in map(read, golds) if parsed][:1]
    if not golds:
        return None, f"the answer {answer!r:.80} is no expression that math-verify reads"
    readings = [parsed for parsed in map(read, candidates(response)) if parsed]
    if not readings:
        return False, "no expression found in the response"
    for reading in readings:
        if verify(golds[0], reading, allow_set_relation_comp=True, timeout_seconds=None):
            return True, f"{reading[-1]!s:.80} equals {golds[0][-1]!s:.80}"
    return False, f"expected {golds[0][-1]!s:.80}, found {readings[0][-1]!s:.80}"


def is_solution(answer: str) -> bool:
    """Whether an answer is a text with the final answer at its end, rather than the final answer itself."""
    return "\\boxed" in answer or "####" in answer or "\n" in answer.strip() or "<answer>" in answer


def read(text: str) -> list:
    """What math-verify reads: an expression and its text, or nothing."""
    return parse(text, EXTRACTION, parsing_timeout=None)


def serve() -> None:
    """Answers requests until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.WARNING)  # math-verify warns that its timeouts are off: the other process has one
    output, sys.stdout = sys.stdout, sys.stderr  # whatever prints, prints elsewhere
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["timeout"])
        print(json.dumps(compare(request["answer"], request["response"])), file=output, flush=True)
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    serve()
