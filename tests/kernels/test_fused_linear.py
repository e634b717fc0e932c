import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.tools.measure import peak_memory_of
from tabom_kernels import (
    count_ordered_pairs,
    fused_linear_cross_entropy,
    fused_linear_tabom_loss,
    reference,
    tabom_loss,
)
from tabom_kernels.backends.results import LogitTransform
from tabom_kernels.backends.selection import load
from tabom_kernels.ops import chunks, fused_linear
from tabom_kernels.ops import head as head_module
from tests.kernels.inputs import VALUES, draw_labels, draw_sequences
from tests.kernels.tolerance import fp32_rounding

FORMS = ["logistic", "hinge", "plackett_luce"]
LENGTHS = {
    "none": [],
    "no rows": [0],
    "one row": [1],
    "uneven": [5, 0, 1, 9, 2],
    "one long": [17],
    "no pair": [1, 1, 1],
}
CHUNKS = {"one chunk": None, "a sequence each": 9, "in pieces": 4, "row by row": 1}
TRANSFORMS = {
    "scale": {"logit_scale": 0.3},
    "soft-cap": {"softcap": 3.0},
    "both": {"logit_scale": 2.0, "softcap": 5.0},
}
COLUMNS, WIDTH = 23, 7


def draw_problem(lengths, dtype=torch.float64):
    steps, cu_seqlens = draw_sequences(lengths)
    rows = len(steps)
    head = {
        "hidden": torch.randn(rows, WIDTH).to(dtype),
        "weight": torch.randn(COLUMNS, WIDTH).to(dtype),
        "bias": torch.randn(COLUMNS).to(dtype),
    }
    batch = {
        "labels": draw_labels(torch.randn(rows, COLUMNS)),
        "steps": steps,
        "cu_seqlens": cu_seqlens,
        "token_weights": torch.rand(rows),
        "sequence_weights": 2 * torch.rand(len(lengths)),
    }
    return head, batch


def run(head, batch, upstream=1.0, frozen=(), temperature=0.7, **options):
    """loss, cross_entropy, rank, entropy and the gradients of all that is not frozen."""
    leaves = {name: x.clone().requires_grad_(name not in frozen) for name, x in head.items()}
    tau_dtype = torch.promote_types(head["hidden"].dtype, torch.float32)
    tau = torch.tensor(temperature, dtype=tau_dtype, requires_grad=True)
    settings = {"rank_weight": 0.3, "margin": 0.1, **options}
    loss, entropy = fused_linear_tabom_loss(**leaves, **batch, temperature=tau, return_entropy=True, **settings)
    (loss.loss * upstream).backward()
    tau_grad = torch.zeros_like(tau) if tau.grad is None else tau.grad
    grads = {name: x.grad for name, x in leaves.items() if name not in frozen}
    return {**loss._asdict(), "entropy": entropy, **grads, "tau": tau_grad}


def assert_close(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("max_chunk_rows", CHUNKS.values(), ids=CHUNKS.keys())
def test_loss_and_gradients_in_fp64(rng, form, lengths, max_chunk_rows):
    head, batch = draw_problem(lengths)
    ours = run(head, batch, 3.0, form=form, max_chunk_rows=max_chunk_rows, backend="torch")
    theirs = run(head, batch, 3.0, form=form, backend="reference")
    assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_chunks_round_no_more_than_one_chunk_does(rng, dtype):
    """All rows of a head have much in common, as those of trained heads do."""
    rows, columns, width = 64, 4096, 64
    hidden, weight = torch.randn(rows, width), torch.randn(columns, width) + 10 * torch.randn(width)
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight / width**0.5)]
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    labels = torch.randint(columns, (rows,))
    exact = torch.autograd.grad(F.cross_entropy(F.linear(*exact_leaves), labels), exact_leaves)
    losses = [fused_linear_cross_entropy(*leaves, labels, max_chunk_rows=most) for most in (None, 4)]
    losses.append(F.cross_entropy(F.linear(*leaves), labels))
    one_chunk, chunks, naive = (
        torch.stack([(a - b).norm() for a, b in zip(torch.autograd.grad(loss, leaves), exact, strict=True)])
        for loss in losses
    )
    assert (chunks <= 1.5 * one_chunk).all() and (chunks <= 2 * naive).all(), (chunks, one_chunk, naive)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_chunk_rows", CHUNKS.values(), ids=CHUNKS.keys())
@pytest.mark.parametrize("fp32_logits", [False, True])
def test_error_is_at_most_twice_that_of_the_naive_loss(rng, backend, dtype, max_chunk_rows, fp32_logits, **options):
    """The naive loss's own error is the largest of eight draws: that of one draw is now and then near 0 by luck."""
    naive_errors = []
    for _ in range(8):
        head, batch = draw_problem([5, 1, 9, 2], dtype)
        exact = run({name: x.double() for name, x in head.items()}, batch, backend="reference", **options)
        naive = run(head, batch, fp32_logits=fp32_logits, backend="reference", **options)
        naive_errors.append({name: (naive[name].double() - exact[name]).abs().max() for name in exact})
    ours = run(head, batch, fp32_logits=fp32_logits, max_chunk_rows=max_chunk_rows, backend=backend, **options)
    for name in exact:
        error, naive_error = (ours[name].double() - exact[name]).abs().max(), max(e[name] for e in naive_errors)
        one_rounding = exact[name].abs().max() * torch.finfo(dtype).eps / 2 * (name in head)
        assert error <= 2 * naive_error + one_rounding + fp32_rounding(exact[name]), (name, error, naive_error)


