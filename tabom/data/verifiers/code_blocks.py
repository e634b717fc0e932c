"""The program in a response: which of its fenced blocks it is, and how it continues the code of its task."""

import ast
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tabom.data.verifiers.reasoning import without_thoughts

FENCE = re.compile(
    r"^(?P<indent>[ \t]*(?:(?:[-*+>]|\d+\.)[ \t]*)?)(?P<mark>`{3,}|~{3,})[ \t]*(?P<language>[\w+#.-]*)[^\n`]*$"
)
QUOTE = re.compile(r"^[ \t]*> ?")
INLINE_FENCE = re.compile(r"(?<=[^\s>])[ \t]*(```(?:python3?|py)[ \t]*\n)", re.IGNORECASE)
TAGS = (("[PYTHON]", "[/PYTHON]"), ("[BEGIN]", "[DONE]"), ("<code>", "</code>"), ("<answer>", "</answer>"))
PYTHON = ("", "python", "python3", "py", "python2", "py3", "python-repl", "ipython")
CODE_LINE = re.compile(r"(?P<indent>[ \t]*)(?:async def|def|class|import|from|@)\s*\w")
READING = {"input", "open", "sys"}
"""Whose calls read the program's input, so that they are no constants."""
MOST_CLOSINGS = 8
"""Fences that are tried as the end of a block that does not parse; a docstring may hold some."""


class Block(NamedTuple):
    """A fenced block: its language, in lower case, and its text."""

    language: str
    text: str


def find_program(response: str, names: Iterable[str] = ()) -> str:
    """The program of a response.

    Of its fenced blocks in Python the last one that defines one of the `names` is taken, else the last one that
    is more than a value; imports and definitions that it lacks are taken from the blocks before it, and from those
    after it that define what it uses. A response without a fence is the program.
    """
    text = without_thoughts(response)
    for opening, closing in TAGS:
        if opening in text:
            inside = text.rpartition(opening)[2].partition(closing)[0]
            text = inside if inside.strip() else text
    blocks = [block.text for block in fenced_blocks(text) if block.language in PYTHON]
    if not blocks:
        return unfenced(text)
    parsed = [(block, parse(block)) for block in blocks]
    wanted = set(names)
    defining = [place for place, (_, tree) in enumerate(parsed) if tree and wanted & definitions(tree)]
    programs = [place for place, (_, tree) in enumerate(parsed) if tree and is_program(tree)]
    chosen = (defining or programs or [len(parsed) - 1])[-1]
    block, tree = parsed[chosen]
    if tree is None:
        return block
    missing = used_names(tree) - definitions(tree)
    later = [other for _, other in parsed[chosen + 1 :] if other and missing & definitions(other)]
    return borrowed(tree, [*later, *(earlier for _, earlier in parsed[:chosen] if earlier)], wanted) + block


def unfenced(text: str) -> str:
    """The program of a text without fences: all of it, or what parses from its first line of code on.

    A text that begins with an indent may be the body of a function.
    """
    lines = text.strip("\n").split("\n")
    is_body = re.match(r"\t| {4}", lines[0]) is not None
    code = [(number, match["indent"]) for number, line in enumerate(lines) if (match := CODE_LINE.match(line))]
    if parse(text) is not None or not (is_body or code):
        return text
    start, indent = (0, "") if is_body else code[0]
    lines = ["if True:"] * is_body + [line.removeprefix(indent) for line in lines[start:]]
    for _ in range(MOST_CLOSINGS):
        try:
            tree = ast.parse("\n".join(lines))
        except SyntaxError as error:
            lines = lines[: max((error.lineno or 1) - 1, 0)]
        except (ValueError, RecursionError, MemoryError):
            return text
        else:
            return "\n".join(lines[is_body:]) if is_body or definitions(tree) else text
    return text


def fenced_blocks(text: str) -> list[Block]:
    """The fenced blocks of a text: cut off, indented in lists, closed after fences in docstrings, or not opened."""
    lines = INLINE_FENCE.sub(r"\n\1", text).split("\n")
    fences = [(number, match) for number, line in enumerate(lines) if (match := FENCE.match(line))]
    if len(fences) == 1 and not fences[0][1]["language"]:
        number = fences[0][0]
        before = "\n".join(lines[:number])
        if parse(before) is not None and before.strip():
            return [Block("", before)]
    blocks = []
    place = 0
    while place < len(fences):
        number, opening = fences[place]
        closings = [
            later
            for later in range(place + 1, len(fences))
            if may_close(fences[later][1]) and fences[later][1]["mark"].startswith(opening["mark"])
        ]
        ends = [fences[later][0] for later in closings[:MOST_CLOSINGS]] or [len(lines)]
        inside = [QUOTE.sub("", line) for line in lines] if ">" in opening["indent"] else lines
        bodies = [textwrap.dedent("\n".join(inside[number + 1 : end])) + "\n" for end in ends]
        language = opening["language"].lower()
        tries = bodies if language in PYTHON else bodies[:1]
        chosen = next((index for index, body in enumerate(tries) if parse(body) is not None), 0)
        blocks.append(Block(language, bodies[chosen]))
        place = closings[chosen] + 1 if closings else len(fences)
    return blocks


