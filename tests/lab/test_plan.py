import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.tools.models import tiny_dream
from tabom.cli.main import main
from tabom.lab.dry_run import DREAM_7B, TINY, random_model
from tabom.lab.plan import PlanConfig, architecture, decode, plan, train
from tabom.sampling.completions import cost_of
from tabom.sampling.config import SamplerConfig
from tabom.sampling.engine import sample


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model and the folder that its plan is read from."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps({**DREAM_7B, **TINY}))
    return tiny_dream(), str(folder)


def test_dream_has_its_published_size():
    dream = architecture("Dream-org/Dream-v0-Instruct-7B")
    assert dream.body + 2 * dream.head + 3584 == pytest.approx(7.616e9, rel=1e-3)
    assert (dream.layers, dream.width, dream.head) == (28, 3584, 152064 * 3584)


@pytest.mark.parametrize("name", ["JetLM/SDAR-4B-Chat", "inclusionAI/LLaDA2.0-mini"])
def test_block_causal_models_have_no_plan(name):
    with pytest.raises(ValueError, match=f"^model={name}: .* attends block-causally"):
        architecture(name)


@pytest.mark.parametrize(
    "name, weights, block_size", [("JetLM/SDAR-4B-Chat", 4.41e9, 4), ("inclusionAI/LLaDA2.0-mini", 16.3e9, 32)]
)
def test_block_causal_models_have_their_published_size(name, weights, block_size):
    model = random_model(name, "full", torch.bfloat16, None, torch.device("meta"))
    assert sum(weight.numel() for weight in model.model.parameters()) == pytest.approx(weights, rel=5e-3)
    assert model.block_size == block_size


def test_the_arithmetic_of_a_forward_is_what_a_counter_of_its_products_finds(tiny):
    model, folder = tiny
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.model(input_ids=torch.ones(3, 50, dtype=torch.long))
    assert architecture(folder).forward(3 * 50, 50, 3 * 50) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("how, cache", [("exact", "none"), ("block cache", "block")])
def test_the_plan_of_a_decoding_is_what_the_engine_computes(tiny, how, cache):
    model, folder = tiny
    config = PlanConfig(mean_prompt=10, response=16, mean_answer=16, block_length=4)
    completions = sample(model, [[5] * 10] * 3, SamplerConfig(max_new_tokens=16, block_length=4, cache=cache))
    assert decode("", architecture(folder), config, 3, how).positions == cost_of(completions).positions


def test_a_run_at_the_papers_scale():
    """2.4e19 FLOP of collecting at 7e9 weights and 512 positions, some 40 times the training."""
    model, config = architecture("Dream-org/Dream-v0-Instruct-7B"), PlanConfig(num_prompts=12000)
    collect, verify, training, evaluate = plan(model, config, "plain", epochs=5, window=32, is_adapter=True)
    assert collect.positions == 12000 * 256 * 512 and collect.flop == pytest.approx(2.1e19, rel=0.05)
    assert evaluate.flop == pytest.approx(collect.flop / 6) and verify.flop == 0
    assert 40 < collect.flop / training.flop < 80
    assert train(model, config, 5, 32, is_adapter=False).flop == 1.5 * training.flop
    assert collect.hours(config) == collect.flop / 989e12 / 0.4 / 3600


def test_the_command_prints_every_part(capsys):
    assert main(["plan", "--recipe", "dream_prm12k", "--num_prompts", "12000", "--gpus", "8"]) == 0
    table = capsys.readouterr().out
    for word in ("collect", "verify", "train", "evaluate", "on 8 GPUs", "2.1e+19", "predicted, not measured"):
        assert word in table
    for option, error in ((["--right", "0"], "right=0.0"), (["--mean_answer", "300"], "mean_answer=300")):
        assert main(["plan", "--recipe", "dream_prm12k", *option]) == 2
        assert error in capsys.readouterr().err


def test_the_shipped_model_is_planned_too(capsys):
    assert main(["plan", "--model", "shipped", "--num_prompts", "10"]) == 0
    assert "shipped, 10 prompts: predicted, not measured" in capsys.readouterr().out
