"""Evaluation: the figures against other ways to them, restarts, ranks, and pairs of models."""

import json
import os
import threading
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.distributed import HashStore

from tabom import PromptSet, SamplerConfig, read_trajectories, sample
from tabom.cli.main import main
from tabom.data.encoding import encode_prompt
from tabom.data.store import ResponseFolder
from tabom.data.verifiers import Verdict
from tabom.evaluation.compare import compare, comparison_table, results_table
from tabom.evaluation.evaluate import Cell, EvaluateConfig, by_problem, evaluate, summarise
from tabom.evaluation.measured import decode_measured, measure
from tabom.evaluation.metrics import estimate, estimate_ratio
from tabom.evaluation.replay import order_accuracy, replayed_tds
from tabom.models.layout import response_logits
from tabom.sampling.collect import to_trajectory
from tabom.sampling.completions import Completion
from tabom.sampling.engine import EngineConfig, Request
from tabom.sampling.ranks import Ranks
from tabom.sampling.termination import Terminated, termination
from tests.conftest import random_model
from tests.models.block_causal import block_causal_model

PROMPTS = [f"{i}+12=" for i in range(10)]
SAMPLER = SamplerConfig(max_new_tokens=6, temperature=1.0, seed=3)
CELL = Cell("a/model", "set", "default")


def prompt_set(verdict=lambda prompt, response: sum(map(ord, response)) % 2 == 0):
    return PromptSet(
        "set", PROMPTS, ["?"] * len(PROMPTS), lambda prompt, answer, response: verdict(prompt, response), "own"
    )


def config(folder, **changes):
    return EvaluateConfig(str(folder), **{"samples_per_prompt": 3, **changes})


def test_every_figure_against_its_definition(tmp_path, model):
    result = evaluate(model, prompt_set(), SAMPLER, config(tmp_path), CELL)
    answers = {record["id"]: record for record in ResponseFolder(CELL.folder(tmp_path)).records()}
    assert len(answers) == 30 and (result["problems"], result["answers"], result["unverified"]) == (10, 30, 0)
    for repeat in range(3):
        encoded = [encode_prompt(model.tokenizer, prompt) for prompt in PROMPTS]
        expected = sample(model, encoded, replace(SAMPLER, seed=SAMPLER.seed + repeat))
        for index, completion in enumerate(expected):
            assert answers[f"{index}-{repeat}"]["response_token_ids"] == completion.token_ids
            assert answers[f"{index}-{repeat}"]["decoding_order"] == completion.decoding_order
    right = np.array([[answers[f"{i}-{k}"]["correct"] for k in range(3)] for i in range(10)], dtype=float)
    assert right.tolist() == [
        [sum(map(ord, answers[f"{i}-{k}"]["response"])) % 2 == 0 for k in range(3)] for i in range(10)
    ]
    assert result["accuracy"]["mean"] == pytest.approx(right.mean())
    assert result["accuracy"]["error"] == pytest.approx(right.mean(1).std(ddof=1) / 10**0.5)
    assert result["pass_at"]["1"]["mean"] == pytest.approx(right.mean())
    assert result["pass_at"]["3"]["mean"] == pytest.approx(right.max(1).mean())
    pairs = [right[:, [a, b]].max(1).mean() for a, b in ((0, 1), (0, 2), (1, 2))]
    assert result["pass_at"]["2"]["mean"] == pytest.approx(np.mean(pairs)), "pass@2 is the mean over pairs of samples"
    json.dumps(result, allow_nan=False)


def logits_without(penalty, *args):
    return response_logits(*args) + penalty


def decoded(model, requests, sampler):
    return [measured for _, measured in sorted(decode_measured(model, requests, sampler, EngineConfig(40)))]


