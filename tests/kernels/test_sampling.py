import math

import mpmath
import pytest
import torch

from tabom_kernels import mix_keys, unmask_statistics
from tabom_kernels.backends.torch import sampling as torch_sampling
from tabom_kernels.noise import GOLDEN_GAMMA, MIX_1, MIX_2, SEGMENT, exponential_noise, split_mix
from tabom_kernels.ops.sampling import filter_logits
from tests.kernels.inputs import VALUES, cases, gaussian
from tests.kernels.tolerance import fp32_rounding


@pytest.mark.parametrize("values, rows, columns", cases())
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8}, {"temperature": 1.5, "top_k": 3, "top_p": 0.8}])
def test_against_the_reference_in_fp64(rng, values, rows, columns, settings):
    logits, keys = values(rows, columns), torch.randint(-(2**62), 2**62, (rows,))
    ours, theirs = (
        unmask_statistics(logits, generator=keys, backend=backend, **settings) for backend in ("torch", "reference")
    )
    assert torch.equal(ours.token, theirs.token)
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("values, rows, columns", cases([(7, 1), (7, 2), (7, 31), (7, 1000)]))
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_triton_reads_the_same_from_low_precision(rng, dtype, values, rows, columns, temperature):
    logits, keys = values(rows, columns).to(dtype), torch.randint(-(2**62), 2**62, (rows,))
    exact, naive, ours = (
        unmask_statistics(z, temperature=temperature, generator=keys, backend=backend)
        for z, backend in ((logits.double(), "reference"), (logits, "reference"), (logits, "triton"))
    )
    assert torch.equal(ours.token, naive.token)
    for e, n, o in zip(exact[1:], naive[1:], ours[1:], strict=True):
        assert (o - e).abs().max() <= 2 * (n - e).abs().max() + fp32_rounding(e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("top_k, top_p", [(40, 0.8), (10**6, 1.0)])
def test_triton_filters_without_a_sort_keep_the_same_tokens(rng, dtype, values, top_k, top_p):
    logits, keys = values(3, 5000).to(dtype), torch.randint(-(2**62), 2**62, (3,))
    settings = {"temperature": 1.5, "top_k": top_k, "top_p": top_p, "generator": keys}
    ours, theirs = (unmask_statistics(logits, backend=backend, **settings).token for backend in ("triton", "reference"))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_the_best_two_are_found_wherever_they_are(rng, backend):
    """In one run of eight columns, in two runs of one block, in two blocks, first and last."""
    columns = 2 * 8192 + 5
    places = [(0, 1), (7, 8), (8191, 8192), (columns - 1, 0), (columns - 2, columns - 1), (3, columns - 1)]
    logits = torch.randn(len(places), columns)
    best, second = torch.tensor(places).T
    rows = torch.arange(len(places))
    logits[rows, second] = 11.0
    logits[rows, best] = 12.0
    statistics = unmask_statistics(logits, backend=backend)
    p = logits.double().softmax(1)
    assert torch.equal(statistics.token, best)
    torch.testing.assert_close(statistics.margin.double(), p[rows, best] - p[rows, second], rtol=1e-5, atol=1e-7)
    tied = logits.clone()
    tied[rows, second] = 12.0
    statistics = unmask_statistics(tied, backend=backend)
    assert torch.equal(statistics.token, torch.minimum(best, second)) and statistics.margin.abs().max() == 0


def test_a_row_of_nan_gets_a_valid_token():
    statistics = unmask_statistics(torch.full((1, 9000), torch.nan), backend="triton")
    assert 0 <= statistics.token.item() < 9000 and statistics.entropy.isnan().all()


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_greedy_takes_the_first_of_the_best(backend):
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [-torch.inf, -torch.inf, 2.0, -torch.inf]])
    statistics = unmask_statistics(logits, backend=backend)
    assert statistics.token.tolist() == [1, 2]
    assert statistics.margin.tolist() == pytest.approx([0.0, 1.0], abs=1e-6)
    assert statistics.probability[1] == 1 and statistics.entropy[1] == 0


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_one_column_is_certain(backend):
    token, probability, margin, entropy = unmask_statistics(torch.tensor([[3.0]]), backend=backend)
    assert (token.item(), probability.item(), margin.item(), entropy.item()) == (0, 1.0, 1.0, 0.0)


def test_tokens_are_drawn_with_the_softmax_probabilities(rng):
    logits, draws, temperature = torch.randn(1, 6) * 2, 40_000, 1.3
    p = (logits[0] / temperature).softmax(-1)
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    token = unmask_statistics(logits.expand(draws, 6), temperature=temperature, generator=generator).token
    counts = token.bincount(minlength=6)
    chi_square = ((counts - draws * p) ** 2 / (draws * p)).sum()
    assert chi_square < 27.9  # 5 degrees of freedom, one in 26,000


