"""Global and shared memory, and the checks of every access to them.

An access may not be misaligned, leave the tensor that the kernel was given, read what nothing has written, or race with
another thread's.
"""

import ctypes
from typing import NamedTuple

import numpy as np
import torch

from tests.gpu_emulator.errors import Defect
from tests.gpu_emulator.numbers import UNSIGNED
from tests.gpu_emulator.program import Instruction
from tests.gpu_emulator.races import RaceDetector, Threads
from tests.gpu_emulator.uninitialised import PATTERN

ADDRESS_BITS = 40
"""Each tensor's storage has so large a range of addresses of its own: an offset that overflows 32 bits stays in it."""


class Access(NamedTuple):
    """What some threads do in one step: each touches `count` elements of `size` bytes from its own address on."""

    instruction: Instruction
    lanes: np.ndarray
    threads: Threads
    size: int
    count: int

    @property
    def width(self) -> int:
        """Bytes that a thread touches."""
        return self.size * self.count

    def part(self, chosen: np.ndarray) -> "Access":
        """The access of some of its threads."""
        return self._replace(lanes=self.lanes[chosen], threads=Threads(*(numbers[chosen] for numbers in self.threads)))

    def defect(self, what: str, index: int, detail: str) -> Defect:
        """The error of the thread at `index`."""
        return Defect(f"{what}: {detail}, thread {self.threads.thread[index]} of the launch, in {self.instruction}")

    def check(self, holds: np.ndarray, what: str, detail: str, numbers: np.ndarray) -> None:
        """Raises for the first thread for which a condition does not hold; `detail` has a place for its number."""
        if not holds.all():
            index = int(np.flatnonzero(~holds)[0])
            raise self.defect(what, index, detail.format(int(numbers[index])))

    def check_equal_values(self, shared: np.ndarray, place: np.ndarray, values: list[np.ndarray]) -> None:
        """Threads that store to the same place in one step store the same: else it is left open which one stays."""
        if shared.any():
            order = np.argsort(place, kind="stable")
            again = place[order][1:] == place[order][:-1]
            for stored in values:
                differs = again & (stored[order][1:] != stored[order][:-1])
                if differs.any():
                    index = int(order[1:][differs][0])
                    raise self.defect("threads store different values to one place", index, f"{stored[index]:#x}")


