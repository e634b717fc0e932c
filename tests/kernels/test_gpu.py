"""What only a GPU can show; everything else in this folder runs there too, at the same shapes and more."""

import pytest
import torch

from tabom_kernels import (
    backend_for,
    cross_entropy_with_entropy,
    fused_linear_tabom_loss,
    reference,
    tabom_loss,
    unmask_statistics,
)
from tests.kernels.inputs import draw_labels, draw_sequences, gaussian
from tests.kernels.tolerance import fp32_rounding

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def draw_batch(rows, columns, dtype=torch.bfloat16):
    logits = (3 * torch.randn(rows, columns)).to(dtype)
    labels = torch.randint(columns, (rows,)).masked_fill(torch.rand(rows) < 0.3, -100)
    return logits, labels, *draw_sequences([rows - rows // 2, rows // 2])


def test_the_default_backend():
    assert backend_for(torch.zeros(1)) == "triton" and backend_for(torch.zeros(1, dtype=torch.float64)) == "torch"


def test_more_than_two_to_the_31_elements(rng):
    rows, columns = 17_100, 126_464
    assert rows * columns > 2**31
    logits = torch.empty(rows, columns, dtype=torch.bfloat16).normal_(std=3)
    last = logits[-3:].double()
    labels = torch.randint(columns, (rows,))
    outputs = cross_entropy_with_entropy(logits.requires_grad_(), labels, inplace_backward=True)
    exact = reference.cross_entropy_with_entropy(last.requires_grad_(), labels[-3:], -100)
    for ours, theirs in zip(outputs, exact, strict=True):
        torch.testing.assert_close(ours[-3:].double(), theirs, rtol=1e-5, atol=1e-5)
    [grad] = torch.autograd.grad(outputs, logits, [torch.ones(rows), torch.ones(rows)])
    [exact_grad] = torch.autograd.grad(exact, last, [torch.ones(3, dtype=torch.float64)] * 2)
    assert grad.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(grad[-3:].double(), exact_grad, rtol=2**-8, atol=1e-7)


def test_sequences_of_8192_rows(rng):
    steps, cu_seqlens = draw_sequences([8192, 2, 8192], last_step=500)
    entropy = torch.rand(len(steps), dtype=torch.float64)
    for form in ("logistic", "hinge", "plackett_luce"):
        results = []
        for backend, dtype in (("triton", torch.float32), ("torch", torch.float64)):
            e = entropy.to(dtype, copy=True).requires_grad_()
            losses = torch.ops.tabom_kernels.trajectory_rank_loss(
                e, *(torch.tensor(x, dtype=dtype) for x in (0.7, 0.1)), steps, cu_seqlens, form, backend
            )[0]
            losses.sum().backward()
            results.append((losses.detach().double(), e.grad.double()))
        for ours, exact in zip(*results, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-7)


def test_results_are_bitwise_reproducible(rng):
    logits, *batch = draw_batch(300, 20_000)

    def gradient():
        leaf = logits.clone().requires_grad_()
        tabom_loss(leaf, *batch).loss.backward()
        return leaf.grad

    first = gradient()
    assert all(torch.equal(gradient(), first) for _ in range(5))


@pytest.mark.parametrize("form", ["logistic", "hinge", "plackett_luce"])
def test_nothing_waits_for_the_host(rng, form):
    logits, *batch = draw_batch(64, 5000)
    keys = torch.arange(64)
    temperature = torch.tensor(0.7, requires_grad=True)

    def step():
        leaf = logits.clone().requires_grad_()
        tabom_loss(leaf, *batch, form=form, temperature=temperature, inplace_backward=True).loss.backward()
        unmask_statistics(logits, temperature=0.8, top_k=50, top_p=0.9, generator=keys)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:  # else every later test of the process fails too
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_chunks_do_not_wait_for_the_host_that_knows_their_lengths(rng, dtype, is_trained):
    _, *batch = draw_batch(64, 5000)
    hidden = torch.randn(64, 32, dtype=dtype, requires_grad=True)
    weight = torch.randn(5000, 32, dtype=dtype, requires_grad=is_trained)

    def step():
        loss = fused_linear_tabom_loss(hidden, weight, *batch, lengths=[32, 32], max_chunk_rows=20)
        torch.autograd.grad(loss.loss, (hidden, weight) if is_trained else hidden)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_training_step_is_captured_in_a_cuda_graph(rng):
    logits, *batch = draw_batch(64, 5000)
    leaf = logits.clone().requires_grad_()

    def step():
        leaf.grad = None
        result = tabom_loss(leaf, *batch)
        result.loss.backward()
        return result.loss, leaf.grad

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grad = step()
    with torch.no_grad():
        leaf.copy_(gaussian(64, 5000))
    graph.replay()
    captured = loss.clone(), grad.clone()
    for ours, eager in zip(captured, step(), strict=True):
        assert torch.equal(ours, eager)


def test_inductor_compiles_the_whole_loss(rng):
    logits, *batch = draw_batch(64, 5000, torch.float32)
    results = []
    for function in (tabom_loss, torch.compile(tabom_loss, fullgraph=True)):
        leaf = logits.clone().requires_grad_()
        result = function(leaf * 2, *batch, inplace_backward=True)
        result.loss.backward()
        results.append((*result, leaf.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_batches_keep_the_error_of_the_naive_loss(rng, dtype):
    rows, columns = 512, 152_064
    logits = gaussian(rows, columns).to(dtype)
    labels = draw_labels(logits[:, :1000])
    upstream = torch.rand(2, rows)
    results = []
    for z, backend in ((logits.double(), "reference"), (logits, "reference"), (logits, "triton")):
        leaf = z.detach().clone().requires_grad_()
        outputs = cross_entropy_with_entropy(leaf, labels, backend=backend)
        grads = torch.autograd.grad(outputs, leaf, [u.to(outputs[0].dtype) for u in upstream])
        results.append([x.detach() for x in (*outputs, *grads)])
    for exact, naive, ours in zip(*results, strict=True):
        assert (ours - exact).abs().max() <= 2 * (naive - exact).abs().max() + fp32_rounding(exact)
