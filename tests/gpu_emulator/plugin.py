"""pytest plugin: where there is no GPU, Triton's kernels run on the emulator.

python -m pytest tests/kernels/test_ranking.py --architecture 80 --chaos --perturb
"""

import pytest
import torch

from tabom_kernels.backends.selection import HAS_TRITON
from tests.gpu_emulator.settings import SETTINGS
from tests.gpu_emulator.uninitialised import mark_new_memory


def pytest_addoption(parser: pytest.Parser) -> None:
    """The emulator's settings."""
    group = parser.getgroup("GPU emulator")
    group.addoption("--architecture", type=int, default=90, choices=(80, 90, 100), help="what kernels are compiled for")
    group.addoption("--chaos", action="store_true", help="run warps in a random order")
    group.addoption("--perturb", action="store_true", help="ex2, lg2, rcp, div and tanh are off by their bound")


def pytest_configure(config: pytest.Config) -> None:
    """Installs the emulator where there is no GPU."""
    if torch.cuda.is_available() or not HAS_TRITON:
        return
    from tests.gpu_emulator.driver import install

    for name in ("architecture", "chaos", "perturb"):
        setattr(SETTINGS, name, config.getoption(name))
    install()


def pytest_report_header() -> str:
    """What the kernels run on."""
    if torch.cuda.is_available():
        return "Triton kernels run on the GPU"
    options = [name for name in ("chaos", "perturb") if getattr(SETTINGS, name)]
    return f"Triton kernels are compiled for sm_{SETTINGS.architecture} and emulated {' '.join(options)}".strip()


@pytest.fixture
def marked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kernels are emulated, memory that a test allocates is marked, so that a read before a write is reported."""
    if not torch.cuda.is_available():
        mark_new_memory(monkeypatch)
