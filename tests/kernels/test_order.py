"""Threads that touch the same memory in an order that nothing fixes: the emulator refuses a launch that does so."""

import pytest
import torch

from tabom_kernels import cross_entropy_with_entropy, unmask_statistics
from tests.gpu_emulator import driver
from tests.gpu_emulator.program import Program
from tests.kernels.inputs import gaussian, peaked


@pytest.mark.parametrize("columns", [1, 2, 31, 64, 127])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_in_place_of_fewer_columns_than_threads(rng, columns, dtype):
    """Warps that have no columns of their own read those of the first, which must not have written yet."""
    logits = gaussian(2, columns).to(dtype).requires_grad_()
    labels = torch.tensor([columns - 1, -100])
    outputs = cross_entropy_with_entropy(logits, labels, inplace_backward=True, backend="triton")
    torch.autograd.grad([sum(x.sum() for x in outputs)], logits)


@pytest.mark.parametrize("columns, stride", [(100, 1), (300, 2), (8193, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_that_share_a_run_of_columns_agree_on_its_sum(rng, columns, stride, dtype):
    """A fused multiply-add of one's own product and another's rounds otherwise in each of the two threads.

    Each thread has a run of one column, or columns are apart, or rows are unaligned. Triton 3.9 shares the first two.
    """
    values = torch.cat([peaked(1, columns), gaussian(2, columns)])
    logits = torch.empty(3, stride * columns, dtype=dtype)[:, ::stride].copy_(values)
    cross_entropy_with_entropy(logits, torch.arange(3), backend="triton")
    unmask_statistics(logits, temperature=0.8, generator=torch.arange(3), backend="triton")


def lopsided_sums(text):
    """Each fused multiply-add of a product that the thread has also given to another thread, and that one's product."""
    given, products, found = {}, {}, []
    for instruction in Program(text).instructions:
        result = instruction.operands[0].partition("|")[0].strip() if instruction.operands else None
        if instruction.kind == "shfl":
            given[result] = instruction.operands[1]
        elif instruction.opcode == "mul.f32":
            products[result] = instruction.operands[1:]
        elif instruction.opcode == "fma.rn.f32":
            *factors, other = instruction.operands[1:]
            if products.get(given.get(other)) == factors:
                found.append(str(instruction))
    return found


@pytest.mark.parametrize("columns, stride", [(100, 1), (300, 2), (8193, 1), (33 * 4096, 1)])
@pytest.mark.skipif(torch.cuda.is_available(), reason="reads what the emulator runs")
def test_no_thread_adds_a_rounded_product_to_its_own_exact_one(rng, monkeypatch, columns, stride):
    """Which of the threads that hold a sum stores it is the compiler's choice, so their sums must be the same.

    In `masses_kernel` one factor is 0 or 1, so that every product is exact.
    """
    texts = set()
    monkeypatch.setattr(driver, "REWRITES", [lambda text: texts.add(text) or text])
    logits = torch.zeros(1, stride * columns)[:, ::stride]
    cross_entropy_with_entropy(logits, torch.arange(1), backend="triton")
    unmask_statistics(logits, temperature=0.8, top_p=0.9, generator=torch.arange(1), backend="triton")
    kernels = {Program(text).name: lopsided_sums(text) for text in texts}
    assert {name for name, found in kernels.items() if found} <= {"masses_kernel"}, kernels
    names = {"statistics_kernel", "merge_kernel", "unmask_kernel", "choose_kernel", "masses_kernel", "narrow_kernel"}
    assert set(kernels) == names


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.8}])
def test_the_search_for_a_threshold_reads_its_interval_before_it_narrows_it(rng, filters):
    unmask_statistics(gaussian(2, 50).float(), temperature=0.8, generator=torch.arange(2), backend="triton", **filters)
