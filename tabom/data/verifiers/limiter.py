"""Runs inside the sandbox, given to Python as text: limits itself, gives up root, then runs the program.

The command line holds the limits: seconds, MiB of memory, MiB of a file, processes. Standard input holds a JSON object:
`program` and `tests` are sources, run one after the other in one module; `stdin` is what the program reads; `nonce`
is printed once the tests are through, so a program that ends itself early does not pass.
"""

import json
import os
import resource
import sys
import types

UNPRIVILEGED = 65534  # nobody


def limit(seconds: float, memory: int, file_size: int, processes: int) -> None:
    """Sets the limits and gives up root, which the limit on processes does not hold for.

    The limit on memory is each process's; should they fill the machine together, these are what the kernel ends first.
    """
    with open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(UNPRIVILEGED)
        os.setuid(UNPRIVILEGED)
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


def run(job: dict) -> None:
    """Runs the program, then the tests, then prints the nonce; the program cannot replace what does that."""
    parts = [compile(job.get(part, ""), f"{part}.py", "exec") for part in ("program", "tests")]
    execute, write, nonce = exec, os.write, job.pop("nonce", "").encode()
    with open("stdin", "w+") as given:
        given.write(job.get("stdin", ""))
        given.seek(0)
        os.dup2(given.fileno(), 0)
    sys.stdin = os.fdopen(0)
    sys.argv = ["program.py"]
    module = types.ModuleType("__main__" if "stdin" in job else "program")
    sys.modules[module.__name__] = module
    for part in parts:
        execute(part, module.__dict__)
    sys.stdout.flush()
    write(1, nonce)


if __name__ == "__main__":
    job = json.loads(sys.stdin.read())
    limit(float(sys.argv[1]), *map(int, sys.argv[2:]))
    run(job)
