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

from tabom.data.verifiers.final_answer import DENIAL, Reading, final_answer
from tabom.data.verifiers.named_answers import (
    has_words,
    is_date,
    is_text,
    is_time,
    letter_of,
    same_date,
    same_letter,
    same_literally,
    same_time,
    same_words,
    words,
)
from tabom.data.verifiers.numerals import NUMERAL, in_digits
from tabom.data.verifiers.spelling import respell
from tabom.data.verifiers.values import is_readable, same_value_of

MEMORY = 4 * 2**30


def compare(answer: str, response: str) -> tuple[bool | None, str]:
    """Whether the final answer of the response equals the answer, and what was read; None where nobody can tell."""
    solution = final_answer(answer) if is_solution(answer) else Reading(answer, "the answer")
    gold = respell(solution.text).strip() if solution else ""
    gold = in_digits(gold) if NUMERAL.fullmatch(gold) else gold
    if not words(gold):
        return None, f"the answer {answer!r:.80} is empty"
    reading = final_answer(response)
    if reading is None:
        return False, "no final answer found in the response"
    found = Reading(respell(reading.text).strip(), reading.mark)
    compared = f"compared {found.text!r:.80} ({found.mark})"
    is_right = is_answer(gold, found)
    if is_right and found.mark == "denied" and not is_negation(gold):
        is_right = False
    if is_right is None:
        return None, f"the answer {answer!r:.80} is no expression that math-verify reads; {compared}"
    return (
        is_right,
        f"{found.text!r:.80} ({found.mark}) equals {gold!r:.80}" if is_right else f"expected {gold!r:.80}, {compared}",
    )


def is_solution(answer: str) -> bool:
    """Whether an answer is a text with the final answer at its end, rather than the final answer itself."""
    return "\\boxed" in answer or "####" in answer or "\n" in answer.strip() or "<answer>" in answer


def is_negation(gold: str) -> bool:
    """Whether an answer is itself a denial, such as `no` or `not prime`."""
    return words(gold) == "no" or DENIAL.search(gold) is not None


def is_answer(gold: str, reading: Reading) -> bool | None:
    """Whether a reading is this answer, by the comparison for its kind; None where the answer is of no kind."""
    gold = re.sub(r"^\$(?=.*[^\d.,])(.*)\$$", r"\1", gold).strip()
    if is_time(gold):
        return same_time(gold, reading) or same_value_of(gold, reading)
    if is_date(gold):
        return same_date(gold, reading)
    if letter_of(gold):
        return same_letter(letter_of(gold), reading)
    if is_text(gold):
        return same_words(gold, reading) or (len(words(gold)) < 5 and same_value_of(gold, reading))
    if same_literally(gold, reading):
        return True
    if not is_readable(gold):
        return None
    reading = with_ratios(gold, reading)
    return same_value_of(gold, reading) or (has_words(gold) and same_words(gold, reading))


def with_ratios(gold: str, reading: Reading) -> Reading:
    """A reading with `3 to 1` as a ratio if the answer is one, and `5 out of 9` as a fraction if the answer is one."""
    if re.fullmatch(r"\d+ ?: ?\d+", gold):
        return reading._replace(text=re.sub(r"(?<=\d) to (?=\d)", ":", reading.text))
    if re.fullmatch(r"\d+/\d+|\\[dt]?frac\{\d+\}\{\d+\}", gold):
        return reading._replace(text=re.sub(r"(?<=\d) (?:out of|in) (?=\d)", "/", reading.text))
    return reading


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
