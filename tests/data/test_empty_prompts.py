"""An empty prompt before a model that reads the logits of a token one position before it (`logits_shift` 1)."""

import json
from dataclasses import replace

import pytest
import torch

from tabom.cli.main import main
from tabom.data.encoding import encode_prompt
from tabom.data.prompts import PromptSet
from tabom.data.tokenized import tokenize
from tabom.data.trajectories import Trajectory
from tabom.evaluation.evaluate import Cell, EvaluateConfig, evaluate
from tabom.evaluation.likelihood import nelbo_log_likelihood, trajectory_log_likelihood
from tabom.sampling.answerable import empty_prompts
from tabom.sampling.collect import collect
from tabom.sampling.config import CollectConfig, SamplerConfig
from tabom.sampling.engine import sample
from tabom.sampling.sampler import denoise
from tabom.training.config import TabomConfig
from tabom.training.trainer import TabomTrainer
from tests.conftest import random_model

REFUSED = r"the prompt has 0 tokens, and this model reads the logits of a response's first token 1 position before it"
RECORD = {"response": "23", "response_token_ids": [6, 7], "decoding_order": [0, 1]}


@pytest.fixture
def shifted(seed):
    """A model as --adapt makes it, whose tokenizer has neither a chat template nor a BOS token."""
    diffusion_model = random_model(seed)
    diffusion_model.model.config.logits_shift = 1
    diffusion_model.tokenizer.bos_token = None
    return replace(diffusion_model, logits_shift=1)


@pytest.fixture
def folder(shifted, tmp_path):
    shifted.model.save_pretrained(tmp_path / "model")
    shifted.tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def settings(tmp_path, **changes):
    return TabomConfig(str(tmp_path / "run"), use_cpu=True, report_to="none", disable_tqdm=True, **changes)


def test_a_bos_token_starts_an_empty_prompt(shifted):
    shifted.tokenizer.bos_token = "<pad>"
    assert encode_prompt(shifted.tokenizer, "") == [shifted.tokenizer.bos_token_id]
    assert encode_prompt(shifted.tokenizer, "", max_length=1) == [shifted.tokenizer.bos_token_id]
    assert encode_prompt(shifted.tokenizer, "1") == shifted.tokenizer("1").input_ids
    assert empty_prompts(shifted, PromptSet("p", ["", "1"], [None, None])) == []


def test_the_logits_of_the_first_token_are_those_of_the_bos_token(shifted):
    shifted.tokenizer.bos_token = "<pad>"
    prompt = encode_prompt(shifted.tokenizer, "")
    [completion] = sample(shifted, [prompt], SamplerConfig(max_new_tokens=1))
    logits = shifted.model(torch.tensor([[*prompt, shifted.mask_token_id]])).logits[0, 0]
    logits[shifted.mask_token_id] = -torch.inf
    assert completion.token_ids == [logits.argmax().item()]


@pytest.mark.parametrize(
    "run",
    [
        lambda model: sample(model, [[5], []], SamplerConfig()),
        lambda model: list(denoise(model, [[5], []], 3, SamplerConfig())),
        lambda model: nelbo_log_likelihood(model, [], [5, 6], samples=2),
        lambda model: trajectory_log_likelihood(model, [], [5, 6], SamplerConfig()),
    ],
    ids=["engine", "denoise", "nelbo", "trajectory"],
)
def test_whatever_computes_refuses_it(shifted, run):
    with pytest.raises(ValueError, match=REFUSED):
        run(shifted)
    run(replace(shifted, logits_shift=0))  # here the first token has logits of its own


def test_training_refuses_the_record_by_file_and_line_or_counts_it(shifted, tmp_path):
    path = write(tmp_path / "t.jsonl", [{"prompt": "1+1=", **RECORD}, {"prompt": "", **RECORD}])
    options = {"logits_shift": 1}
    with pytest.raises(ValueError, match=rf"^{path}, line 2: {REFUSED}.*--skip_invalid leaves such lines out"):
        tokenize(path, shifted.tokenizer, **options)
    table, invalid = tokenize(path, shifted.tokenizer, skip_invalid=True, **options)
    assert (len(table), invalid) == (1, 1)
    assert len(tokenize(path, shifted.tokenizer)[0]) == 2
    with pytest.raises(ValueError, match=rf"^record 1: {REFUSED}"):
        TabomTrainer(shifted, settings(tmp_path), [Trajectory("", "23", [6, 7], [0, 1])])


def test_a_table_that_was_tokenized_for_another_model_is_refused_before_training(shifted, tmp_path):
    path = write(tmp_path / "t.jsonl", [{"prompt": "1+1=", **RECORD}, {"prompt": "", **RECORD}])
    table, _ = tokenize(path, shifted.tokenizer)
    TabomTrainer(replace(shifted, logits_shift=1), settings(tmp_path), table.select([0]))
    with pytest.raises(ValueError, match=REFUSED):
        TabomTrainer(replace(shifted, logits_shift=1), settings(tmp_path), table)


def test_prompts_that_are_answered_during_training_are_looked_at_before_it(shifted, tmp_path):
    prompts = PromptSet("sums", ["1+1=", ""], ["2", None])
    with pytest.raises(ValueError, match=f"^sums, prompt 2 of 2: {REFUSED}"):
        TabomTrainer(shifted, settings(tmp_path), [Trajectory("1", "2", [6], [0])], eval_prompts=prompts)


def test_collect_and_evaluate_refuse_it_before_the_first_answer(shifted, tmp_path):
    prompts = PromptSet("sums", ["1+1=", "2+2=", ""], ["2", "4", None])
    config = CollectConfig(str(tmp_path / "kept.jsonl"))
    with pytest.raises(ValueError, match=f"^sums, prompt 3 of 3: {REFUSED}"):
        collect(shifted, prompts, SamplerConfig(), config)
    with pytest.raises(ValueError, match=f"^sums, prompt 3 of 3: {REFUSED}"):
        evaluate(shifted, prompts, SamplerConfig(), EvaluateConfig(str(tmp_path / "e")), Cell("m", "sums", "default"))
    assert not list(tmp_path.glob("kept*")) and not (tmp_path / "e").exists()


def test_generate_ends_in_one_line(folder, capsys):
    assert main(["generate", "--model", folder, "--prompt", ""]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("tabom generate: error: the prompt has 0 tokens") and "bos_token" in error


def test_collect_counts_what_it_is_told_to_skip(folder, tmp_path, capsys):
    records = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "", "answer": "2"}]
    path, output = write(tmp_path / "p.jsonl", records), tmp_path / "t.jsonl"
    command = ["collect", "--model", folder, "--prompts", path, "--output", str(output)]
    assert main(command) == 2
    assert "p.jsonl, prompt 2 of 2: the prompt has 0 tokens" in capsys.readouterr().err
    assert main([*command, "--skip_invalid", "true"]) == 0
    printed = capsys.readouterr().out
    assert "p.jsonl: 1 prompts without a token left out" in printed and "of 1 attempts" in printed
