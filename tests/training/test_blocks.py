"""Training of block-causal models, against one block at a time behind recomputed clean blocks."""

import json
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch.nn import functional

from tabom import load
from tabom.data.prompts import read_prompts
from tabom.data.tokenized import TokenizedTrajectory
from tabom.data.trajectories import Trajectory, response_blocks
from tabom.models.diffusion_model import LogitRows
from tabom.training.collator import TrajectoryCollator
from tabom.training.examples import TrajectoryDataset
from tabom.training.forward import add_loss_to_forward
from tabom.training.head import HeadStatus
from tabom.training.objectives import Example, ObjectiveSettings, Target, make_target, make_targets
from tabom_kernels import count_ordered_pairs
from tests.models.block_causal import block_causal_model
from tests.training.test_trainer import StopAt, assert_same, config, train, weights

TYPES = ["sdar", "llada2_moe", "Fast_dLLM_Qwen"]
MARGIN, RANK_WEIGHT = 0.1, 0.7


def make_trajectories(rng, block_size, lengths=None):
    """Answers decoded block by block, with ties, tokens that were never unmasked, and prompts of all remainders."""
    trajectories = []
    for prompt_length, length in lengths or [
        (1, 3),
        (block_size, 2 * block_size),
        (block_size + 3, 1),
        (5, 29),
        (2, 13),
    ]:
        order, first = [], 0
        for i in range(length):
            if (prompt_length + i) % block_size == 0:
                first = max([first, *(step + 1 for step in order)])
            order.append(first + rng.randrange(-1, 5) if rng.random() < 0.9 else -1)
        order[rng.randrange(length)] = 0
        prompt = "".join(rng.choices("0123456789", k=prompt_length))
        trajectories.append(Trajectory(prompt, "", rng.choices(range(4, 40), k=length), [max(s, -1) for s in order]))
    return trajectories


def collate(model, trajectories, **settings):
    settings = ObjectiveSettings(**settings, block_size=model.block_size)
    dataset = TrajectoryDataset(trajectories, model.tokenizer, settings, seed=5)
    examples = [dataset[0, i] for i in range(len(dataset))]
    collator = TrajectoryCollator(model.mask_token_id, model.pad_token_id, model.logit_rows, model.block_size)
    return collator(examples), examples


def logits_behind_clean_blocks(model, prompt, response, masked, block):
    """(b, V) logits of the tokens of a block, which is noisy behind clean blocks; the sequence ends with it."""
    size, text = model.block_size, torch.tensor(prompt + response)
    start, end = block * size, (block + 1) * size
    ids = torch.full((end,), model.mask_token_id)
    ids[: min(end, len(text))] = text[:end]
    hidden = torch.zeros(len(text), dtype=torch.bool)
    hidden[len(prompt) :] = torch.from_numpy(masked)
    ids[start : min(end, len(text))][hidden[start:end]] = model.mask_token_id
    position = torch.arange(end)
    allowed = position // size <= position[:, None] // size
    bias = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill_(~allowed, -1e30)
    logits = model.model(input_ids=ids[None], attention_mask=bias[None, None]).logits[0]
    return logits.roll(model.logits_shift, 0)[start:end]


