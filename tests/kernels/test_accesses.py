"""How often the kernels touch each logit, counted in the interpreter's masked loads and stores."""

import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from tabom_kernels import triton_backend
from tabom_kernels.noise import SEGMENT
from tabom_kernels.triton_backend.launch import CHUNK_LANES, chunk_columns

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")

COLUMNS = 2 * 8192


class Accesses:
    """Addresses that were read and written, launch after launch."""

    def __init__(self):
        self.loads, self.stores = [], []

    def per_element(self, addresses, tensor):
        """(N, V) counts of a contiguous tensor."""
        start, size = tensor.data_ptr(), tensor.numel()
        index = (torch.cat([torch.zeros(0, dtype=torch.int64), *addresses]) - start) // tensor.itemsize
        return index[(index >= 0) & (index < size)].bincount(minlength=size).view(tensor.shape)


@pytest.fixture
def accesses(monkeypatch):
    found = Accesses()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def addresses(pointers, mask):
        return torch.from_numpy(pointers.data[mask.data.astype(bool)].astype("int64").reshape(-1))

    def counting_load(self, pointers, mask, *arguments):
        found.loads.append(addresses(pointers, mask))
        return load(self, pointers, mask, *arguments)

    def counting_store(self, pointers, value, mask, *arguments):
        found.stores.append(addresses(pointers, mask))
        return store(self, pointers, value, mask, *arguments)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counting_store)
    return found


def logits_and_again(dtype):
    """(3, COLUMNS) logits, and how many of a row are read a second time: the lane with the best logit of each chunk."""
    logits = torch.randn(3, COLUMNS).to(dtype)
    chunk = chunk_columns(COLUMNS, logits.itemsize)
    return logits, COLUMNS // chunk * (chunk // CHUNK_LANES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_load_a_logit_once(rng, accesses, dtype):
    """A second time, from the cache, come the label's, the neighbours of a best that outweighs its chunk (under 1 %),
    and the chunk of a logit at -inf."""
    logits, _ = logits_and_again(dtype)
    chunk = chunk_columns(COLUMNS, logits.itemsize)
    logits[1, 100], logits[2, 100] = 20.0, -torch.inf
    labels = torch.tensor([5, -100, COLUMNS - 1])
    triton_backend.vocabulary_statistics(logits, labels, -100)
    loads = accesses.per_element(accesses.loads, logits)
    lane = chunk // CHUNK_LANES
    assert loads.min() == 1 and loads.sum(1).sub(COLUMNS).tolist() == [1, lane, chunk + lane + 1]
    assert lane < 0.01 * COLUMNS
    assert accesses.per_element(accesses.stores, logits).sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_loads_and_stores_a_logit_once_and_unused_rows_only_store(rng, accesses, dtype):
    logits, _ = logits_and_again(dtype)
    labels, a, g = torch.tensor([5, -100, -100]), torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.5, 0.5, 0.0])
    statistics = triton_backend.vocabulary_statistics(logits, labels, -100)
    accesses.loads.clear()
    triton_backend.vocabulary_gradient(logits, labels, -100, statistics, a, g, logits)
    loads, stores = (accesses.per_element(found, logits) for found in (accesses.loads, accesses.stores))
    expected = torch.ones(3, COLUMNS, dtype=torch.int64)
    expected[0, 5] = 2
    assert torch.equal(stores, expected)
    expected[2] = 0
    assert torch.equal(loads, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_token_costs_one_load_a_logit(rng, accesses, dtype, temperature):
    """A draw reads one segment again, and every way the token that it took."""
    logits, again = logits_and_again(dtype)
    keys = torch.arange(3) if temperature else None
    triton_backend.unmask_statistics(logits, temperature, None, None, keys)
    loads = accesses.per_element(accesses.loads, logits)
    assert loads.min() == 1
    assert loads.sum(1).unique().tolist() == [COLUMNS + again + 1 + (SEGMENT if temperature else 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("top_k, top_p, half, single", [(50, None, 4, 5), (None, 0.9, 4, 5), (50, 0.9, 5, 7)])
def test_the_loads_of_filters(accesses, dtype, top_k, top_p, half, single):
    """Fewer than 32 bits take, as a search ends with the set; top-p begins in what top-k keeps, below the maximum."""
    logits, again = logits_and_again(dtype)
    logits[:] = torch.randperm(COLUMNS) / 1024  # values whose order decides nothing about a search
    triton_backend.unmask_statistics(logits, 0.8, top_k, top_p, torch.arange(3))
    passes = single if dtype == torch.float32 else half
    loads = accesses.per_element(accesses.loads, logits)
    assert loads.sum(1).unique().tolist() == [(passes + 1) * COLUMNS + again + SEGMENT + 1]
