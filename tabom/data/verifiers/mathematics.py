"""Mathematical answers, compared by math-verify (extra `math`) in worker processes with a limit."""

import json
import queue
import select
import signal
import subprocess
import sys
from importlib.util import find_spec

from tabom.data.encoding import Prompt
from tabom.data.verifiers.verdict import Answer, Verdict, Verifier

START_LIMIT = 120.0
"""Seconds that a worker may take to import sympy, before its first comparison counts."""

PATIENCE = 20
"""A worker that has not answered after this many times its computing time, on however busy a machine, is stuck."""


class Math(Verifier):
    """The response's final answer equals the answer as mathematics: `1/2`, `0.5`, `\\frac{1}{2}` are the same.

    Both may be a bare expression or a full solution with `\\boxed{}` or `#### 42` at its end (see final_answer.py).
    math-verify reads numbers, fractions, percentages, intervals, sets, matrices and equations in LaTeX or plain;
    units, times of day, dates, choices and words are compared beside it (see math_worker.py).

    Args:
        timeout: seconds of computing that one comparison may take. One that takes longer, or brings its process down,
            is wrong; the others are judged all the same. An answer that no response can be compared with in this
            time leaves its responses unverified.
        workers: processes that compare at the same time.

    Raises:
        ModuleNotFoundError: math-verify is not installed.
    """

    def __init__(self, timeout: float = 10.0, workers: int = 2) -> None:
        if find_spec("math_verify") is None:
            raise ModuleNotFoundError("No module named 'math_verify'", name="math_verify")
        self.timeout = timeout
        self.workers = workers
        self.idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for _ in range(workers):
            self.idle.put(Worker())

    def judge(self, prompt: Prompt, answer: Answer, response: str) -> Verdict:
        """Asks the next idle worker."""
        worker = self.idle.get()
        try:
            return worker.compare(str(answer), response, text_of(prompt), self.timeout)
        finally:
            self.idle.put(worker)


def text_of(prompt: Prompt) -> str:
    """A prompt as text, of a conversation what its messages say."""
    return prompt if isinstance(prompt, str) else "\n".join(str(message.get("content")) for message in prompt)


class Worker:
    """One process of `math_worker.py`; started when it is first needed, and anew after it was killed."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def compare(self, answer: str, response: str, prompt: str, timeout: float) -> Verdict:
        """The verdict, or a wrong one when the worker takes too long or dies."""
        if self.process is None:
            self.start()
        line = self.ask(answer, response, prompt, timeout)
        if line:
            return Verdict(*json.loads(line))
        status = self.stop()
        ran_out = line is None or status == -signal.SIGPROF
        problem = f"took over {timeout:g} s" if ran_out else "crashed"
        if not self.reads(answer, timeout):
            return Verdict(None, f"the answer {answer!r:.80} cannot be compared with anything: it {problem}")
        return Verdict(False, f"the comparison {problem}")

    def reads(self, answer: str, timeout: float) -> bool:
        """Whether an answer that brought a comparison down can be read and compared with a number at all."""
        self.start()
        if self.ask(answer, "0", "", timeout):
            return True
        self.stop()
        return False

    def start(self) -> None:
        """Starts the process and waits until it has answered once."""
        command = [sys.executable, "-P", "-m", "tabom.data.verifiers.math_worker"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, **pipes)
        if not self.ask("1", "1", "", START_LIMIT):
            self.stop()
            raise OSError(f"{' '.join(command)}: does not start; run it to see why")

    def ask(self, answer: str, response: str, prompt: str, timeout: float) -> bytes | None:
        """The worker's line: empty when it died, None when it is stuck."""
        request = {"answer": answer, "response": response, "prompt": prompt, "timeout": timeout}
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return b""
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE * timeout)
        return self.process.stdout.readline() if ready else None

    def stop(self) -> int:
        """Ends the process, and says with what status it ended."""
        self.process.kill()
        self.process.communicate()
        status, self.process = self.process.returncode, None
        return status

    def __del__(self) -> None:
        if self.process is not None:  # its pipes may be closed already
            self.process.kill()
            self.process.wait()
