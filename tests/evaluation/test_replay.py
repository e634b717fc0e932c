from dataclasses import replace

import numpy as np
import pytest
import torch

from tabom import Trajectory
from tabom.evaluation.replay import order_accuracy, replayed_tds
from tabom.report.alternatives import replay_tokens
from tabom_kernels import softmax_entropy
from tests.conftest import random_model
from tests.models.block_causal import block_causal_model


def make_trajectories(model, rng, count):
    vocabulary = range(4, model.model.config.vocab_size)
    for _ in range(count):
        length = rng.randrange(2, 7)
        token_ids = [rng.choice(vocabulary) for _ in range(length)]
        order = [rng.randrange(-1, 4) for _ in range(length - 2)] + [0, 1]  # ties, tokens never unmasked, one pair
        yield Trajectory("sort 321=", "", token_ids, order)


def naive_entropy(model, trajectory, now):
    """Of the masked positions that step `now` sees: all of the response, or those of the active block."""
    prompt = model.tokenizer(trajectory.prompt).input_ids
    order, size = trajectory.decoding_order, model.block_size or 1000
    shown = [
        token if 0 <= step < now else model.mask_token_id
        for token, step in zip(trajectory.response_token_ids, order, strict=True)
    ]
    block = min((len(prompt) + i) // size for i, step in enumerate(order) if step >= now)
    ids = prompt + shown
    if model.block_size:
        ids = (ids + [model.mask_token_id] * size)[: (block + 1) * size]
    logits = model.model(**model.inputs(torch.tensor([ids]))).logits[0]
    entropy = softmax_entropy(logits.roll(model.logits_shift, 0)[len(prompt) :]).tolist()
    seen = {i for i, step in enumerate(order) if not 0 <= step < now and (len(prompt) + i) // size == block}
    return {i: entropy[i] for i in sorted(seen)}


def naive_order_accuracy(model, trajectory):
    """Counts in Python loops, one forward pass a moment."""
    order, in_order, pairs = trajectory.decoding_order, 0, 0
    for now in range(max(order) + 1):
        entropy = naive_entropy(model, trajectory, now)
        for i in entropy:
            for j in entropy:
                if now <= order[i] < order[j]:
                    pairs += 1
                    in_order += entropy[i] < entropy[j]
    return in_order / pairs


def test_order_accuracy_against_a_loop(seed, rng):
    for shift in (0, 1):
        model = random_model(seed, logits_shift=shift)
        trajectories = list(make_trajectories(model, rng, 5))
        expected = [naive_order_accuracy(model, trajectory) for trajectory in trajectories]
        assert order_accuracy(model, trajectories) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("model_type", ["sdar", "Fast_dLLM_Qwen"])
def test_a_step_sees_only_the_active_block(tmp_path, seed, rng, model_type):
    """Prompts and responses end inside a block; order accuracy and TDS leave out what the decoding had not begun."""
    model = block_causal_model(tmp_path / "m", model_type, seed)
    size, trajectories = model.block_size, []
    for prompt_length in (size - 1, size, size + 2):
        length, order, first = 2 * size + 1, [], 0
        for i in range(length):
            if (prompt_length + i) % size == 0:
                first = max([-1, *order]) + 1
            order.append(first + rng.randrange(3))
        order[-1] = max(order) + 1
        order = np.unique(order, return_inverse=True)[1].tolist()  # without steps that unmask nothing
        prompt = "".join(rng.choices("0123456789", k=prompt_length))
        trajectories.append(Trajectory(prompt, "", rng.choices(range(4, 40), k=length), order))
    expected = [naive_order_accuracy(model, trajectory) for trajectory in trajectories]
    assert order_accuracy(model, trajectories) == pytest.approx(expected, rel=1e-6)
    expected = [naive_tds(model, trajectory) for trajectory in trajectories]
    assert replayed_tds(model, trajectories) == pytest.approx(expected, rel=1e-4)


def naive_tds(model, trajectory):
    """Positions and moments in Python loops: the variance as the mean square less the squared mean."""
    tokens, order = trajectory.response_token_ids, trajectory.decoding_order
    end = tokens.index(model.eos_token_id) if model.eos_token_id in tokens else len(tokens)
    variances = []
    for now in range(max(order) + 1):
        counted = [e for i, e in naive_entropy(model, trajectory, now).items() if i <= end]
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


@pytest.fixture(scope="module", params=["sdar", "Fast_dLLM_Qwen"])
def block_model(request, tmp_path_factory):
    return replace(block_causal_model(tmp_path_factory.mktemp("model") / "m", request.param), block_size=4)


def entropies_in_blocks(model, trajectory):
    """Before each step of each block, in loops: the entropies of its masked positions, and their steps."""
    prompt, tokens = model.tokenizer(trajectory.prompt).input_ids, trajectory.response_token_ids
    text, order = prompt + tokens, [-1] * len(prompt) + trajectory.decoding_order
    for start in range(len(prompt) // 4 * 4, len(text), 4):
        own = range(max(start, len(prompt)), min(start + 4, len(text)))
        for now in sorted({order[i] for i in own} - {-1}):
            masked = [i for i in own if not 0 <= order[i] < now]
            shown = text[: own[-1] + 1] + [model.mask_token_id] * (start + 4 - own[-1] - 1)
            for i in masked:
                shown[i] = model.mask_token_id
            inputs = model.inputs(torch.tensor([shown]))
            with torch.no_grad():
                logits = model.model(**inputs).logits[0].roll(model.logits_shift, 0)[masked]
            yield softmax_entropy(logits).tolist(), [order[i] for i in masked]


def make_block_trajectories(model, rng):
    for length, prompt in ((9, "1+2="), (7, "12="), (3, "123"), (1, "1")):
        order = rng.sample(range(2 * length), length)  # not block by block, as with full attention
        if length > 3:
            order[rng.randrange(length)] = -1
        yield Trajectory(prompt, "", [rng.randrange(5, 15) for _ in order], order)


def test_pairs_are_counted_inside_blocks(block_model, rng):
    trajectories = list(make_block_trajectories(block_model, rng))
    for trajectory in trajectories[:-1]:  # one token has no pair
        in_order = pairs = 0
        for entropy, steps in entropies_in_blocks(block_model, trajectory):
            for e, i in zip(entropy, steps, strict=True):
                for f, j in zip(entropy, steps, strict=True):
                    pairs += 0 <= i < j
                    in_order += (0 <= i < j) and e < f
        [found] = order_accuracy(block_model, [trajectory])
        assert found == pytest.approx(in_order / pairs, rel=1e-6)


def test_tds_is_over_the_steps_of_blocks(block_model, rng):
    for trajectory in make_block_trajectories(block_model, rng):
        trajectory.response_token_ids[-1] = block_model.eos_token_id
        variances = [np.var(entropy) for entropy, _ in entropies_in_blocks(block_model, trajectory)]
        assert replayed_tds(block_model, [trajectory]) == pytest.approx([np.mean(variances)], rel=1e-4, abs=1e-9)


def test_a_record_of_which_nothing_was_unmasked_has_no_order(block_model, model):
    trajectory = Trajectory("1+2=", "", [5, 6, 7], [-1, -1, -1])
    for each in (block_model, model):
        assert np.isnan(order_accuracy(each, [trajectory])).all() and replayed_tds(each, [trajectory]) == [0]
        assert replay_tokens(each, trajectory)["probability"] == [0, 0, 0]


def test_replayed_tokens_are_seen_with_their_blocks(block_model, rng):
    for trajectory in make_block_trajectories(block_model, rng):
        found = replay_tokens(block_model, trajectory)["probability"]
        prompt = block_model.tokenizer(trajectory.prompt).input_ids
        text, order = prompt + trajectory.response_token_ids, [-1] * len(prompt) + trajectory.decoding_order
        for place, step in enumerate(trajectory.decoding_order):
            start = (len(prompt) + place) // 4 * 4
            ends = range(max(start, len(prompt)), start + 4)
            hidden = [i for i in ends if i >= len(text) or not 0 <= order[i] < step]
            shown = [*text[: start + 4], *[0] * (start + 4 - len(text))]
            for i in hidden:
                shown[i] = block_model.mask_token_id
            with torch.no_grad():
                logits = block_model.model(**block_model.inputs(torch.tensor([shown]))).logits[0]
            logits[:, block_model.mask_token_id] = -torch.inf
            p = logits[len(prompt) + place - block_model.logits_shift].softmax(-1)[trajectory.response_token_ids[place]]
            assert found[place] == (pytest.approx(p.item(), abs=1e-4) if step >= 0 else 0)