@pytest.mark.parametrize("options", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("max_chunk_rows", [None, 4])
def test_scaled_and_soft_capped_logits_in_fp64(rng, options, max_chunk_rows):
    head, batch = draw_problem([5, 0, 1, 9, 2])
    ours = run(head, batch, 3.0, max_chunk_rows=max_chunk_rows, backend="torch", **options)
    assert_close(ours, run(head, batch, 3.0, backend="reference", **options), rtol=1e-9, atol=1e-11)
    scale, softcap = options.get("logit_scale", 1.0), options.get("softcap")
    logits = F.linear(head["hidden"], head["weight"], head["bias"]) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = tabom_loss(logits, **batch, rank_weight=0.3, margin=0.1, temperature=0.7, backend="reference")
    torch.testing.assert_close(ours["loss"], expected.loss)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", TRANSFORMS.values(), ids=TRANSFORMS)
def test_the_error_with_scaled_and_soft_capped_logits(rng, backend, dtype, options):
    test_error_is_at_most_twice_that_of_the_naive_loss(rng, backend, dtype, 9, False, **options)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("options", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transformed_statistics_on_values_that_break_losses(rng, backend, values, options):
    """Saturated logits tie; a logit of -inf becomes -softcap, as it does in the models."""
    logits, transform = values(7, 1000).float(), LogitTransform(options.get("logit_scale", 1.0), options.get("softcap"))
    labels = draw_labels(logits)
    a, g = torch.rand(7), torch.randn(7)
    exact = logits.double().requires_grad_()
    ce, entropy = reference.cross_entropy_with_entropy(
        reference.transformed(exact, *transform), labels, ignore_index=-100
    )
    (ce * a + entropy * g).sum().backward()
    module = load(backend)
    statistics = module.vocabulary_statistics(logits, labels, -100, transform)
    # A logit of 1e4 that is scaled is rounded, by as much as neighbouring numbers there are apart.
    rounding = 2 * torch.finfo(torch.float32).eps * reference.transformed(logits.nan_to_num(neginf=0), *transform)
    close = {"rtol": 1e-4 + rounding.abs().max().item(), "atol": 1e-5 + rounding.abs().max().item()}
    torch.testing.assert_close(statistics.cross_entropy.double(), ce.detach(), **close)
    torch.testing.assert_close(statistics.entropy.double(), entropy.detach(), **close)
    out = module.vocabulary_gradient(logits, labels, -100, statistics, a, g, torch.empty_like(logits), None, transform)
    torch.testing.assert_close(out.double(), exact.grad, rtol=close["rtol"], atol=close["atol"] / 5)


@pytest.mark.parametrize("lowest, softcap", [(-7e4, None), (-7e4, 80.0), (-torch.inf, 80.0)])
def test_no_column_beyond_the_last_outdoes_logits_that_are_low_before_they_are_scaled(rng, lowest, softcap):
    logits, transform = torch.full((2, 9), lowest), LogitTransform(1e-3, softcap)
    logits[1, 3:] += 100.0
    exact = reference.transformed(logits.double(), *transform)
    statistics = load("triton").vocabulary_statistics(logits, None, -100, transform)
    torch.testing.assert_close(statistics.entropy.double(), reference.softmax_entropy(exact), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_soft_capped_chunks_of_minus_infinity(rng, backend):
    """There all logits tie at -softcap, and what pads a chunk is not among them."""
    logits = torch.randn(3, 5000)
    logits[0] = -torch.inf
    logits[1, 4000:] = -torch.inf
    transform = LogitTransform(1.0, 3.0)
    statistics = load(backend).vocabulary_statistics(logits, None, -100, transform)
    exact = reference.softmax_entropy(reference.transformed(logits.double(), *transform))
    torch.testing.assert_close(statistics.entropy.double(), exact, rtol=1e-5, atol=1e-6)


def test_fp32_logits_are_not_rounded(rng):
    head, batch = draw_problem([8, 9], torch.bfloat16)
    exact, plain, fp32 = (
        run({name: x.to(dtype) for name, x in head.items()}, batch, fp32_logits=full, backend="torch")["entropy"]
        for dtype, full in ((torch.float64, False), (torch.bfloat16, False), (torch.bfloat16, True))
    )
    assert (fp32 - exact).abs().max() < 1e-5 < 1e-3 < (plain - exact).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_chunk_rows", [None, 4])
@pytest.mark.parametrize("frozen", [("weight", "bias"), ("hidden",), ("bias", "hidden"), ("weight",)])
def test_what_is_frozen_gets_no_gradient_and_costs_no_buffer(rng, monkeypatch, frozen, max_chunk_rows, dtype):
    head, batch = draw_problem([5, 3], dtype)
    saved = []
    monkeypatch.setattr(head_module.HeadGradients, "__del__", lambda self: saved.append(vars(self)), raising=False)
    ours = run(head, batch, frozen=frozen, max_chunk_rows=max_chunk_rows)
    close = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    assert_close(ours, run(head, batch, frozen=frozen, backend="reference"), **close)
    assert all((saved[0][name].numel() == 0) == (name in frozen) for name in head)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 4), st.sampled_from(FORMS))
def test_the_sum_over_micro_batches_is_the_whole(seed, cut, form):
    torch.manual_seed(seed)
    head, batch = draw_problem([4, 1, 6, 3])
    whole = run(head, batch, form=form)
    row = batch["cu_seqlens"][cut]
    denominators = {
        "num_tokens": (batch["labels"] != -100).sum(),
        "num_sequences": (count_ordered_pairs(batch["steps"], batch["cu_seqlens"]) > 0).sum(),
    }
    parts = []
    for rows, sequences, offsets in (
        (slice(0, row), slice(0, cut), batch["cu_seqlens"][: cut + 1]),
        (slice(row, None), slice(cut, None), batch["cu_seqlens"][cut:] - row),
    ):
        part = {name: batch[name][rows] for name in ("labels", "steps", "token_weights")}
        part |= {"cu_seqlens": offsets, "sequence_weights": batch["sequence_weights"][sequences]}
        parts.append(run(head | {"hidden": head["hidden"][rows]}, part, form=form, **denominators))
    for name in whole:
        joined = torch.cat if name in ("hidden", "entropy") else sum
        torch.testing.assert_close(whole[name], joined([part[name] for part in parts]))


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("max_chunk_rows", [None, 6])
def test_the_fused_linear_cross_entropy(rng, backend, max_chunk_rows):
    head, batch = draw_problem([11], torch.float32)
    del batch["token_weights"]
    ours = run(head, batch, rank_weight=0.0, backend=backend, max_chunk_rows=max_chunk_rows)
    leaves = {name: x.clone().requires_grad_() for name, x in head.items()}
    loss = fused_linear_cross_entropy(**leaves, labels=batch["labels"], max_chunk_rows=max_chunk_rows, backend=backend)
    loss.backward()
    torch.testing.assert_close(ours["loss"], loss.detach())
    for name, leaf in leaves.items():
        torch.testing.assert_close(ours[name], leaf.grad)
    leaves = {name: x.clone().requires_grad_() for name, x in head.items()}
    loss = F.cross_entropy(
        F.linear(**{"input": leaves["hidden"], "weight": leaves["weight"], "bias": leaves["bias"]}), batch["labels"]
    )
    loss.backward()
    torch.testing.assert_close(ours["loss"], loss.detach())
    for name, leaf in leaves.items():
        torch.testing.assert_close(ours[name], leaf.grad)


@pytest.mark.parametrize("options", [{}, *TRANSFORMS.values()], ids=["plain", *TRANSFORMS])
def test_gradcheck_of_the_cross_entropy(rng, options):
    head, batch = draw_problem([9])
    weights = {"token_weights": batch["token_weights"], "num_tokens": torch.tensor(5.0), "max_chunk_rows": 4}

    def loss(hidden, weight, bias):
        return fused_linear_cross_entropy(hidden, weight, batch["labels"], bias=bias, **weights, **options)

    assert torch.autograd.gradcheck(loss, tuple(x.requires_grad_() for x in head.values()))


def test_weights_and_number_of_tokens_of_the_cross_entropy(rng):
    head, batch = draw_problem([9])
    logits = F.linear(head["hidden"], head["weight"], head["bias"])
    each = F.cross_entropy(logits, batch["labels"], reduction="none") * batch["token_weights"]
    ours = fused_linear_cross_entropy(
        **head, labels=batch["labels"], token_weights=batch["token_weights"], num_tokens=13, max_chunk_rows=4
    )
    torch.testing.assert_close(ours, each.sum() / 13)


@pytest.mark.parametrize("rows", [0, 3])
def test_a_cross_entropy_without_labels_is_zero_with_a_gradient_of_zero(rows):
    hidden, weight = torch.ones(rows, 4, requires_grad=True), torch.ones(5, 4, requires_grad=True)
    loss = fused_linear_cross_entropy(hidden, weight, torch.full((rows,), -100))
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not weight.grad.any()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the default device's allocator is not the profiler's")
@pytest.mark.parametrize("upstream, keep", [(1.0, False), (3.0, False), (3.0, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_chunk_rows", [None, 20])
def test_a_trained_head_costs_its_gradient_and_a_chunk(rng, monkeypatch, dtype, upstream, max_chunk_rows, keep):
    """Twice, as gradient accumulation does: the second gradient is added to the first one in place.

    A graph that is kept keeps its gradient. Sums over chunks are in fp32 beside the gradient, and so is all in fp16, as
    is the gradient of its logits.
    """
    rows, columns, width = 64, 4096, 256
    monkeypatch.setattr(head_module, "SCALED_ROWS", 64)
    monkeypatch.setattr(head_module, "PRODUCT_TILE", 64)
    monkeypatch.setattr("tabom_kernels.backends.torch.chunks.CHUNK_ELEMENTS", columns)
    hidden = torch.randn(rows, width).to(dtype).requires_grad_()
    weight = torch.randn(columns, width).to(dtype).requires_grad_()
    labels, chunk_bytes = torch.randint(columns, (rows,)), (max_chunk_rows or rows) * columns * dtype.itemsize
    gradient_bytes = (1 + keep) * weight.nbytes
    if dtype == torch.float16 or (dtype == torch.bfloat16 and max_chunk_rows):
        gradient_bytes = weight.nbytes + weight.numel() * 4
    if dtype == torch.float16:
        chunk_bytes *= 3

    def step():
        loss = fused_linear_cross_entropy(hidden, weight, labels, max_chunk_rows=max_chunk_rows) * upstream
        loss.backward(retain_graph=keep)

    for _ in range(2):
        peak = peak_memory_of(step, torch.device("cpu"))
        assert weight.nbytes <= peak < 1.25 * (gradient_bytes + chunk_bytes)


def test_it_is_tabom_loss_of_the_logits(rng):
    head, batch = draw_problem([6, 5])
    result = fused_linear_tabom_loss(**head, **batch, form="hinge", margin=0.2, rank_weight=2.0)
    logits = F.linear(head["hidden"], head["weight"], head["bias"])
    expected = tabom_loss(logits, **batch, form="hinge", margin=0.2, rank_weight=2.0, backend="reference")
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that an operator makes, those inside our own ops too."""

    def __init__(self, *ignored):
        super().__init__()
        self.elements, self.ignored = 0, {x.data_ptr() for x in ignored}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.data_ptr() not in self.ignored]
        self.elements = max([self.elements, *(x.numel() for x in made)])
        return result


@pytest.mark.parametrize("max_chunk_rows, rows_at_once", [(8, 7), (20, 20)])
def test_no_tensor_of_rows_times_vocabulary_is_ever_made(rng, max_chunk_rows, rows_at_once):
    rows, columns, width = 64, 500, 16
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(columns, width)
    steps, cu_seqlens = draw_sequences([20, 20, 20, 4])
    with LargestTensor(weight) as largest:
        fused_linear_tabom_loss(
            hidden,
            weight,
            torch.randint(columns, (rows,)),
            steps,
            cu_seqlens,
            max_chunk_rows=max_chunk_rows,
            num_sequences=4.0,
        ).loss.backward()
    assert largest.elements == rows_at_once * columns


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("max_chunk_rows", [None, 3])
def test_gradcheck(rng, form, max_chunk_rows):
    head, batch = draw_problem([4, 3])
    tau = torch.tensor(0.7, dtype=torch.float64, requires_grad=form != "hinge")

    def loss(hidden, weight, bias, temperature):
        return fused_linear_tabom_loss(
            hidden,
            weight,
            **batch,
            bias=bias,
            temperature=temperature,
            form=form,
            margin=0.1,
            max_chunk_rows=max_chunk_rows,
        ).loss

    assert torch.autograd.gradcheck(loss, (*(x.requires_grad_() for x in head.values()), tau))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "dtype, max_chunk_rows",
    [(torch.float32, None), (torch.float32, 6), (torch.bfloat16, 6), (torch.float16, None), (torch.float16, 6)],
)
def test_it_compiles_to_one_graph(rng, backend, dtype, max_chunk_rows):
    head, batch = draw_problem([5, 4], dtype)
    eager = run(head, batch, backend=backend, max_chunk_rows=max_chunk_rows)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(hidden, weight, bias):
        return fused_linear_tabom_loss(
            hidden * 1,
            weight,
            **batch,
            bias=bias,
            rank_weight=0.3,
            margin=0.1,
            temperature=0.7,
            backend=backend,
            max_chunk_rows=max_chunk_rows,
        ).loss

    leaves = {name: x.clone().requires_grad_() for name, x in head.items()}
    compiled(**leaves).backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, eager[name])


def test_loss_scaling_of_fp16_loses_nothing(rng):
    """The gradient of a mean over many tokens is below fp16's smallest number, and the scaler multiplies it again."""
    head, batch = draw_problem([9, 8], torch.float16)
    options = {"num_tokens": 1e6, "num_sequences": 1e6, "rank_weight": 1.0}
    ours = run(head, batch, 2.0**16, **options)
    exact = run({name: x.double() for name, x in head.items()}, batch, 2.0**16, **options, backend="reference")
    for name in head:
        torch.testing.assert_close(ours[name].double(), exact[name], rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_it_is_a_linear_layer(rng, dtype):
    head, batch = draw_problem([5, 4], torch.float32)
    with torch.autocast(head["hidden"].device.type, dtype):
        ours = run(head, batch)
    low = run({name: x.to(dtype) for name, x in head.items()}, batch)
    for name in ours:
        torch.testing.assert_close(ours[name].to(low[name].dtype), low[name], rtol=1e-5, atol=1e-6)
    assert ours["weight"].dtype == torch.float32


@pytest.mark.parametrize(
    "lengths, limit, expected",
    [([128] * 8, 861, [512, 512]), ([3] * 6, 13, [9, 9]), ([700, 300, 24], 861, [700, 324]), ([8, 0, 0], 5, [8])],
)
def test_chunks_are_about_equal(lengths, limit, expected):
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    planned = list(chunks.plan_chunks(offsets, sum(lengths), limit))
    assert [c.rows.stop - c.rows.start for c in planned] == expected


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_lengths_on_the_host_change_nothing_and_save_the_wait(rng, monkeypatch, backend, lengths):
    head, batch = draw_problem(lengths, torch.float32)
    expected = run(head, batch, max_chunk_rows=4, backend=backend)
    plan_chunks = chunks.plan_chunks

    def unreadable(cu_seqlens, *arguments):
        return plan_chunks(cu_seqlens.to("meta"), *arguments)

    monkeypatch.setattr(head_module, "plan_chunks", unreadable)
    ours = run(head, batch, max_chunk_rows=4, backend=backend, lengths=lengths)
    assert_close(ours, expected, rtol=0, atol=0)


@pytest.mark.parametrize("rows, size, expected", [(0, 5, [0]), (5, 5, [5]), (6, 5, [3, 3]), (1024, 861, [512, 512])])
def test_pieces_are_about_equal(rows, size, expected):
    pieces = chunks.even_slices(slice(10, 10 + rows), size)
    assert [p.stop - p.start for p in pieces] == expected
    assert pieces[0].start == 10 and all(a.stop == b.start for a, b in pairwise(pieces))


@pytest.mark.parametrize("rows, limit, expected", [(17, 17, [17]), (17, 9, [6, 9, 2]), (17, 5, [5, 1, 9, 2])])
def test_chunks_are_whole_sequences(rows, limit, expected):
    offsets = torch.tensor([0, 5, 5, 6, 15, 17])
    planned = list(chunks.plan_chunks(offsets, rows, limit))
    assert [c.rows.stop - c.rows.start for c in planned] == expected
    assert [c.sequences.start for c in planned] == [0, *(c.sequences.stop for c in planned[:-1])]
    assert planned[-1].sequences.stop == 5
    for chunk in planned:
        assert offsets[chunk.sequences.start] == chunk.rows.start and offsets[chunk.sequences.stop] == chunk.rows.stop


HEAD = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4)}
BATCH = {"labels": torch.tensor([0, 1, -100]), "steps": torch.tensor([0, 1, 2]), "cu_seqlens": torch.tensor([0, 3])}


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"hidden": torch.zeros(3)}, ValueError, r"hidden: expected shape \(N, D\), got \(3,\)"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "hidden: expected a floating-point tensor"),
        ({"weight": torch.zeros(5, 3)}, ValueError, r"weight: expected shape \(V, 4\).*got \(5, 3\)"),
        ({"weight": torch.zeros(0, 4)}, ValueError, r"weight: expected shape \(V, 4\) with V >= 1"),
        (
            {"weight": torch.zeros(5, 4).bfloat16()},
            TypeError,
            "weight: expected a tensor of float32, got torch.bfloat16",
        ),
        ({"bias": torch.zeros(4)}, ValueError, r"bias: expected shape \(5,\), got \(4,\)"),
        ({"labels": torch.tensor([0, 5, 0])}, ValueError, "labels: 5 at row 1; expected 0 <= label < 5"),
        ({"token_weights": torch.ones(2)}, ValueError, r"token_weights: expected shape \(3,\)"),
        ({"max_chunk_rows": 0}, ValueError, "max_chunk_rows=0: expected at least 1"),
        ({"softcap": 0.0}, ValueError, "softcap=0.0: expected None, or above 0 and finite"),
        ({"logit_scale": -1.0}, ValueError, "logit_scale=-1.0: expected above 0 and finite"),
        (
            {"lengths": [2]},
            ValueError,
            "lengths: expected the rows of 1 sequences, 3 in all, .* got 1 of them, 2 in all",
        ),
        ({"backend": "cuda"}, ValueError, "backend='cuda'"),
    ],
)
def test_errors_name_the_argument(monkeypatch, changes, error, message):
    monkeypatch.setenv("TABOM_KERNELS_DEBUG", "1")  # else values are not looked at on a GPU
    device = torch.empty(0).device
    arguments = {**HEAD, **BATCH, **changes}
    arguments = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    with pytest.raises(error, match=message):
        fused_linear_tabom_loss(**arguments)