def loss_block_by_block(model, examples, rank_weight):
    """The loss from its formulas: one forward a block, one response after the other."""
    tokens = sum(target.num_tokens for _, _, target, *_ in examples)
    cross_entropy, ranks = 0.0, []
    for prompt, response, target, *_ in examples:
        of_blocks = []
        for block in range(len(prompt) // model.block_size, -(-(len(prompt) + len(response)) // model.block_size)):
            logits = logits_behind_clean_blocks(model, prompt, response, target.masked, block)
            places = range(block * model.block_size, (block + 1) * model.block_size)
            own = [(at, p - len(prompt)) for at, p in enumerate(places) if 0 <= p - len(prompt) < len(response)]
            log_p = {i: logits[at].log_softmax(-1) for at, i in own}
            for i in log_p:
                if target.supervised[i]:
                    cross_entropy = cross_entropy - float(target.token_weights[i]) * log_p[i][response[i]] / tokens
            entropy = {i: -(x.exp() * x).sum() for i, x in log_p.items()}
            steps = target.steps
            pairs = [(i, j) for i in log_p for j in log_p if 0 <= steps[i] < steps[j]]
            if pairs:
                of_blocks.append(
                    sum(functional.softplus(entropy[i] - entropy[j] + MARGIN) for i, j in pairs) / len(pairs)
                )
        if of_blocks:
            ranks.append(sum(of_blocks) / len(of_blocks))
    return cross_entropy + (rank_weight * sum(ranks) / len(ranks) if rank_weight else 0.0)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("settings", [{"supervised_window": 2, "rank_window": 3}, {}, {"objective": "nelbo"}])
@pytest.mark.parametrize("model_type", TYPES)
def test_one_forward_is_one_block_at_a_time_behind_clean_blocks(tmp_path, rng, seed, model_type, settings):
    model = block_causal_model(tmp_path / "m", model_type, seed)
    model.model.double().config._experts_implementation = "eager"  # grouped products know no fp64
    rank_weight = 0.0 if settings.get("objective") else RANK_WEIGHT
    trajectories = make_trajectories(rng, model.block_size)
    batch, examples = collate(model, trajectories, **settings)
    expected = loss_block_by_block(model, examples, rank_weight)
    expected.backward()
    wanted = gradients(model)
    model.model.zero_grad()
    add_loss_to_forward(model.model, rank_weight=rank_weight, margin=MARGIN)
    output = model.model(**batch)
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-7)
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():  # by norms, because rotary positions are fp32 in a model of fp64 as well
        assert (gradient - wanted[name]).norm() <= 1e-5 * wanted[name].norm() + 1e-9, name


def test_eager_attention_gives_the_loss_of_sdpa(tmp_path, rng):
    losses = []
    block_causal_model(tmp_path / "m", "sdar")
    trajectories = make_trajectories(rng, 4)
    for attention in ("sdpa", "eager"):
        model = load(tmp_path / "m", attn_implementation=attention)
        batch, _ = collate(model, trajectories)
        add_loss_to_forward(model.model)
        losses.append(model.model(**batch).loss)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


