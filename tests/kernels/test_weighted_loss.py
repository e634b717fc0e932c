"""The sum of both means: the torch form and the Triton program, against the formula."""

import pytest
import torch

from tabom_kernels import reference, torch_backend, triton_backend
from tabom_kernels.triton_backend import launch, loss, ranking
from tests.kernels.inputs import draw_sequences

LENGTHS = {"none": [], "few": [4, 0, 5], "many": [1, 12, *[3, 2, 0, 7] * 2]}


def draw_terms(lengths):
    """Cross-entropies, entropies (NaN where a row is not ranked), labels, steps and offsets."""
    steps, cu_seqlens = draw_sequences(lengths)
    labels = torch.randint(-1, 3, steps.shape)
    ce = torch.rand(steps.shape).masked_fill(labels < 0, 0)
    entropy = torch.rand(steps.shape).masked_fill(steps < 0, torch.nan)
    return ce, entropy, labels.masked_fill(labels < 0, -100), steps, cu_seqlens


def expected(ce, entropy, labels, weights, num_tokens, steps, cu_seqlens, form, margin, tau, rank_weight, sequences):
    """In fp64, under autograd."""
    used = (labels != -100).double()
    weights = used if weights is None else weights.double().where(used > 0, 0)
    tokens = used.sum() if num_tokens is None else num_tokens.double()
    tokens = tokens if tokens != 0 else 1
    mean = (ce.double() * weights).sum() / tokens
    if rank_weight is None:
        return mean, mean, torch.zeros(()), weights / tokens, None, torch.zeros(())
    entropy, tau = entropy.double().requires_grad_(), tau.double().requires_grad_()
    ranks = reference.trajectory_rank_loss(entropy, steps, cu_seqlens, form, margin.double(), tau)
    if sequences is None:
        sequences = (reference.count_ordered_pairs(steps, cu_seqlens) > 0).sum()
    term = ranks.sum() / (sequences if sequences != 0 else 1)
    grads = torch.autograd.grad(rank_weight.double() * term + 0 * tau, (entropy, tau), allow_unused=True)
    grads = (torch.zeros_like(x) if g is None else g for g, x in zip(grads, (entropy, tau), strict=True))
    return mean + rank_weight * term.detach(), mean, term.detach(), weights / tokens, *grads


@pytest.mark.parametrize("forms", [torch_backend, triton_backend])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("counted, weighted", [(True, False), (False, True)])
@pytest.mark.parametrize("form", ["logistic", "hinge", "plackett_luce", None])
def test_means_and_what_each_row_is_worth(rng, monkeypatch, forms, lengths, counted, weighted, form):
    monkeypatch.setattr(loss, "SUM_BLOCK", 8)  # several blocks of rows, of sequences, and of rows of a sequence
    monkeypatch.setattr(loss, "SUM_SEQUENCES", 2)
    monkeypatch.setattr(launch, "LONG", 30)  # two ways to share the pairs of a row
    ce, entropy, labels, steps, cu_seqlens = draw_terms(LENGTHS[lengths])
    weights = torch.rand(len(labels)).masked_fill(labels == -100, torch.nan) if weighted else None
    num_tokens, num_sequences = (None, None) if counted else (torch.tensor(7.0), torch.tensor(0.25))
    rank_weight = None if form is None else torch.tensor(0.3)
    ranking = (steps, cu_seqlens, form, torch.tensor(0.1), torch.tensor(0.7), rank_weight, num_sequences)
    ours = forms.weighted_loss(ce, entropy, labels, -100, weights, num_tokens, *ranking)
    theirs = expected(ce, entropy, labels, weights, num_tokens, *ranking)
    for name, a, b in zip(ours._fields, ours, theirs, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("forms", [torch_backend, triton_backend])
def test_nothing_to_count_is_divided_by_1(forms):
    labels, steps, one = torch.full((3,), -100), torch.full((3,), -1), torch.ones(())
    ranking = (steps, torch.tensor([0, 1, 3]), "logistic", one, one, one, None)
    for x in forms.weighted_loss(torch.zeros(3), torch.zeros(3), labels, -100, None, None, *ranking):
        assert (x == 0).all()


@pytest.mark.parametrize("form", ["logistic", "plackett_luce"])
def test_settings_in_memory_are_those_of_the_launch(rng, monkeypatch, form):
    """A number that the host knows is an argument; on a GPU a learned temperature and its like stay where they are."""
    ce, entropy, labels, steps, cu_seqlens = draw_terms(LENGTHS["few"])
    numbers = [torch.tensor(x) for x in (3.0, 0.1, 0.7, 0.3, 2.0)]

    def whole():
        tokens, *rank = numbers
        ranking = (steps, cu_seqlens, form, *rank)
        return triton_backend.weighted_loss(ce, entropy, labels, -100, None, tokens, *ranking)

    by_argument = whole()
    for module in (loss, ranking):
        monkeypatch.setattr(module, "setting", lambda x: x)
    for a, b in zip(whole(), by_argument, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("wrong", [13, -1, 2**40])
@pytest.mark.parametrize("ranked", [True, False])
def test_a_label_that_is_no_column_shows_as_nan_and_reads_nothing(rng, wrong, ranked):
    """On a GPU labels are not looked at before the launch: the row shows it, and no other."""
    logits = torch.randn(4, 13, requires_grad=True)
    labels, steps, one = torch.tensor([3, wrong, -100, 12]), torch.tensor([0, 1, 2, 3]), torch.ones(())
    arguments = (one, labels, steps, torch.tensor([0, 4]), one if ranked else None, "logistic", one, None, None, None)
    whole, cross_entropy, rank, *_ = torch.ops.tabom_kernels.tabom_loss(logits, *arguments, -100, False, "triton")
    whole.backward()
    assert whole.isnan() and cross_entropy.isnan() and rank.isfinite()
    assert logits.grad.isnan().all(1).tolist() == logits.grad.isnan().any(1).tolist() == [False, True, False, False]