@pytest.mark.parametrize("max_chunk_rows", [None, 3000])
@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_fp16_overflows_only_where_autograd_does(rng, scale, max_chunk_rows):
    """Sums over 8192 rows that fp16 does not hold, though their mean is small: one hidden channel is at 30."""
    head, batch = draw_problem([32] * 256, torch.float16)
    head["hidden"][:, 2] = 30
    head["weight"].mul_(0.1)
    batch["labels"].fill_(3)
    for weights in (None, torch.full((8192,), 1e5), torch.full((8192,), 1e-5)):
        batch["token_weights"] = weights
        options = {"num_tokens": 8192.0 * (1 if weights is None else weights[0].item())}
        ours = run(head, batch, scale, max_chunk_rows=max_chunk_rows, backend="torch", **options)
        naive = run(head, batch, scale, backend="reference", **options)
        exact = run({name: x.double() for name, x in head.items()}, batch, scale, backend="reference", **options)
        for name in head:
            assert naive[name].isfinite().all() and ours[name].isfinite().all(), name
            error, naive_error = ((x[name].double() - exact[name]).norm() for x in (ours, naive))
            assert error <= 2 * naive_error + 1e-3 * exact[name].norm(), (name, error, naive_error)


def test_factors_of_the_ranking_overflow_no_fp16(rng):
    """A temperature of 1e-6 nats and one pair a sequence: dE is up to 1e6, and per token it would be 1e8."""
    head, batch = draw_problem([2] * 8, torch.float16)
    batch["steps"] = torch.tensor([0, 1] * 8)
    options = {"temperature": 1e-6, "num_sequences": 800, "num_tokens": 1e5, "margin": 0.0}
    ours = run(head, batch, backend="torch", **options)
    naive = run(head, batch, backend="reference", **options)
    for name in head:
        assert naive[name].isfinite().all() and ours[name].isfinite().all(), name
        torch.testing.assert_close(ours[name], naive[name], rtol=2e-2, atol=2e-2 * naive[name].abs().max().item())


