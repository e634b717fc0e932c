"""What costs a newcomer time: one model under two names, a number out of its range, a flag among a hundred."""

import json
import re
import shutil
import threading

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainingArguments

from tabom.cli.commands import COMMANDS, TRAINING_ARGUMENTS
from tabom.cli.main import main
from tabom.data.progress import Lines
from tabom.models.loading import SHIPPED_PATH, load
from tabom.sampling.animation import PARTIAL_CHARACTER, pieces
from tabom.sampling.sampler import DecodingState
from tests.conftest import random_model


def run(*arguments):
    """Status of a command line, whether it returns or exits."""
    try:
        return main(list(arguments))
    except SystemExit as exit:
        return exit.code


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "base"
    diffusion_model = random_model(0)
    diffusion_model.model.save_pretrained(folder)
    diffusion_model.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "t.jsonl"
    path.write_text('{"prompt": "1+2=", "response": "0003", "decoding_order": [0, 2, 1, 3]}\n')
    return path


def test_relative_and_absolute_paths_are_one_model(capsys, monkeypatch, tmp_path, model_folder):
    prompts, output = tmp_path / "p.jsonl", str(tmp_path / "t.jsonl")
    prompts.write_text("".join(json.dumps({"prompt": f"{i}+1=", "answer": "2"}) + "\n" for i in range(4)))
    monkeypatch.chdir(model_folder.parent)
    link = tmp_path / "link"
    link.symlink_to(model_folder)
    for name in ("base", str(model_folder), "./base/", str(link)):
        assert run("collect", "--model", name, "--prompts", str(prompts), "--output", output) == 0, name
    assert capsys.readouterr().out.count("(0 made now)") == 3
    settings = json.loads((tmp_path / "t.jsonl.rejected").read_text().splitlines()[0])
    assert settings["model"] == load("base").model.name_or_path == str(model_folder)


