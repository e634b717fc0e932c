"""Inputs of every stride, and logits that lie over each other."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tabom_kernels import (
    count_ordered_pairs,
    cross_entropy_with_entropy,
    mix_keys,
    tabom_loss,
    trajectory_rank_loss,
    unmask_statistics,
)
from tabom_kernels.arguments import check_overlap
from tests.kernels.inputs import draw_labels, draw_sequences, gaussian

BACKENDS = ["torch", "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(1, 6), (5, 1)])
def test_in_place_on_an_expanded_view_is_refused_and_leaves_the_leaf(rng, backend, sizes):
    leaf = torch.randn(sizes, requires_grad=True)
    before = leaf.detach().clone()
    labels = torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"inplace_backward=True: .* shape \(5, 6\) with strides .*use logits.clone()"):
        cross_entropy_with_entropy(leaf.expand(5, 6), labels, inplace_backward=True, backend=backend)
    offsets = torch.tensor([0, 5])
    with pytest.raises(ValueError, match="inplace_backward=True"):
        tabom_loss(leaf.expand(5, 6), labels, labels, offsets, inplace_backward=True, backend=backend)
    assert torch.equal(leaf, before)
    cross_entropy_with_entropy(leaf.expand(5, 6), labels, backend=backend)[0].sum().backward()
    assert leaf.grad.isfinite().all()


@given(st.integers(0, 5), st.integers(1, 5), st.integers(0, 9), st.integers(0, 9))
def test_overlap_by_brute_force(rows, columns, row_stride, column_stride):
    logits = torch.zeros(100).as_strided((rows, columns), (row_stride, column_stride))
    places = [i * row_stride + j * column_stride for i in range(rows) for j in range(columns)]
    if len(set(places)) == len(places):
        check_overlap(logits)
    else:
        with pytest.raises(ValueError, match="strides"):
            check_overlap(logits)


@pytest.mark.parametrize("backend", BACKENDS)
def test_columns_beyond_int32(rng, backend):
    """Columns so far apart that the last one times the stride passes 2^31. Nothing between them is touched."""
    stride = 2**28 + 16 if torch.cuda.is_available() else 2**29 + 16
    columns = 9 if torch.cuda.is_available() else 5
    size = (columns - 1) * stride + 3
    if torch.cuda.is_available():
        storage = torch.empty(size, dtype=torch.bfloat16)
    else:
        storage = torch.from_numpy(np.empty(size, np.int16)).view(torch.bfloat16)
    logits = storage.as_strided((3, columns), (1, stride))
    assert (columns - 1) * stride > 2**31
    values = gaussian(3, columns).bfloat16()
    logits.copy_(values)
    labels = torch.tensor([columns - 1, 0, 2])
    outputs = cross_entropy_with_entropy(logits.requires_grad_(), labels, inplace_backward=True, backend=backend)
    [grad] = torch.autograd.grad(outputs, logits, [torch.ones(3)] * 2)
    leaf = values.double().requires_grad_()
    exact = cross_entropy_with_entropy(leaf, labels, backend="reference")
    [exact_grad] = torch.autograd.grad(exact, leaf, [torch.ones(3, dtype=torch.float64)] * 2)
    for a, b in zip((*outputs, grad), (*exact, exact_grad), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2**-7, atol=1e-6)


def spread(x, step=3):
    """The same values, `step` elements apart, with others between them."""
    wide = torch.stack([x, *(torch.full_like(x, 7) for _ in range(step - 1))], 1).flatten()
    return wide[::step]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["logistic", "plackett_luce"])
def test_labels_steps_offsets_and_weights_may_be_strided(rng, backend, form):
    steps, cu_seqlens = draw_sequences([5, 0, 7])
    logits = gaussian(12, 9).float()
    batch = draw_labels(logits), steps, cu_seqlens
    weights = torch.rand(12)

    def gradient(batch, weights):
        leaf = logits.clone().requires_grad_()
        tabom_loss(leaf, *batch, form=form, token_weights=weights, backend=backend).loss.backward()
        return leaf.grad

    strided = [spread(x) for x in batch]
    assert all(x.stride() == (3,) for x in strided)
    assert torch.equal(gradient(strided, spread(weights)), gradient(batch, weights))
    assert torch.equal(
        count_ordered_pairs(strided[1], strided[2], backend=backend), count_ordered_pairs(*batch[1:], backend=backend)
    )
    entropy = torch.rand(12)
    assert torch.equal(
        trajectory_rank_loss(spread(entropy), *strided[1:], form=form, backend=backend),
        trajectory_rank_loss(entropy, *batch[1:], form=form, backend=backend),
    )


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_keys_may_be_strided(rng, backend):
    logits, keys = gaussian(6, 9).float(), torch.randint(2**40, (6,))
    settings = {"temperature": 1.5, "backend": backend}
    for ours, plain in zip(
        unmask_statistics(logits, generator=spread(keys), **settings),
        unmask_statistics(logits, generator=keys, **settings),
        strict=True,
    ):
        assert torch.equal(ours, plain)


def test_errors_of_mix_keys_name_the_part():
    with pytest.raises(TypeError, match=r"parts\[1\]: expected a tensor of int32 or int64, got float"):
        mix_keys(1, 0.5)
    with pytest.raises(TypeError, match=r"parts\[0\]: .*, got torch.float32"):
        mix_keys(torch.zeros(2), 1)
    with pytest.raises(ValueError, match=r"parts\[2\]=18446744073709551616: expected an integer of 64 bits"):
        mix_keys(1, torch.tensor(2), 2**64)


@pytest.mark.parametrize("temperature", [float("inf"), float("nan"), -1.0])
def test_a_senseless_temperature_of_the_sampler(temperature):
    with pytest.raises(ValueError, match=f"temperature={temperature}: expected 0"):
        unmask_statistics(torch.zeros(1, 2), temperature=temperature)
