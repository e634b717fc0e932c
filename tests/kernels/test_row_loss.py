"""The row loss of TABOM against its formula, and what reaches it: weights, denominators, ignored rows."""

import pytest
import torch
import torch.nn.functional as F

from tabom_kernels import fused_linear_cross_entropy, fused_linear_tabom_loss, reference, tabom_loss
from tabom_kernels.backends import torch as torch_backend
from tabom_kernels.backends import triton as triton_backend
from tabom_kernels.backends.triton import launch, ranking
from tabom_kernels.ops.chunks import Chunk
from tabom_kernels.ops.row_loss import TabomArguments, TabomRowLoss, row_loss_inputs
from tests.kernels.inputs import draw_sequences

LENGTHS = {"none": [], "few": [4, 0, 5], "many": [1, 12, *[3, 2, 0, 7] * 2]}
FORMS = ["logistic", "hinge", "plackett_luce"]
TAU, MARGIN = 0.7, 0.1


def draw_terms(lengths):
    """Cross-entropies, entropies (NaN where a row is not ranked), labels, steps and offsets."""
    steps, cu_seqlens = draw_sequences(lengths)
    labels = torch.randint(-1, 3, steps.shape)
    ce = torch.rand(steps.shape).masked_fill(labels < 0, 0)
    entropy = torch.rand(steps.shape).masked_fill(steps < 0, torch.nan)
    return ce, entropy, labels.masked_fill(labels < 0, -100), steps, cu_seqlens


