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

from tabom.data.verifiers import named_answers as named
from tabom.data.verifiers.final_answer import final_answer
from tabom.data.verifiers.numerals import NUMERAL, in_digits
from tabom.data.verifiers.prose import DENIAL, VERDICT, Reading
from tabom.data.verifiers.spelling import respell
from tabom.data.verifiers.stated import latex
from tabom.data.verifiers.values import amount, same_value_of

MEMORY = 4 * 2**30


def compare(answer: str, response: str, prompt: str) -> tuple[bool | None, str]:
    """Whether the final answer of the response equals the answer, and what was read; None where nobody can tell."""
    solution = final_answer(answer) if is_solution(answer) else Reading(answer, "the answer")
    gold = respell(solution.text).strip() if solution else ""
    gold = in_digits(gold) if NUMERAL.fullmatch(gold) else gold
    if not named.words(gold):
        return None, f"the answer {answer!r:.80} is empty"
    reading = final_answer(response)
    if reading is None:
        return False, "no final answer found in the response"
    if named.words(gold) in named.VERDICTS and reading.mark != "announced" and (verdict := VERDICT.match(response)):
        reading = reading if VERDICT.match(reading.text) else Reading(verdict[1], "first word")
    found = Reading(respell(reading.text).strip(), reading.mark)
    compared = f"compared {found.text!r:.80} ({found.mark})"
    is_right = is_answer(gold, found, prompt)
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
    return named.words(gold) == "no" or DENIAL.search(gold) is not None


def is_answer(gold: str, reading: Reading, prompt: str = "") -> bool | None:
    """Whether a reading is this answer, by the comparison for its kind; None where the answer is of no kind.

    Where it is the letter of a choice, the choice's text in the prompt is as good.
    """
    gold = re.sub(r"^\$(?=.*[^\d.,])(.*)\$$", r"\1", gold).strip()
    if named.is_time(gold):
        return named.same_time(gold, reading) or same_value_of(gold, reading)
    if named.is_date(gold):
        return named.same_date(gold, reading)
    if letter := named.letter_of(gold):
        option = named.option_of(letter, prompt, reading)
        return named.same_letter(letter, reading) or (option is not None and is_answer(option, reading) is True)
    if named.is_text(gold):
        return named.same_words(gold, reading) or (len(named.words(gold)) < 5 and same_value_of(gold, reading))
    if named.bare(gold) == named.bare(reading.text):
        return True
    if amount(gold, True) is None:
        return True if named.bare(gold) in map(named.bare, latex(reading.text)) else None
    if is_range(gold):
        gold, reading = as_interval(gold), reading._replace(text=as_interval(reading.text))
    reading = reading._replace(text=in_the_form_of(gold, reading.text))
    return same_value_of(gold, reading) or (named.has_words(gold) and named.same_words(gold, reading))


NUMBER = r"(\d+(?:\.\d+)?)"
RANGE = re.compile(
    rf"(?<![\d.])(?:between {NUMBER} and {NUMBER}|(?:from )?{NUMBER}(?: ?[-\u2013] ?| to ){NUMBER})(?![\d.])"
)


def is_range(gold: str) -> bool:
    """Whether an answer is a range of numbers, such as `10-20`, rather than a difference."""
    ends = RANGE.fullmatch(gold)
    return ends is not None and float(ends[3]) < float(ends[4])


def as_interval(text: str) -> str:
    """A text with its ranges as intervals."""
    return RANGE.sub(r"[\1\3, \2\4]", text)


def in_the_form_of(gold: str, text: str) -> str:
    """A text with `3 to 1` as a ratio and `5 out of 9` as a fraction if the answer is one, and one side of `\\approx`:
    the rounded one if the answer is a plain number, else the exact one.
    """
    if re.fullmatch(r"\d+ ?: ?\d+", gold):
        text = re.sub(r"(?<=\d) to (?=\d)", ":", text)
    if re.fullmatch(r"\d+/\d+|\\[dt]?frac\{\d+\}\{\d+\}", gold):
        text = re.sub(r"(?<=\d) (?:out of|in) (?=\d)", "/", in_digits(text))
    rounded, exact = r"(?:^|(?<=\\\())(?:(?!\\\().)*(?:≈|\\approx)", r"\s*(?:≈|\\approx)(?:(?!\\\)).)*"
    return re.sub(rounded if re.fullmatch(r"[\d.,]+", gold) else exact, "", text)


def serve() -> None:
    """Answers requests until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.WARNING)  # math-verify warns that its timeouts are off: the other process has one
    output, sys.stdout = sys.stdout, sys.stderr  # whatever prints, prints elsewhere
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["timeout"])
        print(json.dumps(compare(request["answer"], request["response"], request["prompt"])), file=output, flush=True)
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    serve()
