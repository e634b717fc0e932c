from math import gamma
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tabom.data.trajectories import Trajectory
from tabom.training.objectives import ObjectiveSettings, make_target
from tabom.training.windows import break_ties, draw_cut, example_rng, last_cut, parallel_cuts, window_at

# Worked out by hand. Position:   0  1  2  3  4  5   (4 is never unmasked, 0 and 3 share a step)
STEPS = np.array([1, 0, 3, 1, -1, 2])
BY_HAND = [
    # cut, M, W,  visible,       supervised,    ranked (positions)
    (0, 1, 1, [], [1], [1]),
    (0, 2, 3, [], [0, 1, 3], [0, 1, 3, 5]),
    (1, 1, 2, [1], [0, 3], [0, 3, 5]),
    (1, 2, 1, [1], [0, 3, 5], [0, 3]),
    (2, 2, 2, [0, 1, 3], [2, 5], [2, 5]),
    (0, 9, 9, [], [0, 1, 2, 3, 5], [0, 1, 2, 3, 5]),
    (1, "all", 1, [1], [0, 2, 3, 5], [0, 3]),
    (2, 1, "all", [0, 1, 3], [5], [2, 5]),
]


@pytest.mark.parametrize("cut, m, w, visible, supervised, ranked", BY_HAND)
def test_windows_worked_out_by_hand(cut, m, w, visible, supervised, ranked):
    window = window_at(STEPS, cut, m, w)
    assert [np.flatnonzero(mask).tolist() for mask in window] == [visible, supervised, ranked]


trajectories = st.lists(st.integers(-1, 12), min_size=1, max_size=20).map(np.array)
sizes = st.integers(1, 8)


@given(trajectories, sizes, sizes, st.integers(0, 2**32))
def test_visible_supervised_and_later_partition_the_response(steps, m, w, seed):
    cut = draw_cut(steps, last_cut(steps, m), np.random.default_rng(seed))
    window = window_at(steps, cut, m, w)
    later = steps >= cut + m
    never = steps < 0
    assert (window.visible.astype(int) + window.supervised + later + never == 1).all()
    assert (window.ranked <= ~window.visible).all()


@given(trajectories, sizes)
def test_every_cut_from_0_to_the_last_is_drawn_and_no_other(steps, m):
    cuts = {draw_cut(steps, last_cut(steps, m), np.random.default_rng(seed)) for seed in range(200)}
    assert cuts == set(range(max(steps.max() - m + 1, 0) + 1))


# Worked out by hand: 6 steps, one token each. Cut -> steps supervised, for M = 2: 0: 01, 1: 12, 2: 23, 3: 34, 4: 45.
LAW = [
    # M, skip_last_step, how many of the equally likely cuts supervise steps 0, 1, 2, 3, 4, 5; how many cuts
    (1, False, [1, 1, 1, 1, 1, 1], 6),
    (2, False, [1, 2, 2, 2, 2, 1], 5),
    (2, True, [1, 2, 2, 2, 1, 0], 4),  # as released: the last step never
    (4, False, [1, 2, 3, 3, 2, 1], 3),
    (6, False, [1, 1, 1, 1, 1, 1], 1),
    (6, True, [1, 1, 1, 1, 1, 1], 1),
    (9, False, [1, 1, 1, 1, 1, 1], 1),
    ("all", False, [1, 2, 3, 4, 5, 6], 6),
]


@pytest.mark.parametrize("m, skip_last_step, times, cuts", LAW)
def test_each_step_is_supervised_as_often_as_the_table_says(seed, m, skip_last_step, times, cuts):
    order = np.random.default_rng(seed).permutation(6)
    trajectory = Trajectory("p", "abcdef", [1] * 6, order.tolist())
    settings = ObjectiveSettings("window", m, 1, skip_last_step=skip_last_step)
    draws = 3000
    targets = [make_target(trajectory, settings, example_rng(seed, 0, i)) for i in range(draws)]
    share = np.mean([target.supervised[np.argsort(order)] for target in targets], axis=0)
    expected = np.array(times) / cuts
    assert np.abs(share - expected).max() < 5 * np.sqrt(0.25 / draws)
    assert ((share == 0) == (expected == 0)).all()


@given(trajectories, sizes, st.sampled_from(["steps", "tokens"]))
def test_the_last_token_is_supervised_by_the_last_cut_and_by_no_earlier_one(steps, m, unit):
    last = last_cut(steps, m, unit)
    if steps.max() < 0:
        assert last == 0
        return
    at_end = steps == steps.max()
    fits = unit == "steps" or at_end.sum() <= m
    reached = [window_at(steps, cut, m, 1, unit).supervised[at_end].all() for cut in range(last + 1)]
    assert reached == [False] * last + [fits]
    if not fits:
        assert last == steps.max()


