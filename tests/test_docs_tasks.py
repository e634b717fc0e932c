"""The commands of docs/tasks.md, as they stand there, at a tiny scale: the lab's model and problems of those shapes."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tabom import make_verifier
from tabom.cli.main import main
from tabom.lab.model import BASE_PATH
from tabom.lab.tasks import make_task

PAGE = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text()

TINY = {  # what a word of the page becomes here
    "GSAI-ML/LLaDA-8B-Instruct": str(BASE_PATH),
    "bfloat16": "float32",
    "256": "4",
    "100": "6",
    "max_new_tokens=256,policy=llada_low_confidence": "max_new_tokens=4,policy=llada_low_confidence",
}
MORE = {  # what a command gets besides: the recipe is made for a GPU and for long responses
    "train": ["--model", str(BASE_PATH), "--dtype", "float32", "--bf16", "false", "--num_train_epochs", "1"],
}


def commands():
    """The command lines of the page's first block."""
    block = re.search(r"```bash\n(.*?)```", PAGE, re.DOTALL)[1].replace("\\\n", " ")
    return [shlex.split(line) for line in block.splitlines() if line and not line.startswith("#")]


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
    monkeypatch.chdir(tmp_path)
    write_problems(tmp_path)
    done = []
    for tabom, command, *words in commands():
        assert tabom == "tabom"
        assert main([command, *(TINY.get(word, word) for word in words), *MORE.get(command, [])]) == 0, command
        done.append(command)
    assert done == ["collect", "train", "evaluate", "report"]
    said = capsys.readouterr().out
    assert "gsm8k_train.jsonl: verifier 'math', by the shape of the data" in said

    records = [json.loads(line) for line in Path("runs/gsm8k.jsonl").read_text().splitlines()]
    assert len(records) > 30 and all(record["correct"] is True and "equals" in record["why"] for record in records)
    assert Path("runs/llada-gsm8k/adapter_model.safetensors").exists()
    assert "eval_accuracy" in Path("runs/llada-gsm8k/README.md").read_text()
    comparison = json.loads(Path("runs/evaluation/comparison.json").read_text())["comparisons"]
    assert {each["prompts"]: each["problems"] for each in comparison} == {"gsm8k_test.jsonl": 16, "math500.jsonl": 6}
    assert all(each["base"]["mean"] > 0.4 for each in comparison), "the lab's model knows sums"
    assert Path("runs/report.html").stat().st_size > 10_000


def test_the_page_s_python():
    pytest.importorskip("math_verify")
    code, expected = re.search(r"```python\n(.*?)\n# (Verdict.*?)\n```", PAGE, re.DOTALL).groups()
    statement, _, expression = code.rpartition("\n")
    names = {}
    exec(statement, names)
    assert repr(eval(expression, names)) == expected
    assert make_verifier is names["make_verifier"]