@pytest.mark.parametrize("max_chunk_rows", [None, 4])
def test_each_row_of_an_fp16_head_is_exact_however_far_apart_they_are(rng, max_chunk_rows):
    """Gradients of 1e4, of 1e-4 and of 0: large hidden states have no probability where the small ones' labels are."""
    common, rare, never = range(8), range(8, 16), range(16, 24)
    head = {"hidden": 1 + torch.rand(16, 256), "weight": torch.zeros(24, 256), "bias": torch.zeros(24)}
    head["hidden"] *= torch.tensor([1e4] * 8 + [1e-4] * 8)[:, None]
    head["hidden"][:, 0] = torch.tensor([100.0] * 8 + [0.0] * 8)
    head["weight"][rare, 0], head["bias"][never] = -100, -torch.inf
    leaves = {name: x.half().requires_grad_() for name, x in head.items()}
    labels = torch.tensor([*common, *rare])
    exact_leaves = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    fused_linear_cross_entropy(**exact_leaves, labels=labels, num_tokens=1, backend="reference").backward()
    exact, grads = exact_leaves["weight"].grad, []
    for _ in range(2):
        loss = fused_linear_cross_entropy(**leaves, labels=labels, num_tokens=1, max_chunk_rows=max_chunk_rows)
        grads += torch.autograd.grad(loss, leaves["weight"])
    assert torch.equal(*grads) and not grads[0][never].any()
    largest = exact.abs().amax(1, keepdim=True)
    assert largest[common].min() > 1e7 * largest[rare].max()
    two_roundings = torch.finfo(torch.float16).eps * exact.abs() + torch.finfo(torch.float16).smallest_normal * 2**-11
    assert ((grads[0] - exact).abs() <= two_roundings + 1e-6 * largest).all()


