import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.tools.measure import peak_memory_of
from tabom_kernels import (
    backend_for,
    count_ordered_pairs,
    cross_entropy_with_entropy,
    fused_linear_tabom_loss,
    softmax_entropy,
    tabom_loss,
    trajectory_rank_loss,
)
from tabom_kernels.backends.torch import chunks
from tests.kernels.inputs import cases, draw_labels, draw_sequences, gaussian, split_rows
from tests.kernels.tolerance import fp32_rounding

BACKENDS = ["torch", "reference", "triton"]


def draw_batch(lengths, columns=13, values=gaussian):
    steps, cu_seqlens = draw_sequences(lengths)
    logits = values(len(steps), columns)
    return logits, draw_labels(logits), steps, cu_seqlens


def run(logits, *batch, **options):
    logits = logits.detach().clone().requires_grad_()
    result = tabom_loss(logits, *batch, **options)
    result.loss.backward()
    return *(x.detach() for x in result), logits.grad


@pytest.mark.parametrize("values, rows, columns", cases())
def test_loss_and_gradient_in_fp64(rng, values, rows, columns):
    batch = draw_batch(split_rows(rows), columns, values)
    options = {"rank_weight": 0.3, "margin": 0.1, "temperature": 0.5, "token_weights": torch.rand(rows)}
    for ours, theirs in zip(
        run(*batch, **options, backend="torch"), run(*batch, **options, backend="reference"), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_the_loss_is_made_of_its_parts(rng):
    logits, labels, steps, cu_seqlens = draw_batch([5, 1, 8])
    labels[0] = 3
    weights = torch.rand(14, dtype=torch.float64)
    ce, entropy = cross_entropy_with_entropy(logits, labels)
    ranks = trajectory_rank_loss(entropy, steps, cu_seqlens, form="hinge", margin=0.1)
    result = tabom_loss(
        logits, labels, steps, cu_seqlens, rank_weight=3.0, form="hinge", margin=0.1, token_weights=weights
    )
    torch.testing.assert_close(result.cross_entropy, (weights * ce).sum() / (labels >= 0).sum())
    torch.testing.assert_close(result.rank, ranks.sum() / (count_ordered_pairs(steps, cu_seqlens) > 0).sum())
    torch.testing.assert_close(result.loss, result.cross_entropy + 3 * result.rank)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["logistic", "hinge", "plackett_luce"])
