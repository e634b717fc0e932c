"""`tabom improve`: rounds are finished or made again, and nothing depends on where a run was interrupted."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tabom.cli.main import main
from tabom.rounds import improve
from tabom.rounds.config import ImproveConfig
from tabom.rounds.improve import Improvement, powers_of_two
from tabom.rounds.records import read_rollouts, right_shares, rollout_figures
from tabom.sampling.engine import Engine

COMMAND = ["improve", "--task", "subtraction", "--num_prompts", "12", "--samples_per_prompt", "4"]
TRAINING = ["--learning_rate", "1e-4", "--logging_steps", "1", "--report_to", "none", "--disable_tqdm", "true"]
TRAINING += ["--num_train_epochs", "1", "--per_device_train_batch_size", "16", "--use_cpu", "true"]
TRAINING += ["--save_strategy", "steps", "--save_steps", "1"]


def run(folder, *options, rounds=2, objective="policy"):
    words = [*COMMAND, "--objective", objective, "--rounds", str(rounds), "--output_dir", str(folder)]
    return main([*words, *TRAINING, *options])


def figures(folder):
    return json.loads((folder / "rounds.json").read_text())


def assert_same_run(a, b):
    """The same weights to the last bit, the same figures and the same responses."""
    names = [path.name for path in a.glob("*.safetensors")]
    assert names
    for name in names:
        ours, theirs = load_file(a / name), load_file(b / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    for ours, theirs in zip(figures(a), figures(b), strict=True):
        assert {**ours, "grad_norm": 0} == {**theirs, "grad_norm": 0}
    for number in (1, 2):
        folders = (each / "rounds" / f"{number:03}" for each in (a, b))
        assert [r["response_token_ids"] for r in read_rollouts(next(folders))] == [
            r["response_token_ids"] for r in read_rollouts(next(folders))
        ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(folder) == 0
    return folder


def test_the_files_and_figures_of_a_run(whole, capsys):
    base, first, second = figures(whole)
    assert base.keys() == {"round", "accuracy"} and (first["round"], second["round"]) == (1, 2)
    for each in (first, second):
        assert each["responses"] == each["learnt"] == 48 and each["steps"] == 3
        assert 0 < each["reward"] < 1 and each["length"] == 4 and each["positions_per_token"] == 12
        shares = each["right_shares"].values()
        assert each["always_right"] == sum(s == 1 for s in shares) and each["always_wrong"] == sum(
            s == 0 for s in shares
        )
        assert each["reward"] == pytest.approx(np.mean(list(shares)))
        assert {"ratio", "clip_share", "kl", "entropy", "policy"} <= each.keys()
    assert first["kl"] < 0.1
    responses = [[r["response_token_ids"] for r in read_rollouts(whole / "rounds" / n)] for n in ("001", "002")]
    assert responses[0] != responses[1], "a round has seeds of its own"
    assert sorted(path.parent.name for path in whole.glob("rounds/*/model")) == ["002"]
    assert not list(whole.glob("**/checkpoint-*"))
    last, final = (load_file(folder / "model.safetensors") for folder in (whole / "rounds/002/model", whole))
    assert all(torch.equal(last[name], final[name]) for name in last)
    assert run(whole) == 0 and "of 12" not in capsys.readouterr().out, "a finished run makes nothing again"


class Killed(Exception):
    pass


def break_after(monkeypatch, owner, name, calls):
    """The function of that name raises after so many calls."""
    plain, made = getattr(owner, name), []

    def counted(*args, **kwargs):
        made.append(1)
        if len(made) > calls:
            raise Killed(name)
        return plain(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize(
    "owner, name, calls",
    [
        (Engine, "sync_host", 9),  # in the responses of the first or second round
        (improve, "collect", 1),  # before those of the second round
        (torch.optim.AdamW, "step", 4),  # in the training of the second round
        (improve.TabomTrainer, "save_model", 1),
        (improve, "finish_round", 2),
    ],
    ids=lambda value: str(value).rpartition(".")[2],
)
def test_a_run_that_was_interrupted_ends_as_if_it_had_not_been(whole, tmp_path, monkeypatch, owner, name, calls):
    with monkeypatch.context() as patches, pytest.raises(Killed):
        break_after(patches, owner, name, calls)
        run(tmp_path / "run")
    assert run(tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", whole)


def test_more_rounds_continue_a_finished_run(whole, tmp_path):
    assert run(tmp_path / "run", rounds=1) == 0
    assert run(tmp_path / "run", rounds=2) == 0
    assert_same_run(tmp_path / "run", whole)


def test_an_adapter_improves_and_continues(tmp_path):
    adapter = ("--use_peft", "true", "--lora_r", "4")
    assert run(tmp_path / "a", *adapter) == 0
    assert run(tmp_path / "b", *adapter, rounds=1) == 0
    assert run(tmp_path / "b", *adapter, rounds=2) == 0
    assert (tmp_path / "a" / "adapter_model.safetensors").exists()
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_in_mixed_precision_responses_are_decoded_as_they_are_trained(tmp_path):
    """Before the first update the policy is the one that acted; decoded in fp32, its KL would be 3e-5."""
    assert run(tmp_path / "run", "--bf16", "true", "--max_steps", "1", rounds=1) == 0
    assert figures(tmp_path / "run")[1]["kl"] < 1e-6


def test_expert_iteration_learns_right_responses_only(tmp_path):
    assert run(tmp_path / "run", "--eval_samples", "4", objective="tabom", rounds=1) == 0
    base, first = figures(tmp_path / "run")
    assert first["learnt"] == round(first["reward"] * 48) and {"cross_entropy", "rank"} <= first.keys()
    assert base["pass_at"].keys() == first["pass_at"].keys() == {"1", "2", "4"}


def test_a_round_without_anything_to_learn_goes_on(tmp_path, monkeypatch):
    """All groups settled: no advantage, so no training, and the weights stay."""
    monkeypatch.setattr(
        "tabom.data.prompts.PromptSet.verdicts", lambda self, indices, _: [improve_verdict()] * len(indices)
    )
    assert run(tmp_path / "run", rounds=1) == 0
    _, first = figures(tmp_path / "run")
    assert first["learnt"] == 0 and "steps" not in first and first["always_wrong"] == 12


def improve_verdict():
    from tabom.data.verifiers import Verdict

    return Verdict(False, "wrong")


def test_settled_prompts_are_drawn_less_often(tmp_path, monkeypatch):
    class Stub:
        class args:
            output_dir = str(tmp_path)

    config = ImproveConfig(prompts_per_round=10, settled_weight=0.05)
    prompts = type("P", (), {"prompts": list(range(100))})()
    improvement = Improvement(Stub, prompts, config, None)
    shares = {str(i): (1.0 if i < 40 else 0.0 if i < 50 else 0.5) for i in range(100)}
    monkeypatch.setattr(improve, "finished_rounds", lambda _: [{}, {"right_shares": shares}])
    drawn = [improvement.draw_prompts(number, seed=0) for number in range(200)]
    assert all(len(set(each)) == 10 and each == sorted(each) for each in drawn)
    settled = np.mean([i < 50 for each in drawn for i in each])
    assert 0.02 < settled < 0.12  # by weight 0.05 / 1.05, a little more without replacement
    assert improvement.draw_prompts(3, seed=0) == drawn[3] != improvement.draw_prompts(3, seed=1)


def test_figures_of_rollouts():
    rollouts = [
        {"id": f"{i}-{k}", "reward": reward, "decoding_order": [0, 1, -1], "positions": 10}
        for i, rewards in enumerate([[1.0, 1.0], [0.0, None], [0.0, 1.0], [None, None]])
        for k, reward in enumerate(rewards)
    ]
    shares = right_shares(rollouts, [5, 7, 9, 11])
    assert shares == {5: 1.0, 7: 0.0, 9: 0.5}
    found = rollout_figures(rollouts, shares)
    assert found == {
        "responses": 8,
        "unverified": 3,
        "reward": 0.6,
        "always_right": 1,
        "always_wrong": 1,
        "length": 2.0,
        "positions": 80,
        "positions_per_token": 5.0,
    }
    assert powers_of_two(8) == [1, 2, 4, 8] and powers_of_two(6) == [1, 2, 4, 6] and powers_of_two(1) == [1]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--sampler", "temperature=0"], "samples_per_prompt=4 with temperature=0"),
        (["--samples_per_prompt", "1"], "samples_per_prompt=1: expected at least 2"),
        (["--settled_weight", "0.5"], "settled_weight=0.5 without prompts_per_round"),
        (["--settled_weight", "0", "--prompts_per_round", "2"], "settled_weight=0.0"),
        (["--prompts", "x.jsonl"], "x.jsonl"),
        (["--eval_strategy", "epoch"], "eval_strategy='epoch': leave it out"),
        (["--resume_from_checkpoint", "auto"], "resume_from_checkpoint='auto': leave it out"),
        (["--learning_rate", "2e-4"], "begun with learning_rate=0.0001, now learning_rate=0.0002"),
        (["--sampler", "temperature=0.5"], "begun with sampler.temperature=1, now sampler.temperature=0.5"),
    ],
)
def test_what_has_no_effect_or_changes_the_run_is_refused(whole, capsys, options, message):
    assert run(whole, *options, rounds=3) == 2
    assert message in capsys.readouterr().err.replace("1.0,", "1,")


def test_nothing_is_evaluated_without_prompts_for_it(tmp_path, capsys):
    path = Path(tmp_path / "p.jsonl")
    path.write_text("".join(json.dumps({"prompt": f"{i}9-12=", "answer": str(10 * i - 3)}) + "\n" for i in range(1, 5)))
    words = ["improve", "--prompts", str(path), "--sampler", "temperature=1,max_new_tokens=4", "--rounds", "1"]
    words += ["--samples_per_prompt", "4", "--objective", "tabom", "--output_dir", str(tmp_path / "run"), *TRAINING]
    assert main([*words, "--eval_samples", "4"]) == 2
    assert "eval_samples=4 without eval_prompts" in capsys.readouterr().err
    assert main(words) == 0
    assert "accuracy" not in figures(tmp_path / "run")[1]
    assert main([*words, "--eval_prompts", str(path), "--output_dir", str(tmp_path / "other")]) == 0
    assert 4 * figures(tmp_path / "other")[1]["accuracy"]["mean"] in range(5)
