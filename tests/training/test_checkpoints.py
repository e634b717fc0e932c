import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from tabom.data.trajectories import Trajectory
from tabom.training import checkpoints
from tabom.training.trainer import TabomTrainer
from tests.conftest import random_model
from tests.training.test_trainer import StopAt, assert_same, config, make_trajectories, train, weights

SETTINGS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture
def trajectories(rng):
    return make_trajectories(rng)


@pytest.fixture
def interrupted(tmp_path, trajectories):
    """A run that was stopped after step 4: its arguments; checkpoints 2 and 4 are there."""
    args = config(tmp_path / "run", **SETTINGS)
    train(random_model(3), trajectories, args, callbacks=[StopAt(4)])
    return args


@pytest.fixture
def whole(tmp_path, trajectories):
    return weights(train(random_model(3), trajectories, config(tmp_path / "whole", **SETTINGS)))


def newest_whole(output_dir):
    return next(checkpoint for checkpoint in checkpoints.newest_first(output_dir) if not damage_of(checkpoint))


def damage_of(checkpoint):
    try:
        checkpoints.check_whole(checkpoint)
    except ValueError as error:
        return str(error)


def damage_nothing(checkpoint):
    pass


def delete(name):
    return lambda checkpoint: (checkpoint / name).unlink()


def truncate(checkpoint):
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.truncate(1000)


def zero_half(checkpoint):
    path = checkpoint / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


def flip_a_byte(checkpoint):
    path = checkpoint / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace(name, old, new):
    def damage(checkpoint):
        text = (checkpoint / name).read_text()
        assert old in text
        (checkpoint / name).write_text(text.replace(old, new))

    return damage


def write_manifest(content):
    return lambda checkpoint: (checkpoint / "tabom_checkpoint.json").write_text(content)


def never_finished(checkpoint):
    checkpoint.rename(checkpoint.parent / checkpoints.SAVING)


@pytest.mark.parametrize(
    "damage, problem",
    [
        (damage_nothing, None),
        (delete("optimizer.pt"), "optimizer.pt is missing"),
        (delete("scheduler.pt"), "scheduler.pt is missing"),
        (delete("rng_state.pth"), "rng_state.pth is missing"),
        (delete("tabom_checkpoint.json"), "it was not finished"),
        (truncate, "model.safetensors has 1000 bytes of"),
        (zero_half, "model.safetensors is damaged"),
        (flip_a_byte, "optimizer.pt is damaged"),
        (replace("trainer_state.json", '"global_step": 4', '"global_step": 3'), "trainer_state.json is damaged"),
        (replace("tabom_checkpoint.json", '"seed": 42', '"seed": 43'), "is not what was written"),
        (write_manifest("[]"), "expected a dict, got"),
        (write_manifest('{"run": {}, "files": {"optimizer.pt": 1}}'), "is not what was written"),
        (write_manifest("{" * 9), "is not whole"),
        (never_finished, None),
        (shutil.rmtree, None),
    ],
)
def test_auto_goes_on_from_the_newest_whole_checkpoint(interrupted, trajectories, whole, caplog, damage, problem):
    newest = checkpoints.Path(interrupted.output_dir) / "checkpoint-4"
    damage(newest)
    if problem:
        with pytest.raises(ValueError, match=problem):
            train(random_model(3), trajectories, interrupted, resume=str(newest))
    begun_at = []
    trainer = train(random_model(7), trajectories, interrupted, "auto", callbacks=[RecordStart(begun_at)])
    assert_same(weights(trainer), whole, rtol=0, atol=0)
    assert begun_at == [4 if damage is damage_nothing else 2]
    assert (problem in caplog.text) if problem else ("passed over" not in caplog.text)
    assert newest_whole(interrupted.output_dir).name == "checkpoint-6"
    assert not (newest.parent / checkpoints.SAVING / "checkpoint-4").exists(), "what was not finished is cleared away"


