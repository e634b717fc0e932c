"""Timing: contenders take turns in one run, after warm-up, on cold caches; the median and its spread are kept.

On a GPU every contender is timed as it is called, `eager`, launch gaps included, and, where it does not wait for the
host, as 20 calls in one CUDA graph, `graph`, less an empty graph. Both go round several copies of the inputs, so that
no call finds its own in the L2 cache.
"""

import gc
import json
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from statistics import quantiles
from typing import Any, Literal, NamedTuple

import torch

PACKAGES = ("triton", "transformers", "peft", "liger-kernel", "cut-cross-entropy", "trl")
RESULTS = Path(__file__).parents[1] / "results"
ROUNDS = 30
CALLS_IN_GRAPH = 20
COLD_BYTES = 2**29
"""Several times the L2 cache of any GPU."""

CEILINGS_ON_GPU, CEILINGS_ON_CPU = (2**29, 8192, ROUNDS), (2**27, 2048, 5)
"""Elements copied, width of the matmul, rounds."""

Mode = Literal["eager", "graph"]


class Timing(NamedTuple):
    """Seconds of a call: the median, and the 10th and 90th percentile."""

    median: float
    low: float
    high: float


class Contender(NamedTuple):
    """A function on each copy of its inputs; `capture` is off for what waits for the host or needs much room."""

    name: str
    calls: list[Callable[[], Any]]
    capture: bool = True


def this_device() -> torch.device:
    """The GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_gpu(device: torch.device) -> bool:
    """Whether the device is timed and counted as a GPU."""
    return device.type == "cuda"


def copies_for(bytes_read: int, device: torch.device) -> int:
    """How many copies of an input make a round of them cold; one on a CPU, whose figures are of warm caches."""
    return min(CALLS_IN_GRAPH, -(-COLD_BYTES // bytes_read)) if is_gpu(device) else 1


def time_interleaved(
    contenders: list[Contender], device: torch.device, rounds: int = ROUNDS
) -> dict[tuple[str, Mode], Timing]:
    """Round after round, every contender once; eager ones first, then the graphs among themselves."""
    seconds = {(c.name, "eager"): [] for c in contenders}
    turns = {c.name: cycle(c.calls) for c in contenders}
    for name in turns:
        next(turns[name])()  # compilation and first allocations
    time_once = time_on_gpu if is_gpu(device) else time_on_cpu
    for _ in range(rounds):
        for name, turn in turns.items():
            seconds[name, "eager"].append(time_once(next(turn)))
    if is_gpu(device):
        empty = captured([lambda: None])
        replays = {c.name: captured(c.calls) for c in contenders if c.capture}
        seconds |= {(name, "graph"): [] for name in replays}
        for _ in range(rounds):
            gap = time_on_gpu(empty)
            for name, replay in replays.items():
                seconds[name, "graph"].append((time_on_gpu(replay) - gap) / CALLS_IN_GRAPH)
    return {key: summary(values) for key, values in seconds.items()}


def captured(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    """CALLS_IN_GRAPH calls, going round the copies, as the replay of one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in islice(cycle(calls), CALLS_IN_GRAPH):
            call()
    return graph.replay


def time_on_gpu(call: Callable[[], Any]) -> float:
    """Seconds between two events around the call, on an idle GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
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
    if is_gpu(device):
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
    elements, width, rounds = CEILINGS_ON_GPU if is_gpu(device) else CEILINGS_ON_CPU
    source, target = (torch.randn(elements, device=device).bfloat16() for _ in range(2))
    a, b = (torch.randn(width, width, device=device).bfloat16() for _ in range(2))
    contenders = [Contender("copy", [lambda: target.copy_(source)]), Contender("matmul", [lambda: a @ b])]
    timings = time_interleaved(contenders, device, rounds)
    mode = "graph" if is_gpu(device) else "eager"
    return {
        "copy_bytes_per_second": 2 * source.nbytes / timings["copy", mode].median,
        "matmul_flop_per_second": 2 * width**3 / timings["matmul", mode].median,
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Where and with what a run was made; "" for what this machine has no command to tell."""
    commit = output_of("git", "rev-parse", "--short", "HEAD")
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit + ("+" if output_of("git", "status", "--porcelain", "--untracked-files=no") else ""),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "versions": {name: version(name) for name in PACKAGES if find_spec(name.replace("-", "_"))},
    }
    if is_gpu(device):
        query = ("nvidia-smi", "--query-gpu=driver_version,clocks.sm", "--format=csv,noheader", "-i", "0")
        driver, _, clock = output_of(*query).partition(", ")
        return found | {"device": torch.cuda.get_device_name(device), "driver": driver, "clock_seen": clock}
    return found | cpu()


def cpu() -> dict[str, str]:
    """The processor's own name and clock, where the package that asks it is installed."""
    name, clock = platform.processor() or platform.machine(), ""
    if find_spec("cpuinfo"):
        from cpuinfo import get_cpu_info

        info = get_cpu_info()
        name, clock = info["brand_raw"], info["hz_actual_friendly"]
    return {"device": f"{name}, {torch.get_num_threads()} threads", "clock_seen": clock}


def output_of(*command: str) -> str:
    """What a command prints, "" if it fails or is not there."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() if done.returncode == 0 else ""


def result_name(benchmark: str, device: torch.device) -> str:
    """The name of a result file: benchmark and device."""
    kind = torch.cuda.get_device_name(device).lower().replace(" ", "-") if is_gpu(device) else "cpu"
    return f"{benchmark}-{kind}"


def write_json(name: str, record: dict[str, Any]) -> Path:
    """benchmarks/results/<name>.json"""
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
