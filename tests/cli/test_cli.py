import json
import subprocess
import sys

import pytest
import torch
from datasets import Dataset, DatasetDict
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from tabom.cli.arguments import parse_arguments
from tabom.cli.main import COMMANDS, main
from tabom.cli.model import ModelArguments
from tabom.cli.train import AdapterArguments, DataArguments
from tabom.data.prompts import read_prompts
from tabom.data.sources import read_records
from tabom.data.trajectories import read_trajectories
from tabom.evaluation.responses import count_right
from tabom.lab.model import character_tokenizer
from tabom.models.loading import SHIPPED_PATH, load
from tabom.sampling.config import SamplerConfig
from tabom.training.config import TabomConfig
from tests.conftest import random_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    diffusion_model = random_model(0)
    diffusion_model.model.save_pretrained(folder)
    diffusion_model.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "t.jsonl"
    record = {"prompt": "1+2=", "response": "0003", "decoding_order": [0, 2, 1, 3], "method": "entropy"}
    path.write_text("".join(json.dumps({**record, "prompt": f"{i}+2="}) + "\n" for i in range(8)))
    return str(path)


def run(*arguments):
    """Status of a command line, whether it returns or exits."""
    try:
        return main(list(arguments))
    except SystemExit as exit:
        return exit.code


def test_help(capsys):
    assert run() == run("--help") == 0
    overview = capsys.readouterr().out
    for command in COMMANDS:
        assert command in overview
        assert run(*command.split(), "--help") == 0
        assert "--config" in capsys.readouterr().out


def test_generate(capsys, model_folder):
    arguments = ["generate", "--model", model_folder, "--prompt", "1+2=", "[bold]x=", "--max_new_tokens", "5"]
    assert run(*arguments) == 0
    answers = capsys.readouterr().out.splitlines()
    assert len(answers) == 2 and all(answers)


@pytest.mark.parametrize("color_by", ["step", "certainty"])
def test_generate_animated(capsys, monkeypatch, model_folder, color_by):
    monkeypatch.setattr("tabom.sampling.animation.time.sleep", lambda seconds: None)
    plain, animated = (
        (run("generate", "--model", model_folder, "--prompt", "1+2=", *options), capsys.readouterr().out)
        for options in ([], ["--animate", "--color_by", color_by])
    )
    assert plain[0] == animated[0] == 0
    assert animated[1].strip().endswith(f"1+2= {plain[1].strip()}")


def test_collect_then_train_then_generate(capsys, tmp_path, model_folder):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i}+1="}) + "\n" for i in range(12)))
    output = str(tmp_path / "t.jsonl")
    collect = ["collect", "--model", model_folder, "--prompts", str(prompts), "--output", output]
    assert run(*collect) == 0
    said = capsys.readouterr().out
    assert "0 right of 12 attempts (12 made now)" in said and "12 more had no answer to be checked" in said
    assert run(*collect) == 0
    assert "0 right of 12 attempts (0 made now)" in capsys.readouterr().out

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "objective: tabom\nsupervised_window: 2\nrank_window: 2\nrank_loss: hinge\nrank_margin: 0.1\n"
        "learning_rate: 2e-5\nmax_steps: 2\nuse_cpu: true\nsave_strategy: 'no'\n"
        f"data: {output}\noutput_dir: {tmp_path / 'run'}\n"
    )
    assert run("train", "--config", str(recipe), "--model", model_folder, "--max_steps", "3") == 0
    assert "12 trajectories, 0 invalid" in capsys.readouterr().out
    assert run("generate", "--model", str(tmp_path / "run"), "--prompt", "1+2=") == 0


