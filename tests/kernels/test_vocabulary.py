import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tabom_kernels import cross_entropy_with_entropy, reference, softmax_entropy, unmask_statistics
from tests.kernels.inputs import SHAPES, cases, draw_labels, gaussian, low_with_one_high, peaked
from tests.kernels.tolerance import fp32_rounding

BACKENDS = ["torch", "triton"]


def run(logits, labels, upstream, **options):
    """ce, entropy and dlogits for given upstream gradients."""
    logits = logits.detach().clone().requires_grad_()
    ce, entropy = cross_entropy_with_entropy(logits, labels, **options)
    torch.autograd.backward([ce, entropy], [u.to(ce.dtype) for u in upstream])
    return ce.detach(), entropy.detach(), logits.grad


@pytest.mark.parametrize("values, rows, columns", cases())
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


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("values, rows, columns", cases([(40, 31), *(shape for shape in SHAPES if shape != (257, 31))]))
def test_error_is_at_most_twice_that_of_the_naive_loss(rng, backend, dtype, values, rows, columns):
    logits = values(rows, columns).to(dtype)
    labels = draw_labels(logits)
    upstream = torch.randn(2, rows, dtype=torch.float64)
    exact = run(logits.double(), labels, upstream, backend="reference")
    naive = run(logits, labels, upstream, backend="reference")
    ours = run(logits, labels, upstream, backend=backend)
    for name, e, n, o in zip(("ce", "entropy", "gradient"), exact, naive, ours, strict=True):
        assert o.isfinite().all(), name
        assert o.dtype == (dtype if name == "gradient" else torch.float32)
        if rows:
            error, naive_error = ((x.double() - e).abs().max() for x in (o, n))
            assert error <= 2 * naive_error + fp32_rounding(e), (name, error, naive_error)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_label_in_the_last_partial_block(rng, backend):
    """The last block holds 3 of its columns, and the rows before it are not near it in value."""
    logits = low_with_one_high(3, 2 * 8192 + 3).float()
    labels = torch.tensor([2 * 8192, 2 * 8192 + 2, 8191])
    logits[0, labels[0]] = 4.0
    upstream = torch.randn(2, 3, dtype=torch.float64)
    for ours, exact in zip(
        run(logits, labels, upstream, backend=backend),
        run(logits.double(), labels, upstream, backend="reference"),
        strict=True,
    ):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_confident_rows_in_bf16_keep_the_label_column(backend):
    """p = 0.999999 is 1 in bf16: rounded before the 1 is subtracted, nothing would be left of the gradient."""
    logits = peaked(4, 1000).bfloat16()
    labels = logits.argmax(1)
    *_, exact = run(logits.double(), labels, torch.ones(2, 4), backend="reference")
    *_, grad = run(logits, labels, torch.ones(2, 4), backend=backend)
    rows = torch.arange(4)
    torch.testing.assert_close(grad[rows, labels].double(), exact[rows, labels], rtol=0.03, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("invalid", [torch.nan, torch.inf])
def test_an_invalid_logit_shows_in_its_row_alone(backend, invalid):
    logits = torch.zeros(3, 9000)
    logits[1, 8999] = invalid
    ce, entropy, grad = run(logits, torch.zeros(3, dtype=torch.int64), torch.ones(2, 3), backend=backend)
    for result in (ce, entropy, grad.sum(1)):
        assert result.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_minus_infinity_alone_has_no_entropy(backend):
    logits = torch.zeros(2, 10)
    logits[0] = -torch.inf
    assert softmax_entropy(logits, backend=backend).isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_bitwise_the_same_in_every_batch(rng, dtype):
    logits, labels = gaussian(5, 20_000).to(dtype), torch.arange(5)
    upstream = torch.randn(2, 5, dtype=torch.float64)
    together = run(logits, labels, upstream, backend="triton")
    for row in range(5):
        alone = run(logits[row : row + 1], labels[row : row + 1], upstream[:, row : row + 1], backend="triton")
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_beyond_int32(rng, backend):
    """Three rows 2^30 elements apart: row times stride is more than int32 holds. Nothing between them is touched."""
    stride, columns = 2**30 + 8, 100
    size = 2 * stride + columns
    if torch.cuda.is_available():
        storage = torch.empty(size, dtype=torch.bfloat16)
    else:
        storage = torch.from_numpy(np.empty(size, np.int16)).view(torch.bfloat16)
    logits = storage.as_strided((3, columns), (stride, 1))
    logits.copy_(gaussian(3, columns))
    labels = torch.tensor([3, 99, 50])
    outputs = cross_entropy_with_entropy(logits.requires_grad_(), labels, inplace_backward=True, backend=backend)
    expected = run(logits.double(), labels, torch.ones(2, 3), backend="reference")
    [grad] = torch.autograd.grad(outputs, logits, [torch.ones(3)] * 2)
    for ours, exact in zip((*outputs, grad), expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_confident_rows_keep_their_relative_accuracy(backend):
    """In fp32 the unshifted `lse - sum p * z` has lost the entropy of this row, the shifted form has not."""
    logits = torch.full((1, 1000), 1000.0, dtype=torch.float64)
    logits[0, 3] += 15
    exact = reference.softmax_entropy(logits)
    assert 3e-3 < exact.item() < 6e-3
    z = logits.float()
    unshifted = z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1)
    assert (unshifted / exact - 1).abs() > 5e-3
    assert (softmax_entropy(z, backend=backend) / exact - 1).abs() < 5e-4


def certain_row(distance, others, columns, best=0.0):
    """One logit at `best`, some `distance` below, the rest at -inf; its S', entropy and the probability of the rest."""
    logits = torch.full((columns,), -torch.inf, dtype=torch.float64)
    logits[columns // 2], logits[:others] = best, best - distance
    rest = others * math.exp(-distance)
    return logits, rest, math.log1p(rest) + distance * rest / (1 + rest)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("columns, best", [(2, 0.0), (40, 12.0), (9000, 20.0), (9000, -16.0)])
def test_certain_rows_are_exact(backend, dtype, columns, best):
    """Entropy, the cross-entropy of either label, margin and the gradient at the label, from E = 1e-1 to 1e-14."""
    if (backend, dtype) == ("triton", torch.float64):
        pytest.skip("the kernels take no fp64")
    rows = [
        certain_row(d, others, columns, best) for d in (4.0, 16.0, 24.0, 31.0, 36.0) for others in (1, columns // 2)
    ]
    logits = torch.stack([row for row, *_ in rows]).to(dtype)
    rest, exact = torch.tensor([numbers for _, *numbers in rows], dtype=torch.float64).T
    assert exact.min() < 1e-13 and exact.max() > 0.05
    labels = torch.full((len(rows),), columns // 2)
    ce, entropy, grad = run(logits, labels, torch.tensor([[1.0], [0.0]]).expand(2, len(rows)), backend=backend)
    sampled = unmask_statistics(logits, backend=backend)
    share = rest / (1 + rest)
    for name, ours, theirs in (
        ("entropy", entropy, exact),
        ("sampled entropy", sampled.entropy, exact),
        ("cross-entropy", ce, rest.log1p()),
        ("gradient", -grad[:, columns // 2], share),
    ):
        tolerance = {torch.bfloat16: 2**-8, torch.float16: 2**-10}.get(dtype, 1e-4) if name == "gradient" else 1e-4
        atol = 2**-24 if name == "gradient" and dtype == torch.float16 else 0
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    other = cross_entropy_with_entropy(logits, labels * 0, backend=backend)[0]
    torch.testing.assert_close(other.double(), rest.log1p() + best - logits[:, 0].double(), rtol=1e-6, atol=0)
    second = (logits[:, 0].double() - best).exp()
    torch.testing.assert_close(sampled.margin.double(), (1 - second) / (1 + rest), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_the_entropy_of_a_certain_row_of_random_logits(rng, backend):
    """Against arithmetic with 40 digits."""
    logits = gaussian(4, 300).float()
    logits[torch.arange(4), torch.tensor([0, 7, 150, 299])] = torch.tensor([12.0, 24.0, 36.0, 46.0])
    with mpmath.workdps(40):
        exact = []
        for row in logits.double().tolist():
            p = [mpmath.exp(mpmath.mpf(z)) for z in row]
            exact.append(float(-sum(x / sum(p) * mpmath.log(x / sum(p)) for x in p)))
    assert min(exact) < 1e-11
    ours = softmax_entropy(logits if backend != "reference" else logits.double(), backend=backend)
    torch.testing.assert_close(ours.double(), torch.tensor(exact, dtype=torch.float64), rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("lowest", [-1e30, -1.8e38, torch.finfo(torch.bfloat16).min])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_logits_however_low_have_a_softmax(backend, lowest, dtype):
    """What masks add in place of -inf; a row of nothing else is uniform, and -inf beside it still has no part."""
    logits = torch.full((3, 9000), lowest, dtype=dtype)
    logits[1, :8999] = -torch.inf
    logits[2, 3:] = -torch.inf
    labels = torch.tensor([8999, 8999, 0])
    ce, entropy, grad = run(logits, labels, torch.ones(2, 3), backend=backend)
    exact = torch.tensor([9000.0, 1.0, 3.0]).log()
    torch.testing.assert_close(entropy, exact)
    torch.testing.assert_close(ce, exact)
    torch.testing.assert_close(grad[2, :4].float(), torch.tensor([-2 / 3, 1 / 3, 1 / 3, 0]), rtol=2**-8, atol=1e-6)
    assert unmask_statistics(logits, backend=backend).token.tolist() == [0, 8999, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_chunks_that_are_done_apart_agree_with_those_that_are_not(rng, dtype):
    """A best of just under and over half of its chunk, ties, -inf, maxima far from 0, and a last chunk all of those."""
    full = 16384 // dtype.itemsize
    logits = (gaussian(11, full + 5) - 4).to(dtype)
    half = math.log(full) - 4 + 0.5  # as much as the others together
    logits[1:4, 100] = torch.tensor([half - 0.1, half + 0.1, half + 3], dtype=dtype)
    logits[4, :9], logits[5, full:] = 20.0, 20.0
    logits[6, 7], logits[7, full:], logits[8, :full] = -torch.inf, -torch.inf, -torch.inf
    logits[9] *= 2**12
    logits[10] = torch.finfo(dtype).min
    labels = torch.arange(full - 6, full + 5)
    labels[6:9] = torch.tensor([8, 9, full])
    upstream = torch.randn(2, 11, dtype=torch.float64)
    exact = run(logits.double(), labels, upstream, backend="reference")
    ours = run(logits, labels, upstream, backend="triton")
    for o, e in zip(ours, exact, strict=True):
        rtol = max(1e-6, 2 * torch.finfo(o.dtype).eps)
        torch.testing.assert_close(o.double(), e, rtol=rtol, atol=1e-6 if o.dim() == 1 else 1e-7)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("magnitude", [1e5, 1e7, 3e8, 1e9, 1e12, 3e38])
def test_logits_of_any_magnitude(rng, backend, magnitude):
    """Neighbouring fp32 numbers there are 2^-7 and more apart; in base 2 the offset itself is rounded as coarsely."""
    for sign in (1, -1):
        logits = torch.full((2, 500), sign * magnitude)
        for _ in range(5):
            logits[0, rng.randrange(500)] = torch.nextafter(logits[0, 0], torch.tensor(-torch.inf))
        logits[1, :9] = -torch.inf
        naive, ours = (softmax_entropy(z, backend=b) for z, b in ((logits.double(), "reference"), (logits, backend)))
        torch.testing.assert_close(ours.double(), naive, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradcheck(rng, backend):
    logits = gaussian(5, 9).requires_grad_()
    labels = torch.tensor([0, 8, -100, 3, 4])
    assert torch.autograd.gradcheck(lambda z: softmax_entropy(z, backend=backend), logits)
    assert torch.autograd.gradcheck(lambda z: cross_entropy_with_entropy(z, labels, backend=backend), logits)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("view", ["strided_rows", "strided_columns", "offset", "transposed"])
def test_views(rng, backend, view):
    base = gaussian(41, 60).float()
    logits = {
        "strided_rows": base[::2],
        "strided_columns": base[:, ::3],
        "offset": base[3:11, 7:],
        "transposed": base.T,
    }[view]
    labels = draw_labels(logits)
    ours, theirs = (
        torch.autograd.grad(sum(x.sum() for x in cross_entropy_with_entropy(z, labels, backend=b)), z)[0]
        for b in (backend, "reference")
        for z in [logits.detach().requires_grad_()]
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradients_of_stride_0_and_absent_ones(rng, backend):
    logits, labels = gaussian(6, 11).float(), torch.arange(6)
    expanded = torch.tensor(0.7).expand(6)
    assert expanded.stride() == (0,)
    for output in (0, 1):
        grads = []
        for name in (backend, "reference"):
            z = logits.clone().requires_grad_()
            cross_entropy_with_entropy(z, labels, backend=name)[output].backward(expanded)
            grads.append(z.grad)
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_any_gradient_are_zero_even_if_their_logits_are_invalid(backend):
    logits = torch.zeros(3, 4)
    logits[1] = torch.nan
    logits.requires_grad_()
    ce, entropy = cross_entropy_with_entropy(logits, torch.tensor([1, -100, 2]), backend=backend)
    (ce[0] + ce[2] + entropy[0]).backward()
    assert (logits.grad[1] == 0).all() and (logits.grad[[0, 2]] != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_inplace_backward_writes_over_the_logits(rng, backend):
    values, labels = gaussian(6, 11).float(), draw_labels(gaussian(6, 11))
    upstream = torch.randn(2, 6)
    *_, expected = run(values, labels, upstream, backend=backend)
    leaf = values.clone().requires_grad_()
    logits = leaf * 1
    outputs = cross_entropy_with_entropy(logits, labels, inplace_backward=True, backend=backend)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset, padding", [(0, 0), (1, 0), (0, 1), (3, 5), (8, 8), (4, 12)])
def test_the_alignment_of_rows_changes_no_more_than_rounding(rng, dtype, offset, padding):
    """The kernels use 128-bit loads where every row starts at a multiple of 16 bytes, and only there.

    The results are not bitwise equal on compiled code. In fp32, the entropy of an unaligned row was 1e-6 away from that
    of the same row aligned, while the cross-entropies were equal: `sums_by_lane` rounds the products p * t of unaligned
    logits, and the compiler fuses those of aligned logits with their sum.
    """
    rows, columns = 3, 8216
    contiguous = gaussian(rows, columns).to(dtype)
    storage = torch.zeros(offset + rows * (columns + padding), dtype=dtype)
    shifted = storage[offset:].view(rows, columns + padding)[:, :columns].copy_(contiguous)
    assert shifted.storage_offset() == offset
    labels, upstream = draw_labels(contiguous), torch.randn(2, rows)
    results = []
    for logits in (contiguous.clone(), shifted):
        sampled = unmask_statistics(logits, temperature=0.7, top_p=0.9, generator=torch.arange(rows), backend="triton")
        greedy = unmask_statistics(logits, backend="triton")
        outputs = cross_entropy_with_entropy(logits.requires_grad_(), labels, inplace_backward=True, backend="triton")
        [grad] = torch.autograd.grad(outputs, logits, list(upstream))
        results.append([x.detach() for x in (*sampled, *greedy, *outputs, grad)])
    for aligned, moved in zip(*results, strict=True):
        rounding = 2**-7 if aligned.dtype == torch.bfloat16 else 2**-20
        torch.testing.assert_close(moved, aligned, rtol=rounding, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("column", [0, 77, 8191, 8192, 8999])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9}])
def test_a_nan_shows_in_its_row_alone_and_gets_a_valid_token(rng, backend, column, settings):
    logits, labels = gaussian(3, 9000).float(), torch.tensor([1, 2, 3])
    logits[1, column] = torch.nan
    ce, entropy = cross_entropy_with_entropy(logits, labels, backend=backend)
    keys = {"generator": torch.arange(3)} if settings else {}
    sampled = unmask_statistics(logits, backend=backend, **settings, **keys)
    for result in (ce, entropy, *sampled[1:]):
        assert result.isnan().tolist() == [False, True, False]
    assert ((sampled.token >= 0) & (sampled.token < 9000)).all()