def test_sequence_weights_scale_the_rank_loss_of_each_sequence(rng, backend, form):
    """Against the same sequences one by one, whose losses are scaled here; one has no rows and one no pair."""
    lengths = [5, 1, 0, 8]
    logits, labels, steps, cu_seqlens = draw_batch(lengths)
    dtype = torch.float32 if backend == "triton" else torch.float64
    logits, weights = logits.to(dtype), torch.tensor([0.5, 2.0, 7.0, 0.0]) + torch.rand(4)
    options = {"form": form, "margin": 0.1, "rank_weight": 0.3, "backend": backend}
    *scalars, grad = run(logits, labels, steps, cu_seqlens, **options, num_sequences=3, sequence_weights=weights)
    rank, grads = 0.0, []
    for row, length, weight in zip(cu_seqlens[:-1].tolist(), lengths, weights.tolist(), strict=True):
        rows, offsets = slice(row, row + length), torch.tensor([0, length], dtype=torch.int32)
        denominators = {"num_tokens": (labels != -100).sum(), "num_sequences": 1}
        shares = {**options, **denominators, "rank_weight": 0.3 * weight / 3, "backend": "reference"}
        _, _, of_sequence, by_logits = run(logits.double()[rows], labels[rows], steps[rows], offsets, **shares)
        rank += of_sequence * weight / 3
        grads.append(by_logits)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if backend == "triton" else {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(scalars[2].double(), rank, **tolerance)
    torch.testing.assert_close(scalars[0], scalars[1] + 0.3 * scalars[2])
    torch.testing.assert_close(grad.double(), torch.cat(grads), **tolerance)


@given(st.integers(0, 2**31), st.integers(0, 4), st.sampled_from(["logistic", "hinge", "plackett_luce"]))
def test_splitting_a_batch_never_changes_the_loss(seed, cut, form):
    torch.manual_seed(seed)
    lengths = [4, 1, 6, 3]
    logits, labels, steps, cu_seqlens = draw_batch(lengths)
    weights = torch.rand(len(steps))
    whole = run(logits, labels, steps, cu_seqlens, form=form, token_weights=weights)
    shared = {
        "form": form,
        "num_tokens": (labels != -100).sum(),
        "num_sequences": (count_ordered_pairs(steps, cu_seqlens) > 0).sum(),
    }
    row = cu_seqlens[cut]
    parts = [
        run(logits[a:b], labels[a:b], steps[a:b], offsets, token_weights=weights[a:b], **shared)
        for a, b, offsets in ((0, row, cu_seqlens[: cut + 1]), (row, len(steps), cu_seqlens[cut:] - row))
    ]
    for name, x, y, z in zip(("loss", "ce", "rank"), whole, *parts, strict=False):
        torch.testing.assert_close(x, y + z, msg=name)
    torch.testing.assert_close(whole[3], torch.cat([parts[0][3], parts[1][3]]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_learn_gives_zero_loss_and_zero_gradient(backend):
    for rows in (0, 3):
        logits = torch.randn(rows, 5)
        labels, steps = torch.full((rows,), -100), torch.full((rows,), -1)
        *scalars, grad = run(logits, labels, steps, torch.tensor([0, rows], dtype=torch.int32), backend=backend)
        assert [x.item() for x in scalars] == [0, 0, 0]
        assert (grad == 0).all() and grad.shape == logits.shape


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("form", ["logistic", "hinge", "plackett_luce"])
def test_gradcheck(rng, backend, form):
    logits, labels, steps, cu_seqlens = draw_batch([4, 3], columns=5)

    def loss(logits, temperature):
        options = {"form": form, "margin": 0.1, "temperature": temperature, "backend": backend}
        return tabom_loss(logits, labels, steps, cu_seqlens, **options).loss

    temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=form != "hinge")
    assert torch.autograd.gradcheck(loss, (logits.requires_grad_(), temperature))


def test_denominators_of_zero_count_as_one(rng):
    batch = draw_batch([5, 6])
    ones, zeros = ({"num_tokens": n, "num_sequences": n} for n in (1, 0))
    tensors = {name: torch.tensor(n) for name, n in zeros.items()}
    for options in (zeros, tensors):
        for a, b in zip(run(*batch, **options), run(*batch, **ones), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_token_weights_of_any_dtype_leave_the_dtype_of_the_loss(rng):
    logits, *batch = draw_batch([5, 6])
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        result = tabom_loss(logits.float(), *batch, token_weights=torch.rand(11).to(dtype))
        assert all(x.dtype == torch.float32 for x in result)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("form", ["logistic", "hinge", "plackett_luce"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_and_fp32_outputs(rng, backend, form, dtype):
    batch = draw_batch([20, 30], columns=100)
    low = (batch[0].to(dtype), *batch[1:])
    exact = run(low[0].double(), *batch[1:], form=form, backend="reference")
    naive, ours = (run(*low, form=form, backend=name) for name in ("reference", backend))
    assert all(x.dtype == torch.float32 for x in ours[:3]) and ours[3].dtype == dtype
    for e, n, o in zip(exact, naive, ours, strict=True):
        assert (o.double() - e).abs().max() <= 2 * (n.double() - e).abs().max() + fp32_rounding(e)


def test_terms_for_logs_are_detached_and_inplace_gives_the_same_gradient(rng):
    batch = draw_batch([5, 6])
    expected = run(*batch)
    logits = (leaf := batch[0].clone().requires_grad_()) * 1
    result = tabom_loss(logits, *batch[1:], inplace_backward=True)
    assert result.loss.requires_grad and not result.cross_entropy.requires_grad and not result.rank.requires_grad
    result.loss.backward()
    torch.testing.assert_close(leaf.grad, expected[3])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_in_place_nothing_of_the_size_of_the_logits_is_allocated(rng, monkeypatch, backend):
    on_a_cpu = chunks.chunk_elements(torch.device("cpu"), 1)  # on a GPU it would hold all of these logits
    monkeypatch.setattr(chunks, "chunk_elements", lambda *_: on_a_cpu)
    logits, *batch = draw_batch([40, 24] if backend == "torch" else [7, 5], columns=40_000)
    logits = logits.float().requires_grad_() * 1

    def step():
        torch.autograd.grad(tabom_loss(logits, *batch, inplace_backward=True, backend=backend).loss, logits)

    assert peak_memory_of(step, logits.device) < (0.01 if backend == "triton" else 0.5) * logits.nbytes


def test_gradient_descent_puts_entropies_in_order(rng):
    """The point of it all: trained on the ranking alone, certainty follows the steps."""
    steps = torch.tensor(rng.sample(range(6), 6))
    logits = torch.randn(6, 20, requires_grad=True)
    labels, cu_seqlens = torch.full((6,), -100), torch.tensor([0, 6], dtype=torch.int32)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        tabom_loss(logits, labels, steps, cu_seqlens, form="hinge", margin=0.1).loss.backward()
        optimizer.step()
    assert softmax_entropy(logits).argsort().tolist() == steps.argsort().tolist()


LOGITS, LABELS, STEPS = torch.zeros(3, 5), torch.tensor([0, 1, -100]), torch.tensor([0, 1, -1])
CU = torch.tensor([0, 3], dtype=torch.int32)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"logits": LOGITS.long()}, TypeError, "logits: expected a floating-point tensor, got torch.int64"),
        ({"logits": LOGITS[None]}, ValueError, r"logits: expected shape \(N, V\).*\(1, 3, 5\)"),
        ({"logits": torch.zeros(3, 0)}, ValueError, r"logits: .*V >= 1"),
        ({"labels": LABELS.int()}, TypeError, "labels: expected a tensor of int64, got torch.int32"),
        ({"labels": LABELS[:2]}, ValueError, r"labels: expected shape \(3,\), got \(2,\)"),
        ({"labels": torch.tensor([0, 5, 1])}, ValueError, "labels: 5 at row 1; expected 0 <= label < 5"),
        ({"labels": torch.tensor([0, 1, -1])}, ValueError, "labels: -1 at row 2"),
        ({"labels": LABELS.to("meta")}, ValueError, "labels: expected device cpu, got meta"),
        ({"steps": STEPS.float()}, TypeError, "steps: expected a tensor of int32 or int64, got torch.float32"),
        ({"steps": STEPS[:2]}, ValueError, r"steps: expected shape \(3,\)"),
        ({"cu_seqlens": CU.float()}, TypeError, "cu_seqlens: expected a tensor of int32 or int64"),
        ({"cu_seqlens": [0, 3]}, TypeError, "cu_seqlens: .*, got list"),
        ({"logits": [[0.0]]}, TypeError, "logits: .*, got list"),
        ({"labels": [0, 1, 2]}, TypeError, "labels: .*, got list"),
        ({"steps": [0, 1, 2]}, TypeError, "steps: .*, got list"),
        ({"steps": STEPS.to("meta")}, ValueError, "steps: expected device cpu, got meta"),
        ({"cu_seqlens": CU.to("meta")}, ValueError, "cu_seqlens: expected device cpu, got meta"),
        ({"steps": STEPS.to("meta"), "cu_seqlens": CU.to("meta")}, ValueError, "steps: expected device cpu, got meta"),
        ({"form": "listnet", "rank_weight": 0.0}, ValueError, "form='listnet'"),
        ({"cu_seqlens": CU[:, None]}, ValueError, r"cu_seqlens: expected shape \(B \+ 1,\), got \(2, 1\)"),
        ({"cu_seqlens": torch.tensor([0, 2])}, ValueError, r"cu_seqlens: .* from 0 to N=3, got \[0, 2\]"),
        ({"cu_seqlens": torch.tensor([0, 2, 1, 3])}, ValueError, r"cu_seqlens: .*\[0, 2, 1, 3\]"),
        ({"cu_seqlens": torch.tensor([1, 3])}, ValueError, r"cu_seqlens: .*\[1, 3\]"),
        ({"form": "listnet"}, ValueError, "form='listnet': expected one of logistic"),
        ({"temperature": 0.0}, ValueError, "temperature=0.0: expected above 0 and finite"),
        ({"temperature": math.inf}, ValueError, "temperature=inf: expected above 0 and finite"),
        ({"temperature": torch.tensor(math.nan)}, ValueError, "temperature=nan: expected above 0 and finite"),
        ({"margin": math.nan}, ValueError, "margin=nan: expected a finite number of nats"),
        ({"margin": -math.inf, "form": "plackett_luce"}, ValueError, "margin=-inf: expected a finite number"),
        ({"rank_weight": -0.5}, ValueError, "rank_weight=-0.5: expected 0 or above, and finite"),
        ({"rank_weight": math.nan}, ValueError, "rank_weight=nan: expected 0 or above"),
        ({"num_tokens": -1}, ValueError, "num_tokens=-1: expected 0 or above, and finite"),
        ({"num_tokens": torch.tensor(-1)}, ValueError, "num_tokens=-1: expected 0 or above"),
        (
            {"num_tokens": torch.ones(3)},
            ValueError,
            r"num_tokens: expected a number or a 0-dim tensor, got shape \(3,\)",
        ),
        ({"num_sequences": torch.ones(1)}, ValueError, r"num_sequences: expected a number .*got shape \(1,\)"),
        ({"num_sequences": math.inf}, ValueError, "num_sequences=inf: expected 0 or above"),
        ({"token_weights": torch.ones(3, requires_grad=True)}, ValueError, "token_weights: .* use .detach()"),
        ({"temperature": torch.ones(2)}, ValueError, r"temperature: .*0-dim tensor, got shape \(2,\)"),
        ({"token_weights": torch.ones(2)}, ValueError, r"token_weights: expected shape \(3,\)"),
        ({"sequence_weights": torch.ones(3)}, ValueError, r"sequence_weights: expected shape \(1,\)"),
        ({"sequence_weights": torch.ones(1, dtype=torch.long)}, TypeError, "sequence_weights: expected a tensor of"),
        ({"sequence_weights": torch.ones(1, requires_grad=True)}, ValueError, "sequence_weights: .* use .detach()"),
        (
            {"sequence_weights": torch.ones(1), "rank_weight": 0.0, "steps": None, "cu_seqlens": None},
            ValueError,
            "sequence_weights: expected None, as cu_seqlens is None",
        ),
        ({"backend": "cuda"}, ValueError, "backend='cuda': expected triton, torch or reference"),
        ({"backend": "triton", "logits": LOGITS.double()}, TypeError, "backend='triton': .* got float64"),
    ],
)
def test_errors_name_the_argument_its_value_and_what_was_expected(changes, error, message):
    arguments = {"logits": LOGITS, "labels": LABELS, "steps": STEPS, "cu_seqlens": CU, **changes}
    with pytest.raises(error, match=message):
        tabom_loss(**arguments)
    if "logits" not in changes:
        hidden, weight = LOGITS[:, :2], LOGITS.new_zeros(5, 2)
        with pytest.raises(error, match=message):
            fused_linear_tabom_loss(hidden, weight, **{k: v for k, v in arguments.items() if k != "logits"})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [0.25, torch.tensor(0.25)])
def test_denominators_between_0_and_1_are_used_as_they_are(rng, backend, count):
    logits, *batch = draw_batch([5, 6])
    quarter, one = (
        tabom_loss(logits.float(), *batch, num_tokens=n, num_sequences=n, backend=backend) for n in (count, 1)
    )
    for ours, plain in zip(quarter, one, strict=True):
        torch.testing.assert_close(ours, 4 * plain)
    hidden, weight = torch.randn(11, 3), torch.randn(13, 3)
    quarter, one = (
        fused_linear_tabom_loss(hidden, weight, *batch, num_tokens=n, num_sequences=n, backend=backend)
        for n in (count, 1)
    )
    for ours, plain in zip(quarter, one, strict=True):
        torch.testing.assert_close(ours, 4 * plain)


def test_the_default_backend_and_a_light_import():
    assert backend_for(LOGITS) == "torch"
    code = "import sys, tabom_kernels; sys.exit(bool({'transformers', 'tabom', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
