"""One process, several processes, sharded or not, resumed or not: the same losses and the same weights."""

import json

import pytest
import torch

from tests.invariant.conftest import launch, logs, weights

STEPS = 5
FULL = json.dumps({"state_dict_type": "FULL_STATE_DICT", "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"})
SHARDED = FULL.replace("FULL_STATE_DICT", "SHARDED_STATE_DICT")


def command(inputs, folder, name, model="untied", batch_size=12, steps=STEPS, **settings):
    """A training run of batches of 12 from 22 records: every second batch has but 10."""
    settings = {
        "model": inputs / model,
        "data": inputs / "t.jsonl",
        "output_dir": folder / name,
        "supervised_window": 3,
        "rank_window": 4,
        "margin": 0.1,
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "learning_rate": 0.02,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": STEPS,
        "ddp_backend": "gloo",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **settings,
    }
    words = ["train"]
    for key, value in settings.items():
        words += [f"--{key}"] if value is None else [f"--{key}", str(value)]
    return words


MODELS = {  # what one process trains as well
    "fp32": {},
    "bf16": {"bf16": True},
    "tied": {"model": "tied"},
    "lora": {"use_peft": True, "lora_r": 4},
    "lora-bf16": {"use_peft": True, "lora_r": 4, "bf16": True},
    "nelbo-bf16": {"objective": "nelbo", "bf16": True},
}
RUNS = {  # on two processes: its model, and how it is run there
    "ddp": ("fp32", {}),
    "ddp-accumulated": ("fp32", {"batch_size": 2, "gradient_accumulation_steps": 3}),
    "ddp-lora": ("lora", {}),
    "fsdp2": ("fp32", {"fsdp": None, "fsdp_config": FULL}),
    "fsdp2-bf16": ("bf16", {"fsdp": None, "fsdp_config": SHARDED}),
    "fsdp2-tied": ("tied", {"fsdp": None, "fsdp_config": SHARDED}),
    "fsdp2-lora": ("lora", {"fsdp": None, "fsdp_config": FULL}),
    "fsdp2-lora-bf16": ("lora-bf16", {"fsdp": None, "fsdp_config": FULL}),
    "fsdp2-nelbo": ("nelbo-bf16", {"fsdp": None, "fsdp_config": FULL}),
}


@pytest.fixture(scope="module")
def folder(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    launch(folder, [command(inputs, folder, name, **settings) for name, settings in MODELS.items()])
    commands = []
    for name, (model, settings) in RUNS.items():
        commands.append(command(inputs, folder, name, **{"batch_size": 6, **MODELS[model], **settings}))
    launch(folder, commands, processes=2)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(folder, name):
    model = RUNS[name][0]
    tolerance = 2e-2 if "bf16" in model else 1e-4
    expected, got = logs(folder / model), logs(folder / name)
    assert [log["loss"] for log in got] == pytest.approx([log["loss"] for log in expected], rel=tolerance)
    assert len(got) == STEPS
    for log in got:
        assert log["loss"] == pytest.approx(log["cross_entropy"] + log["rank"], rel=1e-5), "not rounded to bf16"
    one, two = weights(folder / model), weights(folder / name)
    if model == "tied":  # gathered, both names of the one weight are written
        assert torch.equal(two.pop("lm_head.weight"), two["model.embed_tokens.weight"])
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(
            two[key], one[key], rtol=tolerance, atol=tolerance / 10, msg=lambda m, k=key: f"{k}: {m}"
        )
