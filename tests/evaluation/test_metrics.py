from itertools import product

import numpy as np
import pytest
import torch

from tabom.evaluation.metrics import accuracy_under_parallelism, count_pairs_in_order, entropy_by_step, pass_at_k
from tests.largest_memory import LargestMemory


def test_pass_at_k_against_the_definition(seed):
    """With c right of n samples, pass@k is the share of k-subsets that hold a right one."""
    right = np.array([[1, 0, 0], [0, 0, 0]] + [[1, 1, 0]] * 2 + [[0, 1, 0]] * 12)  # (samples, problems)
    rng = np.random.default_rng(seed)
    for k in (1, 2, 4, 8, 16):
        subsets = np.array([rng.choice(16, k, replace=False) for _ in range(10000)])
        assert pass_at_k(right.sum(0), 16, k) == pytest.approx(right[subsets].any(1).mean(0), abs=0.03)


def test_accuracy_under_parallelism_by_hand():
    """A perfect model has its parallelism times 100; a point that loses over 5 points of accuracy adds nothing."""
    assert accuracy_under_parallelism([4, 1], [100, 100]) == pytest.approx(400)
    assert accuracy_under_parallelism([1, 2, 4], [80, 75, 74.9]) == pytest.approx(
        80 + (80 * np.exp(-0.6) + 75 * np.exp(-0.75)) / 2
    )
    assert accuracy_under_parallelism([2], [50]) == 100


def test_pairs_in_order_by_hand():
    """Pairs (0, 1) and (0, 2) of the first sequence, none of the second: only the first is in order."""
    entropy = torch.tensor([0.5, 0.7, 0.5, 0.1, 0.2])
    steps = torch.tensor([0, 1, 1, 3, -1])
    counts = count_pairs_in_order(entropy, steps, torch.tensor([0, 3, 5], dtype=torch.int32))
    assert (counts.in_order.item(), counts.pairs.item()) == (1, 2)


def test_pairs_are_counted_in_the_memory_of_the_longest_sequence(rng):
    """All rows paired with each other would be 1.3 million elements here, and beyond 2^31 in a batch of 46341 rows."""
    lengths = torch.tensor([0, 5, 300, 1, *[41] * 20])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    rows = int(cu_seqlens[-1])
    entropy, steps = torch.rand(rows).round(decimals=2), torch.randint(-1, 9, (rows,))
    with LargestMemory() as largest:
        counts = count_pairs_in_order(entropy, steps, cu_seqlens)
    assert largest.bytes <= max(8 * rows, 300**2)
    in_order = pairs = 0
    for e, s in zip(entropy.split(lengths.tolist()), steps.split(lengths.tolist()), strict=True):
        for (a, i), (b, j) in product(zip(e.tolist(), s.tolist(), strict=True), repeat=2):
            if 0 <= i < j:
                pairs, in_order = pairs + 1, in_order + (a < b)
    assert (counts.in_order.item(), counts.pairs.item()) == (in_order, pairs)


def test_entropy_by_step():
    assert entropy_by_step([[1, 0], [0, 0]], [[0.5, 0.1], [0.3, 0.2]]) == pytest.approx([0.2, 0.5])
