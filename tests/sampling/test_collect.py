import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch

from tabom.data.prompts import PromptSet, read_prompts
from tabom.data.store import TrajectoryFile
from tabom.data.trajectories import read_trajectories
from tabom.data.verifiers import Verdict
from tabom.lab.model import character_tokenizer
from tabom.lab.tasks import Addition
from tabom.sampling.collect import collect, hit_rate
from tabom.sampling.config import CollectConfig, SamplerConfig
from tabom.sampling.engine import EngineConfig
from tests.conftest import random_model

SAMPLER = SamplerConfig(max_new_tokens=3, temperature=2.0)
PROMPTS = [f"{i}+1=" for i in range(20)]


def keep_some(prompts=PROMPTS):
    """A prompt set whose checker accepts the answers to every second prompt."""

    def check(prompt, answer, response):
        return PROMPTS.index(prompt) % 2 == 0

    return PromptSet("half", list(prompts), [None] * len(prompts), check)


def records(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


@contextmanager
def lock_of_another_job(output):
    with TrajectoryFile(output).lock.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


def test_right_answers_are_kept_and_load_as_trajectories(tmp_path):
    model, output = random_model(0), tmp_path / "t.jsonl"
    report = collect(model, keep_some(), SAMPLER, CollectConfig(str(output), samples_per_prompt=3), EngineConfig(50))
    kept = records(output)
    assert (report.attempts, report.new_attempts, report.correct) == (60, 60, 30)
    assert {r["prompt"] for r in kept} == set(PROMPTS[::2])
    assert len({(r["prompt"], r["response"]) for r in kept}) > 10, "repeats have seeds of their own"
    trajectories, invalid = read_trajectories(output, model.tokenizer, len(model.tokenizer))
    assert len(trajectories) == len(kept) and invalid == 0
    assert all(sorted(t.decoding_order) == [0, 1, 2] for t in trajectories)
    assert all(t.method == "entropy" and t.data_source == "half" for t in trajectories)


@pytest.mark.parametrize("cut_right, cut_wrong", [(0, 0), (17, 0), (0, 11), (300, 250), (10**9, 400), (5, 10**9)])
def test_a_restart_after_any_torn_write_gives_the_same_file(tmp_path, cut_right, cut_wrong):
    model, whole, torn = random_model(0), tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    collect(model, keep_some(), SAMPLER, CollectConfig(str(whole)), EngineConfig(30))
    collect(model, keep_some(PROMPTS), SAMPLER, CollectConfig(str(torn)), EngineConfig(40))
    for path, cut in ((torn, cut_right), (tmp_path / "torn.jsonl.rejected", cut_wrong)):
        os.truncate(path, max(path.stat().st_size - cut, 0))
    collect(model, keep_some(), SAMPLER, CollectConfig(str(torn)), EngineConfig(20))
    by_id = [sorted(records(path), key=lambda r: r["id"]) for path in (whole, torn)]
    assert by_id[0] == by_id[1]


def test_text_that_ends_lines_elsewhere_finishes_and_resumes(tmp_path, monkeypatch):
    """Prompts, responses and reasons with the characters at which `splitlines` and text mode end a line."""
    separators = "\u2028 \u2029 \x85 \r \x0b \x0c \x1c \x1d \x1e"
    monkeypatch.setattr("tabom.sampling.collect.decode_response", lambda model, tokens: f"{len(tokens)}{separators}")
    prompts = PromptSet(
        "s", [prompt + separators for prompt in PROMPTS], [separators] * 20, lambda *_: Verdict(None, separators)
    )
    model, output = random_model(0), tmp_path / "t.jsonl"
    collect(model, prompts.first(20), SAMPLER, CollectConfig(str(output)))
    whole = output.read_bytes()
    os.truncate(output, len(whole) // 2)
    report = collect(model, prompts, SAMPLER, CollectConfig(str(output)))
    assert 0 < report.new_attempts < 20 and report.attempts == 20
    assert sorted(output.read_bytes().split(b"\n")) == sorted(whole.split(b"\n"))
    assert read_trajectories(output, model.tokenizer, None)[0][0].response.endswith(separators)


def test_every_record_says_its_verdict_and_the_unverified_are_counted_apart(tmp_path):
    """Right and unverified answers are kept, marked; wrong ones are rejected with the reason."""
    model, output = random_model(0), tmp_path / "t.jsonl"

    def check(prompt, answer, response):
        return Verdict([True, False, None][PROMPTS.index(prompt) % 3], f"why {prompt}")

    report = collect(model, PromptSet("thirds", PROMPTS, [None] * 20, check), SAMPLER, CollectConfig(str(output)))
    assert (report.attempts, report.correct, report.unverified) == (20, 7, 6)
    kept, (_settings, *rejected) = records(output), records(tmp_path / "t.jsonl.rejected")
    assert [r["correct"] for r in kept].count(True) == 7 and [r["correct"] for r in kept].count(None) == 6
    assert len(rejected) == 7 and all(r["correct"] is False for r in rejected)
    assert all(r["why"] == f"why {r['prompt']}" for r in kept + rejected)


@pytest.mark.parametrize(
    "verdicts, said",
    [([], "none checked"), ([True, False, None], "50.0% of 2 right, 1 unverified"), ([True], "100.0% of 1 right")],
)
def test_the_running_hit_rate(verdicts, said):
    assert hit_rate(verdicts) == said


@pytest.mark.parametrize(
    "policy, method", [("entropy", "entropy"), ("dream_entropy", "entropy"), ("llada_low_confidence", "default")]
)
def test_records_carry_the_method_that_the_recipes_keep(tmp_path, policy, method):
    model, output = random_model(0), tmp_path / "t.jsonl"
    sampler = SamplerConfig(max_new_tokens=3, steps=3, policy=policy)
    collect(model, keep_some(), sampler, CollectConfig(str(output)))
    assert {record["method"] for record in records(output)} == {method}


def test_a_second_run_does_nothing_and_other_settings_are_refused(tmp_path):
    model, output = random_model(0), tmp_path / "t.jsonl"
    config = CollectConfig(str(output))
    collect(model, keep_some(), SAMPLER, config)
    before = output.read_bytes()
    assert collect(model, keep_some(), SAMPLER, config).new_attempts == 0
    with pytest.raises(ValueError, match="was begun with policy='entropy', now policy='margin'"):
        collect(model, keep_some(), SamplerConfig(max_new_tokens=3, policy="margin", temperature=2.0), config)
    with pytest.raises(ValueError, match="was begun with prompts="):
        collect(model, keep_some(PROMPTS[:-1]), SAMPLER, config)
    assert output.read_bytes() == before
    with lock_of_another_job(output), pytest.raises(ValueError, match=r"t\.jsonl: another job is writing to it"):
        collect(model, keep_some(), SAMPLER, CollectConfig(str(output), overwrite=True))
    assert output.read_bytes() == before
    assert collect(model, keep_some(), SAMPLER, CollectConfig(str(output), overwrite=True)).new_attempts == 20


def test_other_weights_under_the_same_path_are_refused(tmp_path):
    model, output = random_model(0), tmp_path / "t.jsonl"
    collect(model, keep_some(), SAMPLER, CollectConfig(str(output)))
    before = output.read_bytes()
    with torch.no_grad():
        model.model.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(ValueError, match="was begun with weights='float32, sha256 "):
        collect(model, keep_some(), SAMPLER, CollectConfig(str(output)))
    half = random_model(0)
    half.model.bfloat16()
    with pytest.raises(ValueError, match="now weights='bfloat16, sha256 "):
        collect(half, keep_some(), SAMPLER, CollectConfig(str(output)))
    assert output.read_bytes() == before
    assert collect(random_model(0), keep_some(), SAMPLER, CollectConfig(str(output))).new_attempts == 0


def test_killed_and_restarted(tmp_path):
    """The real command, killed with SIGKILL in mid-flight, three times over."""
    model = random_model(1)
    model.model.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i}+1="}) + "\n" for i in range(400)))
    output = tmp_path / "t.jsonl"
    command = [
        *(sys.executable, "-m", "tabom", "collect", "--model", str(tmp_path / "model")),
        *("--prompts", str(prompts), "--output", str(output), "--compute_budget", "16", "--max_new_tokens", "4"),
    ]
    for wanted in (20, 60, 100):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not output.exists() or output.read_bytes().count(b"\n") < wanted:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finished_before = {r["id"]: r for r in map(json.loads, output.read_text().split("\n")[:-1])}
    assert 100 <= len(finished_before) < 400
    subprocess.run(command, check=True, capture_output=True)
    after = {r["id"]: r for r in records(output)}
    assert len(records(output)) == len(after) == 400
    assert finished_before.items() <= after.items()


def test_prompt_files(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"question": "1+1=", "answer": " 2"}\n{"prompt": "x"}\n{"answer": "2"}\n')
    with pytest.raises(ValueError, match=r"p\.jsonl, line 3: field 'prompt': missing"):
        read_prompts(path)
    prompts, invalid = read_prompts(path, skip_invalid=True)
    assert (prompts.prompts, invalid) == (["1+1=", "x"], 1)
    assert prompts.is_correct(0, "2") and not prompts.is_correct(0, "3")
    assert not prompts.is_correct(1, "anything") and prompts.verdicts([1], ["x"])[0].correct is None, "unverified"


def test_task_prompts_are_checked_by_the_task():
    prompts = Addition().prompt_set(5, "train", 0)
    assert all(prompts.is_correct(i, answer) for i, answer in enumerate(prompts.answers))
    assert not prompts.is_correct(0, "x")
    assert all(character_tokenizer().unk_token_id not in character_tokenizer()(p).input_ids for p in prompts.prompts)


def test_giving_up_leaves_the_right_answers_as_they_are(tmp_path):
    """Byte for byte; a wrong one that was given up says so, and cost less."""
    model, sampler = random_model(0), SamplerConfig(max_new_tokens=6, block_length=1, seed=3)
    model.model.double()  # where rounding, which follows the batch, changes no digit of a record
    first = tmp_path / "first.jsonl"
    collect(model, PromptSet("any", PROMPTS, [None] * 20, lambda *_: True), sampler, CollectConfig(str(first)))
    answers = [record["response"] for record in sorted(records(first), key=lambda r: PROMPTS.index(r["prompt"]))]
    answers[10:] = ["no " + answer for answer in answers[10:]]
    prompts = PromptSet("exact", PROMPTS, answers)
    costs = []
    for name, give_up in (("whole", False), ("short", True)):
        report = collect(model, prompts, sampler, CollectConfig(str(tmp_path / name), give_up=give_up))
        assert report.correct == 10
        costs.append(
            sum(len([s for s in r["decoding_order"] if s >= 0]) for r in records(tmp_path / f"{name}.rejected")[1:])
        )
    by_id = [sorted((tmp_path / name).read_bytes().split(b"\n")) for name in ("whole", "short")]
    assert by_id[0] == by_id[1]
    assert costs[1] < costs[0]


def test_giving_up_needs_a_verifier_that_can_tell(tmp_path):
    with pytest.raises(ValueError, match="give_up=True with verifier='exact'"):
        collect(random_model(0), keep_some(), SAMPLER, CollectConfig(str(tmp_path / "t"), give_up=True))
