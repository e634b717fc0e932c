"""Parses the PTX of one kernel into instructions, registers and basic blocks."""

import re
from collections import Counter
from typing import NamedTuple

from tests.gpu_emulator.errors import Unsupported

REGISTER = re.compile(r"%[a-z]+\d+")
REGISTER_BYTES = {"%p": 0, "%rs": 2, "%h": 2, "%hh": 4, "%r": 4, "%f": 4, "%rd": 8, "%fd": 8, "%fl": 8}
"""Bytes of a register by the prefix of its name; 0 is a predicate."""

WARP_WIDE = ("shfl.sync", "redux.sync", "bar.warp", "ldmatrix", "stmatrix")
"""Instructions at which the threads of a warp meet."""


class Instruction(NamedTuple):
    """One PTX instruction, the predicate that guards it, and the line of the kernel that it was compiled from."""

    opcode: str
    operands: list[str]
    guard: str | None
    negated: bool
    text: str
    source: str

    @property
    def kind(self) -> str:
        """The operation, without its types and modifiers."""
        return self.opcode.split(".")[0]

    @property
    def modifiers(self) -> list[str]:
        """What follows the operation, the type last."""
        return self.opcode.split(".")[1:]

    @property
    def is_warp_wide(self) -> bool:
        """Whether all threads of a warp execute it together."""
        return self.opcode.startswith(WARP_WIDE)

    @property
    def is_barrier(self) -> bool:
        """Whether all threads of a CTA wait for each other here."""
        return self.opcode.startswith(("bar.sync", "barrier.sync", "barrier.cta.sync"))

    @property
    def ends_block(self) -> bool:
        """Whether the next instruction may be executed by other threads than this one."""
        return self.kind in ("bra", "ret", "exit", "trap") or self.is_barrier

    def __str__(self) -> str:
        return f"{self.text}  // {self.source}" if self.source else self.text


class Register(NamedTuple):
    """A register's bytes, 0 for a predicate, and its index among those of the program."""

    size: int
    index: int


class Parameter(NamedTuple):
    """A parameter of the kernel: its name and PTX type."""

    name: str
    type: str


class Program:
    """The kernel of a PTX module.

    `instructions` are in the order of the text, `labels` map a label to the index of what follows it, `registers` a
    name to its place, and `blocks` are the (first, end) indices of the basic blocks.
    """

    def __init__(self, text: str):
        entry = re.search(r"\.visible \.entry (\w+)\((.*?)\)\s*(.*?)\{(.*)\n\}", text, re.DOTALL)
        if entry is None:
            raise Unsupported("a module without an entry point")
        self.name, parameters, directives, body = entry.groups()
        found = re.findall(r"\.param \.(\w+) (?:\.ptr [^,]*?)?(\w+)\s*(?:,|$)", parameters)
        self.parameters = [Parameter(name, kind) for kind, name in found]
        self.threads = int(re.search(r"\.(?:reqntid|maxntid) (\d+)", directives)[1])
        self.instructions, self.labels = parse_body(body)
        self.registers = find_registers(self.instructions)
        self.blocks = find_blocks(self.instructions, self.labels)


def parse_body(body: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of a kernel, and the index that each label stands for."""
    instructions, labels, source = [], {}, ""
    for line in body.split("\n"):
        location = re.match(r"\s*\.loc\s.*?//\s*(.*)$", line)
        if location:
            source = location[1].strip()
            continue
        line = line.split("//")[0].strip()
        label = re.match(r"(\$?\w+):\s*(.*)$", line)
        if label:
            labels[label[1]] = len(instructions)
            line = label[2]
        for statement in line.split(";"):
            statement = statement.strip().lstrip("{ \t")
            if statement and not statement.startswith((".", "}")):
                instructions.append(parse_statement(statement, source))
    return instructions, labels


def parse_statement(statement: str, source: str) -> Instruction:
    """One instruction, as in `@!%p1 add.s32 %r1, %r2, 3`."""
    found = re.match(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)$", statement, re.DOTALL)
    if found is None:
        raise Unsupported(f"the statement {statement!r}")
    negation, guard, opcode, operands = found.groups()
    return Instruction(opcode, split_operands(operands), guard, bool(negation), statement, source)


def split_operands(text: str) -> list[str]:
    """What commas separate outside of brackets."""
    return [operand.strip() for operand in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text) if operand.strip()]


def find_registers(instructions: list[Instruction]) -> dict[str, Register]:
    """A place for each register that is named."""
    registers = {}
    for instruction in instructions:
        for name in REGISTER.findall(instruction.text):
            if name not in registers:
                size = REGISTER_BYTES[re.match(r"%[a-z]+", name)[0]]
                registers[name] = Register(size, len(registers))
    return registers


def find_blocks(instructions: list[Instruction], labels: dict[str, int]) -> list[tuple[int, int]]:
    """(first, end) of the runs of instructions that the same threads execute together.

    A block ends where threads branch, wait or leave, and begins where they arrive or meet the others of their warp.
    """
    starts = {0, *labels.values()}
    for index, instruction in enumerate(instructions):
        if instruction.ends_block:
            starts.add(index + 1)
        if instruction.is_warp_wide:
            starts.add(index)
    ordered = sorted(start for start in starts if start < len(instructions))
    return list(zip(ordered, [*ordered[1:], len(instructions)], strict=True))


def fuse_multiplications(program: Program) -> None:
    """Makes one multiply-add of a multiplication and the addition that alone uses its result, as ptxas does.

    Both are fp32 without a rounding in their names, and in one block. `fma.neg_c` is a * b - c and `fma.neg_a` is
    c - a * b; PTX has no names for them.
    """
    instructions = program.instructions
    reads, writers = Counter(), {}
    for index, instruction in enumerate(instructions):
        is_store = instruction.kind in ("st", "stmatrix")
        for operand in instruction.operands[0 if is_store else 1 :]:
            reads.update(REGISTER.findall(operand))
        if instruction.operands and not is_store:
            for name in REGISTER.findall(instruction.operands[0]):
                writers.setdefault(name, []).append(index)
    for first, end in program.blocks:
        for index in range(first, end):
            fused = fuse(instructions, index, first, reads, writers)
            if fused is not None:
                product, instructions[index] = fused
                instructions[product] = instructions[product]._replace(opcode="nop", operands=[])


def fuse(
    instructions: list[Instruction], index: int, first: int, reads: Counter[str], writers: dict[str, list[int]]
) -> tuple[int, Instruction] | None:
    """The index of the multiplication that an addition takes up, and what both become; None if it cannot."""
    addition = instructions[index]
    if addition.opcode not in ("add.f32", "sub.f32") or addition.guard:
        return None
    for place in (1, 2):
        factor_of = writers.get(addition.operands[place], [])
        if len(factor_of) != 1 or reads[addition.operands[place]] != 1 or not first <= factor_of[0] < index:
            continue
        product = instructions[factor_of[0]]
        if product.opcode != "mul.f32" or product.guard:
            continue
        opcode = "fma.rn.f32" if addition.opcode == "add.f32" else "fma.neg_c" if place == 1 else "fma.neg_a"
        operands = [addition.operands[0], *product.operands[1:], addition.operands[3 - place]]
        return factor_of[0], addition._replace(
            opcode=opcode, operands=operands, text=f"{addition.text} <- {product.text}"
        )
    return None
