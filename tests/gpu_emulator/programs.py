"""Small PTX programs for the emulator's own tests."""

import numpy as np
import torch

from tests.gpu_emulator.driver import launch_ptx

REGISTER_OF = {1: "%rs", 2: "%rs", 4: "%r", 8: "%rd"}
"""The prefix of a register that holds so many bytes."""


def module(body: str, parameters: int, threads: int) -> str:
    """A PTX module with one kernel, whose parameters are so many pointers."""
    declared = ",\n".join(f"\t.param .u64 .ptr .global .align 1 kernel_param_{i}" for i in range(parameters))
    return f"""
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
{declared}
)
.reqntid {threads}
{{
{body}
}}
"""


def run_ptx(body: str, *tensors: torch.Tensor, threads: int = 32, ctas: int = 1, shared_bytes: int = 0) -> None:
    """Runs a kernel whose pointers `%rd101`, `%rd102`, ... are the tensors; `%r100` is the thread's index."""
    loads = [f"ld.param.b64 %rd{101 + i}, [kernel_param_{i}];" for i in range(len(tensors))]
    text = module("\n".join([*loads, "mov.u32 %r100, %tid.x;", body, "ret;"]), len(tensors), threads)
    given = [(f"tensor {i}", "*i32", tensor) for i, tensor in enumerate(tensors)]
    launch_ptx(text, (ctas, 1, 1), given, shared_bytes)


def evaluate(statement: str, result: type, *operands: np.ndarray) -> np.ndarray:
    """What a statement makes of each thread's operands: `{a}`, `{b}`, ... stand for them, and `{to}` for the result.

    Registers 90 to 99 of every kind are free for the statement's own use.
    """
    count = -(-len(operands[0]) // 32) * 32
    tensors, body, names = [], [], {}
    for index, operand in enumerate(operands):
        padded = np.concatenate([operand, np.repeat(operand[-1:], count - len(operand))])
        tensors.append(torch.from_numpy(padded.view(f"i{operand.itemsize}")))
        register, place = f"{REGISTER_OF[operand.itemsize]}{index + 1}", f"%rd{110 + index}"
        body.append(f"mad.wide.u32 {place}, %r100, {operand.itemsize}, %rd{101 + index};")
        body.append(f"ld.global.b{8 * operand.itemsize} {register}, [{place}];")
        names["abcd"[index]] = register
    size = np.dtype(result).itemsize
    tensors.append(torch.zeros(count, dtype=getattr(torch, f"int{8 * size}")))
    to = f"{REGISTER_OF[size]}80"
    body.append(statement.format(to=to, **names))
    body.append(f"mad.wide.u32 %rd109, %r100, {size}, %rd{100 + len(tensors)};")
    body.append(f"st.global.b{8 * size} [%rd109], {to};")
    run_ptx("\n".join(body), *tensors, threads=count)
    return tensors[-1].numpy().view(result)[: len(operands[0])]
