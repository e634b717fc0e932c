import pytest
import torch

from tabom import Trajectory
from tabom.evaluation.replay import order_accuracy
from tabom_kernels import softmax_entropy
from tests.conftest import random_model


def make_trajectories(model, rng, count):
    vocabulary = range(4, model.model.config.vocab_size)
    for _ in range(count):
        length = rng.randrange(2, 7)
        token_ids = [rng.choice(vocabulary) for _ in range(length)]
        order = [rng.randrange(-1, 4) for _ in range(length - 2)] + [0, 1]  # ties, tokens never unmasked, one pair
        yield Trajectory("sort 321=", "", token_ids, order)


def naive_order_accuracy(model, trajectory):
    """Counts in Python loops, one forward pass a moment."""
    prompt = model.tokenizer(trajectory.prompt).input_ids
    order, in_order, pairs = trajectory.decoding_order, 0, 0
    for now in range(max(order)):
        shown = [
            token if 0 <= step < now else model.mask_token_id
            for token, step in zip(trajectory.response_token_ids, order, strict=True)
        ]
        logits = model.model(input_ids=torch.tensor([prompt + shown])).logits[0]
        entropy = softmax_entropy(logits.roll(model.logits_shift, 0)[len(prompt) :]).tolist()
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
