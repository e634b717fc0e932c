"""Verifiers: whether a response is right, and why. One file a family; `make_verifier` chooses by name."""

from tabom.data.verifiers.registry import VERIFIERS, make_verifier, settings_of, verifier_for
from tabom.data.verifiers.verdict import Answer, Check, Verdict, Verifier, as_verifier

__all__ = [
    "VERIFIERS",
    "Answer",
    "Check",
    "Verdict",
    "Verifier",
    "as_verifier",
    "make_verifier",
    "settings_of",
    "verifier_for",
]
