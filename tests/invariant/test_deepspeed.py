"""DeepSpeed's ZeRO-3 on two processes: the losses and weights of one, also when it is resumed."""

import json
from importlib.util import find_spec

import pytest
import torch

from tests.invariant.conftest import launch, logs, weights
from tests.invariant.test_parallel import STEPS, command

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

MODELS = {"fp32": {}, "tied": {"model": "tied"}, "lora": {"use_peft": True, "lora_r": 4}}


def write_config(folder, gathers=True):
    """What `deepspeed_zero3.yaml` asks for, in DeepSpeed's own words."""
    zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": gathers}
    sizes = dict.fromkeys(
        ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
    )
    path = folder / f"zero3-{gathers}.json"
    path.write_text(json.dumps({"zero_optimization": zero, "zero_allow_untested_optimizer": True, **sizes}))
    return path


def test_zero3_trains_as_one_process(inputs, tmp_path):
    launch(tmp_path, [command(inputs, tmp_path, f"{name}-one", **model) for name, model in MODELS.items()])
    sharded = {"batch_size": 6, "deepspeed": write_config(tmp_path)}
    runs = [command(inputs, tmp_path, name, **model, **sharded) for name, model in MODELS.items()]
    interrupted = command(inputs, tmp_path, "resumed", max_steps=2, save_steps=2, **sharded)
    resumed = [*command(inputs, tmp_path, "resumed", **sharded), "--resume_from_checkpoint", "auto"]
    launch(tmp_path, [*runs, interrupted, resumed], processes=2, DS_ACCELERATOR="cpu")
    for name in (*MODELS, "resumed"):
        one = tmp_path / f"{name.replace('resumed', 'fp32')}-one"
        expected = [log["loss"] for log in logs(one)]
        assert len(expected) == STEPS and [log["loss"] for log in logs(tmp_path / name)] == pytest.approx(
            expected, 1e-4
        )
        a, b = weights(one), weights(tmp_path / name)
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(b[key], a[key], rtol=1e-3, atol=1e-5)


def test_what_would_save_no_model_is_refused_before_training(inputs, tmp_path):
    words = command(inputs, tmp_path, "run", batch_size=6, deepspeed=write_config(tmp_path, gathers=False))
    with pytest.raises(AssertionError, match="set it to true"):
        launch(tmp_path, [words], processes=2, DS_ACCELERATOR="cpu")