def test_prompts_are_answered_while_a_block_causal_model_trains(tmp_path, rng):
    model, path = block_causal_model(tmp_path / "m", "sdar"), tmp_path / "p.jsonl"
    model.model.generation_config.max_new_tokens = 6
    path.write_text("".join(json.dumps({"question": f"{n}=", "answer": str(n)}) + "\n" for n in range(3)))
    args = config(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer = train(model, make_trajectories(rng, 4), args, eval_prompts=read_prompts(path)[0])
    assert [log["eval_checked_answers"] for log in trainer.state.log_history if "eval_checked_answers" in log] == [3, 3]


def test_positions_of_a_batch():
    """612 positions for a prompt of 100 and a response of 256: one clean copy, and one noisy copy of the response."""
    target = Target(np.ones(256, bool), np.ones(256, bool), np.arange(256), np.ones(256, np.float32), 256)
    batch = TrajectoryCollator(1, 0, LogitRows(0), block_size=4)([Example([5] * 100, [6] * 256, target)])
    assert batch["input_ids"].shape == batch["position_ids"].shape == batch["is_noisy"].shape == (1, 612)
    assert batch["position_ids"][0].tolist() == [*range(356), *range(100, 356)]
    assert batch["lengths"] == [4] * 64


def test_a_response_counts_once_whatever_its_number_of_blocks(tmp_path, rng):
    model = block_causal_model(tmp_path / "m", "sdar")
    lengths = [(4, 4), (1, 30), (7, 2), (2, 9)]
    trajectories = [Trajectory("1" * n, "", [5] * length, list(range(length))) for n, length in lengths]
    batch, _ = collate(model, trajectories, objective="nelbo", drawn_per="response")
    has_pair = count_ordered_pairs(batch["steps"], batch["cu_seqlens"]) > 0
    blocks = [len(response_blocks(n, length, 4)) for n, length in lengths]
    shares = [
        part[pairs].sum()
        for part, pairs in zip(batch["sequence_weights"].split(blocks), has_pair.split(blocks), strict=True)
    ]
    torch.testing.assert_close(torch.stack(shares), torch.tensor([float(share > 0) for share in shares]))
    assert batch["num_sequences"] == sum(share > 0 for share in shares)


@pytest.mark.parametrize("model_type", TYPES)
def test_training_lowers_the_loss_in_the_head(tmp_path, rng, model_type):
    model = block_causal_model(tmp_path / "m", model_type)
    trajectories = make_trajectories(rng, model.block_size)
    args = config(tmp_path, max_steps=30, logging_steps=5, learning_rate=3e-3, eval_strategy="steps", eval_steps=15)
    trainer = train(model, trajectories, args, eval_dataset=trajectories)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < 0.8 * losses[0]
    assert model.model.lm_head.status is HeadStatus.IN_HEAD
    evaluated = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert evaluated[1] < evaluated[0]


def test_gradient_accumulation_leaves_the_weights_unchanged(tmp_path, rng):
    block_causal_model(tmp_path / "m", "sdar")
    trajectories, runs = make_trajectories(rng, 4), []
    trajectories = [*trajectories, *make_trajectories(rng, 4, [(3, 9)])]
    for batch_size, accumulation in ((6, 1), (2, 3), (1, 6)):
        settings = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        args = config(tmp_path, max_steps=4, optim="sgd", max_grad_norm=0.0, **settings)
        trainer = train(load(tmp_path / "m"), trajectories, args)
        runs.append((weights(trainer), [log["loss"] for log in trainer.state.log_history if "loss" in log]))
    for other_weights, other_losses in runs[1:]:
        assert_same(runs[0][0], other_weights, rtol=1e-4, atol=1e-5)
        assert other_losses == pytest.approx(runs[0][1], rel=1e-4)


@pytest.mark.parametrize("model_type", [*TYPES, "sdar_moe"])
def test_resuming_gives_bitwise_the_same_weights_and_a_saved_model_loads(tmp_path, rng, model_type):
    block_causal_model(tmp_path / "m", model_type)
    trajectories = make_trajectories(rng, 8)
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
    whole = train(load(tmp_path / "m"), trajectories, config(tmp_path / "whole", **settings))
    interrupted = config(tmp_path / "parts", **settings)
    train(load(tmp_path / "m"), trajectories, interrupted, callbacks=[StopAt(2)])
    resumed = train(load(tmp_path / "m"), trajectories, interrupted, resume=str(tmp_path / "parts" / "checkpoint-2"))
    assert_same(weights(whole), weights(resumed), rtol=0, atol=0)
    whole.save_model(tmp_path / "saved")
    saved, original = load(tmp_path / "saved"), load(tmp_path / "m")
    assert_same(weights(whole), dict(saved.model.named_parameters()), rtol=0, atol=0)
    conventions = [(m.block_size, m.logits_shift, m.mask_token_id) for m in (saved, original)]
    assert conventions[0] == conventions[1]


@pytest.mark.parametrize("model_type", [*TYPES, "sdar_moe"])
def test_an_adapter_learns_and_loads(tmp_path, rng, model_type):
    block_causal_model(tmp_path / "m", model_type)
    model, trajectories = load(tmp_path / "m"), make_trajectories(rng, 8)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer = train(model, trajectories, config(tmp_path / "run", max_steps=10), peft_config=adapter)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert min(losses[-3:]) < losses[0]
    trainer.save_model(tmp_path / "adapter")
    loaded = load(tmp_path / "adapter")
    assert loaded.block_size == model.block_size
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        expected = trainer.model(**model.inputs(ids)).logits
        torch.testing.assert_close(loaded.model(**loaded.inputs(ids)).logits, expected)


def test_attention_without_a_mask_of_pairs_is_refused(tmp_path, rng):
    model = block_causal_model(tmp_path / "m", "sdar")
    model.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        ValueError,
        match=r"^attn_implementation='flash_attention_2' with block_size=4: .* sdpa, eager or, on a GPU, flex",
    ):
        train(model, make_trajectories(rng, 4), config(tmp_path, max_steps=1))