def test_top_k_and_top_p_leave_exactly_their_sets(rng):
    logits = torch.randn(1, 12)
    order = logits[0].argsort(descending=True).tolist()
    p = (logits[0] / 2).softmax(-1)
    mass, nucleus = 0.0, set()
    for token in order:
        if mass >= 0.7:
            break
        nucleus.add(token)
        mass += p[token].item()
    many = logits.expand(20_000, 12)
    seen = {
        name: set(unmask_statistics(many, temperature=2.0, **settings).token.tolist())
        for name, settings in {"k": {"top_k": 4}, "p": {"top_p": 0.7}, "tiny": {"top_p": 1e-9}}.items()
    }
    assert seen == {"k": set(order[:4]), "p": nucleus, "tiny": {order[0]}}


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_key_decides_its_row_whatever_the_batch(rng, backend):
    logits, keys = gaussian(9, 50).float(), torch.randint(-(2**62), 2**62, (9,))

    def draw(logits, keys):
        return unmask_statistics(logits, temperature=1.0, top_p=0.99, generator=keys, backend=backend).token

    together = draw(logits, keys)
    order = torch.randperm(9)
    assert torch.equal(draw(logits[order], keys[order]), together[order])
    for row in range(9):
        [alone] = draw(logits[row : row + 1], keys[row : row + 1])
        assert alone == together[row]


def test_generators_are_reproducible_and_differ_between_rows():
    logits = torch.zeros(200, 1000)
    draw = lambda seed: unmask_statistics(logits, temperature=1.0, generator=torch.Generator().manual_seed(seed)).token  # noqa: E731
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert len(draw(1).unique()) > 150


