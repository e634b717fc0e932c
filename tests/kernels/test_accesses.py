"""How often the compiled kernels touch each logit, counted in the emulator."""

import numpy as np
import pytest
import torch

from tabom_kernels.backends import triton as triton_backend
from tabom_kernels.backends.triton.launch import CHUNK_LANES, chunk_columns
from tabom_kernels.noise import SEGMENT
from tests.gpu_emulator.driver import OBSERVERS
from tests.gpu_emulator.memory import ADDRESS_BITS, GlobalMemory
from tests.gpu_emulator.settings import SETTINGS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the emulator")

COLUMNS = 2 * 8192


class Accesses:
    """An observer of launches: offsets in a tensor that were loaded and stored, by each step."""

    def __init__(self, tensor):
        self.tensor, self.loads, self.stores = tensor, [], []

    def block(self, code, block, threads):
        """Instructions are not counted here."""

    def access(self, memory, access, addresses, is_store):
        """Keeps the elements of the tensor that some threads touch in one step; several may touch the same."""
        if not isinstance(memory, GlobalMemory) or self.tensor.data_ptr() not in memory.by_pointer:
            return
        allocation = memory.by_pointer[self.tensor.data_ptr()]
        offset = addresses[addresses >> ADDRESS_BITS == allocation.base >> ADDRESS_BITS].astype(np.int64)
        first = (offset - allocation.base - allocation.lead) // self.tensor.itemsize
        elements = np.unique(first[:, None] + np.arange(access.width // self.tensor.itemsize))
        (self.stores if is_store else self.loads).append(torch.from_numpy(elements))

    def counts(self, elements):
        """(N, V) of the contiguous tensor."""
        found = torch.cat([torch.zeros(0, dtype=torch.int64), *elements])
        return found.bincount(minlength=self.tensor.numel()).view(self.tensor.shape)


@pytest.fixture
def observe(monkeypatch):
    """Observes the accesses to a tensor; several warps that load the same count once, as they run together."""
    monkeypatch.setattr(SETTINGS, "chaos", False)

    def start(tensor):
        OBSERVERS.append(Accesses(tensor))
        return OBSERVERS[-1]

    yield start
    OBSERVERS.clear()


def logits_and_again(dtype):
    """(3, COLUMNS) logits, and how many of a row are read a second time: the lane with the best logit of each chunk."""
    logits = torch.randn(3, COLUMNS).to(dtype)
    chunk = chunk_columns(COLUMNS, logits.itemsize)
    return logits, COLUMNS // chunk * (chunk // CHUNK_LANES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_load_a_logit_once(rng, observe, dtype):
    """A second time, from the cache, come the label's, the neighbours of a best that outweighs its chunk (under 1 %),
    and the chunk of a logit at -inf."""
    logits, _ = logits_and_again(dtype)
    chunk = chunk_columns(COLUMNS, logits.itemsize)
    logits[1, 100], logits[2, 100] = 20.0, -torch.inf
    labels = torch.tensor([5, -100, COLUMNS - 1])
    accesses = observe(logits)
    triton_backend.vocabulary_statistics(logits, labels, -100)
    loads = accesses.counts(accesses.loads)
    lane = chunk // CHUNK_LANES
    assert loads.min() == 1 and loads.sum(1).sub(COLUMNS).tolist() == [1, lane, chunk + lane + 1]
    assert lane < 0.01 * COLUMNS
    assert accesses.counts(accesses.stores).sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_loads_and_stores_a_logit_once_and_unused_rows_only_store(rng, observe, dtype):
    logits, _ = logits_and_again(dtype)
    labels, a, g = torch.tensor([5, -100, -100]), torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.5, 0.5, 0.0])
    statistics = triton_backend.vocabulary_statistics(logits, labels, -100)
    accesses = observe(logits)
    triton_backend.vocabulary_gradient(logits, labels, -100, statistics, a, g, logits)
    loads, stores = (accesses.counts(found) for found in (accesses.loads, accesses.stores))
    expected = torch.ones(3, COLUMNS, dtype=torch.int64)
    expected[0, 5] = 2
    assert torch.equal(stores, expected)
    expected[2] = 0
    assert torch.equal(loads, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_token_costs_one_load_a_logit(rng, observe, dtype, temperature):
    """A draw reads one segment again, and every way the token that it took."""
    logits, again = logits_and_again(dtype)
    keys = torch.arange(3) if temperature else None
    accesses = observe(logits)
    triton_backend.unmask_statistics(logits, temperature, None, None, keys)
    loads = accesses.counts(accesses.loads)
    assert loads.min() == 1
    assert loads.sum(1).unique().tolist() == [COLUMNS + again + 1 + (SEGMENT if temperature else 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("top_k, top_p, half, single", [(50, None, 4, 5), (None, 0.9, 4, 5), (50, 0.9, 5, 7)])
def test_the_loads_of_filters(observe, dtype, top_k, top_p, half, single):
    """Fewer than 32 bits take, as a search ends with the set; top-p begins in what top-k keeps, below the maximum."""
    logits, again = logits_and_again(dtype)
    logits[:] = torch.randperm(COLUMNS) / 1024  # values whose order decides nothing about a search
    accesses = observe(logits)
    triton_backend.unmask_statistics(logits, 0.8, top_k, top_p, torch.arange(3))
    passes = single if dtype == torch.float32 else half
    loads = accesses.counts(accesses.loads)
    assert loads.sum(1).unique().tolist() == [(passes + 1) * COLUMNS + again + SEGMENT + 1]
