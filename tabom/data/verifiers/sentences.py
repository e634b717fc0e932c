"""A text as the sentences that may hold its answer."""

import re

ABBREVIATED = ("Mr", "Mrs", "Ms", "Dr", "St", "Rs", "No", "vs", r"i\.e", r"e\.g")
ABBREVIATIONS = "".join(rf"(?<!\b{word}\.)" for word in ABBREVIATED)
SENTENCE_END = re.compile(
    rf"(?<=[^\s.][.!?]){ABBREVIATIONS}(?<![ap]\.m\.)(?<!^[A-Z]\.)\s+"
    r"(?=[A-Z\\$(\"'*\[\d\ue000])|[\u3002\uff01\uff1f]|\n+",
    re.MULTILINE,
)
ENUMERATION = re.compile(
    r"^[ \t]*(?:#+[ \t]*|>[ \t]*|[-*\u2022+][ \t]+|\(?\d{1,2}[.)][ \t]+(?=\D)|\[[A-Za-z ]+\][ \t]*)+",
    re.MULTILINE,
)
"""What stands before a sentence in a list, a heading or a quotation."""
COURTESY = re.compile(
    r"(?:I )?hope (?:this|that|it)\b(?!\D*\d)|(?:please )?(?:let me know|feel free)|would you like"
    r"|do you (?:want|have|need)|if you (?:have|need|want|would|'d)\b|is there anything"
    r"|(?:good luck|happy \w+ing|thank|you're welcome|(?:great|good|nice) (?:job|work)|well done|congratulations)\b"
    r"|(?:that|this)(?:['\u2019]s| is) (?:the|our|my|your) (?:final )?(?:answer|solution)\W*$",
    re.IGNORECASE,
)
END_OF_PROOF = re.compile(r"\s*\$?\\?(?:blacksquare|square|Box|qed|\u220e|\u25a0|QED|Q\.E\.D\.)\$?\s*$")
EMPHASIS = re.compile(r"\*\*|__|`+|\*(?=\S[^*\n]*\S\*|\S\*)|(?<=[^\s*])\*(?=[\s.,!]|$)")


def sentences(text: str) -> list[str]:
    """The sentences of a text, without emphasis, empty ones and the courtesies at its end."""
    text = re.sub(r"(?<=[a-z)])\*\*(?=\d)", "^", text)
    text = re.sub(r"\s*\(not [^()]*\)", "", text)
    text = ENUMERATION.sub("", EMPHASIS.sub("", text))
    found = [part.strip() for part in SENTENCE_END.split(text) if part.strip(" \t.#-")]
    while found and COURTESY.match(found[-1]):
        found.pop()
    return found
