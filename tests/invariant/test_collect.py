"""One process, several processes, killed and resumed on others: the same records, each once."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tabom.cli.main import main
from tabom.data.store import ResponseFolder, TrajectoryFile
from tests.invariant.conftest import launch

PROMPTS = 120
SETTINGS = ["--max_new_tokens", "1", "--temperature", "1", "--samples_per_prompt", "2", "--compute_budget", "16"]


@pytest.fixture(scope="module")
def asked(inputs):
    """The words that name the model and its prompts; some answers will be right, some wrong, some cannot be checked."""
    path = inputs / "prompts.jsonl"
    answers = [{}, {"answer": "."}, {"answer": "b"}]  # what the model says often
    prompts = [{"prompt": f"{i}+1=", **answers[i % 3]} for i in range(PROMPTS)]
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    return ["--model", str(inputs / "untied"), "--prompts", str(path), "--verifier", "exact", *SETTINGS]


def collecting(asked, output):
    return ["collect", *asked, "--output", str(output)]


def records(output):
    """What is kept and what is rejected, by name; nothing is left of shards."""
    found = list(TrajectoryFile(output).records())
    by_name = {record["id"]: record for record in found}
    assert len(found) == len(by_name) == 2 * PROMPTS, "each once"
    assert not list(output.parent.glob(f"{output.name}.rank*"))
    return by_name


@pytest.fixture(scope="module")
def alone(asked, tmp_path_factory):
    """Of one process that nobody disturbed."""
    output = tmp_path_factory.mktemp("alone") / "t.jsonl"
    assert main(collecting(asked, output)) == 0
    found = records(output)
    assert {record["correct"] for record in found.values()} == {True, False, None}
    return found


def test_two_processes_collect_and_evaluate_as_one(asked, alone, tmp_path):
    evaluating = ["evaluate", *asked, "--output_dir"]
    assert main([*evaluating, str(tmp_path / "one")]) == 0
    said = launch(tmp_path, [collecting(asked, tmp_path / "t.jsonl"), [*evaluating, str(tmp_path / "two")]], 2)
    assert records(tmp_path / "t.jsonl") == alone
    assert said.count("240 attempts (240 made now)") == 1, "one process speaks for both"
    one, two = (json.loads((tmp_path / folder / "results.json").read_text()) for folder in ("one", "two"))
    for result in one + two:
        del result["seconds"]
    assert one == two
    [cell] = {path.parent for path in (tmp_path / "two").rglob("answers-*.jsonl")}
    shares = [path.read_bytes().count(b"\n") for path in sorted(cell.glob("answers-*.jsonl"))]
    assert sum(shares) == len(list(ResponseFolder(cell).records())) == 240 and min(shares) > 0


def test_killed_on_two_processes_it_goes_on_with_one_or_three(asked, alone, tmp_path, rng):
    """Any process of the two, at any moment."""
    output = tmp_path / "one" / "t.jsonl"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "tabom"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*launcher, *collecting(asked, output)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    deadline = time.monotonic() + 200
    while sum(path.read_bytes().count(b"\n") for path in output.parent.glob("*.rank*")) < 40:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(rng.random() / 50)
    rng.choice(psutil.Process(process.pid).children()).send_signal(signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0 and "SIGKILL" in error, error
    assert len(list(output.parent.glob("*.rank?"))) == 2 and not output.read_bytes(), "killed in the middle"
    shutil.copytree(output.parent, tmp_path / "three")
    assert main(collecting(asked, output)) == 0
    launch(tmp_path, [collecting(asked, tmp_path / "three" / "t.jsonl")], 3)
    assert records(output) == records(tmp_path / "three" / "t.jsonl") == alone


def test_at_sigterm_it_finishes_what_it_has_begun_and_says_what_is_left(asked, alone, tmp_path):
    output = tmp_path / "t.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "tabom", *collecting(asked, output)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    files = [output, output.with_name(f"{output.name}.rejected")]
    deadline = time.monotonic() + 200
    while sum(path.read_bytes().count(b"\n") for path in files if path.exists()) < 16:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143, error
    left = 2 * PROMPTS - len(list(TrajectoryFile(output).records()))
    said = f"ended by SIGTERM; {left} of {2 * PROMPTS} answers are left; the same command goes on where it stopped"
    assert error.splitlines()[-1] == f"tabom collect: {said}" and left > 0
    assert main(collecting(asked, output)) == 0
    assert records(output) == alone
