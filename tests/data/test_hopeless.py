"""Giving up is sound: what is hopeless by its beginning is wrong however it goes on."""

from hypothesis import given
from hypothesis import strategies as st

from tabom.data.verifiers import make_verifier

TEXTS = st.text(st.sampled_from("ab \n"), max_size=5)
EXACT = make_verifier("exact")


@given(answer=TEXTS, beginning=TEXTS, rest=TEXTS)
def test_no_hopeless_beginning_is_right(answer, beginning, rest):
    if EXACT.is_hopeless(answer, beginning):
        assert EXACT("", answer, beginning + rest).correct is False


@given(answer=TEXTS, beginning=TEXTS)
def test_every_beginning_that_is_not_hopeless_can_be_right(answer, beginning):
    """By the answer itself, or spaces more."""
    if answer.strip() and not EXACT.is_hopeless(answer, beginning):
        endings = ["", *(answer.strip()[i:] for i in range(len(answer)))]
        assert any(EXACT("", answer, beginning + ending).correct for ending in endings)


def test_only_exact_can_tell():
    assert EXACT.is_hopeless("12", " 2") and not EXACT.is_hopeless("12", " 1") and not EXACT.is_hopeless(None, "x")
    assert not make_verifier("contains").is_hopeless("12", "2")
    assert not make_verifier("regex", pattern="(.*)").is_hopeless("12", "2")
