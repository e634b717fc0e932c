"""What the compiler makes of every kernel, without a GPU: registers, spills, vector width, instructions.

    python -m benchmarks.static > benchmarks/results/static.md
    python -m benchmarks.static --smallest        # compile what one row alone launches, and print nothing

Every launch of `tabom_kernels.backends.triton` is recorded as its launcher makes it, on tensors that have a shape and
no memory, and compiled for each architecture by Triton's own ptxas. The committed table shows a change in review, and a
test holds it.
"""

import re
import subprocess
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from rich.console import Console
from rich.progress import track
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from tabom_kernels.backends import triton as triton_backend
from tabom_kernels.backends.results import VocabularyStatistics

ARCHITECTURES = (80, 90, 100, 120)
ROWS, COLUMNS = 256, 152064
TOOLS = Path(nvidia.__file__).parent / "bin"
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Launch(NamedTuple):
    """A kernel with the arguments that its launcher gave it."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]


class Instruction(NamedTuple):
    """Of the machine code; where it may jump to, an index, and whether it may also not."""

    opcode: str
    target: int | None
    falls_through: bool

    @property
    def loaded_bytes(self) -> int:
        """From global memory, by a thread."""
        if not self.opcode.startswith("LDG"):
            return 0
        width = re.search(r"\.[US]?(8|16|64|128)\b", self.opcode)
        return int(width[1]) // 8 if width else 4


class Figures(NamedTuple):
    """Of one kernel on one architecture.

    Instructions are all of the code. What follows them is of the kernels that read a chunk of the vocabulary, and of
    the shortest way through the code that reads all of it: what is done for a chunk with nothing special in it.
    Wide loads bring 128 bits: a share of the chunk's bytes. Narrow stores are those of less, of what writes a chunk.
    """

    kernel: str
    dtype: str
    architecture: str
    registers: int
    spills: int
    shared_bytes: int
    instructions: int
    per_element: float | None
    ex2_per_element: float | None
    wide_loads: float | None
    narrow_stores: int | None


def launches() -> list[tuple[str, str, Launch]]:
    """(name, dtype, launch) of every kernel in the ways that it is really used."""
    found = []
    scalar, number = torch.empty((), device="meta"), torch.ones(())
    for dtype in (torch.bfloat16, torch.float32):
        logits = torch.empty(ROWS, COLUMNS, dtype=dtype, device="meta")
        rowwise = torch.empty(ROWS, device="meta")
        labels = torch.empty(ROWS, dtype=torch.int64, device="meta")
        statistics = VocabularyStatistics(rowwise, rowwise, rowwise, rowwise)
        name = str(dtype).removeprefix("torch.")
        calls: dict[str, Callable[[], Any]] = {
            "": lambda z=logits, y=labels: triton_backend.vocabulary_statistics(z, y, -100),
            " ": lambda z=logits, y=labels, s=statistics, g=rowwise: triton_backend.vocabulary_gradient(
                z, y, -100, s, g, g, z, scalar
            ),
            " greedy": lambda z=logits: triton_backend.unmask_statistics(z, 0.0, None, None, None),
            " sampled": lambda z=logits, k=labels: triton_backend.unmask_statistics(z, 0.8, None, None, k),
            " top-k": lambda z=logits: triton_backend.filter_thresholds(z, 0.8, 50, None),
            " top-p": lambda z=logits: triton_backend.filter_thresholds(z, 0.8, None, 0.9),
        }
        found += [(launch, suffix, name) for suffix, call in calls.items() for launch in record(call)]
    entropy, steps = torch.empty(ROWS, device="meta"), torch.empty(ROWS, dtype=torch.int64, device="meta")
    offsets = torch.empty(9, dtype=torch.int32, device="meta")
    for form in ("logistic", "hinge", "plackett_luce"):
        recorded = record(
            lambda form=form: triton_backend.trajectory_rank_loss(entropy, steps, offsets, form, number, number)
        )
        found += [(launch, f" {form}" if "pairs" in launch.kernel.__name__ else "", "float32") for launch in recorded]
    named = {}
    for launch, suffix, dtype in found:
        name = launch.kernel.__name__.removesuffix("_kernel") + suffix.rstrip()
        named.setdefault((name, dtype), (name, dtype, launch))
    return list(named.values())


def smallest_launches() -> list[Launch]:
    """Of one row, as sizes of 1 are constants to Triton; settings are numbers or in memory, and options left out."""
    entropy, steps = torch.empty(1, device="meta"), torch.empty(1, dtype=torch.int32, device="meta")
    labels, offsets = steps.long(), torch.empty(2, dtype=torch.int64, device="meta")
    statistics = VocabularyStatistics(None, entropy, entropy, entropy)
    calls = []
    for dtype in POINTERS:
        if dtype.is_floating_point:
            logits = torch.empty(1, 7, dtype=dtype, device="meta")
            for grads in ((entropy, None), (None, entropy)):
                arguments = (logits, labels, -100, statistics, *grads, logits)
                calls.append(partial(triton_backend.vocabulary_gradient, *arguments))
            calls.append(partial(triton_backend.vocabulary_statistics, logits, None, -100))
            calls.append(partial(triton_backend.vocabulary_statistics, logits, labels, -100))
            calls.append(partial(triton_backend.unmask_statistics, logits, 0.0, None, None, None))
            calls.append(partial(triton_backend.unmask_statistics, logits, 0.8, 3, 0.9, labels))
    for number in (torch.ones(()), torch.empty((), device="meta")):
        for form in ("logistic", "hinge", "plackett_luce"):
            ranking = (steps, offsets, form, number, number)
            calls.append(partial(triton_backend.trajectory_rank_loss, entropy, *ranking))
    return [launch for call in calls for launch in record(call)]


def record(call: Callable[[], Any]) -> list[Launch]:
    """The launches that a call would make."""
    recorded = []

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        options = {name: keywords.pop(name) for name in ("num_warps", "enable_fp_fusion")}
        recorded.append(Launch(kernel, dict(zip(kernel.arg_names, args, strict=False)) | keywords, options))

    original, JITFunction.run = JITFunction.run, run
    call()
    JITFunction.run = original
    return recorded


def source_of(launch: Launch) -> ASTSource:
    """The kernel with its arguments' types, specialised as Triton's launcher specialises them."""
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        is_size = type(value) is int and not launch.kernel.params[index].is_constexpr
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif is_size and value != 1:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "constexpr"
            constants[name] = value
    return ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)


def measure(name: str, dtype: str, launch: Launch, architecture: int) -> Figures:
    """Compile for sm_`architecture` and read the machine code."""
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source_of(launch), target=target, options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        sass = run_tool("nvdisasm", "-c", cubin.name)
        resources = run_tool("cuobjdump", "-res-usage", cubin.name)
    code = read_code(sass)
    everything = Counter(instruction.opcode for instruction in code)
    threads = 32 * launch.options["num_warps"]
    chunk = launch.arguments["CHUNK"] if "ALIGNMENT" in launch.arguments else None
    itemsize = {"bfloat16": 2, "float32": 4}[dtype]
    count = shortest_way(code, chunk * itemsize // threads) if chunk else everything
    wide_loads, wide_stores, stores = (
        sum(n for op, n in count.items() if op.startswith(kind) and op.endswith(width))
        for kind, width in (("LDG", ".128"), ("STG", ".128"), ("STG", ""))
    )

    return Figures(
        name,
        dtype,
        f"sm_{architecture}",
        registers=int(re.search(r"REG:(\d+)", resources)[1]),
        spills=sum(n for op, n in everything.items() if op.startswith(("LDL", "STL"))),
        shared_bytes=compiled.metadata.shared,
        instructions=everything.total(),
        per_element=chunk and count.total() * threads / chunk,
        ex2_per_element=chunk and count["MUFU.EX2"] * threads / chunk,
        wide_loads=chunk and wide_loads * 16 * threads / (chunk * itemsize),
        narrow_stores=stores - wide_stores if "out" in launch.arguments else None,
    )


def read_code(sass: str) -> list[Instruction]:
    """What nvdisasm prints of one kernel, without its padding."""
    lines = re.findall(r"^(\.L_\w+):|/\*[0-9a-f]{4,}\*/\s+(@\S+\s+)?([A-Z][\w.]*)([^;]*);", sass, re.MULTILINE)
    labels, found = {}, []
    for label, guard, opcode, operands in lines:
        if label:
            labels[label] = len(found)
        elif opcode != "NOP":
            found.append((guard, opcode, operands))
    code = []
    for guard, opcode, operands in found:
        jump = re.match(r"\s*(.*?)`\((\.L_\w+)\)", operands) if opcode.startswith("BRA") else None
        always = not guard and (opcode == "EXIT" or (jump is not None and not jump[1]))
        code.append(Instruction(opcode, labels[jump[2]] if jump else None, not always))
    return code


def shortest_way(code: list[Instruction], needed_bytes: int) -> Counter[str]:
    """The opcodes on the shortest way from the first instruction to an end that loads so many bytes."""
    found: Counter[str] = Counter()
    state = (0, 0)  # an instruction, and the bytes that are loaded before it
    came_from, waiting = {state: None}, deque([state])
    while True:
        state = place, loaded = waiting.popleft()
        instruction = code[place]
        loaded = min(loaded + instruction.loaded_bytes, needed_bytes)
        if instruction.opcode == "EXIT" and loaded == needed_bytes:
            break
        following = [instruction.target, place + 1 if instruction.falls_through else None]
        for reached in ((target, loaded) for target in following if target is not None):
            if reached not in came_from:
                came_from[reached] = state
                waiting.append(reached)
    while state is not None:
        found[code[state[0]].opcode] += 1
        state = came_from[state]
    return found


def run_tool(name: str, *arguments: str) -> str:
    """The output of one of the CUDA tools that come with Triton."""
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def all_figures() -> list[Figures]:
    """Every kernel on every architecture, in a fixed order."""
    found = launches()
    steps = [(name, dtype, launch, sm) for name, dtype, launch in found for sm in ARCHITECTURES]
    return [measure(*step) for step in track(steps, "Compiling", console=Console(stderr=True))]


def table(figures: list[Figures]) -> str:
    """Markdown."""
    heads = [field.replace("_", " ") for field in Figures._fields]
    lines = [f"Triton {triton.__version__}, N={ROWS}, V={COLUMNS}.", "", "| " + " | ".join(heads) + " |"]
    lines.append("|" + " --- |" * 3 + " ---: |" * (len(heads) - 3))
    lines += ["| " + " | ".join(cell(value) for value in row) + " |" for row in figures]
    return "\n".join(lines)


def cell(value: str | float | None) -> str:
    """A figure as it stands in the table."""
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    if sys.argv[1:] == ["--smallest"]:
        for launch in smallest_launches():
            triton.compile(source_of(launch), target=GPUTarget("cuda", 90, 32), options=launch.options)
    else:
        print(table(all_figures()))
