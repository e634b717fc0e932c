"""Two machines, here two network namespaces with addresses of their own: what needs root to be tried.

    sudo .venv/bin/python -m tests.invariant.machines

Needs Linux and `ip` (iproute2). Prints a line a case, and exits with status 1 if one fails.
What two launchers can show on the loopback interface is in test_machines.py, and needs no root.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from tests.conftest import random_model
from tests.invariant.conftest import weights
from tests.training.test_trainer import make_trajectories

PEER_TIMEOUT = 20
LIMIT = 240
"""Seconds for a case."""


def shell(command: str) -> None:
    subprocess.run(command, shell=True, check=True, capture_output=True)


def make_machines() -> None:
    """Namespaces tabom0 and tabom1 with the addresses 10.77.0.1 and 10.77.0.2, joined by a link."""
    shell("ip link add tabom-v0 type veth peer name tabom-v1")
    for machine in range(2):
        inside = f"ip netns exec tabom{machine} ip"
        shell(f"ip netns add tabom{machine} && ip link set tabom-v{machine} netns tabom{machine}")
        shell(f"{inside} addr add 10.77.0.{machine + 1}/24 dev tabom-v{machine}")
        shell(f"{inside} link set tabom-v{machine} up && {inside} link set lo up")


def remove_machines() -> None:
    for machine in range(2):
        subprocess.run(["ip", "netns", "delete", f"tabom{machine}"], capture_output=True, check=False)


def link(state: str) -> None:
    shell(f"ip netns exec tabom1 ip link set tabom-v1 {state}")


class Job:
    """A command on both machines, one process on each, under torchrun."""

    def __init__(self, folder: Path, words: list[str], restarts: int = 0) -> None:
        self.said = [folder / f"said-{machine}" for machine in range(2)]
        self.launchers = []
        for machine, said in enumerate(self.said):
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"tabom-v{machine}"}
            launcher = ["ip", "netns", "exec", f"tabom{machine}", sys.executable, "-m", "torch.distributed.run"]
            launcher += ["--nnodes=2", "--nproc_per_node=1", f"--max-restarts={restarts}", "--rdzv_backend=c10d"]
            launcher += ["--rdzv_endpoint=10.77.0.1:29400", f"--rdzv_conf=is_host={machine == 0:d}"]
            launcher += [f"--local_addr=10.77.0.{machine + 1}", "-m", "tabom", *words]
            with said.open("wb") as file:
                process = subprocess.Popen(launcher, stdout=file, stderr=subprocess.STDOUT, env=environment)
            self.launchers.append(process)
        self.deadline = time.monotonic() + LIMIT

    def until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            assert time.monotonic() < self.deadline, self.text()
            time.sleep(0.01)

    def worker(self, machine: int) -> psutil.Process:
        return psutil.Process(self.launchers[machine].pid).children()[-1]

    def statuses(self) -> list[int]:
        self.until(lambda: all(launcher.poll() is not None for launcher in self.launchers))
        return [launcher.returncode for launcher in self.launchers]

    def text(self, machine: int | None = None) -> str:
        return "".join(said.read_text() for said in (self.said if machine is None else [self.said[machine]]))

    def end(self) -> None:
        for launcher in self.launchers:
            if launcher.poll() is None:
                for process in [*psutil.Process(launcher.pid).children(recursive=True), psutil.Process(launcher.pid)]:
                    process.kill()


def training(inputs: Path, output: Path, batch_size: int, steps: int) -> list[str]:
    words = f"train --model {inputs}/model --data {inputs}/t.jsonl --output_dir {output} --max_steps {steps}"
    words += f" --per_device_train_batch_size {batch_size} --save_strategy steps --save_steps 10 --report_to none"
    words += " --disable_tqdm true --dataloader_pin_memory false --max_grad_norm 0 --adam_epsilon 0.1 --use_cpu true"
    words += f" --peer_timeout {PEER_TIMEOUT} --resume_from_checkpoint auto"
    return (words + " --ddp_backend gloo" * (batch_size == 6)).split()


def collecting(inputs: Path, output: Path, samples: int) -> list[str]:
    words = f"collect --model {inputs}/model --prompts {inputs}/p.jsonl --verifier exact --max_new_tokens 6"
    words += f" --temperature 1 --compute_budget 16 --samples_per_prompt {samples} --output {output}"
    return f"{words} --peer_timeout {PEER_TIMEOUT}".split()


def checkpoint_is_there(output: Path) -> bool:
    return any(output.glob("checkpoint-*/tabom_checkpoint.json"))


def same_weights(one: Path, two: Path) -> bool:
    one, two = weights(one), weights(two)
    return all(torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-6) for name in one)


def trains_as_one_process_does(inputs: Path, folder: Path) -> None:
    job = Job(folder, training(inputs, folder / "run", 6, 30))
    assert job.statuses() == [0, 0], job.text()
    assert same_weights(inputs / "alone", folder / "run")


def trains_on_after_a_worker_was_killed(inputs: Path, folder: Path) -> None:
    job = Job(folder, training(inputs, folder / "run", 6, 30), restarts=2)
    job.until(lambda: checkpoint_is_there(folder / "run"))
    job.worker(1).kill()
    assert job.statuses() == [0, 0], job.text()
    assert same_weights(inputs / "alone", folder / "run")


def trains_on_after_a_cut_of_five_seconds(inputs: Path, folder: Path) -> None:
    job = Job(folder, training(inputs, folder / "run", 6, 30))
    job.until(lambda: checkpoint_is_there(folder / "run"))
    link("down")
    time.sleep(5)
    link("up")
    assert job.statuses() == [0, 0], job.text()
    assert same_weights(inputs / "alone", folder / "run")


def saves_on_both_machines_if_one_gets_sigterm(inputs: Path, folder: Path) -> None:
    job = Job(folder, training(inputs, folder / "run", 6, 3000))
    job.until(lambda: checkpoint_is_there(folder / "run"))
    job.worker(1).terminate()
    assert job.statuses() == [1, 1]
    for machine in range(2):
        assert "exitcode  : 143" in job.text(machine) and "is saved" in job.text(machine), job.text()


def has_ended(process: psutil.Process) -> bool:
    """Whether a process has ended, also if its parent does not know yet."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def ends_with_the_link(inputs: Path, folder: Path, words: list[str], has_begun: Callable[[], bool]) -> None:
    """The launcher of the machine that is cut off hangs itself (torch 2.13), after its worker has ended."""
    job = Job(folder, words)
    try:
        job.until(has_begun)
        workers = [job.worker(machine) for machine in range(2)]
        begun = time.monotonic()
        link("down")
        job.until(lambda: all(has_ended(worker) for worker in workers))
        assert time.monotonic() - begun < 3 * PEER_TIMEOUT
        job.until(lambda: job.launchers[0].poll() is not None)
        assert job.launchers[0].returncode == 1
        assert f"no sign of life from rank 1 of 2 processes for {PEER_TIMEOUT} s" in job.text(0), job.text()
        assert "the store on the machine of rank 0" in job.text(1), job.text()
    finally:
        job.end()
        link("up")