def own_steps(steps):
    """Steps from 0 that count only those of these tokens; -1 stays."""
    distinct = sorted({step for step in steps if step >= 0})
    return np.array([distinct.index(step) if step >= 0 else -1 for step in steps])


@pytest.mark.parametrize("m", [1, 2, "all"])
def test_each_block_has_a_cut_and_windows_of_its_own(m):
    """The steps of two blocks of 4 behind a prompt of 2 are interleaved, as those of full attention are.

    Over many draws each pair of cuts of the two blocks is equally likely.
    """
    order = [0, 6, 3, 3, 9, -1, 1, 2]
    trajectory = TokenizedTrajectory([1, 1], list(range(8)), order, None, None)
    settings = ObjectiveSettings("window", m, 1, block_size=4)
    draws, cuts = 800, Counter()
    for seed in range(draws):
        target, cut_of = make_target(trajectory, settings, np.random.default_rng(seed)), []
        for block in (slice(0, 2), slice(2, 6), slice(6, 8)):
            steps, visible = own_steps(order[block]), ~target.masked[block]
            cut = int(steps[visible].max()) + 1 if visible.any() else 0
            assert (visible == ((steps >= 0) & (steps < cut))).all()
            ahead = steps - cut
            supervised = (ahead >= 0) & (ahead < (99 if m == "all" else m))
            assert (target.supervised[block] == supervised).all() and supervised.any()
            assert (target.steps[block] == np.where(ahead == 0, steps, -1)).all()
            weight = (steps >= 0).sum() / supervised.sum() if m == "all" else 1
            assert (target.token_weights[block][supervised] == np.float32(weight)).all()
            cut_of.append(cut)
        assert target.num_tokens == (7 if m == "all" else target.supervised.sum())
        cuts[tuple(cut_of)] += 1
    assert len(cuts) == {1: 8, 2: 1, "all": 8}[m], cuts
    assert (
        max(abs(count / draws - 1 / len(cuts)) for count in cuts.values()) < 5 * (1 / len(cuts) / draws) ** 0.5 + 1e-9
    )


@pytest.mark.parametrize("objective", ["nelbo", "nelbo_exact", "fixed_ratio", "random_ratio"])
def test_a_rate_is_drawn_for_each_block_or_for_the_response(objective):
    trajectory = TokenizedTrajectory([1, 1], list(range(4002)), [0] * 4002, None, None)
    drawn = {}
    for drawn_per in ("block", "response"):
        settings = ObjectiveSettings(objective, mask_ratio=0.3, drawn_per=drawn_per, block_size=2002)
        target = make_target(trajectory, settings, np.random.default_rng(5))
        drawn[drawn_per] = [target.masked[part].mean() for part in (slice(0, 2000), slice(2000, 4002))]
        weights = [set(target.token_weights[part]) for part in (slice(0, 2000), slice(2000, 4002))]
        assert all(len(each) == 1 for each in weights)
        if objective.startswith("nelbo"):
            assert (weights[0] == weights[1]) == (drawn_per == "response")
            assert [1 / each.pop() for each in weights] == pytest.approx(drawn[drawn_per], abs=0.05)
            assert target.num_tokens == 4002
        else:
            assert target.num_tokens == target.masked.sum()
    assert drawn["response"][0] == pytest.approx(drawn["response"][1], abs=0.05)
    assert (objective == "fixed_ratio") == (drawn["block"] == pytest.approx([0.3, 0.3], abs=0.01))


@pytest.mark.parametrize("objective", ["nelbo", "nelbo_exact", "fixed_ratio", "random_ratio"])
@pytest.mark.parametrize("block_size", [None, 4])
def test_complementary_masks_mask_each_token_once(rng, seed, objective, block_size):
    trajectory = TokenizedTrajectory([1], list(range(17)), [rng.randrange(9) for _ in range(17)], None, None)
    settings = ObjectiveSettings(objective, complementary_masks=True, block_size=block_size)
    first, second = make_targets(trajectory, settings, np.random.default_rng(seed))
    assert (first.masked ^ second.masked).all()
    assert (second.masked == second.supervised).all() and (second.steps[~second.masked] == -1).all()
    if objective.startswith("nelbo"):
        rates = 1 / first.token_weights.astype(float)
        np.testing.assert_allclose(1 / second.token_weights, np.maximum(1 - rates, 1e-3), rtol=1e-3)
        assert first.num_tokens == second.num_tokens == 17
    else:
        assert first.num_tokens + second.num_tokens == 17 and (second.token_weights == 1).all()


