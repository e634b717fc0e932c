"""lm-evaluation-harness's own definitions of GSM8K and HumanEval, on data of those shapes, with the shipped model."""

import json
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.tasks import TaskManager

from tabom import load
from tabom.cli.main import main
from tabom.data.verifiers.sandbox import find_bubblewrap
from tabom.evaluation.lm_eval import TabomLM, cut
from tabom.lab.tasks import make_task
from tabom.models.loading import SHIPPED_PATH

BUNDLED = Path(lm_eval.__file__).parent / "tasks"
OVERRIDE = """
include: {bundled}
task: {name}
dataset_path: json
dataset_name: null
dataset_kwargs: {{data_files: {{train: {folder}/{data}, test: {folder}/{data}}}}}
"""
PLAIN = 'doc_to_text: "{{question}}"\ntarget_delimiter: ""\nnum_fewshot: 0\n'
HUMANEVAL = {
    "task_id": "T/0",
    "prompt": "def one():\n    return 1\n\nnumber = ",
    "canonical_solution": "1",
    "test": "def check(candidate):\n    assert candidate() == 1 and number >= 0\n",
    "entry_point": "one",
}
CODE_EVAL = '''
"""Stands for the hub's metric of that name: the programs that pass, run in our sandbox."""
import datasets
import evaluate
from tabom import make_verifier


class CodeEval(evaluate.Metric):
    def _info(self):
        features = {"predictions": datasets.Sequence(datasets.Value("string")), "references": datasets.Value("string")}
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features(features))

    def _compute(self, predictions, references, k):
        code = make_verifier("code", timeout=60)
        right = [code("", tests, each).correct for tests, (each,) in zip(references, predictions)]
        return {"pass@1": sum(right) / len(right)}, {}
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Overrides of the bundled tasks that read files of ours and change nothing else, and one with plain prompts."""
    folder = tmp_path_factory.mktemp("bundled")
    problems = make_task("subtraction").problems(12, "test", 0)
    gsm8k = [{"question": p.prompt, "answer": f"<<{p.prompt}>>\n#### {p.answer.lstrip('+')}"} for p in problems]
    for name, records in (("gsm8k", gsm8k), ("humaneval", [HUMANEVAL])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, task, rest in (("real", "gsm8k", ""), ("plain", "gsm8k", PLAIN), ("program", "humaneval", "")):
        settings = {"bundled": BUNDLED / task / f"{task}.yaml", "name": name, "folder": folder, "data": f"{task}.jsonl"}
        (folder / f"{name}.yaml").write_text(OVERRIDE.format(**settings) + rest)
    (folder / "code_eval").mkdir()
    (folder / "code_eval" / "code_eval.py").write_text(CODE_EVAL)
    return folder


@pytest.fixture
def harness(folder, tmp_path, monkeypatch):
    """Runs a task in this process, without the hub; the task's results and its samples."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(task, model, **options):
        manager = TaskManager(include_path=str(folder))
        common = {"bootstrap_iters": 0, "confirm_run_unsafe_code": True, "log_samples": True}
        results = lm_eval.simple_evaluate(model=model, tasks=[task], task_manager=manager, **common, **options)
        return results["results"][task], results["samples"][task]

    return run


def evaluated(prompts, output):
    """What `tabom evaluate` makes of the same prompts: its results, and the responses by prompt."""
    command = ["evaluate", "--prompts", str(prompts), "--model", str(SHIPPED_PATH), "--max_new_tokens", "4"]
    assert main([*command, "--output_dir", str(output)]) == 0
    [result] = json.loads((output / "results.json").read_text())
    [answers] = output.glob("*/*/*/answers-0.jsonl")
    return result, {r["prompt"]: r["response"] for r in map(json.loads, answers.read_text().splitlines())}


def test_gsm8k_as_it_is_bundled(folder, harness, tmp_path):
    """Few-shot prompts, `until` strings and filters are the task's; the responses those of `tabom evaluate`."""
    _, samples = harness("real", TabomLM(load(SHIPPED_PATH), max_new_tokens=4), num_fewshot=1)
    assert {sample["filter"] for sample in samples} == {"strict-match", "flexible-extract"}
    responses = {sample["arguments"][0][0]: sample["resps"][0][0] for sample in samples}
    assert len(responses) == 12 and all(prompt.count("Question:") == 2 for prompt in responses)
    assert samples[0]["arguments"][0][1]["until"] == ["Question:", "</s>", "<|im_end|>"]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in responses))
    _, ours = evaluated(prompts, tmp_path / "ours")
    assert responses == {prompt: cut(text, ["Question:"]) for prompt, text in ours.items()}


def test_gsm8k_s_filters_find_the_accuracy_of_tabom_evaluate(folder, harness, tmp_path):
    pytest.importorskip("math_verify")
    results, _ = harness("plain", TabomLM(load(SHIPPED_PATH), max_new_tokens=4))
    ours, _ = evaluated(folder / "gsm8k.jsonl", tmp_path / "ours")
    assert 0.2 < ours["accuracy"]["mean"] < 1 and ours["settings"]["verifier"] == "math"
    assert results["exact_match,flexible-extract"] == pytest.approx(ours["accuracy"]["mean"])
    assert results["exact_match,strict-match"] == 0, "the lab's model writes no ####"


def test_gsm8k_as_a_conversation_of_several_turns(harness):
    model = load(SHIPPED_PATH)
    model.tokenizer.chat_template = (
        "{% for m in messages %}<eos>{{ m['role'][0] }}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<eos>a{% endif %}"
    )
    lm = TabomLM(model, max_new_tokens=4)
    _, samples = harness("real", lm, num_fewshot=1, apply_chat_template=True, fewshot_as_multiturn=True, limit=2)
    prompt = samples[0]["arguments"][0][0]
    assert prompt.startswith("<eos>uQuestion: ") and prompt.endswith("\nAnswer:<eos>a") and prompt.count("<eos>") == 4
    assert lm.tok_encode(prompt).count(model.eos_token_id) == 4


def test_humaneval_as_it_is_bundled(harness, monkeypatch):
    pytest.importorskip("evaluate")
    if find_bubblewrap() is None:
        pytest.skip("no working bubblewrap on this machine")
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    results, samples = harness("program", TabomLM(load(SHIPPED_PATH), max_new_tokens=1))
    assert samples[0]["arguments"][0][0] == HUMANEVAL["prompt"] and samples[0]["arguments"][0][1]["until"][1] == "\ndef"
    [[response]] = samples[0]["resps"]
    assert samples[0]["filtered_resps"] == [[HUMANEVAL["prompt"] + response]]
    assert results["pass@1,create_test"] == float(response.isdigit())
