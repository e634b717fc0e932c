import pytest
import torch

from tabom import Trajectory
from tabom.evaluation.replay import order_accuracy, replayed_tds
from tabom_kernels import softmax_entropy
from tests.conftest import random_model


def make_trajectories(model, rng, count):
    vocabulary = range(4, model.model.config.vocab_size)
    for _ in range(count):
        length = rng.randrange(2, 7)
        token_ids = [rng.choice(vocabulary) for _ in range(length)]
        order = [rng.randrange(-1, 4) for _ in range(length - 2)] + [0, 1]  # ties, tokens never unmasked, one pair
        yield Trajectory("sort 321=", "", token_ids, order)


def naive_entropy(model, trajectory, now):
    """Of all positions of the response before step `now`."""
    prompt = model.tokenizer(trajectory.prompt).input_ids
    shown = [
        token if 0 <= step < now else model.mask_token_id
        for token, step in zip(trajectory.response_token_ids, trajectory.decoding_order, strict=True)
    ]
    logits = model.model(input_ids=torch.tensor([prompt + shown])).logits[0]
    return softmax_entropy(logits.roll(model.logits_shift, 0)[len(prompt) :]).tolist()


def naive_order_accuracy(model, trajectory):
    """Counts in Python loops, one forward pass a moment."""
    order, in_order, pairs = trajectory.decoding_order, 0, 0
    for now in range(max(order)):
        entropy = naive_entropy(model, trajectory, now)
        for i, step in enumerate(order):
            for j, later in enumerate(order):
                if now <= step < later:
                    pairs += 1
                    in_order += entropy[i] < entropy[j]
    return in_order / pairs


def test_order_accuracy_against_a_loop(seed, rng):
    for shift in (0, 1):
        model = random_model(seed, logits_shift=shift)
        trajectories = list(make_trajectories(model, rng, 5))
        expected = [naive_order_accuracy(model, trajectory) for trajectory in trajectories]
        assert order_accuracy(model, trajectories) == pytest.approx(expected, rel=1e-6)


def naive_tds(model, trajectory):
    """Positions and moments in Python loops: the variance as the mean square less the squared mean."""
    tokens, order = trajectory.response_token_ids, trajectory.decoding_order
    end = tokens.index(model.eos_token_id) if model.eos_token_id in tokens else len(tokens)
    variances = []
    for now in range(max(order) + 1):
        entropy = naive_entropy(model, trajectory, now)
        counted = [e for i, e in enumerate(entropy) if i <= end and not 0 <= order[i] < now]
        if counted:
            mean = sum(counted) / len(counted)
            variances.append(sum((e - mean) ** 2 for e in counted) / len(counted))
    return sum(variances) / len(variances)


@pytest.mark.parametrize("shift", [0, 1])
def test_tds_against_a_loop(seed, rng, shift):
    model = random_model(seed, logits_shift=shift)
    trajectories = list(make_trajectories(model, rng, 4))
    for end in (0, 2, 3):  # first, in the middle, twice: what follows the first end token does not count
        tokens = [9, 8, 7, model.eos_token_id, 6]
        tokens[end] = model.eos_token_id
        order = rng.sample(range(5), 5)
        trajectories.append(Trajectory("sort 321=", "", tokens, order))
    expected = [naive_tds(model, trajectory) for trajectory in trajectories]
    assert replayed_tds(model, trajectories) == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert (replayed_tds(model, trajectories) > 0).any()