@pytest.mark.parametrize("recipe, policy", [("dream_prm12k", "entropy"), ("llada_ling_coder", "llada_low_confidence")])
def test_collect_then_train_with_the_matching_recipe(tmp_path, model_folder, recipe, policy):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i}+1="}) + "\n" for i in range(4)))
    output = str(tmp_path / "t.jsonl")
    collect = ["--prompts", str(prompts), "--policy", policy, "--steps", "6", "--output", output]
    assert run("collect", "--model", model_folder, *collect) == 0
    train = ["--recipe", recipe, "--model", model_folder, "--data", output, "--output_dir", str(tmp_path / "run")]
    fitting = ["--max_response_length", "64"]  # the recipe's 256 are more than this model has positions for
    assert run("train", *train, *fitting, "--dtype", "float32", "--bf16", "false", "--max_steps", "1") == 0
    assert run("generate", "--model", str(tmp_path / "run"), "--prompt", "1+2=") == 0


def test_records_of_other_methods_are_named(capsys, tmp_path, data, model_folder):
    arguments = ["--model", model_folder, "--data", data, "--output_dir", str(tmp_path)]
    assert run("train", *arguments, "--method", "default", "credit") == 2
    assert "no valid trajectory with method default or credit, but 8 entropy" in capsys.readouterr().err


