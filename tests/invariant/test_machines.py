"""Two launchers, as on two machines, here at two addresses of the loopback interface: restarts and lost peers."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from tabom.cli.main import main
from tabom.data.store import ResponseFolder, TrajectoryFile

PROMPTS = 120


def start(folder, commands, restarts):
    """The two launchers, each of one process that runs the command lines; see worker.py."""
    path = folder / "commands.json"
    path.write_text(json.dumps(commands))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launchers = []
    for machine in range(2):
        launcher = [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"),
            *(f"--max-restarts={restarts}", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}"),
            *(f"--rdzv_conf=is_host={machine == 0:d}", f"--local_addr=127.0.0.{machine + 1}"),
        ]
        with (folder / f"said-{machine}").open("wb") as said:
            command = [*launcher, "-m", "tests.invariant.worker", str(path)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            launchers.append(subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment))
    return launchers


def said(folder):
    return "".join((folder / f"said-{machine}").read_text() for machine in range(2))


def wait_for_lines(folder, pattern, count, launchers):
    """Waits until the files of single processes hold so many lines."""
    deadline = time.monotonic() + 200
    while sum(path.read_bytes().count(b"\n") for path in folder.glob(pattern)) < count:
        assert not any(launcher.poll() for launcher in launchers) and time.monotonic() < deadline, said(folder)
        time.sleep(0.001)


def worker_of(launcher):
    [worker] = psutil.Process(launcher.pid).children()
    return worker


@pytest.fixture(scope="module")
def asked(inputs):
    prompts = [{"prompt": f"{i}+1=", "answer": "."} for i in range(PROMPTS)]
    path = inputs / "prompts.jsonl"
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    settings = ["--max_new_tokens", "1", "--temperature", "1", "--compute_budget", "16", "--peer_timeout", "60"]
    return ["--model", str(inputs / "untied"), "--prompts", str(path), "--verifier", "exact", *settings]


def by_id(records):
    """The records by their ids, each once, without times."""
    found = list(records)
    kept = {record["id"]: {**record, "seconds": None} for record in found}
    assert len(kept) == len(found) == PROMPTS
    return kept


def test_workers_killed_on_either_machine_are_restarted_and_make_what_one_process_makes(asked, tmp_path):
    """torchrun counts the restart on the machine of the killed worker only, and keeps the store."""
    collecting, evaluating = ["collect", *asked, "--output"], ["evaluate", *asked, "--output_dir"]
    for command, output in ((collecting, "one.jsonl"), (evaluating, "one")):
        assert main([*command, str(tmp_path / output)]) == 0
    commands = [[*collecting, str(tmp_path / "two.jsonl")], [*evaluating, str(tmp_path / "two")]]
    launchers = start(tmp_path, commands, restarts=3)
    wait_for_lines(tmp_path, "two.jsonl.rank*", 40, launchers)
    worker_of(launchers[1]).kill()
    wait_for_lines(tmp_path, "two/*/*/*/answers-*.jsonl", 40, launchers)
    worker_of(launchers[0]).kill()
    assert [launcher.wait(timeout=200) for launcher in launchers] == [0, 0], said(tmp_path)
    one, two = (by_id(TrajectoryFile(tmp_path / f"{name}.jsonl").records()) for name in ("one", "two"))
    assert one == two
    cells = [{path.parent for path in (tmp_path / name).rglob("answers-*.jsonl")} for name in ("one", "two")]
    one, two = (by_id(ResponseFolder(cell).records()) for [cell] in cells)
    assert one == two


JOB = """
import time
from tabom.sampling.ranks import joined
with joined(5) as ranks:
    ranks.signal("ready")
    ranks.wait_for("ready", ranks.size)
    print("ready", flush=True)
    time.sleep(1000)
"""


@pytest.mark.parametrize(
    "size, silent, missing", [(3, [1, 2], "ranks 1, 2 of 3"), (2, [0], "the store on the machine of rank 0")]
)
def test_processes_end_and_name_the_peers_that_are_lost(size, silent, missing):
    """A stopped process is as silent as a machine behind a cut link; the first process serves the store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", JOB],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **job, "RANK": str(rank)},
        )
        for rank in range(size)
    ]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * size
    for rank in silent:
        processes[rank].send_signal(signal.SIGSTOP)
    for rank in set(range(size)) - set(silent):
        _, error = processes[rank].communicate(timeout=60)
        assert processes[rank].returncode == 1 and missing in error and "for 5 s (peer_timeout)" in error, error
    for rank in silent:
        processes[rank].kill()
        processes[rank].communicate()
