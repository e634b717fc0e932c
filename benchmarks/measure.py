"""Timing: contenders take turns in one run, after warm-up, on cold caches; the median and its spread are kept.

On a GPU each contender is captured into a CUDA graph where it can be, so that launch gaps do not count, and a write
over several times the L2 cache goes before every timed call.
"""

import gc
import json
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

import torch

PACKAGES = ("triton", "transformers", "peft", "liger-kernel", "cut-cross-entropy")
RESULTS = Path(__file__).parent / "results"
ROUNDS = 30
FLUSH_BYTES = 2**28


class Timing(NamedTuple):
    """Seconds: the median, and the 10th and 90th percentile."""

    median: float
    low: float
    high: float


class Contender(NamedTuple):
    """A function to time; `capture` is off for those that wait for the host, which a CUDA graph cannot."""

    name: str
    call: Callable[[], Any]
    capture: bool = True


def time_interleaved(contenders: list[Contender], device: torch.device, rounds: int = ROUNDS) -> dict[str, Timing]:
    """Round after round, every contender once."""
    if device.type == "cuda":
        prepared = [(c.name, captured(c.call) if c.capture else warm(c.call)) for c in contenders]
        flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
        time_once = lambda call: time_on_gpu(call, flush)  # noqa: E731
    else:
        prepared = [(c.name, warm(c.call)) for c in contenders]
        time_once = time_on_cpu
    seconds = {name: [] for name, _ in prepared}
    for _ in range(rounds):
        for name, call in prepared:
            seconds[name].append(time_once(call))
    return {name: summary(values) for name, values in seconds.items()}


def warm(call: Callable[[], Any]) -> Callable[[], Any]:
    """Called once, so that compilation and first allocations are over."""
    call()
    return call


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as the replay of a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def time_on_gpu(call: Callable[[], Any], flush: torch.Tensor) -> float:
    """Seconds between two events around the call; the flush keeps the GPU busy while the host enqueues them."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def time_on_cpu(call: Callable[[], Any]) -> float:
    """Seconds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def summary(seconds: list[float]) -> Timing:
    """The median, and the 10th and 90th percentile."""
    deciles = quantiles(seconds, n=10, method="inclusive")
    return Timing(deciles[4], deciles[0], deciles[8])


def peak_memory_of(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a call allocates above what was there before it, at its peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        call()
    level = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak


def ceilings(device: torch.device) -> dict[str, float]:
    """What the device reaches in this run: copy (bytes/s, read + written), bf16 matmul on random data (FLOP/s)."""
    elements, width, rounds = (2**29, 8192, ROUNDS) if device.type == "cuda" else (2**27, 2048, 5)
    source, target = (torch.randn(elements, device=device).bfloat16() for _ in range(2))
    a, b = (torch.randn(width, width, device=device).bfloat16() for _ in range(2))
    contenders = [Contender("copy", lambda: target.copy_(source)), Contender("matmul", lambda: a @ b)]
    timings = time_interleaved(contenders, device, rounds)
    return {
        "copy_bytes_per_second": 2 * source.nbytes / timings["copy"].median,
        "matmul_flop_per_second": 2 * width**3 / timings["matmul"].median,
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Where and with what a run was made."""
    commit = output_of("git", "rev-parse", "--short", "HEAD")
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit + ("+" if output_of("git", "status", "--porcelain", "--untracked-files=no") else ""),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "versions": {name: version(name) for name in PACKAGES if find_spec(name.replace("-", "_"))},
    }
    if device.type != "cuda":
        from cpuinfo import get_cpu_info

        cpu = get_cpu_info()
        name = f"{cpu['brand_raw']}, {torch.get_num_threads()} threads"
        return found | {"device": name, "clock_seen": cpu["hz_actual_friendly"]}
    driver, clock = output_of(
        "nvidia-smi", "--query-gpu=driver_version,clocks.sm", "--format=csv,noheader", "-i", "0"
    ).split(", ")
    name = torch.cuda.get_device_name(device)
    return found | {"device": name, "driver": driver, "clock_seen": clock}


def output_of(*command: str) -> str:
    """The last line that a command prints, '' if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() if done.returncode == 0 else ""


def result_name(benchmark: str, device: torch.device) -> str:
    """The name of a result file: benchmark and device."""
    return (
        f"{benchmark}-{'cpu' if device.type == 'cpu' else torch.cuda.get_device_name(device).lower().replace(' ', '-')}"
    )


def write_json(name: str, record: dict[str, Any]) -> Path:
    """benchmarks/results/<name>.json"""
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
