"""The ops as torch.library sees them: schemas, fake implementations, autograd, torch.compile."""

import pytest
import torch

import tabom_kernels  # noqa: F401  registers the ops
from tabom_kernels import tabom_loss, unmask_statistics
from tests.kernels.inputs import draw_labels, draw_sequences, gaussian

BACKENDS = ["torch", "triton"]
OPS = torch.ops.tabom_kernels


def draw_batch(rows=9, columns=20):
    logits = gaussian(rows, columns).float()
    return logits, draw_labels(logits), *draw_sequences([rows - 4, 4])


def draw_head(bias, rows=9, columns=20, width=6, dtype=torch.float32):
    shapes = ((rows, width), (columns, width), (columns,))
    hidden, weight, by_column = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    return hidden, weight, by_column if bias else None


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_op_passes_opcheck(rng, backend):
    logits, labels, steps, cu_seqlens = draw_batch()
    _, entropy, maximum, log_sum = OPS.vocabulary_statistics(logits, labels, -100, False, backend)
    saved = (entropy, maximum, log_sum, torch.rand(9), torch.rand(9), torch.tensor(2.0), backend)
    keys = torch.arange(9)
    one = torch.ones(())
    batch = (one, one, one, labels, steps, cu_seqlens, torch.rand(9), one, one)
    cross_entropy = (labels, None, None, None, one, one, None, "hinge", -100, 1.0, 3.0, None, 0)
    energy, temperature = torch.rand(9, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    calls = [
        (OPS.vocabulary_statistics, (logits.requires_grad_(), labels, -100, False, backend)),
        (OPS.vocabulary_statistics, (logits, None, 0, False, backend)),
        (OPS.vocabulary_gradient, (logits.detach(), labels, -100, *saved)),
        (OPS.vocabulary_gradient_, (logits.detach().clone(), labels, -100, *saved)),
        (OPS.count_ordered_pairs, (steps, cu_seqlens, backend)),
        (OPS.unmask_statistics, (logits.detach(), 0.8, 3, 0.9, keys, backend)),
        (OPS.unmask_statistics, (logits.detach(), 0.0, None, None, None, backend)),
        *(
            (
                OPS.trajectory_rank_loss,
                (energy, temperature, one, steps, cu_seqlens, form, backend),
            )
            for form in ("logistic", "hinge", "plackett_luce")
        ),
        *(
            (OPS.tabom_loss, (logits.detach().clone().requires_grad_(), temperature, *batch, -100, False, backend))
            for batch in (
                (labels, steps, cu_seqlens, one, "logistic", one, torch.rand(9), None, one),
                (labels, steps, cu_seqlens, None, "hinge", one, None, one, None),
            )
        ),
        *(
            (
                OPS.fused_linear_tabom_loss,
                (*head, *batch, lengths, "hinge", -100, *rest[:2], None, 0, rest[2], False, [True] * 3, backend),
            )
            for head, lengths, rest in (
                (draw_head(bias=True), None, (1.0, None, 5)),
                (draw_head(bias=False), [5, 4], (0.5, 3.0, 9)),
                (draw_head(bias=True, dtype=torch.bfloat16), None, (1.0, None, 9)),
                (draw_head(bias=True, dtype=torch.bfloat16), None, (1.0, None, 4)),
            )
        ),
        (
            OPS.fused_linear_tabom_loss,
            (*draw_head(bias=True), one, one, None, *cross_entropy, 4, False, [True] * 3, backend),
        ),
    ]
    assert {op._qualified_op_name.split("::")[1] for op, _ in calls} == {
        name for name in dir(OPS) if not name.startswith("_") and name != "name"
    }
    for op, arguments in calls:
        torch.library.opcheck(op, arguments)
    # In fp16 backward scales what the other checks then compare.
    half = (*draw_head(bias=True, dtype=torch.float16), *calls[-2][1][3:])
    torch.library.opcheck(OPS.fused_linear_tabom_loss, half, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["logistic", "hinge", "plackett_luce"])
def test_the_whole_loss_compiles_to_one_graph(rng, backend, form):
    logits, *batch = draw_batch()

    def loss_and_gradients(function):
        leaf, tau = logits.clone().requires_grad_(), torch.tensor(0.7, requires_grad=True)
        result = function(leaf * 2, *batch, form=form, margin=0.1, temperature=tau, backend=backend)
        result.loss.backward()
        return *result, leaf.grad, tau.grad

    compiled = torch.compile(tabom_loss, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(loss_and_gradients(compiled), loss_and_gradients(tabom_loss), strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_backward_and_a_fixed_temperature_compile(rng, backend):
    logits, *batch = draw_batch()

    def gradient(function):
        leaf = logits.clone().requires_grad_()
        function(leaf * 2, *batch, temperature=0.7, inplace_backward=True, backend=backend).loss.backward()
        return leaf.grad

    compiled = torch.compile(tabom_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradient(compiled), gradient(tabom_loss))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_greedy_sampler_step_compiles(rng, backend):
    logits = gaussian(4, 30).float()
    compiled = torch.compile(unmask_statistics, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(compiled(logits, backend=backend), unmask_statistics(logits, backend=backend), strict=True):
        assert torch.equal(ours, eager)