def may_close(fence: re.Match) -> bool:
    """Whether a fence can be the end of a block: it names no language, or a sentence goes on behind it."""
    first, *others = fence[0].removeprefix(fence["indent"]).split()
    return not fence["language"] or (first == fence["mark"] and len(others) > 1)


def parse(source: str) -> ast.Module | None:
    """The syntax tree of a source, None where there is none."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def compiles(source: str) -> bool:
    """Whether a source is a module; unlike a syntax tree, that has no `return` outside of a function."""
    try:
        compile(source, "program.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def definitions(tree: ast.Module) -> set[str]:
    """The names that a module defines at its top level."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.Import | ast.ImportFrom):
            names |= bound_names(node)
    return names


def used_names(tree: ast.AST) -> set[str]:
    """All plain names in a syntax tree."""
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def bound_names(node: ast.stmt) -> set[str]:
    """The names that an assignment or an import binds."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


def is_program(tree: ast.Module) -> bool:
    """Whether a block does something, rather than show a value such as an output."""
    return any(not isinstance(node, ast.Expr) or contains_call(node) for node in tree.body)


def contains_call(node: ast.AST) -> bool:
    """Whether something is called in an expression."""
    return any(isinstance(each, ast.Call) for each in ast.walk(node))


def called_names(node: ast.AST) -> set[str]:
    """The plain names of what is called in a syntax tree: `set` of `set("ab")`, `sys` of `sys.stdin.read()`."""
    return set().union(*(used_names(each.func) for each in ast.walk(node) if isinstance(each, ast.Call)))


def borrowed(tree: ast.Module, others: Sequence[ast.Module], wanted: set[str]) -> str:
    """The imports and definitions of other blocks that a block or its tests use and that the block does not make.

    A variable is taken if it is a constant, such as `VOWELS = set("aeiou")`: an example of a call is none.
    """
    used = wanted.union(*map(used_names, [tree, *others]))
    missing = used - definitions(tree)
    latest: dict[str, ast.stmt] = {}
    running = READING | {node.name for each in [tree, *others] for node in each.body if hasattr(node, "name")}
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
    for each in others:
        for node in each.body:
            if isinstance(node, kinds) or (isinstance(node, ast.Assign) and called_names(node).isdisjoint(running)):
                names = {node.name} if hasattr(node, "name") else bound_names(node)
                if names & missing or "*" in names:
                    latest |= dict.fromkeys(names, node)
    nodes = {id(node): node for node in latest.values() if getattr(node, "module", None) != "__future__"}
    return "".join(ast.unparse(node) + "\n" for node in nodes.values())


def complete(block: str, header: str, entry_point: str | None) -> list[str]:
    """The sources of a program: a block that does not define the entry point continues the header.

    Of the ways to continue it (as it is, with an indent that the first line lost, with all of it indented) the first
    that parses is taken.
    """
    root = re.match(r"\w*", entry_point or "")[0]
    dedented = textwrap.dedent(block)
    tree = parse(dedented)
    if not root or not header.strip() or (tree and root in definitions(tree)):
        return [source for source in (closed(header), dedented) if source.strip()]
    body = block.lstrip("\n")
    continuations = (body, "    " + body, textwrap.indent(textwrap.dedent(body), "    "))
    whole = [header.rstrip(" ") + ("" if header.endswith(("\n", " ")) else "\n") + each for each in continuations]
    return [next((each for each in whole if compiles(each) and has_body(each, root)), header + block)]


def closed(header: str) -> str:
    """A header as a source of its own: where it ends with the first line of a function, that gets a body."""
    whole = (header, header.rstrip() + "\n    pass\n", header.rstrip() + "\n        pass\n")
    return next((each for each in whole if parse(each)), "")


def has_body(source: str, function: str) -> bool:
    """Whether a function of this name is more than its docstring."""
    found = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == function
    ]
    return any(not is_stub(node) for node in found)


def is_stub(node: ast.stmt) -> bool:
    """Whether a function or class is left to be written: a docstring, `pass` or `...` is all of its body."""
    return all(
        isinstance(each, ast.Pass) or (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))
        for each in node.body
    )
