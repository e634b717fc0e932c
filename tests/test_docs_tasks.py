"""The commands of docs/tasks.md, as they stand there, at a tiny scale: the lab's model and problems of those shapes."""

import json
import re
import shlex
import shutil
from functools import reduce
from importlib.util import find_spec
from pathlib import Path

import pytest

from tabom import make_verifier
from tabom.cli.main import main
from tabom.data.sources import read_records
from tabom.lab.tasks import make_task
from tabom.models.loading import SHIPPED_PATH

PAGE = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text()

SMALL = [  # what the page says, and what stands for it here
    (r"GSAI-ML/LLaDA-8B-Instruct", "tiny"),
    (r"bfloat16", "float32"),
    (r"\b256\b", "4"),
    (r"\b100\b", "6"),
    (r"^gsm8k$", "gsm8k_here"),
]
MORE = {  # what a command gets besides: recipe and task are for longer models, lm-eval's data is on the hub
    "train": shlex.split("--model tiny --dtype float32 --bf16 false --num_train_epochs 1 --max_response_length 64"),
    "lm_eval": ["--include_path", ".", "--output_path", "runs/lm_eval", "--num_fewshot", "0"],
}


def commands():
    """The command lines of the page: the command's name, and its arguments made small."""
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line and not line.startswith("#"):
                words = [reduce(lambda text, change: re.sub(*change, text), SMALL, word) for word in shlex.split(line)]
                python = words[:3] == ["python", "-m", "tabom.evaluation.lm_eval"]
                assert python or words[0] == "tabom"
                name = "lm_eval" if python else words[1]
                yield name, words[3 if python else 2 :] + MORE.get(name, [])


def run(name, words, monkeypatch):
    """Runs one command in this process."""
    if name != "lm_eval":
        assert main([name, *words]) == 0, name
        return
    from tabom.evaluation.lm_eval import cli_evaluate

    monkeypatch.setattr("sys.argv", ["lm_eval", *words])
    cli_evaluate()


def write_model(folder):
    """The lab's model, with a chat template that adds nothing to a prompt of one message."""
    shutil.copytree(SHIPPED_PATH, folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def write_task(folder):
    """lm-eval's GSM8K on the files of this folder."""
    bundled = Path(find_spec("lm_eval").origin).parent / "tasks/gsm8k/gsm8k.yaml"
    files = f"{{train: {folder}/gsm8k_train.jsonl, test: {folder}/gsm8k_test.jsonl}}"
    lines = [f"include: {bundled}", "task: gsm8k_here", "dataset_path: json", "dataset_name: null"]
    (folder / "gsm8k_here.yaml").write_text("\n".join([*lines, f"dataset_kwargs: {{data_files: {files}}}"]) + "\n")


def write_problems(folder):
    """Sums and differences in the shapes of GSM8K and MATH-500."""
    for name, split, count in (("train", "train", 12), ("test", "test", 8)):
        problems = make_task("subtraction").problems(count, split, 0) + make_task("addition").problems(count, split, 0)
        lines = (
            {"question": p.prompt, "answer": f"It is <<{p.prompt}{int(p.answer)}>>.\n#### {int(p.answer):,}"}
            for p in problems
        )
        (folder / f"gsm8k_{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = (
        {"problem": p.prompt, "solution": rf"So \boxed{{{int(p.answer)}}}.", "answer": str(int(p.answer)), "level": 2}
        for p in make_task("addition").problems(6, "test", 1)
    )
    (folder / "math500.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_page_from_a_gsm8k_file_to_an_evaluated_adapter(tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    pytest.importorskip("math_verify")
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_problems(tmp_path)
    write_model(tmp_path / "tiny")
    write_task(tmp_path)
    done = []
    for name, words in commands():
        run(name, words, monkeypatch)
        done.append(name)
    assert done == ["collect", "train", "evaluate", "report", "export", "lm_eval"]
    said = capsys.readouterr().out
    assert "gsm8k_train.jsonl: verifier 'math', by the shape of the data" in said

    records = [json.loads(line) for line in Path("runs/gsm8k.jsonl").read_text().splitlines()]
    assert len(records) > 30 and all(record["correct"] is True and "equals" in record["why"] for record in records)
    assert Path("runs/llada-gsm8k/adapter_model.safetensors").exists()
    assert "eval_accuracy" in Path("runs/llada-gsm8k/README.md").read_text()
    comparison = json.loads(Path("runs/evaluation/comparison.json").read_text())[0]["comparisons"]
    assert {each["prompts"]: each["problems"] for each in comparison} == {"gsm8k_test.jsonl": 16, "math500.jsonl": 6}
    assert all(each["base"]["mean"] > 0.4 for each in comparison), "the lab's model knows sums"
    assert Path("runs/report.html").stat().st_size > 10_000
    exported = [record for _, record in read_records("runs/gsm8k.parquet")]
    assert [each["response_token_ids"] for each in exported] == [each["response_token_ids"] for each in records]
    [results] = Path("runs/lm_eval").glob("**/results_*.json")
    assert json.loads(results.read_text())["n-samples"]["gsm8k_here"]["effective"] == 16


def test_the_page_s_python():
    pytest.importorskip("math_verify")
    code, expected = re.search(r"```python\n(.*?)\n# (Verdict.*?)\n```", PAGE, re.DOTALL).groups()
    statement, _, expression = code.rpartition("\n")
    names = {}
    exec(statement, names)
    assert repr(eval(expression, names)) == expected
    assert make_verifier is names["make_verifier"]