def training_ends_with_the_link(inputs: Path, folder: Path) -> None:
    output = folder / "run"
    ends_with_the_link(inputs, folder, training(inputs, output, 6, 100000), lambda: checkpoint_is_there(output))


def collecting_ends_with_the_link(inputs: Path, folder: Path) -> None:
    words = collecting(inputs, folder / "t.jsonl", 1000)
    ends_with_the_link(inputs, folder, words, lambda: any(each.stat().st_size for each in folder.glob("t.jsonl.rank?")))


CASES = (
    trains_as_one_process_does,
    trains_on_after_a_worker_was_killed,
    trains_on_after_a_cut_of_five_seconds,
    saves_on_both_machines_if_one_gets_sigterm,
    training_ends_with_the_link,
    collecting_ends_with_the_link,
)


def make_inputs(folder: Path) -> None:
    """A tiny model, 22 trajectories, 40 prompts, and what one process trains."""
    diffusion_model = random_model(3)
    diffusion_model.model.save_pretrained(folder / "model")
    diffusion_model.tokenizer.save_pretrained(folder / "model")
    trajectories = make_trajectories(random.Random(7), count=22)
    (folder / "t.jsonl").write_text("".join(json.dumps(each.to_record()) + "\n" for each in trajectories))
    prompts = ({"prompt": f"{i}+1=", "answer": "."} for i in range(40))
    (folder / "p.jsonl").write_text("".join(json.dumps(each) + "\n" for each in prompts))
    subprocess.run([sys.executable, "-m", "tabom", *training(folder, folder / "alone", 12, 30)], check=True)


def main() -> int:
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        inputs = Path(temporary) / "inputs"
        inputs.mkdir()
        make_inputs(inputs)
        remove_machines()
        make_machines()
        try:
            for case in CASES:
                folder = Path(temporary) / case.__name__
                folder.mkdir()
                try:
                    case(inputs, folder)
                    print(f"{case.__name__}: passed", flush=True)
                except AssertionError as error:
                    failed += 1
                    print(f"{case.__name__}: FAILED\n{error}", flush=True)
        finally:
            remove_machines()
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