def test_help_lists_own_fields_before_those_of_transformers(capsys):
    assert run("train", "--help") == 0
    short = capsys.readouterr().out
    assert "--objective" in short and "--adam_beta1" not in short
    for name in re.findall(r"--(\w+)", TRAINING_ARGUMENTS):
        assert name == "help_all" or name in TrainingArguments.__dataclass_fields__
    assert run("train", "--help_all") == 0
    said = capsys.readouterr().out
    own, theirs = said.split("TrainingArguments of transformers:")
    for name in ("data", "model", "objective", "rank_weight", "eval_prompts"):
        assert f"  --{name}" in own
    for name in ("output_dir", "learning_rate", "report_to"):
        assert f"--{name} " in theirs
    assert not re.search(rf"^  --({'|'.join(TrainingArguments.__dataclass_fields__)})\b", own, re.MULTILINE)
    assert said.splitlines()[0].startswith("usage: tabom train [--config FILE.yaml]")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["generate", "--threshold", "7"], "threshold=7.0: expected a probability in [0, 1]"),
        (["generate", "--temperature", "-1"], "temperature=-1.0: expected at least 0"),
        (["generate", "--temperature", "nan"], "temperature=nan: expected at least 0"),
        (["generate", "--top_p", "0"], "top_p=0.0: expected a probability mass in (0, 1]"),
        (["generate", "--top_p", "2"], "top_p=2.0: expected a probability mass in (0, 1]"),
        (["generate", "--top_k", "0"], "top_k=0: expected at least 1"),
        (["generate", "--max_new_tokens", "0"], "max_new_tokens=0: expected at least 1"),
        (
            ["generate", "--max_new_tokens", "126"],
            "max_new_tokens=126: with a prompt of 4 tokens more than the 128 pos",
        ),
        (["generate", "--max_new_tokens", "126", "--animate"], "max_new_tokens=126: with a prompt of 4 tokens more"),
        (["collect", "--num_prompts", "0"], "num_prompts=0: expected at least 1"),
        (["collect", "--samples_per_prompt", "0"], "samples_per_prompt=0: expected at least 1"),
        (["collect", "--max_new_tokens", "200"], "max_new_tokens=200: with a prompt of"),
        (["collect", "--verifier_timeout", "0"], "verifier_timeout=0.0: expected above 0 seconds"),
        (["collect", "--givens", "17"], "givens=17: expected 0 to 16"),
        (["evaluate", "--num_prompts", "0"], "num_prompts=0: expected at least 1"),
        (["evaluate", "--max_prompt_length", "0"], "max_prompt_length=0: expected at least 1"),
        (["evaluate", "--samplers", "steps=abc"], "steps=abc: expected a whole number or null"),
        (["evaluate", "--samplers", "top_p=[1"], "top_p=[1: expected a number or null"),
        (["evaluate", "--samplers", "threshold=7"], "threshold=7: expected a probability"),
        (["report", "{data}", "--limit", "0"], "limit=0: expected at least 1"),
        (["train", "--rank_weight", "-1"], "rank_weight=-1.0: expected at least 0"),
        (["train", "--rank_temperature", "0"], "rank_temperature=0.0: expected above 0 nats"),
        (["train", "--max_response_length", "0"], "max_response_length=0: expected at least 1"),
        (["train", "--lora_r", "0"], "lora_r=0: expected at least 1"),
        (["train", "--gradient_accumulation_steps", "0"], "gradient_accumulation_steps=0: expected at least 1"),
        (["train", "--per_device_train_batch_size", "0"], "per_device_train_batch_size=0: expected at least 1"),
        (["train", "--rank_margin", "1e308"], "rank_margin=1e+308: expected at most 1e+37"),
        (["train", "--peer_timeout", "0"], "peer_timeout=0.0: expected at least 1"),
        (["train", "--lora_dropout", "1"], "lora_dropout=1.0: expected a share in [0, 1)"),
        (["train", "--eval_num_prompts", "0"], "eval_num_prompts=0: expected at least 1"),
        (["train", "--report_to", "wandb"], "report_to=wandb: not installed; pip install wandb"),
        (["train", "--report_to", "tensorboard"], "report_to=tensorboard: not installed; pip install tensorboard"),
        (["train", "--learning_rate", "-1"], "learning_rate=-1.0: expected at least 0"),
        (["train", "--per_device_train_batch_size", "0"], "per_device_train_batch_size=0: expected at least 1"),
        (["train", "--num_train_epochs", "0"], "num_train_epochs=0.0: expected above 0, or --max_steps"),
        (
            ["generate", "--max_new_tokens", "4", "--block_length", "7"],
            "block_length=7: expected at most the response length 4",
        ),
        (["generate", "--system_prompt", "Be brief."], "system_prompt='Be brief.': this model's tokenizer has no chat"),
        (["generate", "--model", "shiped"], "model=shiped: no such model; did you mean 'shipped'?"),
        (["generate", "--model", "nobody"], "model=nobody: expected a folder, 'shipped' or 'shipped-block', or a name"),
        (["evaluate", "--model", "shipped", "nobody"], "model=nobody: expected a folder"),
        (["collect", "--verifier", "regex"], "verifier='regex': give --answer_pattern"),
        (["collect", "--prompt_template", "{tmp}/no.txt"], "no.txt: no such file"),
        (["collect", "--output", "{tmp}"], "output={tmp}: a folder; give the name of a file"),
        (["report", "{data}", "-o", "{tmp}"], "output={tmp}: a folder; give the name of a file"),
        (["report", "{tmp}/no"], "no: no such file or folder"),
        (["report", "{tmp}/other.json"], "other.json: field 'prompt': missing"),
        (["report"], "nothing to report: give trajectories"),
        (["quickstart", "--processes", "0"], "processes=0: expected at least 1"),
        (["train", "--config", "{tmp}/broken.yaml"], "broken.yaml: not valid YAML: "),
        (["train", "--model", "{tmp}/torn"], "model.safetensors is not whole"),
        (["generate", "--model", "{tmp}/torn"], "model.safetensors is not whole"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it(capsys, monkeypatch, tmp_path, model_folder, data, arguments, message):
    monkeypatch.setattr("tabom.training.config.get_available_reporting_integrations", list)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "broken.yaml").write_text("rank_margin: [1,\nrank_loss: hinge\n")
    (tmp_path / "other.json").write_text('{"accuracy": 1}\n')
    if "{tmp}/torn" in arguments:
        shutil.copytree(model_folder, tmp_path / "torn")
        weights = tmp_path / "torn" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
    filled = [argument.replace("{tmp}", str(tmp_path)).replace("{data}", str(data)) for argument in arguments]
    if "--model" not in filled and filled[0] != "quickstart":
        filled += ["--model", str(model_folder)]
    output = str(tmp_path / "out")
    filled += {
        "generate": ["--prompt", "1+2="],
        "collect": ["--task", "addition", *([] if "--output" in filled else ["--output", f"{output}.jsonl"])],
        "evaluate": ["--task", "addition", "--output_dir", output],
        "train": ["--data", str(data), "--output_dir", output],
        "report": [] if "-o" in filled else ["-o", f"{output}.html"],
        "quickstart": ["--output_dir", output],
    }[filled[0]]
    assert run(*filled) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"tabom {filled[0]}: error: ") and message.replace("{tmp}", str(tmp_path)) in error


