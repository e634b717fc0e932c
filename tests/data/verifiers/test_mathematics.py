import pytest

from tabom import make_verifier

GSM8K = "In May she sold 48/2 = <<48/2=24>>24 clips.\nTogether 48+24 = <<48+24=72>>72.\n#### 72"


@pytest.fixture(scope="module")
def verifier():
    return make_verifier("math")


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
    ],
)
def test_wrong_answers(verifier, answer, response):
    verdict = verifier("q", answer, response)
    assert verdict.correct is False and verdict.why


def test_an_answer_that_cannot_be_read_leaves_the_response_unverified(verifier):
    assert verifier("q", r"\boxed{}", "5").correct is None


def test_a_hanging_comparison_costs_that_response_its_verdict_and_nothing_else():
    verifier = make_verifier("math", timeout=5)
    tower = r"\boxed{9^{9^{9^{9}}}}"
    cases = [("q", "5", response) for response in ("5", tower, r"\boxed{5}", tower, "6")]
    verdicts = verifier.verify_all(cases)
    assert [verdict.correct for verdict in verdicts] == [True, False, True, False, False]
    assert "took over 5 s" in verdicts[1].why and "expected 5" in verdicts[4].why


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