def test_order_and_tds_of_the_decoding_are_those_of_its_replay(seed, tmp_path, monkeypatch):
    """Nothing is computed twice: the sampler's own entropies are what a replay of the answer finds.

    In block-causal models both see the pairs inside blocks only.
    """
    full = [random_model(seed, logits_shift=shift) for shift in (0, 1)]
    in_blocks = [block_causal_model(tmp_path / name, name, seed) for name in ("sdar", "Fast_dLLM_Qwen")]
    for model in full + [replace(each, block_size=4, eos_token_id=-1) for each in in_blocks]:
        never_mask = torch.zeros(model.model.config.vocab_size)
        never_mask[model.mask_token_id] = -torch.inf  # as the sampler has it
        without_mask = partial(logits_without, never_mask)
        monkeypatch.setattr("tabom.evaluation.replay.response_logits", without_mask)
        prompts = [encode_prompt(model.tokenizer, p) for p in PROMPTS]
        measured = decoded(model, [Request(p, SAMPLER.max_new_tokens, i) for i, p in enumerate(prompts)], SAMPLER)
        trajectories = [to_trajectory(model, prompt_set(), i, m.completion, "x") for i, m in enumerate(measured)]
        assert [m.tds for m in measured] == pytest.approx(replayed_tds(model, trajectories).tolist(), rel=1e-3)
        for each, trajectory in zip(measured, trajectories, strict=True):
            if model.eos_token_id not in trajectory.response_token_ids:
                [expected] = order_accuracy(model, [trajectory])
                assert each.in_order / each.pairs == pytest.approx(expected, abs=1.5 / each.pairs), "but for a near tie"


def test_positions_are_those_that_the_model_sees(model):
    seen = []
    hook = model.model.get_input_embeddings().register_forward_hook(lambda _m, args, _o: seen.append(args[0].numel()))
    prompts = [encode_prompt(model.tokenizer, prompt) for prompt in ("1+2=", "sort 123=")]
    for sampler in (SAMPLER, replace(SAMPLER, tokens_per_step=4), replace(SAMPLER, stop_early=True)):
        seen.clear()
        measured = decoded(model, [Request(p, sampler.max_new_tokens, i) for i, p in enumerate(prompts)], sampler)
        assert sum(each.positions for each in measured) == sum(seen)
        assert [each.steps for each in measured] == [
            len({s for s in each.completion.decoding_order if s >= 0}) for each in measured
        ]
    hook.remove()


def test_what_follows_the_end_token_does_not_count(model):
    """Two responses that differ behind the first end token have the same figures."""
    end = model.eos_token_id
    entropy = torch.tensor([[0.5, 0.1, 0.2, 9.0], [0.4, float("nan"), 0.3, 8.0], [0.2, float("nan"), float("nan"), 7.0],
                            [float("nan")] * 3 + [6.0]]).double()  # fmt: skip
    other = entropy.clone()
    other[:, 3] = torch.tensor([0.0, 1.0, 2.0, 3.0])
    first, second = (
        measure(model, Completion([9, 8, end, tail], [2, 0, 1, 3], [0.0] * 4, 1), table)
        for tail, table in ((7, entropy), (6, other))
    )
    assert first[1:] == second[1:]
    assert first.tokens == 2
    assert (first.in_order, first.pairs) == (4, 4)  # step 0: 1<2<0 is three pairs, step 1: one; all in order
    assert first.tds == pytest.approx(np.mean([np.var([0.5, 0.1, 0.2]), np.var([0.4, 0.3]), 0]))


@pytest.mark.parametrize("cut", [0, 13, 500, 10**9])
def test_a_restart_after_any_torn_write_gives_the_same_result(tmp_path, cut):
    model = random_model(0)
    whole = evaluate(model, prompt_set(), SAMPLER, config(tmp_path / "whole"), CELL)
    evaluate(model, prompt_set(), SAMPLER, config(tmp_path / "torn"), CELL)
    path = CELL.folder(tmp_path / "torn") / "answers-0.jsonl"
    os.truncate(path, max(path.stat().st_size - cut, 0))
    again = evaluate(model, prompt_set(), SAMPLER, config(tmp_path / "torn"), CELL, EngineConfig(40))
    for result in (whole, again):
        for name in ("seconds", "positions", "reused"):  # the padding depends on the batch
            del result[name]
    assert again.pop("tds") == pytest.approx(whole.pop("tds"), rel=1e-3)
    assert again == whole