@pytest.mark.parametrize("command", COMMANDS)
def test_help_gives_every_option_and_its_default_once(capsys, command):
    assert run(*command.split(), "--help") == 0
    said = capsys.readouterr().out
    options = re.findall(r"^  (?:-\w, )?--(\w+)", said, re.MULTILINE)
    assert len(options) == len(set(options)) and "(default: " not in said and "None" not in said
    assert not re.search(r"^  .*--\w+-\w+", said, re.MULTILINE), "one spelling is enough"
    for entry in re.split(r"^  (?=-)", said, flags=re.MULTILINE):
        assert entry.count("Default: ") <= 1


def test_help_begins_with_the_fields_of_the_command(capsys):
    for command, first in (
        ("collect", "task"),
        ("evaluate", "prompts"),
        ("generate", "prompt"),
        ("plan", "num_prompts"),
    ):
        assert run(command, "--help") == 0
        options = re.findall(r"^  (?:-\w, )?--(\w+)", capsys.readouterr().out, re.MULTILINE)
        assert next(each for each in options if each not in ("help", "config", "recipe")) == first
    assert run("plan", "--help") == 0
    assert len(capsys.readouterr().out.splitlines()) < 50


def test_what_is_cut_and_what_the_vocabulary_lacks_is_counted(capsys, caplog, tmp_path, model_folder, data):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "1+2=", "answer": "3"}\n{"prompt": "Ä=", "answer": "3"}\n')
    common = ["--model", str(model_folder), "--max_prompt_length", "3"]
    asked = [*common, "--prompts", str(prompts), "--max_new_tokens", "2"]
    for command in (["collect", *asked, "-o", str(tmp_path / "t.jsonl")], ["evaluate", *asked, "-o", str(tmp_path)]):
        assert run(*command) == 0
        said = capsys.readouterr().out
        assert "p.jsonl: 1 of 2 prompts cut to max_prompt_length=3 tokens" in said
        assert "p.jsonl: 1 of 2 prompts with text that the model's vocabulary does not have" in said
    assert run("generate", "--model", str(model_folder), "--prompt", "Ä=") == 0
    assert "1 of 1 prompts with text that the model's vocabulary does not have" in capsys.readouterr().err
    learnt = tmp_path / "learnt.jsonl"
    learnt.write_text(data.read_text() + '{"prompt": "Ä=", "response": "01"}\n')
    command = ["train", *common, "--data", str(learnt), "--max_response_length", "3", "--max_steps", "1"]
    assert run(*command, "-o", str(tmp_path / "run"), "--report_to", "none") == 0
    for words in (
        "1 of 2 prompts cut to max_prompt_length=3 tokens",
        "1 of 2 responses cut to max_response_length=3 tokens",
        "1 of 2 records with text that the model's vocabulary does not have",
    ):
        assert f"{learnt}: {words}" in caplog.text


