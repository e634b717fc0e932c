"""Killed and resumed without a person: the weights of a run that nobody disturbed."""

import os
import signal
import subprocess
import sys
import time

import torch

from tests.invariant.conftest import weights
from tests.invariant.test_parallel import command

STEPS = 30


def start(inputs, folder, name):
    arguments = command(inputs, folder, name, max_steps=STEPS, save_steps=1, save_total_limit=3, use_cpu=True)
    at = arguments.index("--ddp_backend")  # which would ask for a process group
    del arguments[at : at + 2]
    words = [sys.executable, "-m", "tabom", *arguments, "--resume_from_checkpoint", "auto"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # A test run in the background may have been told to ignore Ctrl-C, and its children would inherit that.
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_checkpoint(folder, step, process):
    deadline = time.monotonic() + 200
    while not any(int(path.name.partition("-")[2]) >= step for path in folder.glob("checkpoint-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)


def test_killed_and_interrupted_it_goes_on_to_the_same_weights(inputs, tmp_path, rng):
    undisturbed = start(inputs, tmp_path, "whole")
    _, error = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0, error
    for kind, step, status in (
        (signal.SIGKILL, 5, -signal.SIGKILL),
        (signal.SIGINT, 12, 130),
        (signal.SIGTERM, 15, 143),
    ):
        process = start(inputs, tmp_path, "disturbed")
        wait_for_checkpoint(tmp_path / "disturbed", step, process)
        time.sleep(rng.random() / 50)  # somewhere in a step or in a save
        process.send_signal(kind)
        _, error = process.communicate(timeout=60)
        assert process.returncode == status, error
        if kind != signal.SIGKILL:
            said = error.splitlines()[-1]
            assert "Traceback" not in error and "--resume_from_checkpoint auto goes on" in said
            newest = max(int(path.name.partition("-")[2]) for path in (tmp_path / "disturbed").glob("checkpoint-*"))
            assert kind != signal.SIGTERM or f"the checkpoint of step {newest} is saved" in said
    last = start(inputs, tmp_path, "disturbed")
    _, error = last.communicate(timeout=300)
    assert last.returncode == 0, error
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "disturbed")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
