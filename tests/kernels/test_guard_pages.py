"""No op of the torch backend touches a byte beyond its tensors, in a child process that would not survive it.

The emulator checks each access of the Triton kernels, in every test.
"""

import signal
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="guards pages of the host's memory")


def run_child(what: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tests.kernels.guard_pages", what]
    return subprocess.run(command, capture_output=True, text=True)


def test_no_op_touches_the_page_beside_its_tensors():
    child = run_child("torch")
    assert child.returncode == 0, (child.returncode, child.stderr[-3000:])
    assert "nothing beyond the ends was touched" in child.stdout


def test_the_guard_page_ends_a_process_that_touches_it():
    assert run_child("overrun").returncode == -signal.SIGSEGV