def test_a_line_says_what_is_done_and_what_is_left(monkeypatch):
    monkeypatch.setattr("tabom.data.progress.time.monotonic", iter([100, 130, 160, 160, 190]).__next__)
    monkeypatch.setattr("tabom.data.progress.Thread.start", lambda self: None)
    lines = Lines()
    lines.begin("collecting", 64)
    assert lines.line() == "collecting: 0 of 64 (0%) after 0:00:30"
    lines.update(48, "25.0% of 48 right")
    assert lines.line() == "25.0% of 48 right: 48 of 64 (75%) after 0:01:00, 0:00:20 left"
    lines.begin("training steps", 40, 20)
    lines.update(25, "training steps")
    assert lines.line() == "training steps: 25 of 40 (62%) after 0:00:30, 0:01:30 left", "of what this run did"


@pytest.mark.parametrize("command", ["collect", "evaluate", "generate", "train"])
def test_lines_in_a_log_where_there_is_no_terminal(capsys, monkeypatch, tmp_path, model_folder, data, command):
    """Half a minute is over here when the work has got somewhere, and the work waits for the line."""
    worked, printed, asked = threading.Event(), threading.Event(), []

    class HalfAMinute(threading.Event):
        def wait(self, timeout):
            asked.append(timeout)
            if len(asked) == 1:
                return not worked.wait()
            printed.set()
            return super().wait()

    update = Lines.update
    monkeypatch.setattr(Lines, "update", lambda self, *a: (update(self, *a), worked.set(), printed.wait()))
    monkeypatch.setattr("tabom.data.progress.Event", HalfAMinute)
    arguments = {
        "collect": [
            "--task",
            "addition",
            "--num_prompts",
            "20",
            "--max_new_tokens",
            "2",
            "-o",
            str(tmp_path / "t.jsonl"),
        ],
        "evaluate": ["--task", "addition", "--num_prompts", "20", "--max_new_tokens", "2", "-o", str(tmp_path / "e")],
        "generate": ["--prompt", "1+2=", "--max_new_tokens", "4"],
        "train": ["--data", str(data), "--max_steps", "2", "-o", str(tmp_path / "run"), "--report_to", "none"],
    }[command]
    assert run(command, "--model", str(model_folder), *arguments) == 0
    assert asked[0] == 30
    said = capsys.readouterr().err
    title = {"generate": "decoding", "train": "training steps"}.get(command, r".*\d+\.\d% of \d+ right")
    assert re.search(rf"^{title}: \d+ of \d+ \(\d+%\) after 0:00:0\d", said, re.MULTILINE)
    assert "it/s]" not in said


