import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tabom.data.trajectories import Trajectory
from tabom.training.objectives import ObjectiveSettings, make_target
from tabom.training.windows import draw_cut, example_rng, window_at

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
]


@pytest.mark.parametrize("cut, m, w, visible, supervised, ranked", BY_HAND)
def test_windows_worked_out_by_hand(cut, m, w, visible, supervised, ranked):
    window = window_at(STEPS, cut, m, w)
    assert [np.flatnonzero(mask).tolist() for mask in window] == [visible, supervised, ranked]


trajectories = st.lists(st.integers(-1, 12), min_size=1, max_size=20).map(np.array)
sizes = st.integers(1, 8)


@given(trajectories, sizes, sizes, st.integers(0, 2**32))
def test_visible_supervised_and_later_partition_the_response(steps, m, w, seed):
    cut = draw_cut(steps, m, np.random.default_rng(seed))
    window = window_at(steps, cut, m, w)
    later = steps >= cut + m
    never = steps < 0
    assert (window.visible.astype(int) + window.supervised + later + never == 1).all()
    assert (window.ranked <= ~window.visible).all()


@given(trajectories, sizes)
def test_every_cut_from_0_to_the_last_is_drawn_and_no_other(steps, m):
    cuts = {draw_cut(steps, m, np.random.default_rng(seed)) for seed in range(200)}
    assert cuts == set(range(max(steps.max() - m, 0) + 1))


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
    in_order = [draw_cut(steps, 4, example_rng(seed, epoch, index)) for index in range(8)]
    shuffled = {index: draw_cut(steps, 4, example_rng(seed, epoch, index)) for index in order}
    assert [shuffled[index] for index in range(8)] == in_order


def test_cuts_differ_between_epochs_records_and_seeds():
    steps = np.arange(1000)
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert len({draw_cut(steps, 4, example_rng(*key)) for key in keys}) == 4


def test_cut_among_non_ltr_positions():
    steps = np.array([5, 0, 1, 9, 2, 3, 4, 8, 7, 6])
    draws = [draw_cut(steps, 3, np.random.default_rng(seed), among_positions=[1, 6, 3]) for seed in range(100)]
    assert set(draws) == {0, 4}  # the steps of positions 1 and 6; that of position 3, 9, is above s_max - M
    for none in ([3], [2]):  # never decoded; too late
        draws = [
            draw_cut(np.array([0, 1, 2, -1]), 1, np.random.default_rng(i), among_positions=none) for i in range(50)
        ]
        assert set(draws) == {0, 1}


def test_nelbo_weighs_by_the_inverse_of_its_probability(rng):
    length = 2000
    trajectory = Trajectory("p", "x", [1] * length, list(range(length)))
    seed = rng.randrange(2**31)
    for index in range(20):
        target = make_target(trajectory, ObjectiveSettings("nelbo"), example_rng(seed, 0, index))
        t = 1 / target.token_weights[0]
        assert abs(target.masked.mean() - t) < 5 * np.sqrt(t * (1 - t) / length) + 1e-9
        assert (target.supervised == target.masked).all() and (target.steps == -1).all()
        assert target.num_tokens == length


def test_fixed_ratio_masks_its_share(rng):
    trajectory = Trajectory("p", "x", [1] * 40, list(range(40)))
    settings = ObjectiveSettings("fixed_ratio", mask_ratio=0.3)
    masks = [make_target(trajectory, settings, example_rng(rng.randrange(99), 0, i)).masked for i in range(3)]
    assert [mask.sum() for mask in masks] == [12, 12, 12]
    assert (masks[0] != masks[1]).any()