def expected(ce, entropy, labels, steps, cu_seqlens, form, rank_weight, weights, num_tokens, num_sequences):
    """Terms, dce, dE and dtau in fp64 under autograd."""
    is_used = labels != -100
    weights = is_used.double() if weights is None else weights.double().where(is_used, 0.0)
    weights = weights / max(1, is_used.sum() if num_tokens is None else num_tokens)
    ce_sum = (ce.double() * weights).sum()
    if rank_weight == 0:
        return ce_sum[None], weights, None, None
    entropy, tau = entropy.double().requires_grad_(), torch.tensor(TAU, dtype=torch.float64, requires_grad=True)
    ranks = reference.trajectory_rank_loss(entropy, steps, cu_seqlens, form, MARGIN, tau)
    if num_sequences is None:
        num_sequences = max(1, (reference.count_ordered_pairs(steps, cu_seqlens) > 0).sum())
    term = rank_weight * ranks.sum() / num_sequences + 0 * tau + 0 * entropy[:0].sum()
    by_entropy, by_tau = torch.autograd.grad(term, (entropy, tau))
    return torch.stack([ce_sum, term.detach()]), weights, by_entropy, by_tau


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("is_counted, is_weighted", [(True, False), (False, True)])
@pytest.mark.parametrize("form", [*FORMS, None])
def test_terms_and_gradients(rng, monkeypatch, backend, lengths, is_counted, is_weighted, form):
    monkeypatch.setattr(launch, "LONG_BATCH", 30)  # two ways to share the pairs of a row
    ce, entropy, labels, steps, cu_seqlens = draw_terms(LENGTHS[lengths])
    weights = torch.rand(len(labels)).masked_fill(labels == -100, torch.nan) if is_weighted else None
    num_tokens, num_sequences = (None, None) if is_counted else (7.0, 0.25)
    rank_weight = 0.0 if form is None else 0.3
    ranking, settings = (rank_weight, form, MARGIN, TAU), (weights, num_tokens, num_sequences, -100)
    *_, tensors = row_loss_inputs(TabomArguments(labels, steps, cu_seqlens, *ranking, *settings), ce, backend)
    module = {"torch": torch_backend, "triton": triton_backend}[backend]
    row_loss = TabomRowLoss(form, module, torch.tensor(TAU), *tensors)
    ours = row_loss(Chunk(slice(0, len(cu_seqlens) - 1), slice(0, len(ce))), ce, entropy)
    theirs = expected(ce, entropy, labels, steps, cu_seqlens, form, rank_weight, weights, num_tokens, num_sequences)
    for name, a, b in zip(ours._fields, ours, theirs, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("form", FORMS)
def test_chunks_of_sequences_add_up(rng, form):
    ce, entropy, labels, steps, cu_seqlens = draw_terms(LENGTHS["many"])
    arguments = TabomArguments(labels, steps, cu_seqlens, 0.3, form, MARGIN, TAU, None, None, None, -100)
    *_, tensors = row_loss_inputs(arguments, ce, "torch")
    row_loss = TabomRowLoss(form, torch_backend, torch.tensor(TAU), *tensors)
    offsets, sequences = cu_seqlens.tolist(), len(cu_seqlens) - 1
    whole = row_loss(Chunk(slice(0, sequences), slice(0, len(ce))), ce, entropy)
    parts = []
    for first, last in ((0, 3), (3, 4), (4, sequences)):
        rows = slice(offsets[first], offsets[last])
        parts.append(row_loss(Chunk(slice(first, last), rows), ce[rows], entropy[rows]))
    for name in ("terms", "temperature"):
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name))
    for name in ("cross_entropy", "entropy"):
        torch.testing.assert_close(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


@pytest.mark.parametrize("form", ["logistic", "plackett_luce"])
def test_settings_in_memory_are_those_of_the_launch(rng, monkeypatch, form):
    """On a GPU a learned temperature stays in memory, where a kernel reads it; a number is an argument."""
    _, entropy, _, steps, cu_seqlens = draw_terms(LENGTHS["few"])
    settings = (steps, cu_seqlens, form, torch.tensor(MARGIN), torch.tensor(TAU))
    by_argument = triton_backend.trajectory_rank_loss(entropy, *settings)
    monkeypatch.setattr(ranking, "setting", lambda x: x)
    for a, b in zip(triton_backend.trajectory_rank_loss(entropy, *settings), by_argument, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("ignore_index", [-100, -1, 10**6])
@pytest.mark.parametrize("weight", [torch.nan, torch.inf, 3.0])
def test_an_ignored_row_does_not_count_whatever_its_weight_is(rng, backend, ignore_index, weight):
    """The same loss and gradients as with a weight of 0, from logits and from hidden states."""
    hidden, head = torch.randn(9, 6), torch.randn(11, 6)
    labels = torch.randint(11, (9,))
    labels[::3] = ignore_index
    steps, cu_seqlens = draw_sequences([5, 4])
    batch, results = {"steps": steps, "cu_seqlens": cu_seqlens, "ignore_index": ignore_index}, []
    for ignored in (weight, 0.0):
        weights = torch.linspace(0.5, 1.5, 9).masked_fill(labels == ignore_index, ignored)
        options = {"labels": labels, "token_weights": weights, "backend": backend}
        leaves = [x.clone().requires_grad_() for x in (hidden, head)]
        losses = [
            tabom_loss(F.linear(*leaves), **batch, **options).loss,
            fused_linear_tabom_loss(*leaves, **batch, **options).loss,
            fused_linear_cross_entropy(*leaves, ignore_index=ignore_index, **options),
        ]
        results.append([x for loss in losses for x in (loss.detach(), *torch.autograd.grad(loss, leaves))])
    for a, b in zip(*results, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


@pytest.mark.parametrize("wrong", [13, -1, 2**40])
@pytest.mark.parametrize("rank_weight", [1.0, 0.0])
def test_a_label_that_is_no_column_shows_as_nan_and_reads_nothing(rng, monkeypatch, wrong, rank_weight):
    """On a GPU the values of labels are not checked before the launch: the loss of this row is NaN, and of no other."""
    monkeypatch.setattr("tabom_kernels.ops.row_loss.check_labels", lambda *_: None)
    logits = torch.randn(4, 13, requires_grad=True)
    batch = torch.tensor([3, wrong, -100, 12]), torch.tensor([0, 1, 2, 3]), torch.tensor([0, 4])
    whole, cross_entropy, rank = tabom_loss(logits, *batch, rank_weight=rank_weight, backend="triton")
    whole.backward()
    assert whole.isnan() and cross_entropy.isnan() and rank.isfinite()
    assert logits.grad.isnan().all(1).tolist() == logits.grad.isnan().any(1).tolist() == [False, True, False, False]
