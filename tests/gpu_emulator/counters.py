"""Counts what launches do: instructions, bytes, sectors and bank conflicts."""

from collections import Counter

import numpy as np

from tests.gpu_emulator.machine import Code
from tests.gpu_emulator.memory import Access, GlobalMemory, SharedMemory

SECTOR = 32
"""Bytes that global memory is read and written in."""

BANKS, BANK_BYTES = 32, 4
"""Of shared memory, which serves one word of each bank at a time."""

EXPONENTIALS = ("ex2", "tanh")


class Counters:
    """An observer of launches; `totals` are in threads for instructions, else in what their name says."""

    def __init__(self):
        self.totals: Counter[str] = Counter()

    def block(self, code: Code, block: int, threads: int) -> None:
        """Adds the instructions of a block; a multiplication that became part of another is none."""
        first, end = code.program.blocks[block]
        for instruction in code.program.instructions[first:end]:
            if instruction.opcode != "nop":
                self.totals["instructions"] += threads
                self.totals[instruction.kind] += threads
        self.totals["exponentials"] = sum(self.totals[kind] for kind in EXPONENTIALS)

    def access(
        self, memory: GlobalMemory | SharedMemory, access: Access, addresses: np.ndarray, is_store: bool
    ) -> None:
        """Adds the traffic of one step."""
        if isinstance(memory, SharedMemory):
            self.totals["bank_conflicts"] += bank_conflicts(access, addresses)
            return
        name = "stored" if is_store else "loaded"
        warp = access.threads.thread.astype(np.uint64) // 32 << 48
        each = addresses.astype(np.uint64) & (2**48 - 1)
        distinct = np.unique(warp | each)
        by_warp = np.unique(distinct >> 48, return_counts=True)[1] * access.width
        self.totals[f"{name}_bytes"] += int(by_warp.sum())
        self.totals[f"{name}_sectors"] += len(np.unique(warp | each // SECTOR))
        self.totals[f"{name}_sectors_at_best"] += int((-(-by_warp // SECTOR)).sum())


def bank_conflicts(access: Access, addresses: np.ndarray) -> int:
    """How many more times shared memory is asked than if no bank had two words of a request to serve.

    Wide accesses are requests of as many threads as 128 bytes hold.
    """
    threads_a_request = max(1, min(32, BANKS * BANK_BYTES // access.width))
    request = access.lanes // 32 * 32 + access.lanes % 32 // threads_a_request
    words = addresses.astype(np.int64)[:, None] // BANK_BYTES + np.arange(max(access.width // BANK_BYTES, 1))
    distinct = np.unique(np.repeat(request, words.shape[1]).astype(np.int64) << 32 | words.reshape(-1))
    of_bank, served = np.unique(distinct >> 32 << 5 | distinct % BANKS, return_counts=True)
    _, of_request = np.unique(of_bank >> 5, return_inverse=True)
    worst = np.zeros(of_request.max() + 1, np.int64)
    np.maximum.at(worst, of_request, served)
    return int((worst - 1).sum())