def test_ranks_share_the_answers_and_the_first_has_the_result(tmp_path, monkeypatch):
    """Three processes, here threads, go on with what one has begun."""
    model = random_model(0)
    alone = evaluate(model, prompt_set(), SAMPLER, config(tmp_path / "alone"), CELL)
    evaluate(model, prompt_set(), SAMPLER, config(tmp_path / "shared", samples_per_prompt=1), CELL)
    meeting, of_thread, results = HashStore(), threading.local(), {}
    monkeypatch.setattr("tabom.evaluation.evaluate.joined", lambda peer_timeout: nullcontext(of_thread.ranks))

    def run(ranks, own_model):
        of_thread.ranks = ranks
        results[ranks.rank] = evaluate(own_model, prompt_set(), SAMPLER, config(tmp_path / "shared"), CELL)

    threads = []
    for rank in range(3):
        ranks = Ranks(rank, 3, meeting)
        threads.append(threading.Thread(target=run, args=(ranks, random_model(0))))  # as processes have their own
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert (results[1], results[2]) == (None, None) and results[0]["accuracy"] == alone["accuracy"]
    assert (results[0]["reused"], results[0]["answers"]) == (10, 30)
    files = sorted(CELL.folder(tmp_path / "shared").glob("answers-*.jsonl"))
    assert len(files) == 3 and sum(path.read_bytes().count(b"\n") for path in files) == 30, "none is made twice"


def test_at_sigterm_an_evaluation_makes_no_further_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(termination, "is_requested", True)
    with pytest.raises(Terminated) as end:
        evaluate(random_model(0), prompt_set(), SAMPLER, config(tmp_path), CELL)
    assert (end.value.code, end.value.message) == (143, "30 of 30 answers are left")


def test_text_that_ends_lines_elsewhere_finishes_and_resumes(tmp_path, monkeypatch):
    """Prompts, responses and reasons with the characters at which `splitlines` and text mode end a line."""
    separators = "\u2028 \u2029 \x85 \r \x0b \x0c \x1c \x1d \x1e"
    monkeypatch.setattr("tabom.sampling.collect.decode_response", lambda model, tokens: f"{len(tokens)}{separators}")
    prompts = PromptSet(
        "s", [prompt + separators for prompt in PROMPTS], [separators] * 10, lambda *_: Verdict(True, separators)
    )
    first, again = (evaluate(random_model(0), prompts, SAMPLER, config(tmp_path), CELL) for _ in range(2))
    assert (first.pop("reused"), again.pop("reused")) == (0, 30) and first == again
    [record, *_] = ResponseFolder(CELL.folder(tmp_path)).records()
    assert record["response"].endswith(separators) and record["why"] == separators


def test_other_weights_under_the_same_path_are_refused(tmp_path):
    answers = CELL.folder(tmp_path) / "answers-0.jsonl"
    assert evaluate(random_model(0), prompt_set(), SAMPLER, config(tmp_path), CELL)["reused"] == 0
    before = answers.read_bytes()
    other, half = random_model(0), random_model(0)
    with torch.no_grad():
        other.model.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    half.model.bfloat16()
    for model, now in ((other, "float32"), (half, "bfloat16")):
        said = f"was begun with weights='float32, sha256 .*now weights='{now}, sha256 .*; .* choose another output_dir"
        with pytest.raises(ValueError, match=said):
            evaluate(model, prompt_set(), SAMPLER, config(tmp_path), CELL)
    assert answers.read_bytes() == before
    assert evaluate(random_model(0), prompt_set(), SAMPLER, config(tmp_path), CELL)["reused"] == 30