def test_the_best_checkpoint_and_early_stopping(tmp_path, data, model_folder):
    """With a learning rate that ruins the model, the first evaluation is the best and training stops early."""
    arguments = ["--model", model_folder, "--data", data, "--eval_data", data, "--output_dir", str(tmp_path / "run")]
    rhythm = ["--eval_strategy", "steps", "--eval_steps", "2", "--save_steps", "2", "--max_steps", "40"]
    stopping = ["--load_best_model_at_end", "true", "--early_stopping_patience", "2"]
    ruin = ["--learning_rate", "0.5", "--lr_scheduler_type", "constant", "--supervised_window", "2"]
    assert run("train", *arguments, *rhythm, *stopping, *ruin) == 0
    last = max((tmp_path / "run").glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    state = json.loads((last / "trainer_state.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    assert state["best_metric"] == losses[best] and state["best_global_step"] == best
    assert max(losses) == best + 4 < 40
    saved, kept = (load_file(tmp_path / "run" / path / "model.safetensors") for path in (".", f"checkpoint-{best}"))
    assert all(torch.equal(saved[name], kept[name]) for name in kept)


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path, data, model_folder, monkeypatch):
    from tabom.training.trainer import TabomTrainer

    seen = []
    monkeypatch.setattr(TabomTrainer, "train", lambda self, **_: seen.append(self.args))
    monkeypatch.setattr(TabomTrainer, "save_model", lambda self: None)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 2e-5\nrank_margin: 1\nrank_loss: hinge\n")
    arguments = ["--config", str(recipe), "--model", model_folder, "--data", data, "--output_dir", str(tmp_path)]
    assert run("train", *arguments, "--rank_margin", "0.3") == 0
    [config] = seen
    assert (config.learning_rate, config.rank_margin, config.rank_loss, config.rank_weight) == (2e-5, 0.3, "hinge", 0.3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nonsense"], "unknown command 'nonsense'"),
        (["generate"], "--prompt"),
        (["generate", "--prompt", "1", "--polcy", "x"], "unrecognized argument: --polcy"),
        (["generate", "--prompt", "1", "--policy", "best"], "invalid choice: 'best'"),
        (["generate", "--prompt", "1", "--temperature", "-1"], "temperature=-1.0"),
        (["generate", "--prompt", "1", "--steps", "9", "--max_new_tokens", "4"], "steps=9"),
        (["generate", "--prompt", "1", "--model", "no/such/folder"], "no/such/folder"),
        (["collect", "--output", "{tmp}/o.jsonl"], "give exactly one of them"),
        (["collect", "--output", "{tmp}/o.jsonl", "--task", "chess"], "task='chess'"),
        (["collect", "--output", "{tmp}/o.jsonl", "--prompts", "{tmp}/missing"], "missing"),
        (["collect", "--output", "{tmp}/o.jsonl", "--task", "sorting", "--samples_per_prompt", "2"], "temperature=0"),
        (["train", "--data", "{tmp}/broken.jsonl"], "broken.jsonl, line 2: field 'prompt': missing"),
        (["train", "--data", "{tmp}/broken.jsonl", "--config", "{tmp}/bad.yaml"], "did you mean 'learning_rate'?"),
        (["train", "--data", "{tmp}/broken.jsonl", "--config", "{tmp}/choice.yaml"], "rank_loss='ranknet'"),
        (["train", "--data", "{tmp}/broken.jsonl", "--config", "{tmp}/list.yaml"], "expected `field: value` lines"),
        (["train", "--data", "{tmp}/broken.jsonl", "--config", "{tmp}/none.yaml"], "none.yaml"),
        (["train", "--data", "{tmp}/t", "--supervised_window", "0"], "supervised_window=0"),
        (["train", "--data", "{tmp}/t", "--rank_window", "most"], "rank_window=most: expected a number"),
        (["train", "--data", "{tmp}/t", "--rank_margin", "nan"], "rank_margin=nan"),
    ],
)
def test_errors_are_one_line_with_a_status(capsys, tmp_path, model_folder, arguments, message):
    (tmp_path / "broken.jsonl").write_text('{"prompt": "1", "response": "2"}\n{"response": "2"}\n')
    (tmp_path / "bad.yaml").write_text("learning_rat: 1\n")
    (tmp_path / "choice.yaml").write_text("rank_loss: ranknet\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    if "--model" not in arguments and arguments[0] in ("generate", "train", "collect"):
        arguments += ["--model", model_folder]
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert message in error.splitlines()[-1] or arguments == ["nonsense"]  # which the overview follows


def test_a_loss_that_is_not_finite_ends_in_one_line_with_a_status_of_its_own(capsys, tmp_path, model_folder, data):
    settings = ["--optim", "sgd", "--learning_rate", "1e38", "--max_steps", "9", "--save_strategy", "no"]
    arguments = ["--model", model_folder, "--data", data, "--output_dir", str(tmp_path), *settings]
    assert run("train", *arguments) == 1
    error = capsys.readouterr().err
    assert "is not finite" in error and "Traceback" not in error
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("command", ["quickstart", "lab study", "evaluate --task addition --num_prompts 2"])
def test_a_missing_extra_is_named_before_any_work(tmp_path, capsys, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    for name in ("evaluation.pictures", "evaluation.accuracy_picture", "lab.report", "lab.study_report"):
        monkeypatch.delitem(sys.modules, f"tabom.{name}", raising=False)
    for name in ("lab.quickstart", "cli.quickstart", "cli.lab_study", "cli.evaluate"):
        monkeypatch.delitem(sys.modules, f"tabom.{name}", raising=False)
    assert run(*command.split(), "--output_dir", str(tmp_path / "out")) == 2
    said = capsys.readouterr()
    assert "needs matplotlib; pip install matplotlib (the extra plot)" in said.err
    assert said.out == "" and not (tmp_path / "out").exists()


def test_a_tokenizer_cannot_run_code_unasked(model_folder, tmp_path):
    """A folder that brings code of its own is refused, and its code does not run."""
    folder = tmp_path / "remote"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}})
    )
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    command = [sys.executable, "-m", "tabom", "generate", "--model", str(folder), "--prompt", "1"]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("peft", [False, True])
def test_the_best_checkpoint_by_the_answers(tmp_path, data, peft):
    """A model that knows the answers is ruined by training; the checkpoint with the most right answers comes back."""
    prompts = tmp_path / "sums.jsonl"
    problems = [(3, 4), (123, 456), (20, 30), (7, 700), (11, 22)]
    prompts.write_text(
        "".join(json.dumps({"prompt": f"{a:03d}+{b:03d}=", "answer": f"{a + b:04d}"}) + "\n" for a, b in problems)
    )
    arguments = ["--data", data, "--output_dir", str(tmp_path / "run"), "--use_peft", str(peft)]
    evaluation = [
        "--eval_prompts",
        str(prompts),
        "--eval_sampler",
        "max_new_tokens=4",
        "--load_best_model_at_end",
        "true",
    ]
    rhythm = ["--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1", "--max_steps", "3"]
    slow_ruin = ["--learning_rate", "0.02" if peft else "0.005", "--lr_scheduler_type", "constant"]
    assert run("train", *arguments, *evaluation, *rhythm, *slow_ruin, "--supervised_window", "2") == 0
    state = json.loads((tmp_path / "run" / "checkpoint-3" / "trainer_state.json").read_text())
    accuracy = {entry["step"]: entry["eval_accuracy"] for entry in state["log_history"] if "eval_accuracy" in entry}
    assert len(accuracy) == 3 and set(accuracy.values()) <= {0, 0.2, 0.4, 0.6, 0.8, 1}
    assert state["best_metric"] == max(accuracy.values()) and state["best_global_step"] == max(
        accuracy, key=accuracy.get
    )
    diffusion_model = load(tmp_path / "run")
    sums, _ = read_prompts(prompts)
    assert count_right(diffusion_model, sums, SamplerConfig(max_new_tokens=4)) == (round(5 * max(accuracy.values())), 5)