def test_split_mix_gives_the_published_stream():
    """The first outputs of SplitMix64 for seed 1234567, as its author's C code prints them."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    counters = torch.arange(4) * GOLDEN_GAMMA
    stream = split_mix(torch.tensor(1234567) + counters)
    assert [x % 2**64 for x in stream.tolist()] == published


def test_noise_is_exponential():
    drawn = exponential_noise(torch.arange(300), torch.arange(1000)).double()
    assert abs(drawn.mean() - 1) < 0.01 and abs(drawn.var() - 1) < 0.03


def key_of(bits, counter):
    """The key whose noise at `counter` comes from these 64 bits: SplitMix64 backwards."""
    x, inverse = bits % 2**64, [pow(factor % 2**64, -1, 2**64) for factor in (MIX_1, MIX_2)]
    for shift, factor in ((31, inverse[1]), (27, inverse[0]), (30, 1)):
        y = x
        for _ in range(64 // shift):
            y = x ^ (y >> shift)
        x = y * factor % 2**64
    return (x - (counter + 1) * GOLDEN_GAMMA + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("bits", [0, 1, 5, 2**20 + 3, 2**40, 2**63 - 1, 2**63, 2**64 - 2**40, 2**64 - 4, 2**64 - 1])
def test_noise_has_all_its_digits_at_both_ends(bits):
    """-log((bits + 1/2) / 2^64) from 3e-20 to 45; a 32-bit uniform number would give 0 or infinity."""
    key = torch.tensor([key_of(bits, 7)])
    with mpmath.workdps(40):
        exact = float(-mpmath.log((mpmath.mpf(bits) + 0.5) / 2**64))
    assert exponential_noise(key, torch.tensor([7])).item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("distance", [0, 1])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_token_of_probability_1e_12_is_drawn_as_often(rng, backend, distance):
    """By importance sampling: of keys whose noise for the rare token is in the lowest 2^-38 of its range, it wins
    against the certain one, in its own segment or another, where its noise / 1e-12 is below an exponential number."""
    rare, draws = distance * SEGMENT + 1, 40_000
    logits = torch.full((1, 2 * SEGMENT), -torch.inf)
    logits[0, 0], logits[0, rare] = 0.0, math.log(1e-12)
    counter = rare + 1 if distance == 0 else -1
    keys = torch.tensor([key_of(-1 - rng.randrange(2**26), counter) for _ in range(draws)])
    token = unmask_statistics(logits.expand(draws, -1), temperature=1.0, generator=keys, backend=backend).token
    share = 2.0**38 * 1e-12
    share *= 1 - math.exp(-1 / share)  # the mean of exp(-u / share) over u from 0 to 1
    assert (token == rare).double().mean() == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / draws))


def test_triton_draws_the_same_rare_tokens(rng):
    logits = torch.full((1, 2 * SEGMENT), -torch.inf)
    logits[0, 0], logits[0, 1], logits[0, SEGMENT] = 0.0, math.log(1e-12), math.log(3e-12)
    keys = [key_of(-1 - rng.randrange(2**26), counter) for counter in (2, -1) for _ in range(40)]
    ours, theirs = (
        unmask_statistics(
            logits.expand(len(keys), -1), temperature=1.0, generator=torch.tensor(keys), backend=b
        ).token.tolist()
        for b in ("triton", "reference")
    )
    assert ours == theirs and set(ours) == {0, 1, SEGMENT}


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_flat_tail_is_drawn_with_its_mass(rng, backend):
    """Of 20 000 columns at -12, 11 % at temperature 1; with noise of 23 bits most of them could never win."""
    columns, draws = 20_000, 3000
    logits = torch.full((1, columns), -12.0)
    logits[0, 17] = 0.0
    share = 1 - 1 / (1 + (columns - 1) * math.exp(-12))
    keys = mix_keys(rng.randrange(2**40), torch.arange(draws))
    token = unmask_statistics(logits.expand(draws, -1), temperature=1.0, generator=keys, backend=backend).token
    assert (token != 17).double().mean() == pytest.approx(share, abs=5 * math.sqrt(share / draws))
    tail = token[token != 17]
    halves = (tail < columns // 2).double().mean()
    assert halves == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(len(tail)))


def test_uniform_rows_have_no_ties_and_no_favourites(rng):
    columns, draws = 151_936, 2000
    keys = mix_keys(rng.randrange(2**40), torch.arange(draws))
    token = unmask_statistics(torch.zeros(1, columns).expand(draws, -1), temperature=1.0, generator=keys).token
    assert token.double().mean() == pytest.approx(columns / 2, abs=5 * columns / math.sqrt(12 * draws))
    noise = exponential_noise(keys[:200], -torch.arange(columns // SEGMENT))
    assert all(len(row.unique()) >= columns // SEGMENT - 1 for row in noise)


@pytest.mark.parametrize("nucleus", [2, 50, 10**6])
@pytest.mark.parametrize("top_k, top_p", [(3, None), (None, 0.9), (40, 0.8), (1, 0.1), (7, 0.999), (None, None)])
def test_filters_that_sort_only_what_they_must_keep_the_same_set(rng, monkeypatch, nucleus, top_k, top_p):
    monkeypatch.setattr(torch_sampling, "NUCLEUS", nucleus)
    for scale in (0.1, 3.0, 30.0):
        logits = scale * torch.randn(5, 300, dtype=torch.float64)
        logits[:, ::7] = -torch.inf
        settings = {"temperature": 0.7, "top_k": top_k, "top_p": top_p}
        ours, theirs = (filter_logits(logits, backend=backend, **settings) for backend in ("torch", "reference"))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_filtered_logits_are_those_that_tokens_are_drawn_from(rng, backend):
    logits, keys = 3 * torch.randn(6, 200), torch.randint(-(2**62), 2**62, (6,))
    settings = {"temperature": 1.5, "top_k": 20, "top_p": 0.9}
    filtered = filter_logits(logits, backend=backend, **settings)
    assert (filtered.isfinite().sum(1) <= 20).all()
    drawn = unmask_statistics(filtered, temperature=1.0, generator=keys, backend=backend)
    directly = unmask_statistics(logits, generator=keys, backend=backend, **settings)
    assert torch.equal(drawn.token, directly.token)


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_a_top_p_that_rounds_to_one_filters_nothing(rng, backend):
    """The sums of fp32 would cut the tail."""
    logits = 6 * torch.randn(1, 20_000)
    for top_p in (1.0, 1 - 1e-9, 1 - 2.0**-25):
        assert torch.equal(filter_logits(logits, top_p=top_p, backend=backend), logits)
    halved = torch.tensor([[0.0, -30.0]])
    assert filter_logits(halved, top_p=1 - 2.0**-24, backend=backend).tolist() == [[0.0, -torch.inf]]


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_k_beside_top_p_keeps_no_more_than_k(rng, backend, dtype):
    """Distinct logits so close that their probabilities are the same numbers."""
    step = 2.0**-22 if dtype == torch.float32 else 2.0**-7
    best_first = torch.randperm(100)
    logits = torch.empty(1, 100, dtype=dtype)
    logits[0, best_first] = (2 - step * torch.arange(1, 101)).to(dtype)
    settings = {"temperature": 1e4, "backend": backend}
    assert kept_columns(logits, top_k=7, top_p=0.999, **settings) == [best_first[:7].sort().values.tolist()]
    assert kept_columns(logits, top_k=8, top_p=0.49, **settings) == [best_first[:4].sort().values.tolist()]


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_a_mass_of_exactly_top_p_is_enough(backend):
    """Weights 2, 1, 1 at temperature 1 / log 2, exact in any backend."""
    logits = torch.tensor([[1.0, 0.0, -torch.inf, 0.0, -40.0], [0.0, 0.0, 0.0, -torch.inf, 0.0]])
    temperature = 1 / math.log(2)
    assert kept_columns(logits, backend=backend, temperature=temperature, top_p=0.5) == [[0], [0, 1, 2, 4]]
    assert kept_columns(logits, backend=backend, temperature=temperature, top_p=0.5 + 2.0**-20) == [
        [0, 1, 3],
        [0, 1, 2, 4],
    ]


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_the_nucleus_ends_between_neighbours(backend):
    """A search that ends at an interval with one logit must tell it from one with two."""
    logits = torch.tensor([[5.0, 3.0, 3.0 + 2.0**-20, -torch.inf]])
    assert kept_columns(logits, top_p=0.85, temperature=1.0, backend=backend) == [[0, 2]]


def kept_columns(logits, **settings):
    return [row.isfinite().nonzero().squeeze(1).tolist() for row in filter_logits(logits, **settings)]


FILTERS = [(7, None), (None, 0.6), (7, 0.97), (400, 0.9), (1, 1e-9)]


@pytest.mark.parametrize(
    "dtype, top_k, top_p",
    [
        (torch.float16, 7, 0.97),
        *((dtype, *filters) for dtype in (torch.float32, torch.bfloat16) for filters in FILTERS),
    ],
)
@pytest.mark.parametrize("values", VALUES)
def test_every_backend_keeps_the_same_set(rng, dtype, values, top_k, top_p):
    """The nucleus may end one token earlier or later where its mass is `top_p` but for the rounding of fp32 sums."""
    logits = values(2, 3000).to(dtype)

    def kept(logits, backend, top_p):
        return kept_columns(logits, backend=backend, temperature=0.7, top_k=top_k, top_p=top_p)

    masses = [None] * 2 if top_p is None else [top_p * (1 - 2.0**-20), top_p * (1 + 2.0**-20)]
    least, most = (kept(logits.double(), "reference", mass) for mass in masses)
    for backend in ("torch", "triton", "reference"):
        for fewest, ours, all_allowed in zip(least, kept(logits, backend, top_p), most, strict=True):
            assert set(fewest) <= set(ours) <= set(all_allowed)


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"temperature": -1}, ValueError, "temperature=-1: expected 0"),
        ({"temperature": math.nan}, ValueError, "temperature=nan"),
        ({"top_k": 0}, ValueError, "top_k=0: expected at least 1"),
        ({"top_p": 0.0}, ValueError, "top_p=0.0: expected a probability mass"),
        ({"top_p": 1.1}, ValueError, "top_p=1.1"),
        ({"generator": torch.zeros(2, dtype=torch.int32)}, TypeError, "generator: expected a tensor of int64"),
        ({"generator": torch.zeros(3, dtype=torch.int64)}, ValueError, r"generator: expected shape \(2,\)"),
    ],
)
def test_errors_name_the_setting(settings, error, message):
    with pytest.raises(error, match=message):
        unmask_statistics(torch.zeros(2, 5), **settings)


def test_keys_depend_on_every_part_and_its_place():
    keys = {mix_keys(*parts).item() for parts in [(1, 2), (2, 1), (1,), (1, 2, 0), (0, 1, 2), (1, 3)]}
    assert len(keys) == 6
    assert mix_keys(torch.arange(3)[:, None], torch.arange(4)).shape == (3, 4)
    assert mix_keys(torch.arange(3), 7)[2] == mix_keys(2, 7)


def test_keys_are_int64_whatever_the_dtype_of_the_parts():
    parts = torch.arange(4)
    assert torch.equal(mix_keys(5, parts.int()), mix_keys(5, parts))
    assert torch.equal(mix_keys(parts.int(), 5), mix_keys(parts, 5))
    with pytest.raises(TypeError, match=r"parts\[0\]: expected a tensor of int32 or int64"):
        mix_keys(parts.float())


def test_keys_of_neighbours_share_half_of_their_bits():
    keys = mix_keys(3, torch.arange(2000))
    flipped = keys[1:] ^ keys[:-1]
    per_bit = torch.stack([(flipped >> bit) & 1 for bit in range(64)]).double().mean(1)
    assert (per_bit - 0.5).abs().max() < 0.08  # 7 standard deviations