def test_no_random_damage_is_taken_for_a_whole_checkpoint(interrupted, rng):
    older, newest = (checkpoints.Path(interrupted.output_dir) / f"checkpoint-{step}" for step in (2, 4))
    contents = {path.name: path.read_bytes() for path in newest.iterdir()}
    others = [*contents.values(), *(path.read_bytes() for path in older.iterdir())]
    names = sorted(contents)
    tried = 0
    while tried < 200:
        name = rng.choice(names)
        content = contents[name]
        at = rng.randrange(len(content))
        match rng.choice(["flip", "truncate", "overwrite", "swap"]):
            case "flip":
                damaged = content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
            case "truncate":
                damaged = content[:at]
            case "overwrite":
                damaged = content[:at] + bytes(len(content) - at)
            case "swap":
                damaged = rng.choice(others)
        if damaged == content:
            continue
        tried += 1
        (newest / name).write_bytes(damaged)
        assert name == checkpoints.MANIFEST or name in damage_of(newest)
        assert newest_whole(interrupted.output_dir) == older
        (newest / name).write_bytes(content)
    assert newest_whole(interrupted.output_dir) == newest


class RecordStart(StopAt):
    def __init__(self, steps):
        self.steps = steps

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        pass


def test_auto_begins_where_there_is_nothing_and_true_refuses(tmp_path, trajectories, whole):
    args = config(tmp_path / "new", **SETTINGS)
    with pytest.raises(ValueError, match=r"no whole checkpoint in .*new; 'auto' starts anew"):
        train(random_model(3), trajectories, args, resume=True)
    assert_same(weights(train(random_model(3), trajectories, args, "auto")), whole, rtol=0, atol=0)


@pytest.mark.parametrize(
    "other, named",
    [
        ({"seed": 43}, "seed=42, now seed=43"),
        ({"objective": "nelbo"}, "objective='tabom', now objective='nelbo'"),
        ({"rank_margin": 0.2}, "rank_margin=0.1, now rank_margin=0.2"),
        ({"learning_rate": 2e-2}, "learning_rate=0.01, now learning_rate=0.02"),
        ({"gradient_accumulation_steps": 2}, "records_a_step=8, now records_a_step=16"),
    ],
)
def test_a_checkpoint_of_a_run_with_other_settings_is_refused(tmp_path, interrupted, trajectories, other, named):
    args = config(interrupted.output_dir, **SETTINGS | other)
    for resume in ("auto", True, f"{interrupted.output_dir}/checkpoint-2"):
        with pytest.raises(ValueError, match=f"was begun with {named}"):
            train(random_model(3), trajectories, args, resume)


def test_a_checkpoint_of_other_data_or_of_no_adapter_is_refused(interrupted, trajectories):
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match=r"data='24 trajectories, sha256 .*, now data='23 trajectories"):
        train(random_model(3), trajectories[1:], interrupted, "auto")
    with pytest.raises(ValueError, match="data="):
        train(random_model(3), trajectories[::-1], interrupted, "auto")
    with pytest.raises(ValueError, match=r"adapter=\[\], now adapter="):
        lora = peft.LoraConfig(r=4, target_modules=["q_proj"])
        train(random_model(3), trajectories, interrupted, "auto", peft_config=lora)