def test_a_folder_that_does_not_note_the_weights_is_refused_until_the_user_adds_them(tmp_path):
    """An earlier version did not note them."""
    evaluate(random_model(0), prompt_set(), SAMPLER, config(tmp_path), CELL)
    path = CELL.folder(tmp_path) / "settings.json"
    noted = json.loads(path.read_bytes())
    weights = noted.pop("weights")
    path.write_text(json.dumps(noted))
    said = f'was begun without a note of its weights, .* add "weights": "{weights}" to the settings in .*settings.json'
    with pytest.raises(ValueError, match=said):
        evaluate(random_model(0), prompt_set(), SAMPLER, config(tmp_path), CELL)
    path.write_text(json.dumps({**noted, "weights": weights}))
    assert evaluate(random_model(0), prompt_set(), SAMPLER, config(tmp_path), CELL)["reused"] == 30


def test_the_command_with_replaced_weights_and_with_torn_files(tmp_path, capsys):
    """Evaluate a folder, replace its weights, evaluate again; then tear each JSON file, for evaluate and for report."""
    for seed, name in enumerate(("one", "two")):
        diffusion_model = random_model(seed)
        diffusion_model.model.save_pretrained(tmp_path / name)
        diffusion_model.tokenizer.save_pretrained(tmp_path / name)
    output, model = tmp_path / "e", str(tmp_path / "one")
    settings = ["--task", "addition", "--num_prompts", "4", "--max_new_tokens", "2", "--model", model, "shipped"]
    evaluating = ["evaluate", *settings, "--output_dir", str(output)]
    reporting = ["report", str(output), "-o", str(tmp_path / "r.html"), "--model", model]

    def said(command, status):
        assert main(command) == status
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return captured.out if status == 0 else captured.err.rstrip("\n").rpartition("\n")[2]

    assert "earlier run" not in said(evaluating, 0)
    assert "4 of 4 responses were made by an earlier run" in said(evaluating, 0)
    weights = (tmp_path / "one" / "model.safetensors").read_bytes()
    (tmp_path / "one" / "model.safetensors").write_bytes((tmp_path / "two" / "model.safetensors").read_bytes())
    assert "was begun with weights=" in said(evaluating, 2)
    (tmp_path / "one" / "model.safetensors").write_bytes(weights)
    said(evaluating, 0)
    [noted] = [path for path in output.rglob("settings.json") if "shipped" not in path.parts]
    for path, commands, remedy in (
        (noted, (evaluating, reporting), "restore the file, or choose another output_dir"),
        (output / "results.json", (reporting,), "run the `tabom evaluate` command again"),
        (output / "comparison.json", (reporting,), "run the `tabom evaluate` command again"),
    ):
        whole = path.read_bytes()
        for torn in (whole[:-3], b"", b"3"):
            path.write_bytes(torn)
            for command in commands:
                error = said(command, 2)
                assert error.startswith("tabom ") and str(path) in error and remedy in error
        path.write_bytes(whole)
    said(reporting, 0)
    (output / "results.json").write_bytes(b"{")
    assert "4 of 4 responses" in said(evaluating, 0)
    said(reporting, 0)


def test_other_settings_are_refused_and_more_samples_are_not(tmp_path, model):
    evaluate(model, prompt_set(), SAMPLER, config(tmp_path, samples_per_prompt=1), CELL)
    assert evaluate(model, prompt_set(), SAMPLER, config(tmp_path), CELL)["answers"] == 30
    with pytest.raises(ValueError, match=r"was begun with temperature=1\.0, now temperature=0\.5"):
        evaluate(model, prompt_set(), replace(SAMPLER, temperature=0.5), config(tmp_path), CELL)
    with pytest.raises(ValueError, match="samples_per_prompt=3 with temperature=0"):
        evaluate(model, prompt_set(), replace(SAMPLER, temperature=0.0), config(tmp_path / "x"), CELL)