@pytest.mark.parametrize(
    "settings, problem",
    [
        ({"tokens_per_step": 0}, "^tokens_per_step=0: expected at least 1"),
        ({"tokens_per_step": 4, "parallel_share": 0.0}, "^parallel_share=0.0: expected a share in"),
        ({"parallel_share": 0.5}, "^parallel_share=0.5 with tokens_per_step=1: all cuts are those of one token a step"),
        ({"tokens_per_step": 4, "objective": "nelbo"}, "^tokens_per_step=4 with objective='nelbo': it has an effect"),
        ({"tokens_per_step": 4, "every_cut": True}, "^tokens_per_step=4 with every_cut=True: no cut is drawn"),
        ({"drawn_per": "response"}, "^drawn_per='response' with objective='tabom': it has an effect with nelbo,"),
        ({"complementary_masks": True}, "^complementary_masks=True with objective='tabom': "),
        (
            {"min_mask_rate": 0.1},
            "^min_mask_rate=0.1 with objective='tabom': it has an effect with nelbo, random_ratio",
        ),
        (
            {"objective": "nelbo", "every_cut": True},
            "^every_cut=True with objective='nelbo': .* tabom, window, policy only",
        ),
        (
            {"objective": "nelbo", "min_mask_rate": 0.9, "max_mask_rate": 0.1},
            "^min_mask_rate=0.9 with max_mask_rate=0.1",
        ),
        ({"objective": "nelbo", "max_mask_rate": 1.5}, "^min_mask_rate=0.0 with max_mask_rate=1.5: expected shares"),
        ({"every_cut": True, "skip_last_step": True}, "^skip_last_step=True with every_cut=True: no cut is drawn"),
        ({"every_cut": True, "window_unit": "tokens"}, "^window_unit='tokens' with every_cut=True: "),
    ],
)
def test_a_setting_that_the_objective_does_not_have_is_refused(tmp_path, settings, problem):
    with pytest.raises(ValueError, match=problem) as error:
        config(tmp_path, **settings)
    assert len(str(error.value).splitlines()) == 1


BLOCK_CAUSAL_ONLY = [
    {"objective": "nelbo", "drawn_per": "response"},
    {"every_cut": True},
    {"first_token_logits": "noisy"},
    {"pad_last_block": True},
]


@pytest.mark.parametrize("settings", BLOCK_CAUSAL_ONLY, ids=lambda settings: list(settings)[-1])
def test_a_setting_of_blocks_is_refused_with_full_attention(tmp_path, model, rng, settings):
    *_, (name, value) = settings.items()
    with pytest.raises(ValueError, match=f"^{name}={value!r}: it has an effect with block-causal models only") as error:
        train(model, make_trajectories(rng, 4), config(tmp_path, **settings))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "settings, problem",
    [
        ({"drop_short": True}, "^drop_short=True with block_size=4: every block is learnt"),
        ({"first_token_logits": "noisy"}, "^first_token_logits='noisy': the logits of this model are not shifted"),
    ],
)
def test_a_setting_that_a_block_causal_model_does_not_have_is_refused(tmp_path, rng, settings, problem):
    model = block_causal_model(tmp_path / "m", "sdar")
    with pytest.raises(ValueError, match=problem) as error:
        train(model, make_trajectories(rng, 4), config(tmp_path, **settings))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["complementary_masks", "every_cut"])
def test_copies_of_a_record_are_refused_of_a_stream(tmp_path, rng, name):
    model = block_causal_model(tmp_path / "m", "sdar")
    objective = "nelbo" if name == "complementary_masks" else "tabom"
    args = config(tmp_path, objective=objective, max_steps=1, **{name: True})
    stream = datasets.Dataset.from_list([each.to_record() for each in make_trajectories(rng, 4)]).to_iterable_dataset()
    with pytest.raises(ValueError, match=f"^{name}=True with a streaming train_dataset: .* expected a data set"):
        train(model, stream, args)


