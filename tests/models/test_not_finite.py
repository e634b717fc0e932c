"""A model whose logits are not finite: decoding and measuring stop and name the cause, and no file ever holds NaN."""

import json

import pytest
import torch

from tabom.cli.main import main
from tabom.data.trajectories import Trajectory
from tabom.evaluation.likelihood import nelbo_log_likelihood, trajectory_log_likelihood
from tabom.report.alternatives import replay_tokens
from tabom.report.page import pack
from tabom.sampling.config import SamplerConfig
from tabom.sampling.engine import EngineConfig, sample
from tabom.sampling.policies import POLICIES
from tabom.sampling.sampler import denoise
from tabom.training.config import TabomConfig
from tabom.training.trainer import TabomTrainer

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12]]
TRAJECTORY = Trajectory("1+1=", "2", [6, 7, 8], [0, 1, 2])

HEAD, NORM = "lm_head.weight", "model.norm.weight"


def spoil(model, name, value=torch.nan):
    """Makes the last value of one weight not finite: of the head that is one token's row."""
    with torch.no_grad():
        model.model.get_parameter(name).view(-1)[-1] = value


@pytest.mark.parametrize("policy", [name for name, policy in POLICIES.items() if not policy.begins_alone])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_p": 0.9}], ids=["greedy", "drawn"])
def test_every_policy_stops_at_the_first_step_and_names_the_weight(model, policy, settings):
    spoil(model, HEAD)
    steps = {"steps": 6} if policy.startswith("dream_") else {}
    forwards = []
    model.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    with pytest.raises(
        FloatingPointError, match=r"its logits are not finite: its weight lm_head\.weight is not finite"
    ):
        sample(model, PROMPTS, SamplerConfig(policy=policy, **steps, **settings))
    assert len(forwards) == 1


@pytest.mark.parametrize("name, value", [(HEAD, torch.nan), (NORM, torch.nan), (NORM, -torch.inf)])
@pytest.mark.parametrize(
    "decode",
    [
        lambda model: sample(model, PROMPTS, SamplerConfig(), engine=EngineConfig(look_every=4)),
        lambda model: sample(model, PROMPTS, SamplerConfig(cache="block", block_length=3)),
        lambda model: list(denoise(model, PROMPTS, 6, SamplerConfig())),
        lambda model: nelbo_log_likelihood(model, PROMPTS[0], PROMPTS[1], samples=2),
        lambda model: trajectory_log_likelihood(model, PROMPTS[0], PROMPTS[1], SamplerConfig()),
        lambda model: replay_tokens(model, TRAJECTORY),
    ],
    ids=["engine", "cache", "denoise", "nelbo", "trajectory", "report"],
)
def test_whatever_decodes_or_measures_names_the_weight(model, decode, name, value):
    decode(model)
    spoil(model, name, value)
    with pytest.raises(FloatingPointError, match=rf"its weight {name} is not finite; save or download the model again"):
        decode(model)


def test_finite_weights_that_overflow_in_their_dtype_are_not_blamed(model):
    model.model.half()
    with torch.no_grad():
        model.model.lm_head.weight.mul_(6e4 / model.model.lm_head.weight.abs().max())
    with pytest.raises(
        FloatingPointError, match=r"all its weights are finite, so they overflow in dtype=float16; load"
    ):
        sample(model, PROMPTS, SamplerConfig())


def refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


def files_of(folder):
    """Every file that a command left, parsed as strict JSON lines or JSON."""
    for path in folder.rglob("*"):
        if path.suffix in (".json", ".jsonl", ".rejected") and path.stat().st_size:
            text = path.read_text()
            for each in [text] if path.suffix == ".json" else text.splitlines():
                yield path, json.loads(each, parse_constant=refuse_constant)


@pytest.mark.parametrize(
    "command",
    [
        "generate --prompt 1+1=",
        "generate --prompt 1+1= --animate true",
        "collect --task addition --num_prompts 3 --output {out}/kept.jsonl",
        "evaluate --task addition --num_prompts 3 --output_dir {out}",
    ],
)
def test_a_command_ends_in_one_line_and_writes_no_nan(model, tmp_path, capsys, command):
    spoil(model, NORM)
    folder, out = tmp_path / "model", tmp_path / "out"
    out.mkdir()
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    capsys.readouterr()
    assert main([*command.format(out=out).split(), "--model", str(folder)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"tabom {command.split()[0]}: error: model={folder}: its logits are not finite: its weight")
    list(files_of(out))


def test_an_evaluation_of_the_loss_during_training_stops_too(model, tmp_path):
    settings = TabomConfig(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = TabomTrainer(model, settings, [TRAJECTORY], eval_dataset=[TRAJECTORY] * 3)
    trainer.evaluate()
    spoil(model, NORM)
    with pytest.raises(FloatingPointError, match=r"its weight model\.norm\.weight is not finite"):
        trainer.evaluate()


def test_figures_that_are_not_finite_are_left_out_of_the_state_of_a_training(model, tmp_path):
    """As the norm of a gradient that overflowed in fp16, in a step that the scaler skips."""
    settings = TabomConfig(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = TabomTrainer(model, settings, [TRAJECTORY])
    trainer.log({"grad_norm": torch.inf, "learning_rate": 1e-4, "figure": torch.nan})
    trainer.save_state()
    [(_, state)] = files_of(tmp_path)
    assert state["log_history"] == [{"learning_rate": 1e-4, "epoch": 0, "step": 0}]


def test_the_data_of_a_report_is_json_or_an_error():
    with pytest.raises(FloatingPointError, match=r"the report: training.run\[0\].loss=nan cannot be written as JSON"):
        pack({"training": {"run": [{"loss": torch.nan}]}})
