"""What the benchmarks do on a GPU, walked on a CPU: torch.cuda is a stand-in that runs nothing and times nothing."""

import contextlib
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import (
    gpu_first,
    kernels,
    loss,
    model,
    old_form,
    sampler,
    scaling,
    trained_head,
    trainer,
)
from benchmarks.gpu_first import Part
from benchmarks.tools import measure, models
from tabom.lab.dry_run import random_model
from tabom_kernels.backends import triton as triton_backend

DEVICE_NAME = "NVIDIA H100 80GB HBM3"


class FakeEvent:
    """A call takes half a millisecond, and the n-th graph of a test n more."""

    clock = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = FakeEvent.clock

    def elapsed_time(self, end):
        return end.time - self.time + 0.5


class FakeStream:
    def wait_stream(self, other):
        pass


class FakeGraph:
    made = 0

    def __init__(self):
        FakeGraph.made += 1
        self.milliseconds = FakeGraph.made

    def replay(self):
        FakeEvent.clock += self.milliseconds


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A CPU that the benchmarks take for a GPU; returns where they write."""
    stand_ins = {
        "Event": FakeEvent,
        "Stream": FakeStream,
        "CUDAGraph": FakeGraph,
        "current_stream": FakeStream,
        "stream": lambda stream: contextlib.nullcontext(),
        "graph": lambda graph: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 300,
        "mem_get_info": lambda: (2**36, 2**37),
        "get_device_name": lambda device=None: DEVICE_NAME,
        "get_device_capability": lambda device=None: (9, 0),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    modules = (measure, kernels, loss, scaling, sampler, trained_head, trainer, models, gpu_first, old_form)
    for module in modules:
        monkeypatch.setattr(module, "is_gpu", lambda device: True, raising=False)
    monkeypatch.setattr(measure, "CEILINGS_ON_GPU", (64, 8, 2))
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    return tmp_path


def read(folder, name):
    return json.loads((folder / f"{name}-nvidia-h100-80gb-hbm3.json").read_text())


def test_kernels(gpu, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "time_interleaved", partial(measure.time_interleaved, rounds=2))
    monkeypatch.setattr(kernels, "SHAPES", [(32, 1024), (64, 40)])
    monkeypatch.setattr(kernels, "RANK_LENGTHS", [[4, 4]])
    kernels.main([])
    result = read(gpu, "kernels")
    assert result["device"] == DEVICE_NAME and result["ceilings"]["copy_bytes_per_second"] > 0
    assert {figure["size"] for figure in result["figures"]} >= {"32 x 1024", "64 x 40", "2 x 4 hinge"}
    figures = {(f["op"], f["contender"], f["mode"]): f["seconds"]["median"] for f in result["figures"]}
    assert figures["statistics", "ours", "eager"] == 5e-4
    assert figures["statistics", "ours", "graph"] == pytest.approx(1e-3 / 20)  # 1 ms more than the empty graph before
    kernels.main(["--rows", "32", "--ops", "whole_loss", "ranking"])
    assert {f["op"] for f in read(gpu, "kernels-whole-loss-ranking")["figures"]} == {"whole_loss", "ranking"}
    kernels.main(["--rows", "32", "--peers"])
    peers = read(gpu, "kernels-and-peers")["figures"]
    assert "64 x 40" not in {figure["size"] for figure in peers}
    assert {("reference", "eager")} == {(f["contender"], f["mode"]) for f in peers if f["contender"] == "reference"}


def test_a_profiler_gets_every_op_once(gpu, monkeypatch):
    monkeypatch.setattr(kernels, "SHAPES", [(32, 50)])
    monkeypatch.setattr(kernels, "RANK_LENGTHS", [[4, 4]])
    called = []
    contender = kernels.contender

    def named(name, call, inputs, capture=True):
        return contender(name, lambda *batch: called.append(name), inputs, capture)

    monkeypatch.setattr(kernels, "contender", named)
    kernels.main(["--once"])
    once = ["ours", "entropy alone", "ours", "ours", "ours", "ours, temperature", "ours, top-p"]
    assert called == [*once, *["ours"] * len(kernels.FORMS)]
    assert not list(gpu.glob("*.json"))


def test_the_old_form_beside_the_new(gpu, rng, monkeypatch):
    """On whole warps of aligned columns, as the old kernels have races elsewhere, which the emulator reports."""
    monkeypatch.setattr(kernels, "SHAPES", [(3, 1024), (5, 1024)])
    monkeypatch.setattr(old_form, "ROWS", (3,))
    monkeypatch.setattr(old_form, "FOLDER", gpu / "old")
    with pytest.raises(SystemExit, match="make old-kernels"):
        old_form.main()
    (gpu / "old").mkdir()
    [commit] = re.findall(r"BEFORE_BASE_2 := (\w+)", Path("Makefile").read_text())
    command = f"git archive {commit} tabom_kernels | tar -x -C {gpu / 'old'}"
    if subprocess.run(command, shell=True, capture_output=True).returncode:
        pytest.skip(f"git has no history here: {command}")
    old_form.main()
    figures = read(gpu, "old-form")["figures"]
    assert {figure["size"] for figure in figures} == {"3 x 1024"}
    each = {(figure["op"], figure["contender"]) for figure in figures}
    assert each == {(op, form) for op in ("statistics", "gradient", "greedy") for form in ("before base 2", "now")}
    old = old_form.load_backend(gpu / "old")
    assert Path(old.__file__).is_relative_to(gpu) and sys.modules["tabom_kernels.backends.triton"] is triton_backend
    batches = kernels.draw_batches(torch.device("cpu"), 3, 1024, 1)
    for op in old_form.FLOOR:
        torch.manual_seed(0)  # of the upstream gradient
        function, [arguments] = op(old, batches)
        theirs = function(*arguments)
        torch.manual_seed(0)
        function, [arguments] = op(triton_backend, batches)
        torch.testing.assert_close(theirs, function(*arguments), atol=1e-5, rtol=0.01)


def test_what_was_measured_before_a_crash_is_kept(gpu, monkeypatch):
    monkeypatch.setattr(kernels, "SHAPES", [(32, 50), (64, 40)])
    monkeypatch.setattr(kernels, "RANK_LENGTHS", [["broken"]])
    with pytest.raises(TypeError):
        kernels.main([])
    assert {figure["size"] for figure in read(gpu, "kernels")["figures"]} == {"32 x 50", "64 x 40"}


def test_loss_and_scaling(gpu, monkeypatch):
    monkeypatch.setattr(loss, "machine", lambda: (torch.device("cpu"), 2**40, 2, (8, 4, 16)))
    monkeypatch.setattr(scaling, "machine", loss.machine)
    monkeypatch.setattr(loss, "CROSS_ENTROPY_ALONE", {})
    monkeypatch.setattr(loss, "add_peers", lambda device: None)
    loss.main(["--ours", "--rows", "8", "12", "--vocabulary", "60"])
    result = read(gpu, "loss-ours")
    assert {figure["shape"]["rows"] for figure in result["figures"]} == {8, 12}
    assert {figure["contender"] for figure in result["figures"]} == {*loss.OURS, "two matmuls"}
    assert {figure["peak_bytes"] for figure in result["figures"]} == {200}
    monkeypatch.setattr(scaling, "sweeps", lambda *sizes, on_gpu: {"sequences": [loss.Shape(2, 8, 4, 16, 60)]})
    monkeypatch.setattr(scaling, "CONTENDERS", loss.OURS)
    scaling.main()
    assert {figure["sweep"] for figure in read(gpu, "scaling")["figures"]} == {"sequences"}


def test_the_trained_head(gpu, monkeypatch):
    monkeypatch.setattr(trained_head, "VOCABULARY", 60)
    monkeypatch.setattr(trained_head, "CASES_ON_GPU", [trained_head.Case(8, torch.float32, 2)])
    trained_head.main()
    figures = read(gpu, "trained-head")["figures"]
    assert {(figure["contender"], figure["mode"]) for figure in figures} == {
        (name, mode) for name in ("three matmuls", *trained_head.LOSSES) for mode in ("eager", "graph")
    }


def test_the_machine_and_the_peers_of_a_gpu(gpu, monkeypatch):
    monkeypatch.setattr(loss, "LOSSES", dict(loss.LOSSES))
    monkeypatch.setattr(loss, "CROSS_ENTROPY_ALONE", {})
    _, memory, rounds, sizes = loss.machine()
    assert (memory, rounds, sizes) == (2**36, 30, (512, 32, 3584))
    loss.add_peers(torch.device("cpu"))
    assert "Liger CE" in loss.CROSS_ENTROPY_ALONE


@pytest.mark.parametrize("missing", [(), ("peft", "cpuinfo")])
def test_trainer_and_sampler(gpu, monkeypatch, missing):
    diffusion_model = random_model("Dream-org/Dream-v0-Instruct-7B", "tiny", torch.float32, None, torch.device("cpu"))
    find_spec = trainer.find_spec
    for module in (trainer, measure):
        monkeypatch.setattr(module, "find_spec", lambda name: None if name in missing else find_spec(name))
    monkeypatch.setattr(trainer, "random_dream", lambda device: ("tiny", diffusion_model))
    monkeypatch.setattr(trainer, "largest_batch", lambda step: step(1) or 1)
    trainer.main()
    result = read(gpu, "trainer")
    assert {figure["largest_batch"] for figure in result["figures"]} == {1}
    trained = {name.split(".")[-2] for name, p in diffusion_model.model.named_parameters() if p.requires_grad}
    assert trained == ({"q_proj", "v_proj"} if missing else {"default"})


def test_a_machine_without_git_and_nvidia_smi(gpu, monkeypatch):
    monkeypatch.setattr(measure.shutil, "which", lambda command: None)
    found = measure.environment(torch.device("cpu"))
    assert (found["commit"], found["driver"], found["device"]) == ("", "", DEVICE_NAME)


def test_the_first_session(gpu, monkeypatch, capsys):
    """Each way for a part to end, and all of it in the JSON."""
    parts = {
        "fine": Part([sys.executable, "-c", "print('figures')"], 60),
        "fails": Part([sys.executable, "-c", "raise SystemExit(3)"], 60),
        "slow": Part([sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"], 2),
        "missing": Part(["no-such-profiler"], 60),
    }
    monkeypatch.setattr(gpu_first, "PARTS", parts)
    gpu_first.main(["--only", *parts])
    ended = read(gpu, "gpu-first")["parts"]
    assert {name: part["rc"] for name, part in ended.items()} == {"fine": 0, "fails": 3, "slow": 124, "missing": None}
    assert ended["fine"]["tail"] == "figures\n" and ended["slow"]["tail"] == "begun\n"
    assert (gpu / "gpu-first" / "slow.log").read_text() == "begun\n"


def test_the_parts_of_the_first_session_are_commands_that_exist(capsys):
    assert sum(part.seconds for part in gpu_first.PARTS.values()) <= 45 * 60
    for part in gpu_first.PARTS.values():
        module = part.command[part.command.index("-m") + 1]
        assert module in ("pytest", "tabom_kernels.check") or module.removeprefix("benchmarks.") in (
            "kernels",
            "old_form",
            "loss",
            "trained_head",
            "sampler",
        )


def test_the_model_of_time(tmp_path, capsys):
    counts = model.read_counts()
    kernels_of_loss = model.OPS["whole_loss", "ours"]
    large = model.predict(model.GPUS["H200"], kernels_of_loss, 2048 * 152064, counts)
    small = model.predict(model.GPUS["H200"], kernels_of_loss, 64 * 152064, counts)
    floor = 3 * 2 * 2048 * 152064 / (0.9 * 4.8e12)
    assert (
        large.seconds * large.share_of_floor == pytest.approx(floor, rel=0.01)
        and small.share_of_floor < large.share_of_floor
    )
    figure = {"op": "statistics", "contender": "ours", "size": "2048 x 152064", "mode": "graph"}
    run = {"device": DEVICE_NAME, "figures": [figure | {"seconds": {"median": 1.0}}]}
    (tmp_path / "run.json").write_text(json.dumps(run))
    model.main([])
    assert "B200" in capsys.readouterr().out
    model.main([str(tmp_path / "run.json")])
    out = capsys.readouterr().out
    assert "1000000.0" in out and "B200" not in out
