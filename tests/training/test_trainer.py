import copy
import json
import subprocess
import sys
from contextlib import contextmanager

import datasets
import numpy as np
import pytest
import torch
from packaging.version import Version
from torch._dynamo.utils import counters
from transformers import TrainerCallback
from transformers.integrations.peft import MIN_PEFT_VERSION

from tabom.data.tokenized import tokenize
from tabom.data.trajectories import Trajectory
from tabom.evaluation.metrics import count_pairs_in_order
from tabom.models.diffusion_model import describe
from tabom.models.loading import load
from tabom.training import examples
from tabom.training.collator import TrajectoryCollator
from tabom.training.config import TabomConfig
from tabom.training.examples import FILLER, EpochSampler, TrajectoryDataset
from tabom.training.forward import add_loss_to_forward
from tabom.training.objectives import ObjectiveSettings, make_target
from tabom.training.trainer import TabomTrainer
from tabom.training.windows import example_rng
from tabom_kernels import count_ordered_pairs, softmax_entropy, tabom_loss
from tests.conftest import random_model

OBJECTIVES = ["tabom", "window", "nelbo", "nelbo_exact", "fixed_ratio"]


def make_trajectories(rng, count=24):
    """Random answers of different lengths with ties and -1 among their steps."""
    trajectories = []
    for _ in range(count):
        length = rng.randrange(1, 12)
        prompt = "".join(rng.choices("0123456789", k=rng.randrange(1, 8))) + "="
        order = [rng.randrange(-1, length) for _ in range(length)]
        order[rng.randrange(length)] = length - 1
        trajectories.append(Trajectory(prompt, "", rng.choices(range(4, 40), k=length), order))
    return trajectories


def config(tmp_path, **changes):
    settings = {
        "output_dir": str(tmp_path),
        "supervised_window": 3,
        "rank_window": 4,
        "rank_margin": 0.1,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
        **changes,
    }
    return TabomConfig(**settings)


def train(diffusion_model, trajectories, args, resume=None, **kwargs):
    trainer = TabomTrainer(
        model=diffusion_model.model,
        args=args,
        train_dataset=trajectories,
        processing_class=diffusion_model.tokenizer,
        **kwargs,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def collate(diffusion_model, trajectories, **settings):
    dataset = TrajectoryDataset(trajectories, diffusion_model.tokenizer, ObjectiveSettings(**settings), seed=5)
    examples = [dataset[0, i] for i in range(len(dataset))]
    return TrajectoryCollator(diffusion_model.mask_token_id, diffusion_model.pad_token_id, diffusion_model.logit_rows)(
        examples
    ), examples


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_batch_says_what_each_row_is(model, rng, objective):
    batch, examples = collate(model, make_trajectories(rng), objective=objective, supervised_window=3, rank_window=5)
    length = batch["input_ids"].shape[1]
    flat = batch["input_ids"].flatten()
    assert (flat[batch["rows"]] == model.mask_token_id).all(), "only masked positions are asked for"
    assert (batch["attention_mask"].flatten()[batch["rows"]] == 1).all()
    for b, (prompt, response, target, *_) in enumerate(examples):
        rows = slice(*batch["cu_seqlens"][b : b + 2].tolist())
        positions = (batch["rows"][rows] - b * length - len(prompt)).tolist()
        assert positions == [i for i in range(len(response)) if target.supervised[i] or target.steps[i] >= 0]
        for position, label in zip(positions, batch["labels"][rows].tolist(), strict=True):
            assert label == (response[position] if target.supervised[position] else -100)
        shown = [response[i] if not target.masked[i] else model.mask_token_id for i in range(len(response))]
        assert batch["input_ids"][b].tolist()[: len(prompt) + len(response)] == prompt + shown
        assert batch["attention_mask"][b].sum() == len(prompt) + len(response)
    assert batch["num_sequences"] == (count_ordered_pairs(batch["steps"], batch["cu_seqlens"]) > 0).sum()
    assert batch["lengths"] == batch["cu_seqlens"].diff().tolist()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_loss_in_forward_is_the_loss_of_the_rows(model, rng, backend):
    batch, _ = collate(model, make_trajectories(rng), objective="tabom", supervised_window=3, rank_window=4)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model.model(**inputs).logits.flatten(0, 1)[batch["rows"]]
    expected = tabom_loss(
        logits, batch["labels"], batch["steps"], batch["cu_seqlens"], rank_weight=0.5, margin=0.2, backend="reference"
    )
    add_loss_to_forward(model.model, rank_weight=0.5, margin=0.2, backend=backend)
    output = model.model(**batch, return_entropy=True)
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.rank, expected.rank)
    torch.testing.assert_close(output.entropy, softmax_entropy(logits.detach()))
    assert model.model(**inputs).logits.shape[:2] == batch["input_ids"].shape, "without rows: the plain forward"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_accumulation_leaves_the_weights_unchanged(tmp_path, rng, objective):
    """One batch of 12, and 12 micro-batches of one: rows and pairs are spread unevenly over them."""
    trajectories = make_trajectories(rng)
    runs = []
    for batch_size, accumulation in ((12, 1), (4, 3), (1, 12)):
        args = config(
            tmp_path,
            objective=objective,
            max_steps=4,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            max_grad_norm=0.0,
        )
        trainer = train(random_model(3), trajectories, args)
        runs.append((weights(trainer), [log["loss"] for log in trainer.state.log_history if "loss" in log]))
    for other_weights, other_losses in runs[1:]:
        assert_same(runs[0][0], other_weights, rtol=1e-4, atol=1e-5)
        assert other_losses == pytest.approx(runs[0][1], rel=1e-4)