def test_the_animation_ends_where_the_text_ends_and_says_what_its_colours_mean(capsys, monkeypatch, model_folder):
    monkeypatch.setattr("tabom.sampling.animation.time.sleep", lambda seconds: None)
    diffusion_model = load(model_folder)
    end = diffusion_model.tokenizer.eos_token_id

    def decoded(model, prompts, length, config):
        """The last state of a decoding whose second token ends the text."""
        tokens = torch.tensor([[5, end, 6, end]])
        yield DecodingState(tokens, torch.arange(4)[None], torch.zeros(1, 4), torch.zeros(1, 4), 4)

    monkeypatch.setattr("tabom.sampling.animation.denoise", decoded)
    for option, words in (("step", ("decided first", "decided last")), ("certainty", ("certain", "uncertain"))):
        assert run("generate", "--model", str(model_folder), "--prompt", "1+2=", "--animate", "--color_by", option) == 0
        legend, *_, last = capsys.readouterr().out.strip().splitlines()
        assert all(each in legend for each in words)
        assert last.strip() == f"1+2= {diffusion_model.tokenizer.decode([5])}"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_torn_json_of_a_model_is_named(capsys, tmp_path, model_folder, name):
    torn = tmp_path / "torn" / name
    shutil.copytree(model_folder, torn.parent)
    torn.write_text(torn.read_text()[:-3])
    assert run("generate", "--model", str(torn.parent), "--prompt", "1+2=") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"tabom generate: error: model={torn.parent}: {name} is not whole (")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("config.json", "[]", "config.json holds [] instead of an object"),
        ("config.json", "null", "config.json holds None instead of an object"),
        ("config.json", "[" * 100_000, "config.json is not whole"),
        ("config.json", {"model_type": []}, "config.json has model_type=[]: expected a name"),
        ("config.json", {"num_attention_heads": 0}, "config.json has num_attention_heads=0: expected a number from 1"),
        ("config.json", {"num_key_value_heads": 0}, "config.json has num_key_value_heads=0: expected a number from 1"),
        (
            "config.json",
            {"num_hidden_layers": 10**9},
            "config.json has num_hidden_layers=1000000000: expected a number",
        ),
        ("config.json", {"num_hidden_layers": -1}, "config.json has num_hidden_layers=-1: expected a number from 1"),
        ("config.json", {"vocab_size": "x"}, "config.json has vocab_size='x': expected a number from 1"),
        ("config.json", {"logits_shift": 10**9}, "logits_shift=1000000000 in config.json: expected 0, or 1"),
        ("config.json", {"mask_token_id": "x"}, "mask_token_id='x': not in this model's vocabulary"),
        ("tokenizer.json", "{}", "its tokenizer cannot be read (KeyError: 'added_tokens')"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json holds [] instead of an object"),
    ],
)
def test_a_model_with_impossible_settings_is_one_line(capsys, tmp_path, model_folder, name, content, message):
    broken = tmp_path / "broken" / name
    shutil.copytree(model_folder, broken.parent)
    if isinstance(content, dict):
        content = json.dumps(json.loads(broken.read_text()) | content)
    broken.write_text(content)
    assert run("generate", "--model", str(broken.parent), "--prompt", "1+2=") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("tabom generate: error: ") and message in error


@pytest.mark.parametrize("argument", ["data", "eval_data", "eval_prompts"])
def test_training_data_are_looked_for_before_the_model_is_loaded(
    capsys, monkeypatch, tmp_path, model_folder, data, argument
):
    monkeypatch.setattr("tabom.cli.train.load_model", lambda arguments: pytest.fail("the model was loaded"))
    arguments = {"data": data, "model": model_folder, "output_dir": tmp_path / "out", argument: tmp_path / "typo.jsonl"}
    if argument != "data":
        arguments["eval_strategy"] = "epoch"
    assert run("train", *[text for name, value in arguments.items() for text in (f"--{name}", str(value))]) == 2
    assert "typo.jsonl" in capsys.readouterr().err.splitlines()[-1]


def byte_level_tokenizer():
    """One token a byte, as byte-level BPE has before any merge."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_the_animation_shows_characters_of_several_tokens_whole():
    tokenizer = byte_level_tokenizer()
    tokens = tokenizer("é → 中!").input_ids  # 2, 1, 3, 1, 3 and 1 bytes
    decided = list(range(len(tokens)))
    assert list(pieces(tokenizer, tokens, decided)) == ["", "é", " ", "", "", "→", " ", "", "", "中", "!"]
    half_way = [0, 1, 2, 3, 4, -1, -1, -1, 8, 9, 10]  # inside the arrow, and inside the Chinese character
    shown = list(pieces(tokenizer, tokens, half_way))
    assert shown == [
        "",
        "é",
        " ",
        PARTIAL_CHARACTER,
        PARTIAL_CHARACTER,
        "·",
        "·",
        "·",
        "",
        "",
        PARTIAL_CHARACTER * 2 + "!",
    ]
    assert not any("\ufffd" in piece for piece in shown)


def test_the_animation_is_slow_enough_to_see(monkeypatch, capsys):
    slept = []
    monkeypatch.setattr("tabom.sampling.animation.time.sleep", slept.append)
    for length in ("4", "40"):
        slept.clear()
        assert (
            run(
                "generate",
                "--model",
                str(SHIPPED_PATH),
                "--prompt",
                "517-289=",
                "--animate",
                "--max_new_tokens",
                length,
            )
            == 0
        )
        assert sum(slept) >= 3 and min(slept) >= 0.15