@pytest.mark.parametrize(
    "same", [{"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}, {"max_steps": 9}]
)
def test_what_leaves_the_weights_alone_may_change(interrupted, trajectories, same):
    trainer = train(random_model(3), trajectories, config(interrupted.output_dir, **SETTINGS | same), "auto")
    assert trainer.state.global_step == (same.get("max_steps") or 6)


def test_without_the_state_of_the_optimizer_nothing_can_be_gone_on_with(tmp_path, trajectories):
    args = config(tmp_path, **SETTINGS, save_only_model=True)
    train(random_model(3), trajectories, args)
    with pytest.raises(ValueError, match="no state of the optimizer"):
        train(random_model(3), trajectories, args, str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize("dies_in", ["_save_optimizer_and_scheduler", "_save_rng_state", "_save"])
def test_a_save_that_dies_leaves_no_checkpoint_behind(interrupted, trajectories, whole, monkeypatch, dies_in):
    plain = getattr(TabomTrainer, dies_in)

    def die(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(TabomTrainer, dies_in, die)
    with pytest.raises(KeyboardInterrupt):
        train(random_model(3), trajectories, interrupted, "auto")
    monkeypatch.undo()
    assert newest_whole(interrupted.output_dir).name == "checkpoint-4"
    assert_same(weights(train(random_model(3), trajectories, interrupted, "auto")), whole, rtol=0, atol=0)


def test_old_checkpoints_go_and_the_best_one_stays(tmp_path, trajectories):
    args = config(
        tmp_path,
        **SETTINGS,
        save_total_limit=1,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    trainer = train(random_model(3), trajectories, args, eval_dataset=trajectories)
    best = trainer.state.best_model_checkpoint
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {checkpoints.Path(best).name, "checkpoint-6"}
    saved = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == best


@pytest.mark.parametrize(
    "name", ["rank_margin", "rank_weight", "rank_temperature", "learning_rate", "weight_decay", "mask_ratio"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_settings_that_are_not_finite_are_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name}={value}: expected a finite number"):
        config(tmp_path, **{name: value})


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_learning_rate_that_blows_up_ends_the_training_and_saves_nothing(tmp_path, trajectories, max_grad_norm):
    args = config(tmp_path, max_steps=9, save_strategy="steps", save_steps=1, learning_rate=1e38, optim="sgd")
    args.max_grad_norm = max_grad_norm
    with pytest.raises(FloatingPointError, match=r"not finite"):
        train(random_model(3), trajectories, args)
    for saved in tmp_path.rglob("model.safetensors"):
        assert all(weight.isfinite().all() for weight in load_file(saved).values())


def test_two_trainings_into_one_folder_are_refused(tmp_path, trajectories):
    class TrainToo(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with pytest.raises(ValueError, match=r"^output_dir=.*: another job is writing to it; .* another one"):
                train(random_model(3), trajectories, config(tmp_path))

    assert train(random_model(3), trajectories, config(tmp_path, max_steps=1), callbacks=[TrainToo()])
    assert train(random_model(3), trajectories, config(tmp_path, max_steps=1)), "the lock is released"


def test_weights_that_are_not_finite_are_not_saved(tmp_path, trajectories):
    trainer = train(random_model(3), trajectories, config(tmp_path, max_steps=1))
    with torch.no_grad():
        trainer.model.model.norm.weight[3] = float("nan")
    with pytest.raises(FloatingPointError, match=r"model\.norm\.weight is not finite: not saved"):
        trainer.save_model()
    assert not list(tmp_path.rglob("model.safetensors"))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_is_not_finite_names_the_records_of_its_batch(tmp_path, trajectories, accumulation):
    """One record alone has the letter that the model has no finite embedding of."""
    trajectories[17] = Trajectory("+", "", [5, 6], [0, 1])
    diffusion_model = random_model(3)
    with torch.no_grad():
        diffusion_model.model.model.embed_tokens.weight[diffusion_model.tokenizer("+").input_ids] = float("nan")
    args = config(
        tmp_path,
        max_steps=20,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
    )
    step, records = (5, [16, 17, 18, 19]) if accumulation == 1 else (3, [16, 17, 18, 19, 20, 21, 22, 23])
    with pytest.raises(FloatingPointError) as error:
        train(diffusion_model, trajectories, args)
    assert f"step {step}: the loss is not finite (rank 0, records {records};" in str(error.value)


def test_data_without_anything_to_learn_is_refused_before_training(tmp_path, trajectories):
    for trajectory in trajectories:
        trajectory.decoding_order[:] = [-1] * len(trajectory.decoding_order)
    with pytest.raises(ValueError, match="none of the 24 trajectories has anything to learn"):
        train(random_model(3), trajectories, config(tmp_path))
    nelbo = train(random_model(3), trajectories, config(tmp_path, objective="nelbo", max_steps=1))
    assert nelbo.state.global_step == 1, "NELBO does not ask for an order"
