import pytest

from tabom import make_verifier

GSM8K = "In May she sold 48/2 = <<48/2=24>>24 clips.\nTogether 48+24 = <<48+24=72>>72.\n#### 72"

STYLES = (
    r"""
@.|The answer is @.|The answer is: @|Answer: @|ANSWER:@|Final Answer: @|Answer = @|= @|n = @.|Total: @|@,|+@|≈@|~@
**@**|**Answer:** @|**Final Answer:** **@**|*@*|`@`|The answer is `@`.|The answer is "@".|## Answer\n@|```\n@\n```
$@|\$@.00|The answer is $@.|The answer is $@$.|The answer is \$@.00|She earns \$@ in total.|€@|@.0|The profit is **$@**.
@ clips|@ clips, because 70 + 2 = @.|The answer is @ (seventy-two).|So 70 + 2 = @ clips are left.|6 x 12 = @ clips
\(@\)|\[ 70 + 2 = @ \]|$$@$$|$x = @$|\boxed{ @ }|\boxed{@.}|\boxed{{@}}|\boxed{\$@}|\boxed{x=@}|$$\n\boxed{@}\n$$
\boxed{@ \text{ clips}}|\boxed{@~\text{clips}}|\boxed{@\,\mathrm{clips}}|\boxed{\mathbf{@}}|\boxed{\bold{@}}
\boxed{\text{@}}|The answer is:\n\n@
The final answer is $@$. I hope it is correct.|The answer is @. Have 3 nice days!|#### $@.00|####@<eot>
First \boxed{71}, corrected: \boxed{@}.|\boxed{@} is 6 \cdot 12.|The answer is 71. Wait. The answer is @.
<think>Is it \boxed{71}?</think> The answer is @.|<answer> \boxed{@} </answer>
""".strip()
    .replace("\n", "|")
    .replace(r"\n", "\n")
    .split("|")
)
"""One answer as models write it."""

SAME = {
    "1234": ["1,234", r"\boxed{1{,}234}", r"\boxed{1,\!234}", "$1,234.00", "1 234", "\uff11\uff12\uff13\uff14"],
    "-5": ["\u22125", "The answer is \u20135.", r"\boxed{-5}"],
    "1/2": [r"\boxed{\dfrac{1}{2}}", r"\tfrac12", "0.5", ".5", "½", r"50\%"],
    ".5": ["0.5", "1/2"],
    r"1\frac{1}{2}": ["1 1/2", "1.5", "3/2", "1½", r"\boxed{1\tfrac{1}{2}}", "The answer is 1 1/2."],
    "1 1/2": ["1.5"],
    "300000": [r"\boxed{3\times 10^5}", "3e5", "3E+5", "The answer is 3 x 10^5.", "3 \u00d7 10^5", "3*10^5"],
    "0.00012": [r"1.2 \times 10^{-4}", "1.2e-4"],
    "50%": ["50", r"\boxed{50\%}", "50 percent", "0.5"],
    r"\frac{\sqrt{3}}{2}": ["sqrt(3)/2", "√3/2", r"\boxed{\sqrt3/2}", r"\frac{\sqrt 3}{2}"],
    r"2\pi": ["2π", "2*pi", "2 pi", r"$2\pi$"],
    r"\ln 2": ["ln(2)", r"\ln{2}"],
    "x^2+2x+1": ["(x+1)^2", "x**2 + 2*x + 1", "x² + 2x + 1", r"f(x) = x^2 + 2x + 1", "1+2x+x^2"],
    r"60^\circ": ["60°", "60", "60 degrees", r"\boxed{60°}", r"\boxed{60\text{ degrees}}"],
    "1, -2": [r"\boxed{-2,1}", "x = 1 or x = -2", "The solutions are $x=1$ and $x=-2$.", r"\{-2, 1\}"],
    r"1 \pm \sqrt{2}": [r"\boxed{1+\sqrt2, 1-\sqrt2}"],
    r"\{1,2,3\}": ["{3, 2, 1}", r"\boxed{\{1,2,3\}}"],
    "(3,4)": [r"\boxed{\left(3,4\right)}", "(x, y) = (3, 4)"],
    r"(-\infty, 3)": ["x < 3", r"\boxed{x<3}", r"x \in (-\infty,3)"],
    r"x \le 3": [r"\boxed{(-\infty, 3]}", r"x \leq 3"],
    r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}": [r"\boxed{\begin{bmatrix}1&2\\3&4\end{bmatrix}}"],
    "12": ["12 km/h", r"12 \mathrm{~km}", "12 cm³", r"\boxed{12\ \text{cm}^2}", "12min", "12 square meters"],
    "2:3": [r"\boxed{2:3}", "2 : 3"],
    "Evelyn": [r"\boxed{\text{Evelyn}}", r"The answer is \textbf{Evelyn}", "The answer is Evelyn.", "**Evelyn**"],
    r"\text{(C)}": [r"\boxed{\textbf{(C)}}", "The answer is (C).", "C."],
    "y = 2x + 1": [r"\boxed{2x+1}", "y=1+2x"],
}
"""An answer in other notations."""