@pytest.mark.parametrize("to, suffix", [("parquet", ".parquet"), ("jsonl", ".jsonl"), ("datasets", "")])
def test_exported_trajectories_read_back(capsys, tmp_path, data, to, suffix):
    tokenizer = character_tokenizer()
    output = tmp_path / f"exported{suffix}"
    assert run("export", "--data", data, data, "--to", to, "--output", str(output)) == 0
    assert "16 records" in capsys.readouterr().out
    before, after = (read_trajectories(path, tokenizer, len(tokenizer))[0] for path in (data, output))
    assert after == before * 2


def test_figures_of_the_training_go_to_tensorboard(tmp_path, data, model_folder):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = ["--model", model_folder, "--data", data, "--output_dir", str(tmp_path / "run"), "--max_steps", "2"]
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "1+1=", "answer": "2"}\n')
    evaluation = ["--eval_prompts", str(prompts), "--eval_sampler", "max_new_tokens=2", "--eval_strategy", "epoch"]
    reporting = ["--report_to", "tensorboard", "--logging_steps", "1", "--save_strategy", "no"]
    assert run("train", *arguments, *evaluation, *reporting) == 0
    [events] = tmp_path.glob("run/**/events.out.*")
    found = EventAccumulator(str(events.parent)).Reload()
    assert {"train/loss", "train/rank", "train/order_accuracy", "eval/accuracy"} <= set(found.Tags()["scalars"])
    assert [point.step for point in found.Scalars("train/rank")] == [1, 2]


def test_an_exported_field_that_the_first_record_lacks_is_not_lost(tmp_path):
    records = [{"prompt": "1", "response": "2"}, {"prompt": "1", "response": "2", "decoding_order": [0], "method": "a"}]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    output = tmp_path / "t.parquet"
    assert run("export", "--data", str(path), "--to", "parquet", "--output", str(output)) == 0
    assert [record for _, record in read_records(output)] == records


def test_the_model_card_says_method_data_settings_and_results(tmp_path, data, model_folder):
    arguments = ["--model", model_folder, "--data", data, "--output_dir", str(tmp_path / "run"), "--max_steps", "2"]
    evaluation = ["--eval_data", data, "--eval_strategy", "epoch", "--learning_rate", "3e-5", "--save_strategy", "no"]
    assert run("train", *arguments, *evaluation, "--logging_steps", "1") == 0
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.library_name == "transformers" and "tabom" in card.data.tags
    assert {result.metric_type for result in card.data.eval_results} >= {"loss"}
    for words in (
        model_folder,
        "8 trajectories",
        "method entropy",
        "| learning_rate | 3e-05 |",
        "| eval_loss |",
        "`tabom`",
    ):
        assert words in card.text, words