# Worked out by hand: two tokens a step but for the last. Position: 0  1  2  3  4; in the order 1 3 | 4 2 | 0
PARALLEL = np.array([2, 0, 1, 0, 1])
PARALLEL_ENTROPY = [0.1, 0.2, 0.9, 0.3, 0.4]
IN_UNITS = [
    # cut, M, supervised by steps, by tokens
    (0, 1, [1, 3], [1]),
    (0, 2, [1, 2, 3, 4], [1, 3]),
    (0, 3, [0, 1, 2, 3, 4], [1, 3, 4]),
    (1, 1, [2, 4], [4]),
    (1, 3, [0, 2, 4], [0, 2, 4]),
    (2, 2, [0], [0]),
]


@pytest.mark.parametrize("cut, m, by_steps, by_tokens", IN_UNITS)
def test_windows_in_tokens_and_in_steps_worked_out_by_hand(cut, m, by_steps, by_tokens):
    for unit, expected in (("steps", by_steps), ("tokens", by_tokens)):
        window = window_at(PARALLEL, cut, m, m, unit, PARALLEL_ENTROPY)
        assert np.flatnonzero(window.supervised).tolist() == np.flatnonzero(window.ranked).tolist() == expected
        assert (window.visible == (cut > PARALLEL)).all(), "the cut stands between two steps, whatever the unit"


def test_the_document_has_the_same_tables():
    text = (Path(__file__).parents[2] / "docs" / "method.md").read_text()
    for cut, m, *supervised in IN_UNITS:
        assert f"| {cut} | {m} | {' | '.join(' '.join(map(str, each)) for each in supervised)} |\n" in text
    rows = [row for row in LAW if row[0] in (4, "all") or row[:2] == (2, False) or row[:2] == (2, True)]
    for m, skip_last_step, times, cuts in rows:
        skip = " `skip_last_step`" if skip_last_step else ""
        assert f"| {m} |{skip} | {' | '.join(map(str, times))} | {cuts} |\n" in text
    steps = np.arange(256) // 2
    assert (window_at(steps, 5, 32, 32).supervised.sum(), last_cut(steps, 32)) == (64, 96)
    assert (window_at(steps, 5, 32, 32, "tokens").supervised.sum(), last_cut(steps, 32, "tokens")) == (32, 112)


def test_last_cut_in_tokens_worked_out_by_hand():
    assert [last_cut(PARALLEL, m, "tokens") for m in (1, 2, 3, 4, 5, 6)] == [2, 2, 1, 1, 0, 0]
    assert [last_cut(PARALLEL, m, "steps") for m in (1, 2, 3, 4)] == [2, 1, 0, 0]


@given(st.permutations(range(10)), sizes, sizes, st.integers(0, 2**32))
def test_with_one_token_a_step_tokens_and_steps_are_the_same(order, m, w, seed):
    steps = np.array(order)
    assert last_cut(steps, m, "tokens") == last_cut(steps, m, "steps")
    cut = draw_cut(steps, last_cut(steps, m), np.random.default_rng(seed))
    for by_steps, by_tokens in zip(window_at(steps, cut, m, w), window_at(steps, cut, m, w, "tokens"), strict=True):
        assert (by_steps == by_tokens).all()


def test_ties_are_broken_by_entropy_else_from_left_to_right():
    assert break_ties(PARALLEL, PARALLEL_ENTROPY).tolist() == [4, 0, 3, 1, 2]
    assert break_ties(PARALLEL).tolist() == [4, 0, 2, 1, 3]
    trajectory = Trajectory("p", "abcde", [1] * 5, PARALLEL.tolist(), entropy=PARALLEL_ENTROPY)
    settings = ObjectiveSettings("tabom", 5, 5, rank_ties=True)
    assert make_target(trajectory, settings, example_rng(0, 0, 0)).steps.tolist() == [4, 0, 3, 1, 2]


@given(trajectories, sizes)
def test_each_decoded_position_is_supervised_by_exactly_the_cuts_within_m_steps_before_it(steps, m):
    cuts = range(int(steps.max()) + 1)
    times = sum(window_at(steps, cut, m, m).supervised.astype(int) for cut in cuts)
    assert (times == np.where(steps < 0, 0, np.minimum(steps + 1, m))).all()


def test_a_trajectory_shorter_than_the_window_is_supervised_whole(rng):
    order = list(range(4))
    rng.shuffle(order)
    trajectory = Trajectory("p", "abcd", [1, 2, 3, 4], order)
    target = make_target(trajectory, ObjectiveSettings("tabom", 32, 32), example_rng(rng.randrange(99), 0, 0))
    assert target.masked.all() and target.supervised.all()
    assert target.steps.tolist() == order


