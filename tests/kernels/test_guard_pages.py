"""No op touches a byte beyond its tensors, in a child process that would not survive it."""

import os
import signal
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="guards pages of the host's memory")


def run_child(what: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tests.kernels.guard_pages", what]
    return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_op_touches_the_page_beside_its_tensors(backend):
    child = run_child(backend)
    assert child.returncode == 0, (child.returncode, child.stderr[-3000:])
    assert "nothing beyond the ends was touched" in child.stdout


def test_the_guard_page_ends_a_process_that_touches_it():
    assert run_child("overrun").returncode == -signal.SIGSEGV
