"""Runs a program: the threads of several CTAs at once, each with a program counter of its own.

A program counter names a basic block. The lowest block that any thread can run is run next, by all threads that are
there; at an instruction of whole warps, by the warps that are complete. So threads that a branch took apart meet again
as early as the order of the blocks allows.
"""

from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from tests.gpu_emulator.errors import Defect, Unsupported
from tests.gpu_emulator.instructions import build
from tests.gpu_emulator.memory import Access, GlobalMemory, SharedMemory
from tests.gpu_emulator.numbers import UNSIGNED
from tests.gpu_emulator.operands import At, Execution, Operands
from tests.gpu_emulator.program import Instruction, Program, fuse_multiplications
from tests.gpu_emulator.races import Threads
from tests.gpu_emulator.settings import SETTINGS

ALL = slice(None)
CHANCE_OF_A_WARP = 0.4
"""Under `chaos`, of each warp that can run to be among those that do."""


class Observer(Protocol):
    """Counts what a launch does."""

    def access(
        self, memory: GlobalMemory | SharedMemory, access: Access, addresses: np.ndarray, is_store: bool
    ) -> None:
        """Some threads touch memory in one step."""

    def block(self, code: "Code", block: int, threads: int) -> None:
        """So many threads run a block."""


class Code:
    """A program with an executable function for each instruction, by block."""

    def __init__(self, text: str):
        self.program = Program(text)
        fuse_multiplications(self.program)
        self.operands = Operands(self.program.registers)
        self.bodies: list[list[Execution]] = []
        self.ends: list[Instruction | None] = []
        self.meets: list[bool] = []
        for first, end in self.program.blocks:
            instructions = [one for one in self.program.instructions[first:end] if one.opcode != "nop"]
            last = instructions.pop() if instructions and instructions[-1].ends_block else None
            self.bodies.append([build(one, self.operands) for one in instructions])
            self.ends.append(last)
            self.meets.append(self.program.instructions[first].is_warp_wide)
        block_at = {first: block for block, (first, _) in enumerate(self.program.blocks)}
        self.targets = {label: block_at[index] for label, index in self.program.labels.items() if index in block_at}


class Launch(NamedTuple):
    """What a kernel is launched with; `parameters` are the bytes of each, by name."""

    grid: tuple[int, int, int]
    parameters: dict[str, np.ndarray]
    memory: GlobalMemory
    shared_bytes: int