@given(st.integers(0, 2**31), st.integers(0, 50), st.permutations(range(8)))
def test_shuffling_records_changes_no_cut(seed, epoch, order):
    steps = np.arange(40)
    in_order = [draw_cut(steps, 36, example_rng(seed, epoch, index)) for index in range(8)]
    shuffled = {index: draw_cut(steps, 36, example_rng(seed, epoch, index)) for index in order}
    assert [shuffled[index] for index in range(8)] == in_order


def test_cuts_differ_between_epochs_records_and_seeds():
    steps = np.arange(1000)
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert len({draw_cut(steps, 996, example_rng(*key)) for key in keys}) == 4


def test_cut_among_non_ltr_positions():
    steps = np.array([5, 0, 1, 9, 2, 3, 4, 8, 7, 6])
    draws = [draw_cut(steps, 7, np.random.default_rng(seed), among_positions=[1, 6, 3]) for seed in range(100)]
    assert set(draws) == {0, 4}  # the steps of positions 1 and 6; that of position 3, 9, is after the last cut
    for none in ([3], [2]):  # never decoded; too late
        draws = [draw_cut(np.array([0, 1, 2, -1]), 1, np.random.default_rng(i), none) for i in range(50)]
        assert set(draws) == {0, 1}


@given(trajectories, st.integers(1, 6))
def test_parallel_cuts_are_those_before_which_a_multiple_of_the_pace_is_visible(steps, tokens_per_step):
    last = max(int(steps.max()), 0)
    visible = [int(((steps >= 0) & (steps < cut)).sum()) for cut in range(last + 1)]
    expected = [cut for cut in range(last + 1) if visible[cut] % tokens_per_step == 0]
    assert parallel_cuts(steps, last, tokens_per_step).tolist() == expected and expected[0] == 0


def test_parallel_cuts_worked_out_by_hand():
    assert parallel_cuts(np.arange(16), 15, 4).tolist() == [0, 4, 8, 12]
    assert parallel_cuts(np.array([0, 0, 1, 1, 2, 2, -1]), 2, 4).tolist() == [0, 2]


def test_a_share_of_the_cuts_is_that_of_a_parallel_decoding(seed):
    """Sixteen tokens: with a share of 0.5 a cut on the grid of 4 has the probability 1/32 + 1/8, any other 1/32."""
    trajectory = Trajectory("p", "x" * 16, [1] * 16, list(range(16)))

    def cuts(**settings):
        drawn = ObjectiveSettings("window", **settings)
        targets = [make_target(trajectory, drawn, example_rng(seed, 0, index)) for index in range(4000)]
        return np.array([(~target.masked).sum() for target in targets])

    counts = np.bincount(cuts(tokens_per_step=4, parallel_share=0.5), minlength=16)
    expected = 4000 * np.array([5 / 32, 1 / 32, 1 / 32, 1 / 32] * 4)
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()
    assert set(cuts(tokens_per_step=4, parallel_share=1.0)) == {0, 4, 8, 12}
    assert (cuts() == cuts(tokens_per_step=1)).all()


def test_nelbo_weighs_by_the_inverse_of_its_probability(rng):
    length = 2000
    trajectory = Trajectory("p", "x", [1] * length, list(range(length)))
    seed = rng.randrange(2**31)
    for index in range(20):
        target = make_target(trajectory, ObjectiveSettings("nelbo"), example_rng(seed, 0, index))
        t = 1 / target.token_weights[0]
        assert abs(target.masked.mean() - t) < 5 * np.sqrt(t * (1 - t) / length) + 1e-9
        assert (target.supervised == target.masked).all()
        assert target.num_tokens == length


def test_fixed_ratio_masks_its_share(rng):
    trajectory = Trajectory("p", "x", [1] * 40, list(range(40)))
    settings = ObjectiveSettings("fixed_ratio", mask_ratio=0.3)
    masks = [make_target(trajectory, settings, example_rng(rng.randrange(99), 0, i)).masked for i in range(3)]
    assert [mask.sum() for mask in masks] == [12, 12, 12]
    assert (masks[0] != masks[1]).any()


# The estimators against exact enumeration: each draw of the masks has a loss that depends on the whole state, so that a
# wrong weight of any one state shows.

LENGTH = 5


def loss_of_state(masked, position):
    """Any function of what is masked and of the position; in nats."""
    state = sum(1 << i for i in np.flatnonzero(masked))
    return 1 + np.sin(7.3 * state + position) ** 2


