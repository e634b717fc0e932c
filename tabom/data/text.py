"""Makes text of unknown origin safe to print on a terminal."""

import unicodedata

BIDIRECTIONAL = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that change the order in which others are shown."""


def printable(text: str) -> str:
    """The text with control characters (such as ESC, OSC and C1) replaced by visible escapes; newline and tab stay."""
    return "".join(spelt_out(c) if is_control(c) and c not in "\n\t" else c for c in text)


def is_control(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs") or character in BIDIRECTIONAL


def spelt_out(character: str) -> str:
    return character.encode("unicode_escape").decode()
