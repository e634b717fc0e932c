import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tabom_kernels import cross_entropy_with_entropy, reference, softmax_entropy
from tests.kernels.inputs import SHAPES, VALUES, draw_labels, gaussian


def run(logits, labels, upstream, **options):
    """ce, entropy and dlogits for given upstream gradients."""
    logits = logits.detach().clone().requires_grad_()
    ce, entropy = cross_entropy_with_entropy(logits, labels, **options)
    torch.autograd.backward([ce, entropy], [u.to(ce.dtype) for u in upstream])
    return ce.detach(), entropy.detach(), logits.grad


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_values_and_gradients_in_fp64(rng, values, rows, columns):
    logits = values(rows, columns)
    labels = draw_labels(logits)
    upstream = torch.randn(2, rows, dtype=torch.float64)
    for ours, theirs in zip(
        run(logits, labels, upstream, backend="torch"),
        run(logits, labels, upstream, backend="reference"),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("rows, columns", [(64, 31), (64, 1000), (2, 152064)])
def test_error_is_at_most_twice_that_of_the_naive_loss(rng, dtype, values, rows, columns):
    logits = values(rows, columns).to(dtype)
    labels = draw_labels(logits)
    upstream = torch.randn(2, rows, dtype=torch.float64)
    exact = run(logits.double(), labels, upstream, backend="reference")
    naive = run(logits, labels, upstream, backend="reference")
    ours = run(logits, labels, upstream, backend="torch")
    for name, e, n, o in zip(("ce", "entropy", "gradient"), exact, naive, ours, strict=True):
        assert o.isfinite().all(), name
        assert o.dtype == (dtype if name == "gradient" else torch.float32)
        error, naive_error = ((x.double() - e).abs().max() for x in (o, n))
        assert error <= 2 * naive_error + 1e-6, (name, error, naive_error)


def test_confident_rows_keep_their_relative_accuracy():
    """In fp32 the unshifted `lse - sum p * z` has lost the entropy of this row, the shifted form has not."""
    logits = torch.full((1, 1000), 1000.0, dtype=torch.float64)
    logits[0, 3] += 15
    exact = reference.softmax_entropy(logits)
    assert 3e-3 < exact.item() < 6e-3
    z = logits.float()
    unshifted = z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1)
    assert (unshifted / exact - 1).abs() > 5e-3
    assert (softmax_entropy(z, backend="torch") / exact - 1).abs() < 5e-4


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradcheck(rng, backend):
    logits = gaussian(5, 9).requires_grad_()
    labels = torch.tensor([0, 8, -100, 3, 4])
    assert torch.autograd.gradcheck(lambda z: softmax_entropy(z, backend=backend), logits)
    assert torch.autograd.gradcheck(lambda z: cross_entropy_with_entropy(z, labels, backend=backend), logits)


@pytest.mark.parametrize("view", ["strided_rows", "strided_columns", "offset", "transposed"])
def test_views(rng, view):
    base = gaussian(41, 60)
    logits = {
        "strided_rows": base[::2],
        "strided_columns": base[:, ::3],
        "offset": base[3:11, 7:],
        "transposed": base.T,
    }[view]
    labels = draw_labels(logits)
    ours, theirs = (
        torch.autograd.grad(sum(x.sum() for x in cross_entropy_with_entropy(z, labels, backend=b)), z)[0]
        for b in ("torch", "reference")
        for z in [logits.detach().requires_grad_()]
    )
    torch.testing.assert_close(ours, theirs)


def test_upstream_gradients_of_stride_0_and_absent_ones(rng):
    logits, labels = gaussian(6, 11), torch.arange(6)
    expanded = torch.tensor(0.7, dtype=torch.float64).expand(6)
    assert expanded.stride() == (0,)
    for output in (0, 1):
        grads = []
        for backend in ("torch", "reference"):
            z = logits.clone().requires_grad_()
            cross_entropy_with_entropy(z, labels, backend=backend)[output].backward(expanded)
            grads.append(z.grad)
        torch.testing.assert_close(*grads)


def test_rows_without_any_gradient_are_zero_even_if_their_logits_are_invalid():
    logits = torch.zeros(3, 4)
    logits[1] = torch.nan
    logits.requires_grad_()
    ce, entropy = cross_entropy_with_entropy(logits, torch.tensor([1, -100, 2]))
    (ce[0] + ce[2] + entropy[0]).backward()
    assert (logits.grad[1] == 0).all() and (logits.grad[[0, 2]] != 0).any()


def test_inplace_backward_writes_over_the_logits(rng):
    values, labels = gaussian(6, 11), draw_labels(gaussian(6, 11))
    upstream = torch.randn(2, 6, dtype=torch.float64)
    *_, expected = run(values, labels, upstream)
    leaf = values.clone().requires_grad_()
    logits = leaf * 1
    outputs = cross_entropy_with_entropy(logits, labels, inplace_backward=True)
    [grad] = torch.autograd.grad(outputs, logits, list(upstream), retain_graph=True)
    assert grad.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(logits.detach(), expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(outputs, logits, list(upstream))


@given(st.floats(-50, 50), st.integers(0, 2**31))
def test_shifting_all_logits_of_a_row_changes_nothing(shift, seed):
    torch.manual_seed(seed)
    logits, upstream = gaussian(4, 13), torch.randn(2, 4, dtype=torch.float64)
    labels = draw_labels(logits)
    for a, b in zip(run(logits, labels, upstream), run(logits + shift, labels, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@given(st.permutations(range(13)), st.integers(0, 2**31))
def test_permuting_the_vocabulary_permutes_the_gradient(order, seed):
    torch.manual_seed(seed)
    logits, upstream = gaussian(4, 13), torch.randn(2, 4, dtype=torch.float64)
    labels = draw_labels(logits, ignored=0)
    inverse = torch.tensor(order).argsort()
    ce, entropy, grad = run(logits, labels, upstream)
    permuted = run(logits[:, order], inverse[labels], upstream)
    for a, b in zip(permuted, (ce, entropy, grad[:, order]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_gradients_of_a_row_add_up_to_zero(rng):
    logits = gaussian(8, 50)
    *_, grad = run(logits, draw_labels(logits), torch.randn(2, 8, dtype=torch.float64))
    torch.testing.assert_close(grad.sum(1), torch.zeros(8, dtype=torch.float64), atol=1e-12, rtol=0)


def test_no_grad_saves_nothing():
    entropy = softmax_entropy(torch.zeros(2, 3))
    assert entropy.grad_fn is None
    torch.testing.assert_close(entropy, torch.full((2,), 3.0).log())
