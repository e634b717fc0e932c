"""What the trainer takes: streams, several evaluation sets, and records for `evaluate` and `predict`."""

import copy
import json
import random
import subprocess
import sys

import datasets
import pytest
import torch
from transformers import TrainerCallback

from tabom.data.prompts import PromptSet
from tabom.sampling.config import SamplerConfig
from tabom.training.trainer import TabomTrainer
from tests.conftest import random_model
from tests.training.test_trainer import assert_same, config, make_trajectories, weights


def records_of(trajectories):
    return [trajectory.to_record() for trajectory in trajectories]


class Lines(torch.utils.data.IterableDataset):
    """A stream of torch, which has no length."""

    def __init__(self, records):
        self.records = records

    def __iter__(self):
        return iter(self.records)


def as_streams(records):
    names = dict.fromkeys(name for record in records for name in record)
    table = datasets.Dataset.from_list([{name: record.get(name) for name in names} for record in records])
    return {"datasets": table.to_iterable_dataset(num_shards=2).with_format("torch"), "torch": Lines(records)}


def trainer_of(model, args, **kwargs):
    model = copy.deepcopy(model)
    return TabomTrainer(model=model.model, args=args, processing_class=model.tokenizer, **kwargs)


@pytest.mark.parametrize("kind", ["datasets", "torch"])
def test_a_stream_trains_as_its_records_in_their_order_do(tmp_path, rng, kind):
    model, records = random_model(3), records_of(make_trajectories(rng, 8))
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4}  # two passes
    listed = config(tmp_path / "a", **settings, train_sampling_strategy="sequential")
    expected = trainer_of(model, listed, train_dataset=records)
    expected.train()
    trainer = trainer_of(model, config(tmp_path / "b", **settings), train_dataset=as_streams(records)[kind])
    trainer.train()
    assert_same(weights(trainer), weights(expected), rtol=0, atol=0)
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == [
        entry["loss"] for entry in expected.state.log_history if "loss" in entry
    ]
    trainer.create_model_card()
    assert "- 8 trajectories of unnamed" in (tmp_path / "b" / "README.md").read_text()


def test_a_resumed_stream_goes_on_where_it_was(tmp_path, rng):
    model, records = random_model(3), records_of(make_trajectories(rng, 6))
    settings = {"per_device_train_batch_size": 2, "max_steps": 5, "save_strategy": "steps", "save_steps": 4}
    whole = trainer_of(model, config(tmp_path, **settings), train_dataset=Lines(records))
    whole.train()
    resumed = trainer_of(model, config(tmp_path, **settings), train_dataset=Lines(records))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))  # in the second pass
    assert_same(weights(resumed), weights(whole), rtol=0, atol=0)


