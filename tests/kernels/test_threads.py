"""Chunks of rows on threads of their own: the same numbers, errors that show, forks that work."""

import multiprocessing
import threading

import pytest
import torch

from tabom_kernels import cross_entropy_with_entropy, fused_linear_tabom_loss, unmask_statistics
from tabom_kernels.backends import torch as torch_backend
from tabom_kernels.backends.torch import chunks, threads
from tests.kernels.inputs import draw_labels, draw_sequences, gaussian, with_minus_infinity

ROWS, COLUMNS = 29, 50


@pytest.fixture(autouse=True)
def on_a_cpu_in_small_chunks(monkeypatch):
    torch.set_default_device("cpu")
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 2 * COLUMNS)
    yield
    torch.set_num_threads(1)


def with_threads(count, call):
    torch.set_num_threads(count)
    return call()


def losses_and_gradient(logits, labels, inplace_backward):
    leaf = logits.clone().requires_grad_()
    ce, entropy = cross_entropy_with_entropy(leaf * 1, labels, inplace_backward=inplace_backward)
    (ce @ torch.linspace(-1, 1, ROWS) + entropy @ torch.linspace(0, 2, ROWS)).backward()
    return ce.detach(), entropy.detach(), leaf.grad


@pytest.mark.parametrize("count", [2, 3, 20])
@pytest.mark.parametrize("values", [gaussian, with_minus_infinity])
def test_rows_do_not_depend_on_the_number_of_threads(rng, monkeypatch, count, values):
    """With 20 of them the threads of Python are fewer, and have several for their ops."""
    logits = values(ROWS, COLUMNS).bfloat16()
    labels = draw_labels(logits)
    seen = set()
    in_threads = chunks.in_threads

    def note(work, shares):
        seen.add(len(shares))
        return in_threads(work, shares)

    monkeypatch.setattr(chunks, "in_threads", note)
    for call in (
        lambda: losses_and_gradient(logits, labels, inplace_backward=False),
        lambda: losses_and_gradient(logits.float(), labels, inplace_backward=True),
        lambda: unmask_statistics(logits, temperature=0.8, top_k=20, generator=torch.Generator().manual_seed(1)),
    ):
        alone, together = with_threads(1, call), with_threads(count, call)
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a, b)
    assert seen == {1, min(count, threads.MAX_THREADS)}


@pytest.mark.parametrize("form", ["logistic", "hinge", "plackett_luce"])
def test_ranking_and_fused_loss_on_threads(rng, form):
    steps, cu_seqlens = draw_sequences([ROWS - 9, 9], last_step=10**6)
    hidden, weight = torch.randn(ROWS, 4, dtype=torch.float64), torch.randn(COLUMNS, 4, dtype=torch.float64)
    labels = draw_labels(hidden @ weight.T)

    def gradients(backend):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = fused_linear_tabom_loss(*leaves, labels, steps, cu_seqlens, form=form, margin=0.1, backend=backend).loss
        return [loss, *torch.autograd.grad(loss, leaves)]

    expected = gradients("reference")
    for x, y in zip(with_threads(3, lambda: gradients("torch")), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


def test_inference_mode_reaches_the_threads(rng):
    logits = gaussian(ROWS, COLUMNS)
    expected = unmask_statistics(logits)
    with torch.inference_mode():
        for a, b in zip(with_threads(2, lambda: unmask_statistics(logits * 1)), expected, strict=True):
            assert torch.equal(a, b)


def test_an_error_shows_when_all_have_ended():
    torch.set_num_threads(2)
    ended = threading.Event()

    def work(share):
        if share == 0:
            raise FloatingPointError("share 0")
        assert not ended.wait(0.2)
        ended.set()

    with pytest.raises(FloatingPointError, match="share 0"):
        threads.in_threads(work, [0, 1])
    assert ended.is_set()
    assert threads.in_threads(str, [0, 1]) == ["0", "1"]


def test_the_callers_threads_stay_and_a_worker_has_its_part():
    def counts(cores):
        torch.set_num_threads(cores)
        shares = range(threads.thread_count())
        return set(threads.in_threads(lambda _: torch.get_num_threads(), shares)), torch.get_num_threads()

    assert counts(2) == ({1}, 2)
    assert counts(16) == ({2}, 16)
    started_later = []
    thread = threading.Thread(target=lambda: started_later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert started_later == [16]


def test_a_fork_has_threads_of_its_own(rng):
    logits = gaussian(ROWS, COLUMNS)
    expected = with_threads(2, lambda: torch_backend.vocabulary_statistics(logits, None, -100))

    def check():
        found = torch_backend.vocabulary_statistics(logits, None, -100)
        assert torch.equal(found.entropy, expected.entropy)

    child = multiprocessing.get_context("fork").Process(target=check)
    child.start()
    child.join(20)
    child.kill()  # or it would keep the tests from ending
    assert child.exitcode == 0, "None: it waits for threads that are not there"
