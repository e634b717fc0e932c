"""A model by its name, and what is pushed to the hub."""

import re
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import BertConfig, BertForMaskedLM, TrainingArguments

from tabom import TabomConfig, TabomTrainer, Trajectory, load
from tabom.cli.main import main, no_connection
from tabom.models.loading import SHIPPED_PATH
from tests.conftest import random_model

DATA = [Trajectory("1+1=", "2345", [6, 7, 8, 9], [0, 2, 1, 3])] * 4


@pytest.fixture
def folder(tmp_path, monkeypatch, seed):
    """A model in `tmp_path`, which is the working directory."""
    diffusion_model = random_model(seed)
    diffusion_model.model.save_pretrained(tmp_path / "base")
    diffusion_model.tokenizer.save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "base"


def by_name(folder):
    return {"model": str(folder)}


def by_path_from_here(folder):
    return {"model": folder.relative_to(Path.cwd())}


def loaded(folder):
    return {"model": load(folder)}


def without_its_tokenizer(folder):
    return {"model": load(folder).model}


def in_parts(folder):
    diffusion_model = load(folder)
    return {"model": diffusion_model.model, "processing_class": diffusion_model.tokenizer}


@pytest.mark.parametrize("how", [by_name, by_path_from_here, loaded, without_its_tokenizer, in_parts])
def test_the_ways_to_name_a_model_train_the_same(folder, how):
    trainer = TabomTrainer(**how(folder), train_dataset=DATA)
    assert trainer.args.output_dir == "base-TABOM" and trainer.processing_class.mask_token == "<mask>"
    assert type(trainer.args) is TabomConfig and trainer.args.objective == "tabom"
    args = TabomConfig("run", max_steps=1, save_strategy="no", report_to="none", disable_tqdm=True)
    trainer = TabomTrainer(**how(folder), args=args, train_dataset=DATA)
    trainer.train()
    trainer.save_model()
    again = load("run").model
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(weight, again.state_dict()[name]), name


def test_a_nameless_model_needs_its_tokenizer():
    with pytest.raises(ValueError, match="processing_class=None, and the model was not loaded from a folder"):
        TabomTrainer(random_model(0).model)


def test_arguments_of_another_class_and_no_data_are_named(folder):
    with pytest.raises(TypeError, match="args: expected a TabomConfig, got TrainingArguments"):
        TabomTrainer(folder, TrainingArguments("run", report_to="none"), DATA)
    with pytest.raises(ValueError, match="training requires a train_dataset"):
        TabomTrainer(folder).train()


def test_a_masked_language_model_of_transformers_is_taken_as_it_is(folder):
    """Whose config says nothing of causal attention."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForMaskedLM(BertConfig(**sizes, vocab_size=60))
    args = TabomConfig("run", max_steps=1, save_strategy="no", report_to="none", disable_tqdm=True)
    trainer = TabomTrainer(model, args, DATA, processing_class=load(folder).tokenizer)
    trainer.train()
    trainer.save_model()
    assert isinstance(load("run").model, BertForMaskedLM)


@pytest.fixture
def uploads(monkeypatch):
    """What a stub of the hub was sent: commit message, files, model card."""
    sent = []

    def upload_folder(folder_path, commit_message, ignore_patterns=(), run_as_future=False, **_):
        names = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        files = {name for name in names if not any(fnmatch(name, each) for each in ignore_patterns)}
        sent.append((commit_message, files, (Path(folder_path) / "README.md").read_text()))
        return SimpleNamespace(done=lambda: True, result=lambda: None)

    api = SimpleNamespace(
        create_repo=lambda name, **_: SimpleNamespace(repo_id=f"somebody/{name}"), upload_folder=upload_folder
    )
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: api)
    return sent


@pytest.mark.parametrize("use_peft", [False, True])
def test_the_command_line_pushes_weights_tokenizer_and_card(tmp_path, capsys, uploads, use_peft):
    data = tmp_path / "t.jsonl"
    data.write_text('{"prompt": "1+2=", "response": "0003", "decoding_order": [0, 2, 1, 3]}\n')
    arguments = ["--data", str(data), "--output_dir", str(tmp_path / "run"), "--max_steps", "2", "--save_steps", "1"]
    pushing = ["--push_to_hub", "--hub_model_id", "tuned", "--hub_strategy", "every_save"]
    peft = ["--use_peft", "true"] if use_peft else []
    assert main(["train", "--model", str(SHIPPED_PATH), *arguments, *pushing, *peft, "--report_to", "none"]) == 0
    assert "pushed to somebody/tuned" in capsys.readouterr().out
    assert [message for message, *_ in uploads] == [f"Training in progress, step {n}" for n in (1, 2)] + ["Model save"]
    weights = "adapter_model.safetensors" if use_peft else "model.safetensors"
    for message, files, _ in uploads:
        assert {weights, "tokenizer.json", "README.md"} <= files, message
        unwanted = {name for name in files if re.search(r"optimizer|saving|checkpoint", name)}
        assert not unwanted, f"{message}: {unwanted}"
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert "# tuned" in card.text and str(SHIPPED_PATH) in card.text


def test_without_a_network_a_push_ends_in_one_line_and_the_model_stays(tmp_path, capsys, monkeypatch, uploads):
    def no_network(*_, **__):
        raise no_connection()("[Errno -2] Name or service not known")

    monkeypatch.setattr("transformers.Trainer.push_to_hub", no_network)
    data = tmp_path / "t.jsonl"
    data.write_text('{"prompt": "1+2=", "response": "0003"}\n')
    arguments = ["--data", str(data), "--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--report_to", "none"]
    assert main(["train", *arguments, "--push_to_hub"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("tabom train: error: the hub cannot be reached: [Errno -2] Name or service not known")
    load(tmp_path / "run")


def test_a_pushed_card_shows_the_evaluation_of_the_pushed_weights(folder, uploads):
    """The first checkpoint is the best one; the last push is of its weights again."""

    class Worsening(TabomTrainer):
        def evaluation_loop(self, *args, **kwargs):
            output = super().evaluation_loop(*args, **kwargs)
            output.metrics["eval_quality"] = -self.state.global_step
            return output

    args = TabomConfig(
        "run",
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="quality",
        greater_is_better=True,
        push_to_hub=True,
        hub_strategy="every_save",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Worsening(str(folder), args, train_dataset=DATA, eval_dataset=DATA)
    trainer.train()
    trainer.save_model()
    shown = [re.search(r"\| eval_loss \| .* \(step (\d)\)", card)[1] for *_, card in uploads]
    assert shown == ["1", "2", "3", "1"]