@pytest.mark.parametrize("max_chunk_rows", [None, 4])
def test_the_gradient_of_an_fp16_head_is_there_before_the_loss_scale_is(rng, max_chunk_rows):
    """p is 2^-12 and hidden states are near 1e-4: fp16 has no such number until 65536 multiplies it."""
    leaves = [(1e-4 * torch.randn(8, 16)).half().requires_grad_(), torch.zeros(4096, 16).half().requires_grad_()]
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    labels = torch.randint(4096, (8,))
    exact = F.cross_entropy(F.linear(*exact_leaves), labels, reduction="sum") * 65536
    ours = fused_linear_cross_entropy(*leaves, labels, num_tokens=1, max_chunk_rows=max_chunk_rows) * 65536
    [exact], [ours] = (torch.autograd.grad(loss, x[1]) for loss, x in ((exact, exact_leaves), (ours, leaves)))
    torch.testing.assert_close(ours.double(), exact, rtol=2**-9, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("max_chunk_rows", [None, 4])
def test_token_weights_of_an_fp16_head_may_be_1e6_apart(rng, backend, max_chunk_rows):
    head, batch = draw_problem([5, 1, 9, 2], torch.float16)
    batch["token_weights"] = 10 ** (6 * torch.rand(17) - 3)
    options = {"num_tokens": batch["token_weights"].sum(), "rank_weight": 0.0}
    ours = run(head, batch, max_chunk_rows=max_chunk_rows, backend=backend, **options)
    naive = run(head, batch, backend="reference", **options)
    exact = run({name: x.double() for name, x in head.items()}, batch, backend="reference", **options)
    for name in head:
        error, naive_error = ((x[name].double() - exact[name]).norm() for x in (ours, naive))
        assert error <= 2 * naive_error + 1e-3 * exact[name].norm(), (name, error, naive_error)


@pytest.mark.parametrize("max_chunk_rows", [None, 1])
def test_a_light_token_of_fp16_keeps_its_small_probabilities(rng, max_chunk_rows):
    """p is 2^-12 and a weight 1e-3 of the other one; the hidden states of the two share no channel."""
    hidden = torch.block_diag(1 + torch.rand(1, 8), 1 + torch.rand(1, 8)).half()
    weight = torch.zeros(4096, 16).half().requires_grad_()
    labels, token_weights = torch.tensor([0, 1]), torch.tensor([1.0, 1e-3])
    options = {"token_weights": token_weights, "num_tokens": 1, "max_chunk_rows": max_chunk_rows}
    loss = fused_linear_cross_entropy(hidden, weight, labels, **options)
    [ours] = torch.autograd.grad(loss * 4096, weight)
    exact = token_weights.double() @ hidden.double()
    torch.testing.assert_close(ours[2:].double(), exact.expand(4094, 16), rtol=2**-8, atol=0)


def test_a_frozen_fp16_head_keeps_small_probabilities_in_a_mean_over_many_tokens(rng):
    """p is 1/5000 and the mean is over 1e6 tokens; only the rows of the head with these probabilities are not 0."""
    weight = torch.randn(5000, 16).half()
    weight[0] = 0
    hidden, labels = torch.zeros(8, 16).half().requires_grad_(), torch.zeros(8, dtype=torch.int64)
    loss = fused_linear_cross_entropy(hidden, weight, labels, num_tokens=1e6)
    [ours] = torch.autograd.grad(loss * 2.0**16, hidden)
    exact = weight.double().sum(0) / 5000 * 2.0**16 / 1e6
    torch.testing.assert_close(ours.double(), exact.expand(8, 16), rtol=2**-9, atol=1e-6)


@pytest.mark.parametrize("max_chunk_rows", [None, 4])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_gradient_scaler_sees_what_is_not_finite_and_nothing_else(rng, value, max_chunk_rows):
    """A head in fp32 under autocast to fp16, trained as PyTorch says: such a step is left out, the next one is not."""
    head = torch.nn.Linear(16, 50, bias=False)
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    device = head.weight.device.type
    scaler = torch.amp.GradScaler(device)
    hidden, labels = torch.randn(2, 9, 16), torch.randint(50, (9,))
    hidden[0, 3, 5] = value
    exact = copy.deepcopy(head).double()
    F.cross_entropy(exact(hidden[1].double()), labels).backward()
    for x, is_left_out in zip(hidden, (True, False), strict=True):
        before = head.weight.detach().clone()
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16):
            loss = fused_linear_cross_entropy(x, head.weight, labels, max_chunk_rows=max_chunk_rows)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, head.weight) == is_left_out
    assert scaler.get_scale() == 2**15
    torch.testing.assert_close(head.weight.grad.double(), exact.weight.grad, rtol=2e-2, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_chunk_rows", [None, 4])
def test_a_second_backward_through_a_kept_graph_gives_the_same(rng, dtype, max_chunk_rows):
    """The gradients are scaled in place by the backward that frees the graph, and by no other."""
    head, batch = draw_problem([5, 4], dtype)
    leaves = {name: x.clone().requires_grad_() for name, x in head.items()}
    loss = fused_linear_tabom_loss(**leaves, **batch, max_chunk_rows=max_chunk_rows).loss
    first, second, last = (
        torch.autograd.grad(loss * 3, list(leaves.values()), retain_graph=keep) for keep in (True, True, False)
    )
    for a, b, c in zip(first, second, last, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_the_upstream_gradient_is_not_rounded_to_half_precision(rng):
    """1 + 2^-9 is 1 in bf16; over many numbers its share shows."""
    head, batch = draw_problem([300], torch.bfloat16)
    head["hidden"] = torch.randn(300, WIDTH).bfloat16()
    plain, scaled = (run(head, batch, upstream, rank_weight=0.0) for upstream in (1e6, 1e6 * (1 + 2**-9)))
    for name in ("hidden", "weight"):
        ratio = scaled[name].double().abs().sum() / plain[name].double().abs().sum()
        assert abs(ratio - 1 - 2**-9) < 2**-10, name
    assert all(scaled[name].dtype == torch.bfloat16 for name in head)


@pytest.mark.parametrize("fp32_logits", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_last_slice_of_the_vocabulary_may_be_partial(rng, monkeypatch, dtype, fp32_logits):
    """Where half precision is multiplied in fp32, and gradients scaled; the label and the best token are in it."""
    monkeypatch.setattr(head_module, "SCALED_ROWS", 512)
    monkeypatch.setattr(head_module, "PRODUCT_TILE", 256)
    columns = 2 * head_module.SCALED_ROWS + 5
    weight, hidden = 0.1 * torch.randn(columns, WIDTH), torch.randn(9, WIDTH)
    weight[-2] = 4 * hidden[0]
    head = {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "bias": torch.randn(columns).to(dtype)}
    steps, cu_seqlens = draw_sequences([5, 4])
    labels = torch.full((9,), columns - 2)
    labels[3] = columns - 1
    batch = {"labels": labels, "steps": steps, "cu_seqlens": cu_seqlens}
    options = {"max_chunk_rows": 5, "fp32_logits": fp32_logits}
    ours = run(head, batch, backend="torch", **options)
    exact = run({name: x.double() for name, x in head.items()}, batch, backend="reference")
    for name in ("loss", "weight", "bias", "hidden"):
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        error = (ours[name].double() - exact[name]).norm()
        assert error <= tolerance * exact[name].norm(), name
        if name in ("weight", "bias"):
            last = slice(-5, None)
            assert (ours[name][last].double() - exact[name][last]).norm() <= tolerance * exact[name][last].norm()


def test_fp32_logits_under_autocast(rng):
    """Hidden and weight are cast, and the sums of their products are kept."""
    head, batch = draw_problem([8, 9], torch.float32)
    with torch.autocast(head["hidden"].device.type, torch.bfloat16):
        ours = run(head, batch, fp32_logits=True)
    low = {name: x.bfloat16() for name, x in head.items()}
    exact = run({name: x.double() for name, x in low.items()}, batch, backend="reference")
    rounded = run(low, batch, fp32_logits=False)
    assert (ours["entropy"] - exact["entropy"]).abs().max() < 1e-5 < (rounded["entropy"] - exact["entropy"]).abs().max()
    assert ours["entropy"].dtype == ours["loss"].dtype == ours["weight"].dtype == torch.float32


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("form", FORMS)
def test_only_the_loss_requires_a_gradient(rng, backend, form):
    head, batch = draw_problem([5, 4], torch.float32)
    leaves = {name: x.requires_grad_() for name, x in head.items()}
    result, entropy = fused_linear_tabom_loss(**leaves, **batch, form=form, return_entropy=True, backend=backend)
    assert result.loss.requires_grad
    assert not any(x.requires_grad for x in (result.cross_entropy, result.rank, entropy))
    with torch.no_grad():
        assert not fused_linear_tabom_loss(**leaves, **batch, form=form, backend=backend).loss.requires_grad
    frozen = {name: x.detach() for name, x in leaves.items()}
    assert not fused_linear_tabom_loss(**frozen, **batch, form=form, backend=backend).loss.requires_grad


@pytest.mark.parametrize("max_chunk_rows", [None, 100])
def test_gradients_summed_over_many_rows_keep_more_than_bf16(rng, max_chunk_rows):
    """4096 equal terms: a sum in bf16 stops growing at 256 of them."""
    rows = 4096
    head = {"hidden": torch.ones(rows, 2), "weight": torch.zeros(4, 2), "bias": torch.zeros(4)}
    head = {name: x.bfloat16() for name, x in head.items()}
    batch = {
        "labels": torch.zeros(rows, dtype=torch.int64),
        "steps": torch.full((rows,), -1),
        "cu_seqlens": torch.arange(0, rows + 1, 64),
    }
    ours = run(head, batch, rank_weight=0.0, max_chunk_rows=max_chunk_rows, backend="torch")
    assert ours["bias"].tolist() == [-0.75, 0.25, 0.25, 0.25]
    assert ours["weight"].tolist() == [[-0.75] * 2] + [[0.25] * 2] * 3


@pytest.mark.parametrize("fp32_logits, rows_at_once", [(False, 64), (True, 32)])
def test_by_default_logits_take_the_budget_and_no_more(rng, monkeypatch, fp32_logits, rows_at_once):
    columns = 500
    monkeypatch.setattr(fused_linear, "LOGITS_BUDGET", 64 * columns * 2)
    hidden, weight = torch.randn(128, 4).bfloat16().requires_grad_(), torch.randn(columns, 4).bfloat16()
    steps, cu_seqlens = draw_sequences([32] * 4)
    planned = []
    plan = chunks.plan_chunks
    monkeypatch.setattr(head_module, "plan_chunks", lambda *a: planned.extend(plan(*a)) or planned)
    labels = torch.randint(columns, (128,))
    fused_linear_tabom_loss(hidden, weight, labels, steps, cu_seqlens, fp32_logits=fp32_logits, backend="torch")
    assert {chunk.rows.stop - chunk.rows.start for chunk in planned} == {rows_at_once}
    assert rows_at_once * columns * (4 if fp32_logits else 2) == fused_linear.LOGITS_BUDGET


def test_the_default_budget_is_256_mib():
    assert fused_linear.LOGITS_BUDGET == 256 * 2**20