DATA_PARALLEL = """
import sys, random, torch
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tests.training.test_trainer import StopAt, config, make_trajectories, random_model, train, weights
root, folder, processes, stop, seed = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])
trajectories = make_trajectories(random.Random(seed))
args = config(folder / f"run-{processes}", max_steps=5, per_device_train_batch_size=12 // processes, optim="sgd",
              max_grad_norm=0.0, ddp_backend="gloo", save_strategy="steps", save_steps=3)
if stop:
    train(random_model(3), trajectories, args, callbacks=[StopAt(stop)])
resume = str(folder / f"run-{processes}" / f"checkpoint-{stop}") if stop else None
trainer = train(random_model(3), trajectories, args, resume=resume)
if trainer.is_world_process_zero():
    torch.save((weights(trainer), [log["loss"] for log in trainer.state.log_history if "loss" in log]), folder / "out")
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()  # an exit without it can abort in gloo's threads
"""


def test_two_processes_train_to_the_same_weights_also_when_resumed(tmp_path, seed, pytestconfig):
    """Batches of 12 of 24 trajectories: step 3, where the second run is interrupted, is in the middle of an epoch."""
    script = tmp_path / "train.py"
    script.write_text(DATA_PARALLEL)
    results = []
    for processes, stop in ((1, 0), (2, 3)):
        arguments = [str(script), str(pytestconfig.rootpath), str(tmp_path), str(processes), str(stop), str(seed)]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = subprocess.run([sys.executable, *launcher, *arguments], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        results.append(torch.load(tmp_path / "out"))
    (one, one_losses), (two, two_losses) = results
    assert_same(one, two, rtol=1e-4, atol=1e-5)
    assert two_losses == pytest.approx(one_losses, rel=1e-4)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("stop, workers", [(3, 0), (4, 0), (7, 0), (4, 2)])
def test_resuming_gives_bitwise_the_same_weights(tmp_path, rng, stop, workers):
    """24 trajectories in batches of 8 are 3 steps an epoch: step 3 ends one, 4 and 7 stand inside the next ones."""
    trajectories = make_trajectories(rng)
    settings = {"max_steps": 9, "save_strategy": "steps", "save_steps": stop, "dataloader_num_workers": workers}
    whole = train(random_model(3), trajectories, config(tmp_path / "whole", **settings))
    interrupted = config(tmp_path / "parts", **settings)
    train(random_model(3), trajectories, interrupted, callbacks=[StopAt(stop)])
    resumed = train(random_model(7), trajectories, interrupted, resume=str(tmp_path / "parts" / f"checkpoint-{stop}"))
    assert_same(weights(whole), weights(resumed), rtol=0, atol=0)


def test_workers_draw_the_same_cuts(tmp_path, rng):
    trajectories = make_trajectories(rng)
    runs = [
        weights(train(random_model(3), trajectories, config(tmp_path, max_steps=5, dataloader_num_workers=workers)))
        for workers in (0, 2)
    ]
    assert_same(*runs, rtol=0, atol=0)


def test_epochs_shuffle_and_cut_anew(model, rng):
    sampler = EpochSampler(10, seed=1, shuffle=True)
    epochs = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    assert epochs[0] == epochs[2] and {key[0] for key in epochs[1]} == {1}
    assert [i for _, i in epochs[0]] != [i for _, i in epochs[1]]
    assert sorted(i for _, i in epochs[1]) == list(range(10))
    long = [Trajectory("1", "", [5] * 60, list(range(60)))]
    dataset = TrajectoryDataset(long, model.tokenizer, ObjectiveSettings("tabom", 4, 4), seed=0)
    assert len({dataset[epoch, 0][2].masked.sum() for epoch in range(8)}) > 3


@pytest.mark.parametrize("length, multiple, fillers", [(10, 1, 0), (10, 4, 2), (12, 4, 0), (1, 8, 7)])
def test_an_epoch_is_filled_up_with_what_asks_nothing(model, rng, length, multiple, fillers):
    keys = list(EpochSampler(length, seed=1, shuffle=True, multiple_of=multiple))
    assert len(keys) == len(EpochSampler(length, 1, True, multiple)) == length + fillers
    assert sorted(index for _, index in keys[:length]) == list(range(length))
    assert keys[length:] == [(0, FILLER)] * fillers
    dataset = TrajectoryDataset(make_trajectories(rng, length), model.tokenizer, ObjectiveSettings(), seed=1)
    collator = TrajectoryCollator(model.mask_token_id, model.pad_token_id, model.logit_rows)
    filled, plain = (collator([dataset[key] for key in each]) for each in (keys, keys[:length]))
    for name in ("rows", "labels", "steps", "token_weights", "num_tokens", "num_sequences"):
        assert torch.equal(filled[name], plain[name]), name
    assert filled["input_ids"].shape[0] == length + fillers == len(filled["cu_seqlens"]) - 1


def test_examples_of_a_batch_are_those_of_its_keys(model, rng):
    trajectories = make_trajectories(rng, 6)
    dataset = TrajectoryDataset(trajectories, model.tokenizer, ObjectiveSettings("tabom", 4, 4), seed=0)
    keys = [(1, 4), (0, FILLER), (2, 0), (1, 4), (1, 2), (0, 4)]
    batch = dataset.__getitems__(keys)
    assert [each is None for each in batch] == [index == FILLER for _, index in keys]
    for (epoch, index), example in zip(keys, batch, strict=True):
        if index != FILLER:
            trajectory = trajectories[index]
            target = make_target(trajectory, dataset.settings, example_rng(0, epoch, index))
            assert example[:2] == (model.tokenizer(trajectory.prompt).input_ids, trajectory.response_token_ids)
            for found, expected in zip(example[2], target, strict=True):
                np.testing.assert_array_equal(found, expected)
    assert dataset.__getitems__([(0, FILLER)] * 2) == [None, None]


def test_logs_hold_the_terms_of_the_loss(tmp_path, rng):
    trainer = train(random_model(3), make_trajectories(rng), config(tmp_path, max_steps=4, rank_weight=0.5))
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 4
    for log in logs:
        assert log["loss"] == pytest.approx(log["cross_entropy"] + 0.5 * log["rank"], rel=1e-5)
        assert 0 <= log["order_accuracy"] <= 1 and 0 < log["entropy"] < 4


def test_logged_terms_are_means_over_the_steps_between_two_logs(tmp_path, rng):
    trajectories = make_trajectories(rng)
    every = train(random_model(3), trajectories, config(tmp_path, max_steps=6))
    third = train(random_model(3), trajectories, config(tmp_path, max_steps=6, logging_steps=3))
    each = [log["cross_entropy"] for log in every.state.log_history if "loss" in log]
    means = [log["cross_entropy"] for log in third.state.log_history if "loss" in log]
    assert means == pytest.approx([sum(each[:3]) / 3, sum(each[3:]) / 3], rel=1e-5)


def test_window_is_tabom_without_its_ranking(tmp_path, rng):
    trajectories = make_trajectories(rng)
    window = train(random_model(3), trajectories, config(tmp_path, max_steps=3, objective="window"))
    unranked = train(random_model(3), trajectories, config(tmp_path, max_steps=3, rank_weight=0.0))
    ranked = train(random_model(3), trajectories, config(tmp_path, max_steps=3))
    assert_same(weights(window), weights(unranked), rtol=0, atol=0)
    assert any((a != b).any() for a, b in zip(weights(window).values(), weights(ranked).values(), strict=True))


@pytest.mark.parametrize("objective", ["nelbo", "nelbo_exact"])
def test_nelbo_with_ranking_is_its_cross_entropy_and_the_hinge_over_all_masked_pairs(tmp_path, rng, objective):
    """The first step's loss by the formula, in loops over the examples that the dataset draws."""
    diffusion_model, trajectories = random_model(3), make_trajectories(rng, 8)
    args = config(tmp_path, objective=objective, rank_weight=0.7, rank_loss="hinge", max_steps=1, seed=5)
    batch, examples = collate(diffusion_model, trajectories, objective=objective)
    with torch.no_grad():
        logits = diffusion_model.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits.double()
    total, tokens, ranks = 0.0, 0, []
    for (prompt, response, target, *_), trajectory, rows in zip(examples, trajectories, logits, strict=True):
        log_p = rows[len(prompt) : len(prompt) + len(response)].log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        masked, order = target.masked.nonzero()[0], trajectory.decoding_order
        weight = len(response) / len(masked) if objective == "nelbo_exact" else target.token_weights[0]
        total -= weight * sum(log_p[i, response[i]].item() for i in masked)
        tokens += len(response)
        pairs = [(i, j) for i in masked for j in masked if 0 <= order[i] < order[j]]
        if pairs:
            ranks.append(sum(max(entropy[i] - entropy[j] + 0.1, 0) for i, j in pairs) / len(pairs))
    trainer = train(diffusion_model, trajectories, args)
    expected = total / tokens + 0.7 * float(sum(ranks)) / len(ranks)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_only_tabom_is_ranked_unless_a_weight_is_given(tmp_path):
    for objective in OBJECTIVES:
        weight = 0.3 if objective == "tabom" else 0.0
        assert config(tmp_path, objective=objective).loss_settings["rank_weight"] == weight
        assert config(tmp_path, objective=objective, rank_weight=0.7).loss_settings["rank_weight"] == 0.7


def test_reference_and_torch_backends_train_to_the_same_weights(tmp_path, rng):
    trajectories = make_trajectories(rng)
    runs = [
        weights(train(random_model(3), trajectories, config(tmp_path, max_steps=20, loss_backend=backend, optim="sgd")))
        for backend in ("reference", "torch")
    ]
    assert_same(*runs, rtol=1e-3, atol=1e-4)


def test_lora_trains_the_adapter_alone_and_loads_back(tmp_path, rng):
    peft = pytest.importorskip("peft")
    diffusion_model, trajectories = random_model(3), make_trajectories(rng)
    diffusion_model.model.save_pretrained(tmp_path / "base")
    diffusion_model.tokenizer.save_pretrained(tmp_path / "base")
    diffusion_model = load(tmp_path / "base")
    before = copy.deepcopy(diffusion_model.model.state_dict())
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trainer = train(diffusion_model, trajectories, config(tmp_path / "run", max_steps=5), peft_config=lora)
    changed = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert changed and all("lora_" in name for name in changed)
    trained_base = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): p
        for name, p in trainer.model.state_dict().items()
        if "lora_" not in name
    }
    assert_same(before, trained_base, rtol=0, atol=0)
    trainer.save_model()
    ids = torch.tensor([[5, 6, 7]])
    loaded = load(tmp_path / "run")
    torch.testing.assert_close(loaded.model(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)
    assert (loaded.model(input_ids=ids).logits - random_model(3).model(input_ids=ids).logits).abs().max() > 1e-3

    with pytest.raises(ValueError, match="peft_config: the model already carries an adapter"):
        train(loaded, trajectories, config(tmp_path / "again"), peft_config=lora)
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        with pytest.raises(ValueError, match=f"use a version >= {MIN_PEFT_VERSION}"):
            train(loaded, trajectories, config(tmp_path / "again"))
        pytest.skip(f"this transformers saves adapters that it has loaded with peft {MIN_PEFT_VERSION} or newer only")
    further = train(loaded, trajectories, config(tmp_path / "again", max_steps=5))
    further.save_model()
    assert not (tmp_path / "again" / "model.safetensors").exists()
    again = load(tmp_path / "again")
    torch.testing.assert_close(again.model(input_ids=ids).logits, further.model.eval()(input_ids=ids).logits)
    assert (again.model(input_ids=ids).logits - trainer.model(input_ids=ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("average", ["global_batch", "micro_batch"])
@pytest.mark.parametrize("fused_linear", [False, True])
def test_batches_in_which_every_trajectory_is_too_short_change_nothing(tmp_path, rng, average, fused_linear):
    """A long one stands at the end, where two steps do not come."""
    diffusion_model = random_model(3)
    trajectories = [*make_trajectories(rng), Trajectory("1", "", [5] * 110, list(range(110)))]
    before = {name: p.detach().clone() for name, p in diffusion_model.model.named_parameters()}
    args = config(
        tmp_path,
        max_steps=2,
        drop_short=True,
        supervised_window=99,
        loss_average=average,
        fused_linear=fused_linear,
        train_sampling_strategy="sequential",
    )
    trainer = train(diffusion_model, trajectories, args)
    assert [log["loss"] for log in trainer.state.log_history if "loss" in log] == [0.0, 0.0]
    assert_same(weights(trainer), before, rtol=0, atol=0)


@pytest.mark.parametrize("with_lora", [False, True])
def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path, rng, with_lora):
    peft = pytest.importorskip("peft")
    trajectories = make_trajectories(rng)
    runs, recomputed = [], []
    for checkpointing in (False, True):
        diffusion_model = random_model(3)
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="gaussian") if with_lora else None
        calls = []
        diffusion_model.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        args = config(tmp_path, max_steps=3, gradient_checkpointing=checkpointing, optim="sgd")
        runs.append(weights(train(diffusion_model, trajectories, args, peft_config=lora)))
        recomputed.append(len(calls))
    assert recomputed == [4, 7]  # the head is checked once, in a forward of its own
    assert_same(*runs, rtol=1e-5, atol=1e-6)


def test_compiled_training_gives_the_same_weights_with_one_break_in_the_first_step(tmp_path, rng):
    trajectories = make_trajectories(rng)
    eager = train(random_model(3), trajectories, config(tmp_path, max_steps=3, optim="sgd"))
    torch._dynamo.reset()
    counters.clear()
    args = config(tmp_path, max_steps=3, optim="sgd", torch_compile=True, torch_compile_backend="aot_eager")
    compiled = train(random_model(3), trajectories, args)
    assert_same(weights(eager), weights(compiled), rtol=1e-5, atol=1e-6)
    assert counters["frames"]["ok"] > 0, "something was compiled"
    [broken_by] = counters["graph_break"]
    assert "set_status" in broken_by
    compiled.save_model()
    assert_same(weights(eager), dict(load(tmp_path).model.named_parameters()), rtol=1e-5, atol=1e-6)


def test_a_trained_model_loads_back(tmp_path, rng):
    trainer = train(random_model(3), make_trajectories(rng), config(tmp_path / "run", max_steps=2))
    trainer.save_model()
    loaded = load(tmp_path / "run")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded.model(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["is_causal"] is False


def test_evaluation(tmp_path, rng):
    diffusion_model, trajectories = random_model(3), make_trajectories(rng, 8)
    trainer = TabomTrainer(
        model=diffusion_model.model,
        args=config(tmp_path),
        eval_dataset=trajectories,
        processing_class=diffusion_model.tokenizer,
    )
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_loss"] == second["eval_loss"] > 0
    dataset = TrajectoryDataset(trajectories, diffusion_model.tokenizer, config(tmp_path).objective_settings, seed=42)
    batch = TrajectoryCollator(diffusion_model.mask_token_id, diffusion_model.pad_token_id, diffusion_model.logit_rows)(
        [dataset[0, i] for i in range(8)]
    )
    assert first["eval_loss"] == pytest.approx(diffusion_model.model(**batch).loss.item(), rel=1e-5)


def test_data_sets_and_records_train_as_their_trajectories_do(tmp_path, rng):
    trajectories = make_trajectories(rng)
    records = [trajectory.to_record() for trajectory in trajectories]
    diffusion_model = random_model(3)
    tokenized, _ = tokenize(records, diffusion_model.tokenizer)
    runs = []
    for data in (trajectories, records, datasets.Dataset.from_list(records), tokenized):
        trainer = train(random_model(3), data, config(tmp_path, max_steps=3), eval_dataset=data)
        runs.append({**weights(trainer), "eval": torch.tensor(trainer.evaluate()["eval_loss"])})
    for run in runs[1:]:
        assert_same(runs[0], run, rtol=0, atol=0)
    records[1]["response_token_ids"][0] = diffusion_model.model.config.vocab_size
    with pytest.raises(
        ValueError, match=r"^record 2: field 'response_token_ids': \d+ at position 0; expected at least 0"
    ):
        train(random_model(3), records, config(tmp_path))


def test_the_main_process_tokenizes_first(tmp_path, rng, monkeypatch):
    inside = []

    @contextmanager
    def main_process_first(self, **kwargs):
        inside.append(True)
        yield
        inside.pop()

    def tokenize_inside(*args, **options):
        assert inside
        return tokenize(*args, **options)

    monkeypatch.setattr(TabomConfig, "main_process_first", main_process_first)
    monkeypatch.setattr(examples, "tokenize", tokenize_inside)
    train(random_model(3), make_trajectories(rng), config(tmp_path, max_steps=1))
    assert not inside


def test_pair_order_by_brute_force(rng):
    steps = torch.tensor([rng.randrange(-1, 4) for _ in range(30)])
    entropy, cu_seqlens = torch.rand(30), torch.tensor([0, 11, 11, 30])
    sequence = [0] * 11 + [2] * 19
    pairs = [(i, j) for i in range(30) for j in range(30) if sequence[i] == sequence[j] and 0 <= steps[i] < steps[j]]
    counts = count_pairs_in_order(entropy, steps, cu_seqlens)
    assert counts.pairs == len(pairs)
    assert counts.in_order == sum(bool(entropy[i] < entropy[j]) for i, j in pairs)


def test_models_that_do_not_fit_are_refused(model):
    causal = random_model(0)
    causal.model.config.is_causal = True
    with pytest.raises(ValueError, match="attends causally"):
        describe(causal.model, causal.tokenizer)
    model.model.config.mask_token_id = None
    model.tokenizer.mask_token = None
    with pytest.raises(ValueError, match="no mask token"):
        describe(model.model, model.tokenizer)


@pytest.mark.parametrize("padded", [False, True])
def test_records_that_the_model_has_no_positions_for(tmp_path, rng, caplog, padded):
    """Rotary positions go on beyond what was trained; those of a table end."""
    trajectories, args = make_trajectories(rng), config(tmp_path)
    if padded:
        args = config(tmp_path, pad_response=True, max_response_length=30)
    dataset = TrajectoryDataset(
        trajectories,
        random_model(0).tokenizer,
        ObjectiveSettings(),
        0,
        max_response_length=args.max_response_length,
        pad_token_id=0 if padded else None,
    )
    longest = max(len(prompt) + len(response) for prompt, response, *_ in (dataset[0, i] for i in range(len(dataset))))
    for positions, said in ((longest, False), (longest - 1, True)):
        caplog.clear()
        network = random_model(0, max_position_embeddings=positions)
        TabomTrainer(network.model, args, trajectories, processing_class=network.tokenizer)
        assert (f"train_dataset: a record of {longest} tokens" in caplog.text) is said
    network.model.config.rope_parameters = None
    with pytest.raises(ValueError, match=f"has {longest - 1} positions .*max_response_length"):
        TabomTrainer(network.model, args, trajectories, processing_class=network.tokenizer)


@pytest.mark.parametrize(
    "setting",
    [{"supervised_window": 0}, {"rank_window": -1}, {"rank_window": "some"}, {"rank_window": 1.5}, {"mask_ratio": 0.0}],
)
def test_wrong_settings_are_named(tmp_path, setting):
    [(name, value)] = setting.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        config(tmp_path, **setting)


@pytest.mark.parametrize("objective", ["tabom", "nelbo"])
def test_the_fused_head_trains_to_the_weights_of_the_reference(tmp_path, rng, objective):
    trajectories = make_trajectories(rng)
    runs = []
    for loss_backend, fused_linear in ((None, True), ("reference", False)):
        args = config(
            tmp_path,
            objective=objective,
            max_steps=50,
            learning_rate=1e-3,
            loss_backend=loss_backend,
            fused_linear=fused_linear,
        )
        runs.append(train(random_model(1), trajectories, args))
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert_same(weights(runs[0]), weights(runs[1]), rtol=1e-2, atol=1e-4)