OTHER = {
    "72": [
        "\\boxed{72, 73}",
        "72 or 73",
        "\\boxed{72} or \\boxed{73}",
        "The answer is 71, not 72.",
        "720",
        "7.2",
        "-72",
    ],
    "10": ["The answer is 10 or 20.", "x=10 or x=4", "10 1/2", "10^2"],
    "17": ["<think>maybe \\boxed{17}</think> The answer is 18.", "\\boxed{17} no, \\boxed{18}", "#### 17\n#### 18"],
    "50": ["0.5"],
    "5": [".5", "1 5/6", "5e3", "√5", "5²"],
    ".5": ["5"],
    "0.333": ["1/3"],
    "2:3": ["3:2"],
    "1, 2": ["1, 2, 3"],
    "x<3": ["x>3", "(-\\infty, 3]"],
    "(3,4)": ["(4,3)"],
    "Evelyn": ["\\boxed{\\text{Briana}}"],
}
"""An answer, and what is none of it."""


@pytest.mark.parametrize(
    "answer, response",
    [
        (GSM8K, "72"),
        (GSM8K, "48+24=72"),
        (GSM8K, "She sold 48 + 24 = 72 clips altogether."),
        (GSM8K, "The answer is **72**."),
        (GSM8K, "<reasoning>48/2</reasoning><answer>72</answer>"),
        (GSM8K, "so\n#### 72\nHave 3 nice days"),
        (GSM8K, r"Final answer: $\boxed{72}$. I hope it is correct."),
        (GSM8K, r"$\boxed{71}$, no: $\boxed{72}$"),
        (GSM8K, r"\boxed{71} wait \boxed{72}"),
        ("#### 1,234", "1234"),
        ("18", "She makes $18 every day"),
        ("18", r"\boxed{18 dollars}"),
        ("18", r"\fbox{18}"),
        (r"\frac{1}{2}", "0.5"),
        ("1/2", r"\(\frac12\)"),
        ("0.5", "The answer is 1/2."),
        (r"50\%", "0.5"),
        ("50", "50%"),
        ("(2, 5]", r"\boxed{(2,5]}"),
        ("(2, 5]", "x in (2,5]"),
        (r"(-\infty,2)\cup(3,\infty)", r"$x \in (-\infty, 2) \cup (3, \infty)$"),
        (r"10\text{ cm}", "10"),
        ("12 km/h", "12"),
        (r"90^\circ", "90 degrees"),
        (r"3\sqrt{2}", r"3\sqrt2"),
        ("5x+3", "3+5x"),
        ("x=2", "2"),
        ("1,2", r"\boxed{1} and \boxed{2}"),
        (r"\text{(C)}", "C"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"so $x = \boxed{\frac{3}{4}}$.", "0.75"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \pi/2)}"),
        *((GSM8K, style.replace("@", "72")) for style in STYLES),
        *((answer, response) for answer, responses in SAME.items() for response in responses),
    ],
)
def test_the_usual_ways_to_write_a_right_answer(verifier, answer, response):
    verdict = verifier("q", answer, response)
    assert verdict.correct is True, verdict.why


@pytest.mark.parametrize(
    "answer, response",
    [
        (GSM8K, "24"),
        (GSM8K, ""),
        (GSM8K, r"72 is wrong, so \boxed{71}"),
        (GSM8K, "72?\n#### 71"),
        (GSM8K, "I do not know"),
        ("6", "6 - 2i"),
        ("(2, 5]", "(2, 5)"),
        (r"3\sqrt{2}", "3"),
        ("1/2", r"\boxed{1/3}"),
        (r"\text{even}", "odd"),
        *((answer, response) for answer, responses in OTHER.items() for response in responses),
    ],
)
def test_wrong_answers(verifier, answer, response):
    verdict = verifier("q", answer, response)
    assert verdict.correct is False and verdict.why


def test_an_answer_that_cannot_be_read_leaves_the_response_unverified(verifier):
    assert verifier("q", r"\boxed{}", "5").correct is None


def test_a_hanging_comparison_costs_that_response_its_verdict_and_nothing_else():
    verifier = make_verifier("math", timeout=1, workers=1)
    tower = r"\boxed{9^{9^{9^{9}}}}"
    cases = [("q", "5", response) for response in ("5", tower, r"\boxed{5}", "6")]
    verdicts = verifier.verify_all(cases)
    assert [verdict.correct for verdict in verdicts] == [True, False, True, False]
    assert "took over 1 s" in verdicts[1].why and "expected '5'" in verdicts[3].why


def test_a_worker_that_dies_is_replaced(verifier, monkeypatch):
    assert verifier("q", "5", "5").correct
    workers = [verifier.idle.get() for _ in range(verifier.workers)]
    for worker in workers:
        if worker.process:
            worker.process.kill()
            worker.process.wait()
        verifier.idle.put(worker)
    verdicts = [verifier("q", "5", "5") for _ in range(2 * verifier.workers)]
    assert any("crashed" in verdict.why for verdict in verdicts)
    assert [verdict.correct for verdict in verdicts[-verifier.workers :]] == [True] * verifier.workers