def test_a_padded_block_is_learnt_whole_and_last(tmp_path, rng):
    model = block_causal_model(tmp_path / "m", "sdar")
    trajectory = Trajectory("12", "", [7, 8, 9], [1, 0, 2])
    padding = {"block_padding": (4, model.pad_token_id)}
    for options, length, order in (
        (padding, 6, [1, 0, 2, 3, 4, 5]),
        ({"max_response_length": 2, **padding}, 2, [1, 0]),
        ({"max_response_length": 4, "pad_token_id": model.pad_token_id, **padding}, 6, [1, 0, 2, 3, 4, 5]),
    ):
        dataset = TrajectoryDataset([trajectory], model.tokenizer, ObjectiveSettings(block_size=4), 0, **options)
        assert dataset.table[0]["response_token_ids"] == ([7, 8, 9] + [model.pad_token_id] * 3)[:length]
        assert dataset.table[0]["decoding_order"] == order


@pytest.mark.parametrize(
    "settings",
    [
        {"pad_response": True, "max_response_length": 11},
        {"window_unit": "tokens"},
        {"rank_ties": True},
        {"every_cut": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_other_settings_train_as_well(tmp_path, rng, settings):
    model = block_causal_model(tmp_path / "m", "sdar")
    args = config(tmp_path, max_steps=12, learning_rate=3e-3, loss_average="micro_batch", **settings)
    trainer = train(model, make_trajectories(rng, 4), args)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert min(losses[-3:]) < losses[0]


def test_the_auxiliary_loss_of_the_experts_is_the_models_own(tmp_path, rng):
    """Its value for the tokens of both copies, without the padding, as a mean over the micro-batches of a step."""
    block_causal_model(tmp_path / "m", "sdar_moe")
    trajectories, losses = make_trajectories(rng, 4, [(3, 9), (1, 4), (6, 14), (2, 2)]), {}
    settings = {"seed": 5, "max_steps": 1, "train_sampling_strategy": "sequential"}
    for coefficient, batch_size in ((0.0, 4), (10.0, 4), (10.0, 2)):
        model = load(tmp_path / "m")
        model.model.config.output_router_logits = True
        model.model.config.router_aux_loss_coef = coefficient
        batches = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 4 // batch_size}
        trainer = train(model, trajectories, config(tmp_path, **settings, **batches))
        losses[coefficient, batch_size] = trainer.state.log_history[0]["loss"]

    model, gates = load(tmp_path / "m"), []
    for layer in model.model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, args, out: gates.append(out[0].softmax(-1)))
    add_loss_to_forward(model.model)
    _, examples = collate(model, trajectories, supervised_window=3, rank_window=4)
    collator = TrajectoryCollator(model.mask_token_id, model.pad_token_id, model.logit_rows, model.block_size)

    def balance(part):
        batch = collator(part)
        model.model(**batch)
        rows = torch.cat([gate[batch["attention_mask"].flatten().bool()] for gate in gates[-2:]])
        chosen = torch.zeros_like(rows).scatter(1, rows.topk(2).indices, 1.0)
        return 8 * (chosen.mean(0) * rows.mean(0)).sum().item()

    added = losses[10.0, 4] - losses[0.0, 4]
    assert added == pytest.approx(10 * balance(examples), rel=1e-4)
    added = losses[10.0, 2] - losses[0.0, 4]
    assert added == pytest.approx(10 * (balance(examples[:2]) + balance(examples[2:])) / 2, rel=1e-4)


def test_an_auxiliary_loss_that_cannot_be_added_is_refused(tmp_path, rng):
    model = block_causal_model(tmp_path / "m", "sdar_moe")
    model.model.config.output_router_logits = True
    with pytest.raises(ValueError, match=r"^output_router_logits=True: .* train with fused_linear and a plain head$"):
        train(model, make_trajectories(rng, 4), config(tmp_path, max_steps=1, fused_linear=False))
