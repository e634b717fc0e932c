"""The sizes and layouts of real use that the other tests leave out, with values and gradients compared to fp64."""

import pytest
import torch

from tabom_kernels import cross_entropy_with_entropy, trajectory_rank_loss, unmask_statistics
from tests.kernels.inputs import draw_labels, draw_sequences, gaussian

ROUNDING = {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def results(logits, labels, upstream, backend):
    leaf = logits.detach().clone() if logits.is_contiguous() else logits.detach()
    outputs = cross_entropy_with_entropy(leaf.requires_grad_(), labels, backend=backend)
    [gradient] = torch.autograd.grad(outputs, leaf, [u.to(outputs[0].dtype) for u in upstream])
    return *(x.detach() for x in outputs), gradient


def placed(logits, layout):
    """The same logits, where rows are unaligned, or columns apart, or rows and columns have changed places."""
    rows, columns = logits.shape
    if layout == "unaligned":
        return (
            torch.empty(rows * (columns + 3) + 1, dtype=logits.dtype)[1:]
            .as_strided((rows, columns), (columns + 3, 1))
            .copy_(logits)
        )
    if layout == "columns":
        return torch.empty(rows, 2 * columns, dtype=logits.dtype)[:, ::2].copy_(logits)
    return torch.empty(columns, rows, dtype=logits.dtype).T.copy_(logits)


@pytest.mark.parametrize(
    "columns, dtype, layout",
    [
        (32000, torch.float16, None),
        (32000, torch.bfloat16, None),
        (152064, torch.bfloat16, None),
        (152064, torch.float32, None),
        (9001, torch.float16, "unaligned"),
        (9001, torch.bfloat16, "columns"),
        (9000, torch.float32, "transposed"),
    ],
)
def test_losses_and_gradients(rng, columns, dtype, layout):
    logits = gaussian(2, columns).to(dtype)
    labels, upstream = draw_labels(logits, ignored=0), torch.randn(2, 2)
    exact = results(logits.double(), labels, upstream, "reference")
    ours = results(logits if layout is None else placed(logits, layout), labels, upstream, "triton")
    for got, want in zip(ours, exact, strict=True):
        rounding = ROUNDING[got.dtype] if got.dim() == 2 else 2**-20
        torch.testing.assert_close(got.double(), want, rtol=2 * rounding, atol=3e-7)


@pytest.mark.parametrize("layout", ["unaligned", "columns", "transposed"])
def test_tokens_from_views(rng, layout):
    logits = gaussian(2, 9001).bfloat16()
    settings = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "generator": torch.arange(2)}
    exact = unmask_statistics(logits.double(), backend="reference", **settings)
    ours = unmask_statistics(placed(logits, layout), backend="triton", **settings)
    assert torch.equal(ours.token, exact.token)
    for got, want in zip(ours[1:], exact[1:], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["logistic", "hinge", "plackett_luce"])
@pytest.mark.parametrize("lengths", [[4100], [2] * 300], ids=["a long sequence", "many sequences"])
def test_long_and_many_sequences(rng, form, lengths):
    """From 4096 rows on several programs share a row; more than 256 sequences take a program several turns."""
    steps, cu_seqlens = draw_sequences(lengths, last_step=300)
    if len(lengths) == 1:
        steps = steps.masked_fill(torch.rand(len(steps)) < 0.95, -1)  # rows without a step cost nothing
    entropy = 5 * torch.rand(len(steps), dtype=torch.float64)
    outcomes = []
    for backend, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        leaf = entropy.to(dtype).requires_grad_()
        losses = trajectory_rank_loss(leaf, steps, cu_seqlens, form=form, margin=0.1, temperature=0.7, backend=backend)
        losses.sum().backward()
        outcomes.append((losses.detach().double(), leaf.grad.double()))
    for got, want in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