def test_unverified_answers_are_no_part_of_the_accuracy(tmp_path, model):
    prompts = prompt_set(lambda prompt, response: Verdict([True, None][PROMPTS.index(prompt) % 2], ""))
    result = evaluate(model, prompts, SAMPLER, config(tmp_path), CELL)
    assert (result["accuracy"]["mean"], result["unverified"]) == (1.0, 15)


def test_answers_are_trajectories(tmp_path, model):
    evaluate(model, prompt_set(), SAMPLER, config(tmp_path), CELL)
    path = CELL.folder(tmp_path) / "answers-0.jsonl"
    trajectories, invalid = read_trajectories(path, model.tokenizer, len(model.tokenizer))
    assert (len(trajectories), invalid) == (30, 0)


def test_two_models_in_pairs(tmp_path):
    base, tuned = Cell("base", "set", "default"), Cell("tuned", "set", "default")
    verdicts = {base: [[1, 1], [0, 0], [1, 0], [0, 1]], tuned: [[1, 1], [1, 1], [0, 0], [0, 1]]}
    for cell, rows in verdicts.items():
        folder = cell.folder(tmp_path)
        folder.mkdir(parents=True)
        lines = (
            json.dumps({"id": f"{i}-{k}", "index": i, "correct": bool(right)}) + "\n"
            for i, row in enumerate(rows)
            for k, right in enumerate(row)
        )
        (folder / "answers-0.jsonl").write_text("".join(lines))
    result = compare(base, tuned, tmp_path)
    changes = [0, 1, -0.5, 0]
    assert (result["won"], result["lost"], result["problems"]) == (1, 1, 4)
    assert result["change"]["mean"] == pytest.approx(np.mean(changes))
    assert result["change"]["error"] == pytest.approx(np.std(changes, ddof=1) / 2)
    assert result["retention"]["mean"] == pytest.approx(2.5 / 2)
    table = comparison_table([result, {**result, "prompts": "other"}])
    assert "+12.5 ± 31.5" in table and table.splitlines()[2].endswith("| - |") and "125.0 ±" in table.splitlines()[3]


def test_the_error_of_a_ratio_covers_what_resampling_shows(seed):
    rng = np.random.default_rng(seed)
    a = rng.random((2000, 400)) < 0.6
    b = np.where(rng.random(a.shape) < 0.8, a, rng.random(a.shape) < 0.5)
    ratios = [estimate_ratio(y.astype(float), x.astype(float)) for x, y in zip(a, b, strict=True)]
    spread = np.std([ratio.mean for ratio in ratios])
    assert np.mean([ratio.error for ratio in ratios]) == pytest.approx(spread, rel=0.1)


def test_too_few_problems_have_no_error():
    assert estimate([]) == (None, None) and estimate([1.0]) == (1.0, None)
    assert estimate_ratio(np.array([1.0]), np.array([0.0])) == (None, None)


def test_a_table_survives_bars_and_missing_figures():
    nothing = {"mean": None, "error": None}
    figures = {name: {"mean": 1.0, "error": None} for name in ("tds", "tokens", "steps", "positions", "seconds")}
    result = {"model": "a|b", "prompts": "p", "sampler": "s", "problems": 1, "unverified": 1, "accuracy": nothing}
    table = results_table([{**result, "pass_at": {}, "pair_order": None, **figures}])
    assert r"a\|b" in table and len(table.splitlines()) == 3


def test_right_answers_by_problem_leave_out_the_unverified():
    records = [{"index": 1, "correct": True}, {"index": 0, "correct": None}, {"index": 1, "correct": False}]
    assert by_problem(records) == {1: [True, False]}
    figures = {name: 1 for name in ("pairs", "in_order", "tds", "tokens", "steps", "positions", "seconds")}
    assert summarise([{**record, **figures} for record in records])["accuracy"]["mean"] == 0.5
