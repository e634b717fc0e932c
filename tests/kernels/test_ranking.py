import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tabom_kernels import count_ordered_pairs, trajectory_rank_loss
from tabom_kernels.backends.selection import load
from tabom_kernels.backends.torch import chunks as torch_chunks
from tabom_kernels.backends.torch import ranking as torch_ranking
from tabom_kernels.backends.triton import launch, ranking
from tests.kernels.inputs import draw_sequences
from tests.kernels.tolerance import fp32_rounding

FORMS = ["logistic", "hinge", "plackett_luce"]
BACKENDS = ["torch", "reference", "triton"]
LENGTHS = {
    "none": [],
    "empty": [0, 0],
    "one row": [1],
    "one pair": [2],
    "uneven": [7, 0, 1, 12, 2],
    "long": [70],
}


def run(entropy, steps, cu_seqlens, upstream, temperature=0.7, **options):
    """Losses, dE and dtau for given upstream gradients."""
    entropy = entropy.clone().requires_grad_()
    temperature = torch.tensor(temperature, dtype=entropy.dtype, requires_grad=True)
    losses = trajectory_rank_loss(entropy, steps, cu_seqlens, temperature=temperature, **options)
    losses.backward(upstream)
    by_temperature = torch.zeros_like(temperature) if temperature.grad is None else temperature.grad
    by_entropy = torch.zeros_like(entropy) if entropy.grad is None else entropy.grad
    return losses.detach(), by_entropy, by_temperature


