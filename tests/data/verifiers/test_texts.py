import pytest

from tabom import Verdict, make_verifier
from tabom.data.verifiers import verifier_for


@pytest.mark.parametrize(
    "name, settings, answer, response, correct",
    [
        ("exact", {}, "42", " 42\n", True),
        ("exact", {}, "42", "it is 42", False),
        ("contains", {}, "Paris", "It is Paris.", True),
        ("contains", {}, "Paris", "It is paris.", False),
        ("regex", {"pattern": "answer: (.*)"}, "7", "answer: 5\nanswer: 7 ", True),
        ("regex", {"pattern": "answer: (.*)"}, "5", "answer: 5\nanswer: 7", False),
        ("regex", {"pattern": "answer: (.*)"}, "7", "7", False),
    ],
)
def test_text_verifiers(name, settings, answer, response, correct):
    verdict = make_verifier(name, **settings)("q", answer, response)
    assert verdict.correct is correct and verdict.why


@pytest.mark.parametrize("name", ["exact", "contains"])
@pytest.mark.parametrize("answer", [None, ""])
def test_without_an_answer_nothing_is_right(name, answer):
    assert make_verifier(name)("q", answer, "").correct is None


def longer_than_the_prompt(prompt, answer, response):
    return len(response) > len(prompt)


def test_ones_own_function_gives_a_truth_value_or_a_verdict():
    own = make_verifier(f"python:{__name__}.longer_than_the_prompt")
    assert own("ab", None, "abc").correct is True and own("ab", None, "a").correct is False
    assert own.verify_all([("ab", None, "abc"), ("ab", None, "a")]) == [(True, "right"), (False, "wrong")]
    assert isinstance(own("ab", None, "abc"), Verdict)


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("maths", {}, "verifier='maths': expected one of exact"),
        ("exact", {"timeout": 1}, "timeout=1: the verifier 'exact' takes none"),
        ("regex", {}, "needs pattern"),
        ("regex", {"pattern": "("}, "not a regular expression"),
        ("regex", {"pattern": "a"}, "has 0 groups"),
        ("python:f", {}, "expected python:module.function"),
        ("python:no_such_module.f", {}, "No module named"),
        ("python:json.no_such", {}, "no_such"),
    ],
)
def test_wrong_names_and_settings(name, settings, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make_verifier(name, **settings)


@pytest.mark.parametrize(
    "answers, name",
    [
        (["yes", "no"], "exact"),
        (["42", "-1,234.5", "$3", "50%", " .5 "], "math"),
        ([42, 0.5], "math"),
        (["42", "a dozen"], "exact"),
        (["x", r"\frac{1}{2}"], "math"),
        (["... #### 7", None], "math"),
        ([["assert f()"]], "code"),
        ([{"tests": "assert f()"}, None], "code"),
        ([None, None], "exact"),
    ],
)
def test_the_verifier_that_the_answers_ask_for(answers, name):
    assert verifier_for(answers) == name