def run(code: Code, launch: Launch, observers: list[Observer]) -> None:
    """Executes a launch.

    Raises:
        Defect: the program did what a GPU leaves undefined.
        Unsupported: it uses what the emulator does not know.
    """
    ctas = int(np.prod(launch.grid))
    at_once = max(1, SETTINGS.lanes_at_once // code.program.threads)
    for first in range(0, ctas, at_once):
        Machine(code, launch, range(first, min(first + at_once, ctas)), observers).run()


class Machine:
    """The threads of some CTAs of a launch, one after the other, as lanes of numpy arrays."""

    def __init__(self, code: Code, launch: Launch, ctas: range, observers: list[Observer]):
        self.code, self.launch, self.ctas, self.observers = code, launch, ctas, observers
        self.cta_threads = code.program.threads
        self.lanes = np.arange(len(ctas) * self.cta_threads)
        count = len(self.lanes)
        self.registers = [
            np.full(count, 0x7FC0BEEF % 2 ** (8 * size), UNSIGNED[size]) if size else np.ones(count, bool)
            for size, _ in code.program.registers.values()
        ]
        self.shared = SharedMemory(launch.shared_bytes, len(ctas), self.cta_threads)
        self.thread = (self.lanes + ctas.start * self.cta_threads).astype(np.int32)
        self.epoch, self.warp_epoch = np.zeros(count, np.int32), np.zeros(count, np.int32)
        self.place = np.zeros(count, np.int32)
        self.waits, self.has_ended = np.zeros(count, bool), np.zeros(count, bool)

    # What instructions use.

    def for_each(self, at: At, values: np.ndarray) -> np.ndarray:
        """One value for each of the threads `at`, where there may be one for all."""
        return np.ascontiguousarray(np.broadcast_to(values, self.lanes[at].shape))

    def parameter(self, name: str, offset: int, dtype: np.dtype) -> np.ndarray:
        """(1,) value in the kernel's parameters."""
        return self.launch.parameters[name][offset : offset + dtype.itemsize].view(dtype)

    @cached_property
    def special_registers(self) -> dict[str, np.ndarray]:
        """Of each thread: its place in its CTA, and its CTA's in the grid."""
        x, y, z = self.launch.grid
        lane, cta = self.lanes % self.cta_threads, np.repeat(np.array(self.ctas), self.cta_threads)
        same = np.ones_like(lane)
        return {
            **{"%tid.x": lane, "%tid.y": 0 * lane, "%tid.z": 0 * lane, "%laneid": lane % 32, "%warpid": lane // 32},
            **{"%ntid.x": self.cta_threads * same, "%ntid.y": same, "%ntid.z": same},
            **{"%ctaid.x": cta % x, "%ctaid.y": cta // x % y, "%ctaid.z": cta // (x * y)},
            **{"%nctaid.x": x * same, "%nctaid.y": y * same, "%nctaid.z": z * same},
        }

    def special_register(self, name: str) -> np.ndarray:
        """(lanes,) of a register that the hardware sets."""
        if name not in self.special_registers:
            raise Unsupported(f"the register {name}")
        return self.special_registers[name]

    def load(
        self, space: str, addresses: np.ndarray, size: int, count: int, at: At, instruction: Instruction
    ) -> list[np.ndarray]:
        """`count` neighbouring elements for each thread."""
        access = self.access_of(at, instruction, size, count)
        return self.transfer(space, addresses, access, None)

    def store(
        self, space: str, addresses: np.ndarray, values: list[np.ndarray], at: At, instruction: Instruction
    ) -> None:
        """Writes neighbouring elements of each thread."""
        self.transfer(space, addresses, self.access_of(at, instruction, values[0].itemsize, len(values)), values)

    def access_of(self, at: At, instruction: Instruction, size: int, count: int) -> Access:
        # A detector of races keeps them, so they are copies: epochs are counted up in place.
        threads = Threads(self.thread[at], self.epoch[at].copy(), self.warp_epoch[at].copy())
        return Access(instruction, self.lanes[at], threads, size, count)

    def transfer(
        self, space: str, addresses: np.ndarray, access: Access, values: list[np.ndarray] | None
    ) -> list[np.ndarray] | None:
        memory = self.shared if space == "shared" else self.launch.memory
        for observer in self.observers:
            observer.access(memory, access, addresses, values is not None)
        return memory.access(addresses, access, values)

    def check_rows(self, addresses: np.ndarray, instruction: Instruction) -> None:
        """The rows of matrices begin at multiples of 16 bytes."""
        if (addresses % 16).any():
            raise Defect(
                f"misaligned access: a matrix row at {int(addresses[addresses % 16 > 0][0])}, in {instruction}"
            )

    # Which threads run what.

    def run(self) -> None:
        """Until all threads have ended."""
        while not self.has_ended.all():
            ready = ~(self.waits | self.has_ended)
            if ready.any():
                self.run_block(*self.choose(ready))
            else:
                self.open_barriers()

    def choose(self, ready: np.ndarray) -> tuple[int, np.ndarray]:
        """The lowest block that threads can run, and these threads."""
        if SETTINGS.chaos:
            warps = np.repeat(SETTINGS.random.random(len(ready) // 32) < CHANCE_OF_A_WARP, 32)
            chosen = self.choose_among(ready & warps)
            if chosen is not None:
                return chosen
        chosen = self.choose_among(ready)
        if chosen is None:
            first = int(np.flatnonzero(ready)[0])
            instruction = self.code.program.instructions[self.code.program.blocks[self.place[first]][0]]
            raise Defect(
                f"part of a warp: thread {self.thread[first]} waits for the others of its warp, in {instruction}"
            )
        return chosen

    def choose_among(self, ready: np.ndarray) -> tuple[int, np.ndarray] | None:
        """The same among some threads, or None if each waits for others of its warp."""
        while ready.any():
            block = int(self.place[ready].min())
            here = ready & (self.place == block)
            if not self.code.meets[block]:
                return block, np.flatnonzero(here)
            complete = np.repeat(here.reshape(-1, 32).all(1), 32)
            if complete.any():
                return block, np.flatnonzero(complete)
            ready = ready & ~here
        return None

    def run_block(self, block: int, chosen: np.ndarray) -> None:
        """The instructions of a block, and where its threads go from there."""
        at = ALL if len(chosen) == len(self.lanes) else chosen
        for observer in self.observers:
            observer.block(self.code, block, len(chosen))
        for execute in self.code.bodies[block]:
            execute(self, at)
        end = self.code.ends[block]
        self.place[at] = block + 1
        if end is None:
            return
        holds = self.guard_of(end, at)
        if end.kind == "bra":
            self.place[chosen[holds]] = self.code.targets[end.operands[0]]
        elif end.is_barrier:
            if not holds.all():
                raise Unsupported(f"{end}: a barrier under a guard")
            self.waits[at] = True
        elif end.kind == "trap":
            raise Defect(f"a trap, in {end}")
        else:
            self.has_ended[chosen[holds]] = True

    def guard_of(self, instruction: Instruction, at: At) -> np.ndarray:
        """For which of the threads `at` an instruction is executed."""
        if instruction.guard is None:
            return np.ones(len(self.lanes[at]), bool)
        index = self.code.program.registers[instruction.guard].index
        return self.registers[index][at] != instruction.negated

    def open_barriers(self) -> None:
        """Every thread waits or has ended: those of a CTA go on, if they wait at one barrier and none is missing."""
        of_ctas = (len(self.ctas), self.cta_threads)
        for waits, ended, place in zip(
            self.waits.reshape(of_ctas), self.has_ended.reshape(of_ctas), self.place.reshape(of_ctas), strict=True
        ):
            if waits.any():
                barriers = [self.code.ends[block - 1] for block in np.unique(place[waits])]
                if len(barriers) > 1:
                    raise Defect(f"divergent barriers: a CTA waits at {' and at '.join(map(str, barriers))}")
                if ended.any():
                    raise Defect(
                        f"divergent barriers: {ended.sum()} threads have ended while others wait at {barriers[0]}"
                    )
        self.epoch[self.waits] += 1
        self.warp_epoch[self.waits] += 1
        self.waits[:] = False
