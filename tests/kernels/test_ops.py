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
    one, weights = torch.ones(()), torch.rand(9) / 9
    ranked = [weights, torch.rand(2), steps, cu_seqlens, one]
    energy, temperature = torch.rand(9, requires_grad=True), torch.tensor(0.5, requires_grad=True)

    def of_logits(row_loss, tensors):
        leaf = logits.detach().clone().requires_grad_()
        return OPS.loss_of_logits, (leaf, temperature, labels, row_loss, tensors, False, backend)

    def of_head(head, row_loss, tensors, lengths, transform, max_chunk_rows):
        options = (lengths, transform, max_chunk_rows, False, [True] * 3, backend)
        return OPS.fused_linear_loss, (*head, temperature, labels, row_loss, tensors, *options)

    def of_policy(head, *terms):
        return of_head(head, "policy_hinge", [weights, torch.randn(9), torch.randn(9), one, one, *terms], None, [], 5)

    nothing = torch.empty(0)
    head = draw_head(bias=True)
    detached = [x.detach() for x in head]
    of_rows = OPS.head_statistics(*detached, labels, [0.5], 4, False, backend)[1:]
    calls = [
        of_policy(head, nothing, nothing, nothing),
        of_policy(head, torch.randn(9), weights, weights, *ranked[1:]),
        (OPS.head_statistics, (*head, labels, [0.5], 4, False, backend)),
        (
            OPS.head_gradients,
            (*detached, labels, *of_rows, torch.rand(9), torch.rand(9), [0.5], 4, False, [True, False, True], backend),
        ),
        (OPS.vocabulary_statistics, (logits.requires_grad_(), labels, -100, False, backend)),
        (OPS.vocabulary_statistics, (logits, None, 0, False, backend)),
        (OPS.vocabulary_gradient, (logits.detach(), labels, -100, *saved)),
        (OPS.vocabulary_gradient_, (logits.detach().clone(), labels, -100, *saved)),
        (OPS.count_ordered_pairs, (steps, cu_seqlens, backend)),
        (OPS.unmask_statistics, (logits.detach(), 0.8, 3, 0.9, keys, backend)),
        (OPS.unmask_statistics, (logits.detach(), 0.0, None, None, None, backend)),
        *(
            (OPS.trajectory_rank_loss, (energy, temperature, one, steps, cu_seqlens, form, backend))
            for form in ("logistic", "hinge", "plackett_luce")
        ),
        *(of_logits(f"tabom_{form}", ranked) for form in ("logistic", "plackett_luce")),
        of_logits("tabom_hinge", [weights]),
        of_head(draw_head(bias=True), "tabom_hinge", ranked, None, [], 5),
        of_head(draw_head(bias=False), "tabom_logistic", ranked, [5, 4], [0.5, 3.0], 9),
        of_head(draw_head(bias=True), "tabom_hinge", [weights], None, [2.0], 4),
        of_head(draw_head(bias=True, dtype=torch.bfloat16), "tabom_hinge", ranked, None, [], 9),
        of_head(draw_head(bias=True, dtype=torch.bfloat16), "tabom_hinge", ranked, None, [], 5),
    ]
    assert {op._qualified_op_name.split("::")[1] for op, _ in calls} == {
        name for name in dir(OPS) if not name.startswith("_") and name != "name"
    }
    for op, arguments in calls:
        torch.library.opcheck(op, arguments)
    # In fp16 the sums are in fp32, which the other checks would compare with a gradient in fp16.
    half = (*draw_head(bias=True, dtype=torch.float16), *calls[-1][1][3:])
    torch.library.opcheck(OPS.fused_linear_loss, half, test_utils=("test_schema", "test_faketensor"))


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