def test_collect_never_takes_the_test_split_by_itself(capsys, tmp_path, model_folder):
    tables = {split: Dataset.from_list([{"prompt": split, "answer": "1"}]) for split in ("test", "train")}
    DatasetDict(tables).save_to_disk(tmp_path / "sums")
    common = ["--model", model_folder, "--prompts", str(tmp_path / "sums"), "--max_new_tokens", "3"]
    assert run("collect", *common, "--output", str(tmp_path / "t.jsonl")) == 0
    assert "sums: split 'train' (--split chooses another)" in capsys.readouterr().out
    [_settings, record] = (tmp_path / "t.jsonl.rejected").read_text().splitlines()
    assert json.loads(record)["prompt"] == "train"
    assert run("evaluate", *common, "--output_dir", str(tmp_path / "e")) == 0
    assert "sums: split 'test' (--split chooses another)" in capsys.readouterr().out
    [answers] = (tmp_path / "e").rglob("answers-0.jsonl")
    assert json.loads(answers.read_text())["prompt"] == "test"


def test_evaluate_and_compare(capsys, tmp_path, model_folder):
    prompts = tmp_path / "sums.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) + "\n" for i in range(6)))
    folder = tmp_path / "results"
    arguments = ["--task", "subtraction", "--prompts", str(prompts), "--num_prompts", "5", "--max_new_tokens", "4"]
    arguments += ["--samplers", "tokens_per_step=1", "tokens_per_step=2,policy=margin", "--output_dir", str(folder)]
    assert run("evaluate", *arguments, "--model", str(SHIPPED_PATH), model_folder) == 0
    said = capsys.readouterr().out
    results, [comparison] = (json.loads((folder / name).read_text()) for name in ("results.json", "comparison.json"))
    assert len(results) == 8 and len(comparison["comparisons"]) == 4
    first = comparison["comparisons"][0]
    assert (first["prompts"], first["won"]) == ("subtraction", 0) and first["lost"] == 5 * first["base"]["mean"]
    assert (folder / "results.md").read_text() in said and (folder / "results.png").stat().st_size > 1000
    steps = {result["sampler"]: result["steps"]["mean"] for result in results}
    assert steps == {"tokens_per_step=1": 4, "tokens_per_step=2,policy=margin": 2}
    assert run("evaluate", *arguments, "--samplers", "stps=3") == 2
    assert "'stps' is none of" in capsys.readouterr().err


def test_evaluate_answers_a_task_at_its_length(tmp_path):
    """The model's own default of 4 tokens could solve no sudoku."""
    command = ["--model", "shipped", "--task", "sudoku", "addition", "--num_prompts", "4"]
    assert run("evaluate", *command, "--output_dir", str(tmp_path)) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert {result["prompts"]: result["steps"]["mean"] for result in results} == {"sudoku": 16, "addition": 4}


PUBLISHED = {  # learning rate, rank weight, margin, methods
    "dream_prm12k": (2e-5, 1.0, 0.1, ["entropy"]),
    "dream_ling_coder": (1e-4, 2.0, 0.1, ["entropy"]),
    "llada_prm12k": (2e-5, 1.0, 0.2, ["entropy", "default", "credit"]),
    "llada_ling_coder": (2e-5, 1.0, 0.3, ["default"]),
}


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_recipes_hold_the_published_values(recipe):
    types = (DataArguments, AdapterArguments, ModelArguments, TabomConfig)
    arguments, adapter, model, config = parse_arguments(
        types, ["--recipe", recipe], "tabom train", "", takes_recipe=True
    )
    assert (config.learning_rate, config.rank_weight, config.rank_margin, arguments.method) == PUBLISHED[recipe]
    assert config.cut_among_non_ltr == (recipe == "dream_ling_coder")
    assert model.model == {"d": "Dream-org/Dream-v0-Instruct-7B", "l": "GSAI-ML/LLaDA-8B-Instruct"}[recipe[0]]
    assert (config.rank_loss, config.supervised_window, config.rank_window) == ("hinge", 32, 32)
    assert (config.window_unit, config.skip_last_step) == ("steps", True)
    assert (config.rank_ties, config.drop_short, config.loss_average) == (True, True, "micro_batch")
    lora = (adapter.use_peft, adapter.lora_r, adapter.lora_alpha, adapter.lora_target_modules)
    assert lora == (True, 16, 16, ["q_proj", "v_proj"])
    assert (config.weight_decay, config.max_grad_norm, config.num_train_epochs) == (0.01, 1.0, 5)
    assert (config.lr_scheduler_type, config.warmup_steps, config.per_device_train_batch_size) == ("cosine", 50, 8)
    assert (config.max_prompt_length, config.max_response_length, config.pad_response) == (256, 256, True)


