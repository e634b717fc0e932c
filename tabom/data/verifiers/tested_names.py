"""Which names in a record's tests stand for the program, and which for Python's own functions.

Tests use names that they do not define. `assert sqrt(f(3)) == 2` means Python's `sqrt`, as the harnesses of public
data sets import it, but `assert gcd(12, 8) == 4` tests the program's `gcd`: if Python's took its place, a program that
solves nothing would pass.
"""

import ast
import builtins
import symtable
from collections.abc import Iterable, Iterator

from tabom.data.verifiers.code_blocks import used_names
from tabom.data.verifiers.harness import ALIASES, PRELUDE, PRELUDE_MODULES, SOLUTION_MODULES

STANDARD = {*vars(builtins), *PRELUDE_MODULES, *ALIASES, "pytest", "unittest"}.union(*map(str.split, PRELUDE.values()))
"""Names that a test may use without an import, and that Python has."""


def free_names(source: str) -> set[str]:
    """The names that a module uses and does not bind."""
    module, *inner = scopes(symtable.symtable(source, "tests.py", "exec"))
    symbols = [*module.get_symbols(), *(each for table in inner for each in table.get_symbols() if each.is_global())]
    return {symbol.get_name() for symbol in symbols if symbol.is_referenced()} - bound_names(source)


def bound_names(source: str) -> set[str]:
    """The names that a module binds at its top level, or in a function that declares them global."""
    module, *inner = scopes(symtable.symtable(source, "tests.py", "exec"))
    bound = [symbol for symbol in module.get_symbols() if symbol.is_assigned() or symbol.is_imported()]
    bound += [symbol for table in inner for symbol in table.get_symbols() if symbol.is_declared_global()]
    return {symbol.get_name() for symbol in bound}


def scopes(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    """A scope and all scopes inside it."""
    yield table
    for child in table.get_children():
        yield from scopes(child)


def imported_names(tree: ast.Module) -> set[str]:
    """The names that are imported from a module by name."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in nodes for alias in node.names} - {"*"}


def imported_packages(tree: ast.Module) -> set[str]:
    """The packages that are imported, or modules of them."""
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return {module.partition(".")[0] for module in modules}


def names_of_program(tree: ast.Module, free: Iterable[str]) -> set[str]:
    """The names that can only be the program's: Python does not have them, or they are imported from the program."""
    nodes = list(ast.walk(tree))
    origins = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module in SOLUTION_MODULES]
    names = {alias.asname or alias.name for node in origins for alias in node.names}
    modules = [alias for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names |= {alias.asname or alias.name for alias in modules if alias.name in SOLUTION_MODULES}
    return names | {name for name in free if name not in STANDARD}


def tested_standard_names(tree: ast.Module, free: set[str]) -> set[str]:
    """Names of Python's own functions by which the tests mean functions of the program.

    They are those that are called in an assertion in which nothing else can come from the program: no name of the
    program, and no name that the tests bind, which may hold one of its results. Tests without any name of the program
    mean all functions that Python does not have as builtins, or else the first builtin that an assertion calls.
    """
    own = names_of_program(tree, free)
    if not own:
        called = called_names(tree) & free
        builtin = [name for each in assertions(tree) for name in outermost_call(each)]
        return {name for name in called if not hasattr(builtins, name)} or {
            name for name in builtin[:1] if name in free
        }
    return {
        name
        for each in assertions(tree)
        if used_names(each) <= free - own
        for name in called_names(each)
        if not hasattr(builtins, name)
    }


def assertions(tree: ast.Module) -> Iterator[ast.expr]:
    """What is asserted: the conditions of `assert`, and the arguments of unittest's methods, as a tuple."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            yield node.test
        elif (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.startswith("assert")
        ):
            yield ast.Tuple(node.args, ast.Load())


def outermost_call(asserted: ast.expr) -> list[str]:
    """The function whose result is asserted or compared, if it has a plain name."""
    side = asserted.left if isinstance(asserted, ast.Compare) else asserted
    side = side.elts[0] if isinstance(side, ast.Tuple) and side.elts else side
    return [side.func.id] if isinstance(side, ast.Call) and isinstance(side.func, ast.Name) else []


def called_names(tree: ast.AST) -> set[str]:
    """The plain names that are called."""
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {function.id for function in calls if isinstance(function, ast.Name)}
