"""Runs inside the sandbox, given to Python as text: limits itself, gives up root, then runs the program.

The command line holds `program` or `tests`, the descriptors of a file to read and of one to write, the limits (seconds,
MiB of memory, MiB of a file, processes) and the user to become. The file to read holds a JSON object. `program` are
sources that are run one after the other in one module; `stdin` is what they read. For `tests` it holds what `run_tests`
in harness.py takes.
"""

import ctypes
import json
import os
import resource
import socket
import sys
import types
from contextlib import suppress

PR_SET_DUMPABLE = 4


def limit(seconds: float, memory: int, file_size: int, processes: int, user: int) -> None:
    """Sets the limits and becomes `user` if this is root, for which the limit on processes does not hold.

    The limit on memory is each process's; should they fill the machine together, these are what the kernel ends first.
    """
    with open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    mine = [pid for pid in os.listdir("/proc") if pid.isdigit() and owner(pid) == os.getuid()]
    limits = {
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_AS: memory << 20,
        resource.RLIMIT_FSIZE: file_size << 20,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: sum(map(threads, mine)) + processes,  # it counts all processes of the user
    }
    for name, value in limits.items():
        resource.setrlimit(name, (value, value))


def owner(pid: str) -> int | None:
    """The user of a process, None when it has just ended."""
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except FileNotFoundError:
        return None


def threads(pid: str) -> int:
    """How many threads a process has; 0 when it has just ended."""
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except FileNotFoundError:
        return 0


def run_program(given: int, output: int) -> None:
    """Runs a program that reads its standard input and prints; nothing in this process knows what it should print."""
    from tabom.data.verifiers.harness import execute

    with os.fdopen(given) as file:
        job = json.load(file)
    with open("stdin", "w+") as stdin:
        stdin.write(job["stdin"])
        stdin.seek(0)
        os.dup2(stdin.fileno(), 0)
    os.dup2(output, 1)
    sys.stdin = os.fdopen(0)
    sys.argv = ["program.py"]
    execute(job["program"], types.ModuleType("__main__"), "program.py")


def run_tests(given: int, output: int) -> None:
    """Runs the program in a child and its tests here; what came of them is all that is written.

    The child is made before the tests are read, has none of this process's files, and may not look into it: without
    the right to be dumped, a process hides its memory and its files from others of the same user.
    """
    from tabom.data.verifiers import harness

    here, there = socket.socketpair()
    if os.fork() == 0:
        for descriptor in (given, output):
            os.close(descriptor)
        here.close()
        with open(os.devnull, "r+b", buffering=0) as nothing:
            os.dup2(nothing.fileno(), 2)
        with suppress(harness.Gone):
            harness.serve_program(there.makefile("rwb"))
        os._exit(0)
    there.close()
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0)
    with os.fdopen(given) as file:
        job = json.load(file)
    outcome = harness.run_tests(here.makefile("rwb"), job)
    os.write(output, json.dumps(outcome).encode())
    os._exit(0)


if __name__ == "__main__":
    kind, given, output, seconds, *limits = sys.argv[1:]
    limit(float(seconds), *map(int, limits))
    sys.set_int_max_str_digits(0)
    run = {"tests": run_tests, "program": run_program}[kind]
    run(int(given), int(output))