def cross_entropy(target):
    """The example's loss as the trainer adds it up, with this example alone in the batch."""
    losses = [loss_of_state(target.masked, i) * target.token_weights[i] for i in np.flatnonzero(target.supervised)]
    return sum(losses) / target.num_tokens


def nelbo_by_enumeration():
    """E_t[1/t * sum over the masked] / T: the integral over t of t^(k - 1) (1 - t)^(T - k) is B(k, T - k + 1)."""
    total = 0.0
    for state in range(1, 2**LENGTH):
        masked = np.array([bool(state >> i & 1) for i in range(LENGTH)])
        k = int(masked.sum())
        beta = gamma(k) * gamma(LENGTH - k + 1) / gamma(LENGTH + 1)
        total += beta * sum(loss_of_state(masked, i) for i in np.flatnonzero(masked))
    return total / LENGTH


def estimates(objective, seed, draws=40_000, **settings):
    trajectory = Trajectory("p", "x" * LENGTH, [1] * LENGTH, [3, 0, 4, 1, 2])
    settings = ObjectiveSettings(objective, **settings)
    rng = np.random.default_rng(seed)
    targets = [make_target(trajectory, settings, rng) for _ in range(draws)]
    assert {target.num_tokens for target in targets} == {LENGTH}
    return np.array(
        [cross_entropy(target) for target in targets if target.masked.any()]
        + [0.0] * sum(not target.masked.any() for target in targets)
    )


def test_both_nelbos_have_the_mean_of_exact_enumeration_and_the_exact_one_less_variance(seed):
    plain, exact = (estimates(objective, seed) for objective in ("nelbo", "nelbo_exact"))
    for values in (plain, exact):
        assert abs(values.mean() - nelbo_by_enumeration()) < 5 * values.std() / np.sqrt(len(values))
    assert exact.var() < plain.var() / 5


def test_the_whole_path_has_the_mean_of_its_formula(seed):
    """1/(s_max + 1) sum_c 1/k_c sum_{later} CE: every state that the decoding passed, every later token."""
    order = np.array([3, 0, 4, 1, 2])
    expected = 0.0
    for cut in range(LENGTH):
        later = order >= cut
        expected += sum(loss_of_state(later, i) for i in np.flatnonzero(later)) / later.sum() / LENGTH
    values = estimates("window", seed, supervised_window="all", rank_window="all")
    assert abs(values.mean() - expected) < 5 * values.std() / np.sqrt(len(values))


def test_the_whole_path_with_ties_and_tokens_never_unmasked(seed):
    steps = [0, 2, -1, 0, 2, 2]
    trajectory = Trajectory("p", "x" * 6, [1] * 6, steps)
    cuts = set()
    for i in range(60):
        target = make_target(trajectory, ObjectiveSettings("tabom", "all", "all"), example_rng(seed, 0, i))
        left = int(target.supervised.sum())
        cuts.add(int(target.masked.sum()) - 1)
        assert not target.supervised[2] and target.masked[2] and target.num_tokens == 5
        assert target.token_weights[target.supervised] == pytest.approx(5 / left)
        assert target.steps.tolist() == [s if m and s >= 0 else -1 for s, m in zip(steps, target.masked, strict=True)]
    assert cuts == {5, 3}  # tokens left before steps 0, and 1 and 2


@given(trajectories, st.sampled_from(["steps", "tokens"]), st.sampled_from(["all", 1, 3]), st.integers(0, 2**32))
def test_any_trajectory_gives_finite_weights_that_add_up(steps, unit, m, seed):
    trajectory = Trajectory("p", "", [1] * len(steps), steps.tolist())
    target = make_target(trajectory, ObjectiveSettings("tabom", m, "all", unit), np.random.default_rng(seed))
    weights = target.token_weights[target.supervised].astype(float)
    assert weights.sum() == pytest.approx(target.num_tokens, rel=1e-5)
    assert (target.supervised <= target.masked).all() and ((target.steps >= 0) <= target.masked).all()
    if steps.max() >= 0 and m == "all":
        assert target.supervised.any()


@pytest.mark.parametrize("objective", ["nelbo", "nelbo_exact", "fixed_ratio"])
def test_random_masks_are_ranked_over_all_that_is_masked(seed, objective):
    steps = [3, 0, -1, 1, 2, 1]
    trajectory = Trajectory("p", "", [1] * 6, steps)
    for i in range(20):
        target = make_target(trajectory, ObjectiveSettings(objective, 1, 1), example_rng(seed, 0, i))
        assert target.steps.tolist() == [s if m else -1 for s, m in zip(steps, target.masked, strict=True)]