def weights_and_loss(folder, processes, seed):
    """Trains on a stream in batches of 4 of 8 records, and evaluates 5, so that one of two processes has fewer."""
    records = records_of(make_trajectories(random.Random(seed), 13))
    sizes = {f"per_device_{each}_batch_size": 4 // processes for each in ("train", "eval")}
    backend = "gloo" if processes > 1 else None
    args = config(folder, max_steps=3, optim="sgd", max_grad_norm=0.0, ddp_backend=backend, **sizes)
    trained, evaluated = (as_streams(each)["datasets"] for each in (records[:8], records[8:]))
    trainer = trainer_of(random_model(3), args, train_dataset=trained, eval_dataset=evaluated)
    trainer.train()
    return weights(trainer), trainer.evaluate()["eval_loss"]


DATA_PARALLEL = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
from tests.training.test_sources import weights_and_loss
result = weights_and_loss(sys.argv[2], 2, int(sys.argv[3]))
if os.environ["RANK"] == "0":
    torch.save(result, sys.argv[2] + "/out")
torch.distributed.destroy_process_group()  # an exit without it can abort in gloo's threads
"""


def test_two_processes_share_a_stream(tmp_path, seed, pytestconfig):
    script = tmp_path / "train.py"
    script.write_text(DATA_PARALLEL)
    arguments = [str(script), str(pytestconfig.rootpath), str(tmp_path), str(seed)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([sys.executable, *launcher, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (two, two_loss), (one, one_loss) = torch.load(tmp_path / "out"), weights_and_loss(tmp_path / "one", 1, seed)
    assert_same(one, two, rtol=1e-4, atol=1e-5)
    assert two_loss == pytest.approx(one_loss, rel=1e-4)


def test_streams_that_cannot_be_trained_say_why(tmp_path, rng):
    model, records = random_model(3), records_of(make_trajectories(rng, 4))
    stop = {"max_steps": 1, "per_device_train_batch_size": 2}
    with pytest.raises(ValueError, match="max_steps has to be specified"):
        trainer_of(model, config(tmp_path), train_dataset=Lines(records))
    with pytest.raises(ValueError, match="dataloader_num_workers=1 with a streaming train_dataset"):
        trainer_of(model, config(tmp_path, **stop, dataloader_num_workers=1), train_dataset=Lines(records))
    with pytest.raises(ValueError, match="the stream holds no record"):
        trainer_of(model, config(tmp_path, **stop), train_dataset=Lines([])).train()
    with pytest.raises(ValueError, match="record 2: field 'prompt': missing"):
        trainer_of(model, config(tmp_path, **stop), train_dataset=Lines([records[0], {}])).train()
    model.model.config.max_position_embeddings, model.model.config.rope_parameters = 4, None
    with pytest.raises(ValueError, match="train_dataset: a record of 9 tokens"):
        long = {"prompt": "1+1=", "response": "12345"}
        trainer_of(model, config(tmp_path, **stop), train_dataset=Lines([long])).train()


def test_a_loss_that_is_not_finite_names_the_records_of_a_stream(tmp_path, rng):
    model, records = random_model(3), records_of(make_trajectories(rng, 8))
    args = config(tmp_path, per_device_train_batch_size=2, max_steps=3)
    trainer = trainer_of(model, args, train_dataset=Lines(records))

    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                model.lm_head.weight.data[:] = torch.nan

    trainer.add_callback(Break())
    with pytest.raises(FloatingPointError, match=r"step 3: the loss is not finite \(rank 0, records \[4, 5\];"):
        trainer.train()


def test_several_evaluation_sets_have_figures_of_their_own(tmp_path, rng):
    model = random_model(3)
    first, second = (records_of(make_trajectories(rng, count)) for count in (8, 5))
    sets = {"a": first, "b": second, "c": Lines(second)}
    args = config(tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1)
    trainer = trainer_of(model, args, train_dataset=first, eval_dataset=sets)
    expected = {
        name: trainer_of(model, config(tmp_path), eval_dataset=each).evaluate()["eval_loss"]
        for name, each in (("a", first), ("b", second))
    }
    metrics = trainer.evaluate()
    expected["c"] = pytest.approx(
        expected["b"], rel=1e-6
    )  # a stream comes in another order, so the sum is rounded otherwise
    assert {name: metrics[f"eval_{name}_loss"] for name in "abc"} == expected
    assert "eval_loss" not in metrics
    assert trainer.evaluate("b")["eval_loss"] == expected["b"]
    assert trainer.evaluate(first)["eval_loss"] == expected["a"]
    assert trainer.evaluate({"x": second}, metric_key_prefix="new")["new_x_loss"] == expected["b"]
    predicted = trainer.predict(second)
    assert predicted.metrics["test_loss"] == expected["b"] and predicted.predictions is None
    trainer.train()
    assert {"eval_a_loss", "eval_b_loss", "eval_c_loss"} <= set().union(*trainer.state.log_history)
    tables = {name: datasets.Dataset.from_list([{"prompt": "1", "response": name}]) for name in "12"}
    assert {"eval_1_loss", "eval_2_loss"} <= set(trainer.evaluate(datasets.DatasetDict(tables)))


def test_prompts_are_answered_once_beside_several_sets_and_not_for_other_records(tmp_path, rng):
    records = records_of(make_trajectories(rng, 4))
    prompts = PromptSet("p", ["1+1="], ["2"])
    options = {"eval_prompts": prompts, "eval_sampler": SamplerConfig(max_new_tokens=2)}
    args = config(tmp_path, metric_for_best_model="accuracy")
    trainer = trainer_of(random_model(3), args, eval_dataset={"a": records, "b": records}, **options)
    metrics = trainer.evaluate()
    assert {name for name in metrics if "accuracy" in name} == {"eval_accuracy"}
    assert [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry] == [
        metrics["eval_accuracy"]
    ]
    for other in (trainer.evaluate(records), trainer.evaluate("a"), trainer.predict(records).metrics):
        assert not [name for name in other if "accuracy" in name]
    single = trainer_of(random_model(3), args, eval_dataset=records, **options)
    assert single.evaluate()["eval_accuracy"] == metrics["eval_accuracy"]
    assert json.dumps(single.state.log_history)


def test_the_best_of_several_sets_needs_a_name(tmp_path, rng):
    records = records_of(make_trajectories(rng, 4))
    best = {"load_best_model_at_end": True, "save_strategy": "epoch", "eval_strategy": "epoch", "num_train_epochs": 1}
    sets = {"train_dataset": records, "eval_dataset": {"a": records, "b": records}}
    with pytest.raises(ValueError, match="metric_for_best_model='loss' with several evaluation sets: expected eval_a_"):
        trainer_of(random_model(3), config(tmp_path, **best), **sets)
    trainer = trainer_of(random_model(3), config(tmp_path, **best, metric_for_best_model="eval_b_loss"), **sets)
    trainer.train()
    assert trainer.state.best_global_step == 1
