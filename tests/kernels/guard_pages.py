"""Runs every op in PyTorch on tensors against a page that may not be touched: one element too far ends the process.

    python -m tests.kernels.guard_pages torch|overrun

A child process of `test_guard_pages.py`; `overrun` touches such a page on purpose.
"""

import ctypes
import itertools
import mmap
import sys

import torch

from tabom_kernels import (
    count_ordered_pairs,
    cross_entropy_with_entropy,
    fused_linear_tabom_loss,
    tabom_loss,
    trajectory_rank_loss,
    unmask_statistics,
)

PROT_NONE = 0
PAGE = mmap.PAGESIZE
MAPPINGS = []  # they live as long as the process


def guarded(values: torch.Tensor, at_end: bool) -> torch.Tensor:
    """A copy of `values` between two forbidden pages that ends at the second, or begins after the first."""
    size = -(-max(values.nbytes, 1) // PAGE) * PAGE
    mapping = mmap.mmap(-1, size + 2 * PAGE)
    MAPPINGS.append(mapping)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    for page in (address, address + PAGE + size):
        if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = PAGE + (size - values.nbytes if at_end else 0)
    copy = torch.frombuffer(mapping, dtype=values.dtype, count=values.numel(), offset=offset).view(values.shape)
    return copy.copy_(values)


def run_every_op(dtype: torch.dtype, rows: int, columns: int, at_end: bool) -> None:
    """Each on guarded tensors and on their copies, with the same results."""
    logits = (3 * torch.randn(rows, columns)).to(dtype)
    labels = torch.randint(columns, (rows,))
    labels[0], labels[-1] = columns - 1, 0
    steps = torch.randint(-1, 4, (rows,))
    cu_seqlens = torch.tensor([0, rows // 2, rows], dtype=torch.int32)
    hidden, weight = torch.randn(rows, 8).to(dtype), torch.randn(columns, 8).to(dtype)
    inputs = (logits, labels, steps, cu_seqlens, torch.arange(rows), torch.rand(rows), hidden, weight)

    def results(
        logits: torch.Tensor,
        labels: torch.Tensor,
        steps: torch.Tensor,
        cu_seqlens: torch.Tensor,
        keys: torch.Tensor,
        energy: torch.Tensor,
        hidden: torch.Tensor,
        weight: torch.Tensor,
    ) -> list[torch.Tensor]:
        batch = (labels, steps, cu_seqlens)
        found = [*unmask_statistics(logits, backend="torch")]
        for filters in ({}, {"top_k": 3}, {"top_p": 0.8}):
            found += unmask_statistics(logits, temperature=0.8, generator=keys, backend="torch", **filters)
        for form in ("logistic", "hinge", "plackett_luce"):
            found.append(trajectory_rank_loss(energy, steps, cu_seqlens, form=form, backend="torch"))
        found.append(count_ordered_pairs(steps, cu_seqlens, backend="torch"))
        leaves = [x.requires_grad_() for x in (hidden, weight)]
        fused = fused_linear_tabom_loss(*leaves, *batch, max_chunk_rows=2, backend="torch").loss
        found += [fused, *torch.autograd.grad(fused, leaves)]
        leaf = logits.requires_grad_()
        loss = tabom_loss(leaf, *batch, backend="torch").loss
        found += [loss, *torch.autograd.grad(loss, leaf)]
        both = cross_entropy_with_entropy(leaf, labels, inplace_backward=True, backend="torch")
        torch.autograd.grad(sum(x.sum() for x in both), leaf)  # written over the logits
        return [x.detach() for x in (*found, *both, leaf)]

    guarded_results, expected = results(*(guarded(x, at_end) for x in inputs)), results(*inputs)
    for ours, theirs in zip(guarded_results, expected, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    if sys.argv[1] == "overrun":
        tensor = guarded(torch.zeros(3), at_end=True)
        ctypes.string_at(tensor.data_ptr() + tensor.nbytes, 1)
    shapes = itertools.product((torch.float32, torch.bfloat16), (3,), (1, 31, 257, 8195), (True, False))
    for case in shapes:
        run_every_op(*case)
    print("nothing beyond the ends was touched")
