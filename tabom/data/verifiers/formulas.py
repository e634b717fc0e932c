"""LaTeX inside prose: each formula becomes one sign while a text is cut into sentences and clauses.

So no full stop, comma, bracket or word inside a formula is taken for one of the sentence around it.
"""

import re

ENVIRONMENT = r"(?:align|aligned|alignat|gather|gathered|equation|eqnarray|multline|split)\*?"
DISPLAY = re.compile(
    rf"\$\$(?P<dollars>.+?)\$\$|\\\[(?P<brackets>.+?)\\\]|\\begin\{{(?P<name>{ENVIRONMENT})\}}(?P<lines>.+?)\\end\{{(?P=name)\}}",
    re.DOTALL,
)
INLINE = re.compile(
    r"\\\((?P<brackets>(?:(?!\\\)).)+)\\\)|(?<![\\\d])\$(?P<dollars>(?:\\.|[^$\n\\])+)\$(?!\d)",
    re.DOTALL,
)
NESTED = re.compile(rf"\\(?:begin|end)\{{{ENVIRONMENT}\}}(?:\{{\d\}})?")
COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname|boxed|fbox)\s*\{([^{}]*)\}")
PRICES = re.compile(
    r"(?<![\\a-zA-Z])(?!and\b|or\b|sin\b|cos\b|tan\b|log\b|exp\b|sqrt\b)[a-zA-Z]{3,}"
    r"|(?i:\b(?:it|no|we|he|so|by|is)\b)"
)
SIGN = re.compile("\ue000(\\d+)\ue001")


def hide(text: str) -> tuple[str, list[str]]:
    """A text with a sign for each formula, and the formulas; the stop or comma at a formula's end follows its sign."""
    formulas: list[str] = []

    def sign(content: str) -> str:
        content = last_line(content).strip()
        formulas.append(content.rstrip(" .,;~").removesuffix("\\"))
        return f"\ue000{len(formulas) - 1}\ue001" + (content[-1:] if content.endswith((".", ",", ";")) else "")

    def display(match: re.Match) -> str:
        return f" {sign(match['dollars'] or match['brackets'] or match['lines'])} "

    def inline(match: re.Match) -> str:
        content = match["brackets"] or match["dollars"]
        return match[0] if match["dollars"] and are_prices(content) else sign(content)

    return INLINE.sub(inline, DISPLAY.sub(display, text)), formulas


def show(text: str, formulas: list[str]) -> str:
    """A text with its formulas, each between `\\(` and `\\)`."""
    return SIGN.sub(lambda match: rf"\({formulas[int(match[1])]}\)", text)


def last_line(content: str) -> str:
    """The last line of a formula of several lines, without its signs of alignment."""
    if not NESTED.search(content) and re.search(r"\\begin\{", content):
        return " ".join(content.split())
    lines = [line.replace("&", " ").strip() for line in re.split(r"\\\\(?:\[[^\]]*\])?", NESTED.sub(" ", content))]
    lines = [line for line in lines if line.strip(" .,")] or [""]
    return " ".join(re.sub(r"^(?:\\(?:Rightarrow|implies|therefore|qquad|quad|iff)\b|[=\s])+", "", lines[-1]).split())


def are_prices(content: str) -> bool:
    """Whether two dollars are those of two prices, because words or an unfinished calculation stand between them."""
    has_words = PRICES.search(COMMAND.sub("", content)) is not None and "\\" not in content
    return has_words or re.search(r"(?:[-+*/=]|\\times)\s*$|^\d.*\s$", content) is not None
