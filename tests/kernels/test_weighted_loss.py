"""The sum of both means: the torch form and the Triton program, against the formula."""

import pytest
import torch

from tabom_kernels import torch_backend, triton_backend
from tabom_kernels.triton_backend import loss

SMALL, LARGE = 9, 70


def draw_terms(rows, sequences, dtype=torch.float32):
    ce, labels = torch.rand(rows, dtype=dtype), torch.randint(-1, 3, (rows,))
    labels = labels.masked_fill(labels < 0, -100)
    pairs = torch.randint(3, (sequences,))
    rank = torch_backend.RankLoss(
        torch.rand(sequences, dtype=dtype).masked_fill(pairs == 0, 0),
        pairs,
        torch.randn(rows, dtype=dtype),
        torch.randn(sequences, dtype=dtype),
    )
    return ce.masked_fill(labels < 0, 0), labels, rank


def expected(ce, labels, weights, num_tokens, rank, rank_weight, num_sequences):
    used = (labels != -100).double()
    weights = used if weights is None else weights.double().where(used > 0, 0)
    tokens = used.sum() if num_tokens is None else num_tokens.double()
    tokens = tokens if tokens != 0 else 1
    mean = (ce.double() * weights).sum() / tokens
    if rank is None:
        return mean, mean, torch.zeros(()), weights / tokens, None, torch.zeros(())
    sequences = (rank.pairs > 0).double().sum() if num_sequences is None else num_sequences.double()
    sequences = sequences if sequences != 0 else 1
    term = rank.loss.double().sum() / sequences
    factor = rank_weight.double() / sequences
    grads = rank.grad_entropy.double() * factor, rank.grad_temperature.double().sum() * factor
    return mean + rank_weight * term, mean, term, weights / tokens, *grads


@pytest.mark.parametrize("forms", [torch_backend, triton_backend])
@pytest.mark.parametrize("rows, sequences", [(0, 0), (SMALL, 3), (LARGE, 40)])
@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("ranked", [True, False])
def test_means_and_what_each_row_is_worth(rng, monkeypatch, forms, rows, sequences, counted, weighted, ranked):
    monkeypatch.setattr(loss, "SUM_BLOCK", 32)  # several blocks of rows and of sequences
    ce, labels, rank = draw_terms(rows, sequences)
    weights = torch.rand(rows).masked_fill(labels == -100, torch.nan) if weighted else None
    num_tokens, num_sequences = (None, None) if counted else (torch.tensor(7), torch.tensor(0.25))
    arguments = (weights, num_tokens, rank if ranked else None, torch.tensor(0.3) if ranked else None, num_sequences)
    ours = forms.weighted_loss(ce, labels, -100, *arguments)
    for name, a, b in zip(ours._fields, ours, expected(ce, labels, *arguments), strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("forms", [torch_backend, triton_backend])
def test_nothing_to_count_is_divided_by_1(forms):
    labels, rank = torch.full((3,), -100), torch_backend.RankLoss(*(torch.zeros(2) for _ in range(4)))
    rank = rank._replace(pairs=torch.zeros(2, dtype=torch.int64), grad_entropy=torch.zeros(3))
    for x in forms.weighted_loss(torch.zeros(3), labels, -100, None, None, rank, torch.tensor(1.0), None):
        assert (x == 0).all()


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
