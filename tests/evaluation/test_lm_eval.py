"""The adapter for lm-evaluation-harness, on task files of our own with the shipped model."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from tabom import SamplerConfig, load
from tabom.cli.main import main
from tabom.evaluation.likelihood import nelbo_log_likelihood, trajectory_log_likelihood
from tabom.evaluation.lm_eval import TabomLM, cut
from tabom.models.loading import SHIPPED_PATH
from tabom.sampling.engine import Engine
from tests.conftest import random_model
from tests.models.block_causal import block_causal_model

TASK = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_text: "{{{{question}}}}"
target_delimiter: ""
"""
GENERATED = """
task: local_sums
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOSEN = """
task: local_choices
output_type: multiple_choice
doc_to_choice: "{{[answer, wrong]}}"
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Two tasks over thirty subtractions of the lab."""
    from tabom.lab.tasks import make_task

    folder = tmp_path_factory.mktemp("tasks")
    problems = make_task("subtraction").problems(30, "test", 0)
    wrong = [problem.answer[:-1] + str((int(problem.answer[-1]) + 3) % 10) for problem in problems]
    lines = [
        json.dumps({"question": problem.prompt, "answer": problem.answer, "wrong": other})
        for problem, other in zip(problems, wrong, strict=True)
    ]
    (folder / "sums.jsonl").write_text("\n".join(lines) + "\n")
    for name, rest in (("sums", GENERATED), ("choices", CHOSEN)):
        (folder / f"{name}.yaml").write_text(TASK.format(data=folder / "sums.jsonl") + rest)
    return folder


def run_harness(tasks, output, *names, launcher=(), arguments="policy=entropy"):
    """The results of the real command."""
    command = [*launcher] if launcher else [sys.executable]
    command += ["-m", "tabom.evaluation.lm_eval", "--model", "tabom", "--batch_size", "7"]
    command += ["--model_args", f"pretrained={SHIPPED_PATH},{arguments}", "--tasks", ",".join(names)]
    command += ["--include_path", str(tasks), "--output_path", str(output), "--log_samples"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    [path] = output.glob("**/results_*.json")
    return json.loads(path.read_text())["results"], output


def test_the_same_numbers_as_tabom_evaluate(tasks, tmp_path):
    results, output = run_harness(tasks, tmp_path / "harness", "local_sums")
    ours = ["--prompts", str(tasks / "sums.jsonl"), "--model", str(SHIPPED_PATH), "--max_new_tokens", "4"]
    assert main(["evaluate", *ours, "--output_dir", str(tmp_path / "ours")]) == 0
    [expected] = json.loads((tmp_path / "ours" / "results.json").read_text())
    assert 0.2 < expected["accuracy"]["mean"] < 0.9, "a task that the model half knows"
    assert results["local_sums"]["exact_match,none"] == pytest.approx(expected["accuracy"]["mean"])
    [samples] = output.glob("**/samples_*.jsonl")
    theirs = {s["doc"]["question"]: s["resps"][0][0] for s in map(json.loads, samples.read_text().splitlines())}
    [answers] = (tmp_path / "ours").glob("*/*/*/answers-0.jsonl")
    assert theirs == {r["prompt"]: r["response"] for r in map(json.loads, answers.read_text().splitlines())}


def test_two_processes_find_what_one_finds(tasks, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    settings = "policy=entropy,likelihood=trajectory"
    alone, _ = run_harness(tasks, tmp_path / "1", "local_sums", "local_choices", arguments=settings)
    both, _ = run_harness(tasks, tmp_path / "2", "local_sums", "local_choices", launcher=torchrun, arguments=settings)
    for name, metric in (("local_sums", "exact_match,none"), ("local_choices", "acc,none")):
        assert both[name][metric] == pytest.approx(alone[name][metric]), name
    assert alone["local_choices"]["acc,none"] > 0.9, "right answers are likelier than wrong ones"


def requests(kind, *arguments):
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def test_every_request_has_its_length_its_ends_and_its_place(monkeypatch):
    """Requests of several lengths come back in order, decoded with those of their own length, in one engine."""
    lm = TabomLM(load(SHIPPED_PATH), batch_size=2)
    seen = []

    class Watched(Engine):
        def run(self, requests):
            lengths = [len(request.prompt) for request in requests]
            seen.append((self.config.max_new_tokens, self.config.temperature, lengths, self.compute_budget))
            return super().run(requests)

    monkeypatch.setattr("tabom.evaluation.lm_eval.Engine", Watched)
    asked = [("123+456=", 4), ("sort 72914836=", 8), ("007+700=", 4), ("reverse badcafed=", 8), ("999+001=", 4)]
    answers = lm.generate_until(requests("generate_until", *((p, {"max_gen_toks": n}) for p, n in asked)), True)
    assert [len(answer) for answer in answers] == [4, 8, 4, 8, 4] and answers[0] == "0579"
    assert sorted(seen) == [(4, 0.0, [8, 8, 8], 2 * 12), (8, 0.0, [14, 17], 2 * 25)]
    seen.clear()
    settings = {"max_gen_toks": 4, "until": ["7"], "do_sample": True, "temperature": 0.1}
    [answer] = lm.generate_until(requests("generate_until", ("123+456=", settings)), True)
    assert answer == "05" and seen == [(4, 0.1, [8], 2 * 12)]


@pytest.mark.parametrize(
    "asked, expected",
    [
        ({}, {}),
        ({"max_new_tokens": 5}, {"max_new_tokens": 5}),
        ({"max_tokens": "7"}, {"max_new_tokens": 7}),
        ({"max_completion_tokens": 8}, {"max_new_tokens": 8}),
        ({"temperature": 0.7}, {"temperature": 0.7}),
        ({"temperature": 0.7, "do_sample": False, "top_p": 0.9}, {}),
        ({"temperature": 0.0}, {}),
        ({"do_sample": True}, {"temperature": 1.0}),
        (
            {"do_sample": True, "temperature": "0.5", "top_p": 0.9, "top_k": 20},
            {"temperature": 0.5, "top_p": 0.9, "top_k": 20},
        ),
        ({"temperature": 0.5, "top_k": -1, "num_beams": 1, "until": "x"}, {"temperature": 0.5}),
    ],
)
def test_what_a_request_asks_for_is_done(seed, asked, expected):
    settings = TabomLM(random_model(seed)).settings_for(asked)
    assert settings == SamplerConfig(**{"max_new_tokens": 6, **expected})


@pytest.mark.parametrize("asked", [{"num_beams": 4}, {"min_p": 0.1}, {"max_length": 100}, {"repetition_penalty": 1.2}])
def test_what_the_sampler_does_not_do_is_refused_by_name(seed, asked):
    [(name, value)] = asked.items()
    with pytest.raises(ValueError, match=f"^generation_kwargs {name}={value}: not done by tabom's sampler"):
        TabomLM(random_model(seed)).generate_until(requests("generate_until", ("1+2=", asked)), True)


def test_requests_of_different_settings_are_decoded_apart(monkeypatch, seed):
    lm, seen = TabomLM(random_model(seed)), []

    class Watched(Engine):
        def run(self, requests):
            seen.append((self.config.top_p, self.config.top_k))
            return super().run(requests)

    monkeypatch.setattr("tabom.evaluation.lm_eval.Engine", Watched)
    sample = {"max_gen_toks": 2, "temperature": 1.0}
    asked = [sample, sample | {"top_p": 0.5}, sample | {"top_k": 3}, sample | {"top_p": 0.5}]
    lm.generate_until(requests("generate_until", *(("1+2=", each) for each in asked)), True)
    assert sorted(seen, key=str) == sorted([(None, None), (0.5, None), (None, 3)], key=str)


def test_text_is_cut_at_the_first_end():
    assert cut("a\nb Q: c", ["Q:", "\n"]) == "a" and cut("abc", None) == "abc" and cut("abc", "b") == "a"
    assert cut("abc", [""]) == "abc"


def test_a_rendered_conversation_is_encoded_as_evaluate_encodes_it(seed):
    from tabom.data.encoding import encode_prompt

    model = random_model(seed)
    model.tokenizer.chat_template = (
        "{% for m in messages %}<eos>{{ m['role'][0] }} {{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<eos>a {% endif %}"
    )
    lm = TabomLM(model)
    rendered = lm.apply_chat_template([{"role": "user", "content": "1+2="}])
    assert lm.tok_encode(rendered) == encode_prompt(model.tokenizer, "1+2=")


@pytest.mark.parametrize("model_type", ["sdar", "Fast_dLLM_Qwen"])
def test_likelihoods_of_block_causal_models(tmp_path, model_type):
    """They go over the blocks of the model, or over those of `block_length`."""
    model = block_causal_model(tmp_path / "m", model_type)
    asked, found = requests("loglikelihood", ("1+2=", "0312345")), []
    prompt, response = (model.tokenizer(text).input_ids for text in ("1+2=", "0312345"))
    for block_length in (1, 4, None):
        config = SamplerConfig(block_length=block_length)
        settings = {"block_length": block_length, "check_greedy": False, "nelbo_samples": 8}
        in_blocks = replace(model, block_size=block_length or model.block_size)
        [bound] = TabomLM(model, **settings).loglikelihood(asked, True)
        assert bound[0] == pytest.approx(nelbo_log_likelihood(in_blocks, prompt, response, 8), rel=1e-5)
        along = TabomLM(model, likelihood="trajectory", **settings).loglikelihood(asked, True)
        assert along == [trajectory_log_likelihood(model, prompt, response, config)]
        found.append(bound[0])
    assert found[0] != pytest.approx(found[1], rel=1e-3)
    given = TabomLM(str(tmp_path / "m"), block_size=3, mask_token_id=model.mask_token_id - 1).model
    assert (given.block_size, given.mask_token_id) == (3, model.mask_token_id - 1)
    whole = TabomLM(model, nelbo_samples=8, check_greedy=False)
    assert whole.loglikelihood_rolling(requests("loglikelihood_rolling", ("1+2=0312345",)), True)[0] < 0


def test_the_bound_and_the_likelihood_along_the_decoding(seed):
    model = random_model(seed)
    both = {
        name: TabomLM(model, likelihood=name, nelbo_samples=64).loglikelihood(
            requests("loglikelihood", ("1+2=", "0003"), ("", "12")), True
        )
        for name in ("nelbo", "trajectory")
    }
    assert both["nelbo"][0][1] == both["trajectory"][0][1], "greedy or not, the same"
    assert all(value < 0 for results in both.values() for value, _ in results)
    rolling = TabomLM(model).loglikelihood_rolling(requests("loglikelihood_rolling", ("12",)), True)
    assert len(rolling) == 1 and rolling[0] < 0


def test_wrong_arguments(seed):
    model = random_model(seed)
    with pytest.raises(ValueError, match="polcy='x': neither"):
        TabomLM(model, polcy="x")
    with pytest.raises(ValueError, match="expected nelbo or trajectory"):
        TabomLM(model, likelihood="exact")
    with pytest.raises(ValueError, match="block_size=4, mask_token_id=None with a loaded model"):
        TabomLM(model, block_size=4)
    assert TabomLM(model, tokens_per_step=2).sampler == SamplerConfig(tokens_per_step=2)