def softplus(x):
    return math.log1p(math.exp(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "entropy, steps, form, expected",
    [
        # E_i - E_j of the only pair is -0.5
        ([0.5, 1.0], [0, 1], "hinge", 0.1),
        ([0.5, 1.0], [0, 1], "logistic", softplus((-0.5 + 0.6) / 2)),
        ([0.5, 1.0], [1, 0], "hinge", 1.1),
        ([0.5, 1.0], [1, 1], "hinge", 0.0),
        ([0.5, 1.0], [-1, 1], "logistic", 0.0),
        # pairs (0, 1), (0, 2); rows 1 and 2 tie
        ([2.0, 1.0, 1.5], [0, 3, 3], "hinge", ((2 - 1 + 0.6) + (2 - 1.5 + 0.6)) / 2),
        # turn of row 1 among both, then row 0 alone
        ([1.0, 3.0], [5, 2], "plackett_luce", (3 / 2 + math.log(math.exp(-0.5) + math.exp(-1.5))) / 2),
        # Breslow: rows 0 and 1 tie, each has its turn among all three
        (
            [0.0, 0.0, 2.0],
            [0, 0, 1],
            "plackett_luce",
            (2 * math.log(2 + math.exp(-1)) + 0) / 3,
        ),
    ],
)
def test_losses_worked_out_by_hand(backend, entropy, steps, form, expected):
    losses = trajectory_rank_loss(
        torch.tensor(entropy),
        torch.tensor(steps),
        torch.tensor([0, len(steps)], dtype=torch.int32),
        form=form,
        margin=0.6,
        temperature=2.0,
        backend=backend,
    )
    assert losses.tolist() == pytest.approx([expected], abs=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("last_step", [0, 1, 5, 10**6])
@pytest.mark.parametrize("steps_dtype", [torch.int32, torch.int64])
def test_values_and_gradients_in_fp64(rng, monkeypatch, form, lengths, last_step, steps_dtype):
    monkeypatch.setattr(torch_chunks, "CHUNK_ELEMENTS", 40)  # many chunks, the last one partial
    steps, cu_seqlens = draw_sequences(lengths, last_step)
    entropy = torch.rand(len(steps), dtype=torch.float64) * 12
    upstream = torch.randn(len(lengths), dtype=torch.float64)
    results = [
        run(entropy, steps.to(steps_dtype), cu_seqlens, upstream, form=form, margin=0.3, backend=backend)
        for backend in ("torch", "reference")
    ]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lengths", [*LENGTHS.values(), [12, 3, 60]], ids=[*LENGTHS.keys(), "two blocks"])
@pytest.mark.parametrize("last_step, steps_dtype", [(0, torch.int32), (5, torch.int64)])
def test_error_in_fp32_is_at_most_twice_that_of_the_naive_loss(
    rng, monkeypatch, backend, form, lengths, last_step, steps_dtype
):
    monkeypatch.setattr(ranking, "PAIR_BLOCK", 32)
    steps, cu_seqlens = draw_sequences(lengths, last_step)
    steps = steps.to(steps_dtype)
    entropy = torch.rand(len(steps), dtype=torch.float64) * 12
    upstream = torch.randn(len(lengths), dtype=torch.float64)
    exact = run(entropy, steps, cu_seqlens, upstream, 0.1, form=form, backend="reference")
    single = (entropy.float(), steps, cu_seqlens, upstream.float(), 0.1)
    naive, ours = (run(*single, form=form, backend=name) for name in ("reference", backend))
    # dtau is a sum of hundreds with the signs of `upstream`, where one ulp is 3e-5: count without the cancellation.
    uncancelled = run(entropy, steps, cu_seqlens, upstream.abs(), 0.1, form=form, backend="reference")
    for e, n, o, u in zip(exact, naive, ours, uncancelled, strict=True):
        if e.numel() == 0:
            continue
        assert (o - e).abs().max() <= 2 * (n - e).abs().max() + fp32_rounding(u)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradcheck(rng, form, backend):
    steps, cu_seqlens = draw_sequences([6, 5, 1])
    entropy = torch.randn(12, dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor(0.8, dtype=torch.float64, requires_grad=form != "hinge")

    def losses(entropy, temperature):
        return trajectory_rank_loss(
            entropy, steps, cu_seqlens, form=form, margin=0.137, temperature=temperature, backend=backend
        )

    assert torch.autograd.gradcheck(losses, (entropy, temperature))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_unranked_rows_never_matter(rng, form, backend, value):
    steps, cu_seqlens = draw_sequences([9, 9], unranked=0.4)
    entropy = torch.rand(18)
    upstream = torch.ones(2)
    clean = run(entropy.masked_fill(steps < 0, 0.0), steps, cu_seqlens, upstream, form=form, backend=backend)
    dirty = run(entropy.masked_fill(steps < 0, value), steps, cu_seqlens, upstream, form=form, backend=backend)
    for a, b in zip(clean, dirty, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_no_pair_do_not_matter_even_if_their_difference_overflows(backend):
    """The rows are a pair in one order only, in which (E_i - E_j) / tau is -inf in fp32; in the other it is inf."""
    entropy = torch.tensor([0.0, 12.0], requires_grad=True)
    steps, cu_seqlens = torch.tensor([0, 1]), torch.tensor([0, 2])
    loss = trajectory_rank_loss(entropy, steps, cu_seqlens, temperature=2e-38, backend=backend)
    loss.sum().backward()
    assert loss.tolist() == [0] and entropy.grad.tolist() == [0, 0]


@pytest.mark.parametrize("difference", [10.5, 20.5, 30.5, 40.5])
def test_the_logistic_loss_of_a_large_difference_keeps_the_digits_of_fp64(difference):
    """PyTorch's softplus is x from 20 on, where log(1 + exp(-x)) is still 2e-9."""
    entropy = torch.tensor([difference, 0.0], dtype=torch.float64)
    [loss] = trajectory_rank_loss(entropy, torch.tensor([0, 1]), torch.tensor([0, 2]), backend="torch").tolist()
    assert loss == pytest.approx(difference + math.log1p(math.exp(-difference)), rel=5e-16, abs=0)


@pytest.mark.parametrize("form", ["logistic", "hinge"])
def test_far_apart_entropies_keep_their_relative_accuracy(form):
    """softplus(-20) is 2e-9, which log(1 + exp(-20)) in fp32 rounds to 0."""
    entropy, steps = torch.tensor([0.0, 20.0]), torch.tensor([0, 1])
    offsets, upstream = torch.tensor([0, 2], dtype=torch.int32), torch.ones(1)
    exact = run(entropy.double(), steps, offsets, upstream.double(), 1.0, form=form, backend="reference")
    ours = run(entropy, steps, offsets, upstream, 1.0, form=form, backend="triton")
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("temperature", [1e-4, 1e-2])
def test_plackett_luce_keeps_fp32_at_small_temperatures(rng, backend, temperature):
    """E / tau is 1e5 there: only differences of entropies may be divided by tau."""
    steps, cu_seqlens = draw_sequences([40, 30])
    upstream = torch.ones(2)
    equal = run(
        torch.full((70,), 11.9), steps, cu_seqlens, upstream, temperature, form="plackett_luce", backend=backend
    )
    assert equal[2] == 0
    entropy = 11 + torch.rand(70)
    ours = run(entropy, steps, cu_seqlens, upstream, temperature, form="plackett_luce", backend=backend)
    exact = run(
        entropy.double(), steps, cu_seqlens, upstream.double(), temperature, form="plackett_luce", backend="reference"
    )
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_ranked_rows_without_a_pair_give_0_even_if_their_entropy_is_nan(backend, form):
    """Alone in its sequence, or all of one step."""
    steps, cu_seqlens = torch.tensor([3, -1, 2, 2, 0, 1]), torch.tensor([0, 2, 4, 6])
    entropy = torch.tensor([math.nan, 1.0, math.nan, 1.0, 2.0, 1.0])
    losses, by_entropy, by_temperature = run(entropy, steps, cu_seqlens, torch.ones(3), form=form, backend=backend)
    assert losses[:2].tolist() == [0, 0] and losses[2] > 0
    assert (by_entropy[:4] == 0).all() and (by_entropy[4:] != 0).all() and by_temperature.isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_at_equality_the_hinge_has_no_slope(backend):
    """As relu: E_i - E_j + margin is 0 for the first pair, above it for the second."""
    entropy, steps = torch.tensor([1.0, 1.5, 1.0, 1.25]), torch.tensor([0, 1, 0, 1])
    options = {"form": "hinge", "margin": 0.5, "backend": backend}
    losses, by_entropy, _ = run(entropy, steps, torch.tensor([0, 2, 4]), torch.ones(2), **options)
    assert losses.tolist() == pytest.approx([0, 0.25]) and by_entropy.tolist() == pytest.approx([0, 0, 1, -1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lengths", [[0] * 20 + [5, 1, 4] + [0] * 9 + [3], [3, 41]], ids=["sequences", "partners"])
def test_more_sequences_and_partners_than_a_block(rng, monkeypatch, form, lengths):
    """The search for a row's sequence takes several blocks, or the sum over its partners several of several tiles."""
    monkeypatch.setattr(ranking, "PAIR_BLOCK", 8)
    if len(lengths) == 2:
        monkeypatch.setattr(launch, "LONG_BATCH", 1)
    steps, cu_seqlens = draw_sequences(lengths)
    entropy, upstream = torch.rand(len(steps)) * 3, torch.rand(len(lengths))
    ours, exact = (
        run(entropy.to(dtype), steps, cu_seqlens, upstream.to(dtype), form=form, backend=backend)
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64))
    )
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)
    counts = (count_ordered_pairs(steps, cu_seqlens, backend=b) for b in ("triton", "reference"))
    assert torch.equal(*counts)


@pytest.mark.parametrize("form", FORMS)
def test_one_long_sequence_among_short_ones_makes_no_padding(rng, monkeypatch, form):
    """The pairs looked at are at most four times those that exist, twice that for the order of each."""
    lengths = [300] + [7] * 200
    steps, cu_seqlens = draw_sequences(lengths, last_step=10**6, unranked=0)
    seen = []
    chunks = torch_ranking.pair_chunks
    monkeypatch.setattr(torch_ranking, "pair_chunks", lambda e: seen.append(e.numel() * e.shape[1]) or chunks(e))
    count_ordered_pairs(steps, cu_seqlens, backend="torch")
    assert not seen
    trajectory_rank_loss(torch.rand(len(steps)), steps, cu_seqlens, form=form, backend="torch")
    assert sum(seen) <= 4 * sum(n * n for n in lengths)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("margin, temperature", [(-0.3, 0.5), (0.0, 1.0), (0.3, 2.0)])
def test_numbers_and_tensors_are_the_same_settings(rng, backend, form, margin, temperature):
    """The gradient by the temperature included, which is computed of a number as well."""
    steps, cu_seqlens = draw_sequences([6, 5, 1])
    entropy, function = torch.rand(12), load(backend).trajectory_rank_loss
    by_number = function(entropy, steps, cu_seqlens, form, margin, temperature)
    by_tensor = function(entropy, steps, cu_seqlens, form, torch.tensor(margin), torch.tensor(temperature))
    for a, b in zip(by_number, by_tensor, strict=True):
        torch.testing.assert_close(a, b)
    assert by_number.grad_temperature.any() == (form != "hinge")
    exact = trajectory_rank_loss(
        entropy, steps, cu_seqlens, form=form, margin=margin, temperature=temperature, backend="reference"
    )
    torch.testing.assert_close(by_number.loss, exact)


@given(st.sampled_from(FORMS), st.integers(0, 2**31), st.permutations(range(8)))
def test_permuting_the_rows_of_a_sequence_permutes_the_gradient(form, seed, order):
    torch.manual_seed(seed)
    steps, cu_seqlens = draw_sequences([8])
    entropy, upstream = torch.rand(8, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    loss, grad, _ = run(entropy, steps, cu_seqlens, upstream, form=form)
    permuted_loss, permuted_grad, _ = run(entropy[order], steps[order], cu_seqlens, upstream, form=form)
    torch.testing.assert_close(permuted_loss, loss)
    torch.testing.assert_close(permuted_grad, grad[order])


@given(st.sampled_from(FORMS), st.integers(0, 2**31), st.floats(-5, 5))
def test_only_differences_of_entropies_matter(form, seed, shift):
    torch.manual_seed(seed)
    steps, cu_seqlens = draw_sequences([5, 4])
    entropy, upstream = torch.rand(9, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    for a, b in zip(
        run(entropy, steps, cu_seqlens, upstream, form=form),
        run(entropy + shift, steps, cu_seqlens, upstream, form=form),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "entropy, error, message",
    [
        ([0.5], TypeError, "entropy: expected a floating-point tensor, got list"),
        (torch.tensor([1]), TypeError, "entropy: expected a floating-point tensor, got torch.int64"),
        (torch.zeros(1, 1), ValueError, r"entropy: expected shape \(N,\), got \(1, 1\)"),
    ],
)
def test_errors_name_the_entropy(entropy, error, message):
    with pytest.raises(error, match=message):
        trajectory_rank_loss(entropy, torch.tensor([0]), torch.tensor([0, 1]))


def test_errors_name_the_steps():
    steps, cu_seqlens = torch.tensor([0]).to("meta"), torch.tensor([0, 1]).to("meta")
    with pytest.raises(ValueError, match=r"steps: expected device (cpu|cuda:0), got meta"):
        trajectory_rank_loss(torch.zeros(1), steps, cu_seqlens)
    with pytest.raises(TypeError, match="steps: expected a tensor of int32 or int64, got list"):
        count_ordered_pairs([0], torch.tensor([0, 1]))


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(-1, 4), max_size=9), max_size=5))
def test_count_ordered_pairs_by_brute_force(sequences):
    steps = torch.tensor([s for sequence in sequences for s in sequence], dtype=torch.int32)
    cu_seqlens = torch.tensor([0, *map(len, sequences)]).cumsum(0).int()
    expected = [sum(0 <= a < b for a in sequence for b in sequence) for sequence in sequences]
    for backend in BACKENDS:
        assert count_ordered_pairs(steps, cu_seqlens, backend=backend).tolist() == expected
