"""Rounds on two processes, with DDP and with FSDP2: the responses, figures and weights of one process."""

import json

import pytest

from tabom.rounds.records import read_rollouts
from tests.invariant.conftest import launch, weights

FSDP = {"fsdp": None, "fsdp_config": json.dumps({"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"})}
RUNS = {"ddp": {}, "fsdp2": FSDP, "fsdp2-lora": FSDP | {"use_peft": True}}

pytestmark = pytest.mark.xdist_group("improve")  # one process makes what all tests here read


def command(folder, name, batch_size, rounds=2, **settings):
    settings = {
        "task": "subtraction",
        "num_prompts": 10,
        "samples_per_prompt": 4,
        "rounds": rounds,
        "objective": "policy",
        "output_dir": folder / name,
        "per_device_train_batch_size": batch_size,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "ddp_backend": "gloo",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **settings,
    }
    words = ["improve"]
    for key, value in settings.items():
        words += [f"--{key}"] if value is None else [f"--{key}", str(value)]
    return words


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Each run is interrupted after its first round."""
    folder = tmp_path_factory.mktemp("rounds")
    launch(folder, [command(folder, "alone", 20), command(folder, "alone-lora", 20, use_peft=True)])
    commands = []
    for name, settings in RUNS.items():
        commands += [command(folder, name, 10, rounds=rounds, **settings) for rounds in (1, 2)]
    launch(folder, commands, processes=2)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_make_the_rounds_of_one(folder, name):
    alone = folder / ("alone-lora" if "lora" in name else "alone")
    ours, theirs = (json.loads((each / "rounds.json").read_text()) for each in (folder / name, alone))
    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in {"reward", "learnt", "steps", "policy", "ratio", "kl", "entropy"} & a.keys():
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), key
        assert a["accuracy"] == b["accuracy"]
    for number in ("001", "002"):
        ids = [
            [r["response_token_ids"] for r in read_rollouts(each / "rounds" / number)]
            for each in (folder / name, alone)
        ]
        assert ids[0] == ids[1]
    one, two = weights(alone), weights(folder / name)
    assert one.keys() == two.keys()
    for key in one:
        assert (two[key] - one[key]).norm() <= 1e-4 * one[key].norm(), key
