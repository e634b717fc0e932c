import ast
import inspect
import subprocess
import sys

import pytest

import tabom


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_tabom_imports_at_once_and_loads_nothing():
    seconds, *modules = run_python(
        "import sys, time; start = time.perf_counter(); import tabom; print(time.perf_counter() - start, *sys.modules)"
    )
    assert not {"torch", "numpy", "transformers", "tabom_kernels"} & set(modules)
    assert float(seconds) < 0.2


def test_the_kernels_load_neither_transformers_nor_triton():
    modules = set(run_python("import sys, tabom_kernels; print(*sys.modules)"))
    assert not {"transformers", "triton", "tabom"} & modules and "torch" in modules


@pytest.mark.parametrize("name", tabom.__all__)
def test_a_public_name_is_what_its_module_calls_it(name):
    value = getattr(tabom, name)
    assert value.__name__ == name and value.__module__.startswith("tabom.")
    assert name in dir(tabom)


def test_type_checkers_see_the_same_names():
    [block] = (node for node in ast.parse(inspect.getsource(tabom)).body if isinstance(node, ast.If))
    seen = {node.module.removeprefix("tabom."): tuple(alias.name for alias in node.names) for node in block.body}
    assert seen == tabom.MODULES
    assert sorted(name for names in tabom.MODULES.values() for name in names) == tabom.__all__


def test_an_unknown_name():
    with pytest.raises(AttributeError, match=r"module 'tabom' has no attribute 'Trainer'"):
        _ = tabom.Trainer
