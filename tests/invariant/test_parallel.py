"""Fused or not, accumulated or not, on one process or several, sharded, resumed: the same losses and weights."""

import json

import pytest
import torch

from tests.invariant.conftest import launch, logs, weights

pytestmark = pytest.mark.xdist_group("parallel")  # one process makes what all tests here read

STEPS = 5
FULL = json.dumps({"state_dict_type": "FULL_STATE_DICT", "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"})
SHARDED = FULL.replace("FULL_STATE_DICT", "SHARDED_STATE_DICT")


def command(inputs, folder, name, model="untied", batch_size=12, **settings):
    """A training run of batches of 12 from 22 records: every second batch has but 10."""
    settings = {
        "model": inputs / model,
        "data": inputs / "t.jsonl",
        "output_dir": folder / name,
        "supervised_window": 3,
        "rank_window": 4,
        "margin": 0.1,
        "max_steps": STEPS,
        "per_device_train_batch_size": batch_size,
        "learning_rate": 0.02,
        "adam_epsilon": 0.1,  # so that its step is smooth in the gradient
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
    "blocks": {"model": "blocks"},
}
ALONE = {  # on one process: the model, and how it is run in another way
    "accumulated": ("fp32", {"batch_size": 4, "gradient_accumulation_steps": 3}),
    "reference": ("fp32", {"fused_linear": False, "loss_backend": "reference"}),
}
FSDP = {"fsdp": None, "fsdp_config": FULL}
# On two processes: the model, how it is run there, and after which step it is interrupted. FSDP leaves settings in the
# environment of a process, so the runs without it come first.
RUNS = {
    "ddp": ("fp32", {}, 0),
    "ddp-accumulated": ("fp32", {"batch_size": 2, "gradient_accumulation_steps": 3}, 0),
    "ddp-lora-bf16": ("lora-bf16", {}, 3),
    "ddp-blocks": ("blocks", {"batch_size": 2, "gradient_accumulation_steps": 3}, 0),
    "fsdp2-full-state": ("fp32", FSDP, 3),
    "fsdp2-checkpointing": ("bf16", FSDP | {"gradient_checkpointing": True}, 0),
    "fsdp2-sharded-state": ("bf16", FSDP | {"fsdp_config": SHARDED}, 3),
    "fsdp2-tied": ("tied", FSDP | {"fsdp_config": SHARDED, "gradient_accumulation_steps": 3, "batch_size": 2}, 0),
    "fsdp2-lora": ("lora", FSDP, 3),
    "fsdp2-lora-bf16": ("lora-bf16", FSDP | {"fsdp_config": SHARDED}, 3),
    "fsdp2-nelbo": ("nelbo-bf16", FSDP, 0),
    "fsdp2-blocks": ("blocks", FSDP | {"fsdp_config": FULL.replace("LlamaDecoderLayer", "Qwen3MoeDecoderLayer")}, 3),
    "fsdp2-not-fused": ("bf16", FSDP | {"fused_linear": False}, 0),
}


@pytest.fixture(scope="module")
def folder(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    alone = MODELS | {name: MODELS[model] | settings for name, (model, settings) in ALONE.items()}
    launch(folder, [command(inputs, folder, name, **settings) for name, settings in alone.items()])
    commands = []
    for name, (model, settings, interrupted) in RUNS.items():
        settings = {"batch_size": 6, **MODELS[model], **settings}
        if interrupted:
            commands.append(command(inputs, folder, name, **settings, max_steps=interrupted, save_steps=interrupted))
            settings["resume_from_checkpoint"] = "auto"
        commands.append(command(inputs, folder, name, **settings))
    launch(folder, commands, processes=2)
    return folder


@pytest.mark.parametrize("name, model", [(name, run[0]) for name, run in (ALONE | RUNS).items()])
def test_every_way_to_train_gives_the_same(folder, name, model):
    tolerance = 2e-2 if "bf16" in model else 1e-5
    expected, got = logs(folder / model), logs(folder / name)
    assert [log["loss"] for log in got] == pytest.approx([log["loss"] for log in expected], rel=tolerance)
    assert len(got) == STEPS
    for log in got:
        parts = log["cross_entropy"] + 0.3 * log["rank"]  # 0.3 is the default weight; rank is 0 without a ranking
        assert log["loss"] == pytest.approx(parts, rel=1e-5), "not rounded to bf16"
    one, two = weights(folder / model), weights(folder / name)
    if model == "tied":  # gathered, both names of the one weight are written
        assert torch.equal(two.pop("lm_head.weight"), two["model.embed_tokens.weight"])
    assert one.keys() == two.keys()
    for key in one:
        error = (two[key] - one[key]).norm() / one[key].norm()
        assert error < tolerance * (5 if "lora" in model else 1), f"{key}: {error:.1e}"  # an adapter is all update
