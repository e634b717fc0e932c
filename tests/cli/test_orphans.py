import os
import subprocess
import sys
import time

WORKER = """
import time
from tabom.cli.orphans import end_with_parent
end_with_parent(0.1)
print("watching", flush=True)
time.sleep(120)
"""
LAUNCHER = """
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
print(worker.pid, worker.stdout.readline(), flush=True)
time.sleep(120)
"""


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"


def test_a_worker_ends_when_its_launcher_is_killed():
    command = [sys.executable, "-c", LAUNCHER, WORKER]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    worker, said = launcher.stdout.readline().split()
    assert said == "watching" and is_running(int(worker))
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 60
    while is_running(int(worker)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