class Allocation:
    """The storage of one or several tensors that a kernel is given.

    Offsets are counted from the 64 bytes in which the storage begins, so that the alignment of an address is that of
    the tensor on the host. A place is an element of the tensors, counted over those that they contain.
    """

    def __init__(self, storage: torch.UntypedStorage, index: int):
        self.pointer, self.base = storage.data_ptr(), (index + 1) << ADDRESS_BITS
        self.lead = self.pointer % 64
        size = -(-(self.lead + storage.nbytes()) // 8) * 8 if storage.nbytes() else 0
        memory = (ctypes.c_char * size).from_address(self.pointer - self.lead) if size else b""
        self.bytes = np.frombuffer(memory, np.uint8)
        self.views = {size: self.bytes.view(dtype) for size, dtype in UNSIGNED.items()}
        self.tensors: list[tuple[str, torch.Tensor]] = []

    def add(self, name: str, tensor: torch.Tensor) -> int:
        """The address of a tensor on this storage."""
        self.tensors.append((name, tensor))
        return self.base + self.lead + tensor.storage_offset() * tensor.itemsize

    def close(self, cta_threads: int) -> None:
        """Prepares the checks, once all tensors are known."""
        self.unit = min(tensor.itemsize for _, tensor in self.tensors)
        self.elements = np.frombuffer(self.bytes[self.lead % self.unit :], UNSIGNED[self.unit], self.units_in_storage())
        parts = [self.units_of(tensor) for _, tensor in self.tensors if tensor.numel()]
        self.units = parts[0] if len(parts) == 1 else np.unique(np.concatenate([*map(np.asarray, parts), []]))
        self.is_range = isinstance(self.units, range)
        if not self.is_range:
            self.units = self.units.astype(np.int64)
        inside = slice(self.units.start, self.units.stop) if self.is_range else self.units
        self.has_unwritten = bool((self.elements[inside] == PATTERN[self.unit]).any())
        self.races = RaceDetector(len(self.units), cta_threads)

    def units_in_storage(self) -> int:
        """Whole elements in the bytes of the storage."""
        return (len(self.bytes) - self.lead % self.unit) // self.unit

    def units_of(self, tensor: torch.Tensor) -> range | np.ndarray:
        """The elements of a tensor, sorted, in units from the first one of the storage."""
        first = (self.lead + tensor.storage_offset() * tensor.itemsize) // self.unit
        many = tensor.itemsize // self.unit
        if tensor.is_contiguous():
            return range(first, first + tensor.numel() * many)
        offsets = np.zeros(1, np.int64)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            offsets = (offsets[:, None] + stride * np.arange(size)).reshape(-1)
        return np.unique((first + offsets * many)[:, None] + np.arange(many))

    @property
    def names(self) -> str:
        """The kernel's names for the tensors."""
        return ", ".join(name for name, _ in self.tensors)

    def access(self, addresses: np.ndarray, access: Access, values: list[np.ndarray] | None) -> list[np.ndarray] | None:
        """Loads and returns, or stores `values`.

        Raises:
            Defect: a check failed.
        """
        detail = f"{access.width} bytes at address {{:#x}} of {self.names}"
        access.check(addresses % access.width == 0, "misaligned access", detail, addresses)
        offset = addresses.astype(np.int64) - self.base
        first = (offset - self.lead % self.unit) // self.unit
        units = first[:, None] + np.arange(max(access.width // self.unit, 1))
        if self.is_range:
            place, inside = units - self.units.start, (units >= self.units.start) & (units < self.units.stop)
        else:
            place = np.searchsorted(self.units, units)
            inside = self.units[np.minimum(place, len(self.units) - 1)] == units
        detail = f"byte {{}} from where {self.names} begins"
        access.check(inside.all(1), "access out of bounds", detail, offset - self.lead)
        if values is None and self.has_unwritten:
            written = self.elements[units] != PATTERN[self.unit]
            access.check(written.all(1), "read of uninitialised memory", detail, offset - self.lead)
        many = place.shape[1]
        threads = access.threads.repeat(many) if many > 1 else access.threads
        if values is None:
            race = self.races.read(place.reshape(-1), threads)
        else:
            change = is_change(self.views[access.size], offset // access.size, values)
            race, shared = self.races.write(place.reshape(-1), threads, np.repeat(change, many))
            access.check_equal_values(shared, offset, values)
        if race is not None:
            name, index = race
            raise access.defect(f"global {name}", index // many, f"byte {offset[index // many]} of {self.names}")
        return transfer(self.views[access.size], offset // access.size, values, access.count)


class GlobalMemory:
    """All tensors that a kernel is given."""

    def __init__(self):
        self.allocations: list[Allocation] = []
        self.by_pointer: dict[int, Allocation] = {}

    def address_of(self, name: str, tensor: torch.Tensor) -> int:
        """The address of a tensor; views of one storage share its range."""
        storage = tensor.untyped_storage()
        allocation = self.by_pointer.get(storage.data_ptr()) if storage.nbytes() else None
        if allocation is None:
            allocation = Allocation(storage, len(self.allocations))
            self.allocations.append(allocation)
            self.by_pointer[allocation.pointer] = allocation
        return allocation.add(name, tensor)

    def close(self, cta_threads: int) -> None:
        """Prepares the checks, once all tensors are known."""
        for allocation in self.allocations:
            allocation.close(cta_threads)

    def access(self, addresses: np.ndarray, access: Access, values: list[np.ndarray] | None) -> list[np.ndarray] | None:
        """Loads and returns, or stores `values`; the threads of one access may go to different tensors."""
        indices = (addresses >> ADDRESS_BITS).astype(np.int64) - 1
        exists = (indices >= 0) & (indices < len(self.allocations))
        access.check(exists, "access out of bounds", "address {:#x} is in no tensor", addresses)
        if (indices == indices[0]).all():
            return self.allocations[indices[0]].access(addresses, access, values)
        loaded = [np.zeros(len(addresses), UNSIGNED[access.size]) for _ in range(access.count)]
        for index in np.unique(indices):
            chosen = indices == index
            stored = None if values is None else [numbers[chosen] for numbers in values]
            part = self.allocations[index].access(addresses[chosen], access.part(chosen), stored)
            for all_numbers, numbers in zip(loaded, part or [], strict=False):
                all_numbers[chosen] = numbers
        return loaded if values is None else None


class SharedMemory:
    """The shared memory of several CTAs; its places are bytes."""

    def __init__(self, size: int, ctas: int, cta_threads: int):
        self.size, self.cta_threads = size, cta_threads
        self.stride = -(-max(size, 1) // 16) * 16
        self.bytes = np.zeros(ctas * self.stride, np.uint8)
        self.is_written = np.zeros(ctas * self.stride, bool)
        self.races = RaceDetector(ctas * self.stride, cta_threads)

    def access(self, addresses: np.ndarray, access: Access, values: list[np.ndarray] | None) -> list[np.ndarray] | None:
        """Loads and returns, or stores `values`.

        Raises:
            Defect: a check failed.
        """
        detail = f"{access.width} bytes at {{}} of {self.size} of shared memory"
        offset = addresses.astype(np.int64)
        access.check(offset % access.width == 0, "misaligned access", detail, offset)
        inside = (offset >= 0) & (offset + access.width <= self.size)
        access.check(inside, "access out of bounds", detail, offset)
        offset = offset + access.lanes // self.cta_threads * self.stride
        place = offset[:, None] + np.arange(access.width)
        threads = access.threads.repeat(access.width)
        if values is None:
            access.check(self.is_written[place].all(1), "read of uninitialised memory", detail, addresses)
            race = self.races.read(place.reshape(-1), threads)
        else:
            self.is_written[place] = True
            change = is_change(self.bytes.view(UNSIGNED[access.size]), offset // access.size, values)
            race, shared = self.races.write(place.reshape(-1), threads, np.repeat(change, access.width))
            access.check_equal_values(shared, offset, values)
        if race is not None:
            name, index = race
            raise access.defect(f"shared {name}", index // access.width, f"byte {addresses[index // access.width]}")
        return transfer(self.bytes.view(UNSIGNED[access.size]), offset // access.size, values, access.count)


def is_change(memory: np.ndarray, first: np.ndarray, values: list[np.ndarray]) -> np.ndarray:
    """Whether each thread stores something else than what is there."""
    return np.any([memory[first + place] != stored for place, stored in enumerate(values)], axis=0)


def transfer(
    memory: np.ndarray, first: np.ndarray, values: list[np.ndarray] | None, count: int
) -> list[np.ndarray] | None:
    """Copies `count` neighbouring elements of each thread out of or into memory."""
    if values is None:
        return [memory[first + place] for place in range(count)]
    for place, stored in enumerate(values):
        memory[first + place] = stored
    return None