def test_the_command_line_wins_over_the_config_and_it_over_the_recipe(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("rank_margin: 0.5\nrank_weight: 3.0\n")
    argv = ["--recipe", "dream_prm12k", "--config", str(path), "--rank_weight", "4"]
    types = (DataArguments, AdapterArguments, ModelArguments, TabomConfig)
    *_, config = parse_arguments(types, argv, "tabom train", "", takes_recipe=True)
    assert (config.rank_weight, config.rank_margin, config.rank_loss) == (4.0, 0.5, "hinge")


@pytest.mark.parametrize("text, window", [("all", "all"), ("7", 7), (7, 7)])
def test_windows_are_numbers_or_all_in_files_and_on_the_command_line(tmp_path, text, window):
    path = tmp_path / "c.yaml"
    path.write_text(f"supervised_window: {text}\nwindow_unit: tokens\n")
    argv = ["--config", str(path), "--rank_window", str(text), "--output_dir", "x"]
    (config,) = parse_arguments((TabomConfig,), argv, "tabom train", "")
    assert (config.supervised_window, config.rank_window, config.window_unit) == (window, window, "tokens")


SHORT = ["--max_prompt_length", "20", "--max_response_length", "12", "--per_device_train_batch_size", "2"]
SHORT += ["--gradient_accumulation_steps", "1"]


@pytest.mark.parametrize(
    "recipe, options, sequences",
    [
        ("dream_ling_coder", [], "8 sequences of 256 + 256 tokens"),
        ("llada_prm12k", [], "8 sequences of 256 + 256 tokens"),
        *[(name, SHORT, "2 sequences of 20 + 12 tokens") for name in ("sdar_sft", "sdar_tabom")],
        *[(name, SHORT, "2 sequences of 20 + 12 tokens") for name in ("llada2_sft", "llada2_tabom")],
    ],
)
def test_a_dry_run_of_a_recipe(capsys, tmp_path, recipe, options, sequences):
    arguments = ["--recipe", recipe, "--dry_run", "--max_steps", "2", "--scale", "tiny", *options]
    assert run("train", *arguments, "--output_dir", str(tmp_path)) == 0
    table = capsys.readouterr().out
    for figure in ("step", "tokens a second", "peak memory", "of it head and loss", "with the released loss"):
        assert figure in table
    assert sequences in table


@pytest.mark.parametrize(
    "arguments, error",
    [
        (["--dry_run"], "model=None: expected"),
        (["--dry_run", "--data", "t.jsonl"], "data='t.jsonl', dry_run=True: give exactly one"),
        ([], "data=None, dry_run=False: give exactly one"),
        (["--recipe", "dream"], "invalid choice: 'dream'"),
        (
            ["--data", "t.jsonl", "--eval_data", "e.jsonl"],
            "eval_prompts=None with eval_strategy='no'",
        ),
        (["--data", "t.jsonl", "--early_stopping_patience", "2"], "needs --load_best_model_at_end true"),
        (["--data", "t.jsonl", "--adapt", "--use_peft"], "adapt=True with use_peft=True"),
    ],
)
def test_training_that_cannot_start_says_why(capsys, monkeypatch, tmp_path, arguments, error):
    monkeypatch.chdir(tmp_path)
    for name in ("t.jsonl", "e.jsonl"):
        (tmp_path / name).touch()
    assert run("train", *arguments, "--output_dir", str(tmp_path), "--scale", "tiny") == 2
    assert error in capsys.readouterr().err
