"""Prompts from anywhere: every known shape, every format, and who is chosen to judge."""

import json

import datasets
import pytest

from tabom.cli.commands import ReadingArguments
from tabom.cli.prompts import read
from tabom.data.prompts import PromptReader, read_prompts
from tabom.data.trajectories import read_trajectories
from tabom.lab.model import character_tokenizer

GSM8K = {"question": "Ann has 3 apples and buys 4. How many?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"}
MATH500 = {"problem": "What is $1/2$?", "solution": r"It is $\boxed{\frac12}$.", "answer": r"\frac{1}{2}", "level": 1}
HUMANEVAL = {
    "task_id": "T/0",
    "prompt": 'def one() -> int:\n    """Returns 1."""\n',
    "canonical_solution": "    return 1\n",
    "test": "def check(candidate):\n    assert candidate() == 1\n",
    "entry_point": "one",
}
MBPP = {"text": "Write f, which doubles.", "code": "", "test_list": ["assert f(1) == 2"], "test_setup_code": ""}
MBPP_SANITIZED = {
    "prompt": "Write f, which doubles.",
    "test_imports": ["import math"],
    "test_list": ["assert f(1) == 2"],
}
APPS = {"question": "Double it.", "input_output": json.dumps({"inputs": ["1\n"], "outputs": ["2\n"]})}
APPS_METHOD = {
    "question": "Double it.",
    "input_output": json.dumps({"fn_name": "f", "inputs": [[1]], "outputs": [2]}),
    "starter_code": "class Solution:\n    def f(self, x):\n        ",
}
LIVECODEBENCH = {
    "question_title": "Double",
    "question_content": "Double it.",
    "public_test_cases": json.dumps([{"input": "1\n", "output": "2\n", "testtype": "stdin"}]),
    "private_test_cases": "eJxrYJk6nQEAAzoBNw==",
    "metadata": "{}",
    "starter_code": "",
}
LIVECODEBENCH_METHOD = {
    "question_content": "Repeat it.",
    "public_test_cases": json.dumps([{"input": "[1]\n2", "output": "[1, 1]", "testtype": "functional"}]),
    "metadata": json.dumps({"func_name": "f"}),
    "starter_code": "class Solution:\n    def f(self, x, n):\n        ",
}
AIME = {"ID": "2024-I-1", "Problem": "1+1?", "Solution": r"It is $\boxed{2}$.", "Answer": 2}
PRM12K = {"question": {"problem": "1+1?", "ground_truth_answer": "2"}}
CHAT = {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": r"It is \boxed{2}."}]}
SHAREGPT = {
    "conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": r"It is \boxed{2}."}],
    "source": "x",
}

SHAPES = {  # record, verifier, prompt, a right response, a wrong one
    "gsm8k": (GSM8K, "math", GSM8K["question"], "So 7.", "So 8."),
    "math500": (MATH500, "math", MATH500["problem"], r"\boxed{0.5}", r"\boxed{2}"),
    "humaneval": (HUMANEVAL, "code", HUMANEVAL["prompt"], "    return 1\n", "    return 2\n"),
    "mbpp": (MBPP, "code", None, "def f(x): return 2 * x", "def f(x): return x"),
    "mbpp sanitized": (MBPP_SANITIZED, "code", None, "def f(x): return 2 * x", "def f(x): return x"),
    "apps": (APPS, "code", "Double it.", "print(2 * int(input()))", "print(1)"),
    "apps with a method": (
        APPS_METHOD,
        "code",
        "Double it.\n\n" + APPS_METHOD["starter_code"],
        "class Solution:\n    def f(self, x): return 2 * x",
        "class Solution:\n    def f(self, x): return x",
    ),
    "livecodebench": (LIVECODEBENCH, "code", "Double it.", "print(2 * int(input()))", "print(1)"),
    "livecodebench with a method": (
        LIVECODEBENCH_METHOD,
        "code",
        "Repeat it.\n\n" + LIVECODEBENCH_METHOD["starter_code"],
        "class Solution:\n    def f(self, x, n): return x * n",
        "class Solution:\n    def f(self, x, n): return x",
    ),
    "aime": (AIME, "math", "1+1?", r"\boxed{2}", "3"),
    "sharegpt": (SHAREGPT, "math", CHAT["messages"][:1], r"\boxed{2}", "3"),
    "prm12k": (PRM12K, "math", "1+1?", "2", "3"),
    "chat": (CHAT, "math", CHAT["messages"][:1], r"\boxed{2}", "3"),
    "numbers": ({"question": "What is 6 * 7?", "answer": 42}, "math", "What is 6 * 7?", "It is 42.", "It is 41."),
    "numbers as text": ({"question": "6 * 700?", "answer": "4,200"}, "math", "6 * 700?", "It is $4200.", "420"),
    "latex": ({"question": "Half?", "answer": r"\frac{1}{2}"}, "math", "Half?", "The answer is 0.5.", "0.25"),
    "text": ({"prompt": "Capital of France?", "answer": "Paris"}, "exact", "Capital of France?", "Paris", "Paris."),
}


def write(path, records):
    """The records in the format of the path's suffix."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    else:
        table = datasets.Dataset.from_list(records)
        table.to_parquet(path) if path.suffix == ".parquet" else table.to_csv(path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("shape", SHAPES)
def test_known_shapes_in_every_format(tmp_path, capsys, code_runs, shape, suffix):
    record, verifier, prompt, right, wrong = SHAPES[shape]
    if verifier == "code":
        code_runs()
    prompts, invalid = read_prompts(write(tmp_path / f"data{suffix}", [record, record]))
    assert (len(prompts.prompts), invalid, prompts.verifier) == (2, 0, verifier)
    assert f"verifier {verifier!r}" in capsys.readouterr().out
    if prompt is not None:
        assert prompts.prompts[0] == prompt
    else:
        assert record["test_list"][0] in prompts.prompts[0] and "which doubles" in prompts.prompts[0]
    assert [verdict.correct for verdict in prompts.verdicts([0, 1], [right, wrong])] == [True, False]


@pytest.fixture
def code_runs():
    """Skips where programs cannot be run."""
    from tabom.data.verifiers.sandbox import find_bubblewrap

    return lambda: find_bubblewrap() or pytest.skip("no working bubblewrap on this machine")


def test_csv_and_numbers_for_answers(tmp_path):
    path = write(tmp_path / "p.csv", [{"ask": "6*7", "number": 42.0}, {"ask": "1/2", "number": 0.5}])
    reader = PromptReader(prompt_column="ask", answer_column="number")
    prompts, _ = read_prompts(path, reader=reader)
    assert (prompts.prompts, prompts.answers) == (["6*7", "1/2"], ["42", "0.5"])


def test_words_for_missing_values_are_answers_in_csv(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("question,answer\nWhich roots?,None\nWhich gas?,NA\nWhat?,\n")
    prompts, _ = read_prompts(path)
    assert prompts.answers == ["None", "NA", None]


def test_an_answer_that_is_no_number_is_refused(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"question": "2+2?", "answer": NaN}\n')
    with pytest.raises(ValueError, match="line 1: field 'answer': nan; expected a text or a finite number"):
        read_prompts(path)


def test_a_folder_of_datasets_and_its_splits(tmp_path):
    tables = {name: datasets.Dataset.from_list([{**GSM8K, "question": name}]) for name in ("train", "test")}
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "saved")
    assert read_prompts(tmp_path / "saved")[0].prompts == ["test"]
    assert read_prompts(tmp_path / "saved", split="train")[0].prompts == ["train"]
    with pytest.raises(ValueError, match=r"split='dev': expected one of train, test"):
        read_prompts(tmp_path / "saved", split="dev")


def test_the_split_that_was_taken_by_default_is_printed(tmp_path, capsys):
    tables = {name: datasets.Dataset.from_list([{**GSM8K, "question": name}]) for name in ("train", "test")}
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "saved")
    only = datasets.DatasetDict({"validation": tables["train"]})
    only.save_to_disk(tmp_path / "only")
    for folder, default, taken in (
        ("saved", "train", "train"),
        ("saved", "test", "test"),
        ("only", "train", "validation"),
    ):
        read_prompts(tmp_path / folder, default_split=default)
        assert f"{folder}: split {taken!r} (--split chooses another)\n" in capsys.readouterr().out
    read_prompts(tmp_path / "saved", split="train")
    assert ": split" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="split=None: expected one of train, test"):
        read_prompts(tmp_path / "saved", default_split="dev")


def test_a_field_that_other_records_have_is_not_there(tmp_path):
    """Arrow fills what a record lacks with None; that is neither an answer nor a test."""
    path = write(tmp_path / "p.parquet", [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": None}])
    prompts, _ = read_prompts(path)
    assert prompts.answers == ["1", None] and prompts.verdicts([1], ["x"])[0].correct is None
    path = write(
        tmp_path / "q.parquet", [{"instruction": "a", "question": None}, {"instruction": None, "question": "b"}]
    )
    assert read_prompts(path)[0].prompts == ["a", "b"]


def test_templates_and_system_prompts(tmp_path):
    path = write(tmp_path / "p.jsonl", [GSM8K, CHAT])
    prompts, _ = read_prompts(path, reader=PromptReader(template="Q: {prompt} {x}", system_prompt="Be brief."))
    system = {"role": "system", "content": "Be brief."}
    assert prompts.prompts == [
        [system, {"role": "user", "content": f"Q: {GSM8K['question']} {{x}}"}],
        [system, {"role": "user", "content": "Q: 1+1? {x}"}],
    ]
    with pytest.raises(ValueError, match=r"expected \{prompt\} in it"):
        PromptReader(template="no place")


def test_ignored_tests_are_said(tmp_path, capsys):
    path = write(tmp_path / "p.jsonl", [{"prompt": "p", "answer": "1", "test": "assert f()"}])
    prompts, _ = read_prompts(path, reader=PromptReader(verifier="exact"))
    assert prompts.answers == ["1"]
    assert "warning" in (said := capsys.readouterr().out) and "tests of 1 records are not used" in said


def test_ones_own_verifier_gets_the_tests(tmp_path):
    path = write(tmp_path / "p.jsonl", [HUMANEVAL])
    prompts, _ = read_prompts(path, reader=PromptReader(verifier="python:tests.data.test_prompts.entry_point_is_named"))
    assert [verdict.correct for verdict in prompts.verdicts([0, 0], ["def one", "def two"])] == [True, False]


def entry_point_is_named(prompt, answer, response):
    return answer["entry_point"] in response


def test_a_setting_of_another_verifier_than_the_shape_chose_is_left_out(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": "p", "answer": "yes"}])
    prompts, _ = read_prompts(path, verifier_settings={"timeout": 3.0})
    assert prompts.verifier == "exact"


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"x": 1}\n', r"line 1: field 'prompt': missing"),
        ('{"prompt": 1}\n', r"line 1: field 'prompt': expected text"),
        ("", "no valid prompt"),
    ],
)
def test_errors_name_the_place(tmp_path, content, message):
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(path)
    with pytest.raises(ValueError, match="field 'ask': missing; the record has prompt"):
        read_prompts(write(path, [{"prompt": "p"}]), reader=PromptReader(prompt_column="ask"))
    with pytest.raises(FileNotFoundError):
        read_prompts(tmp_path / "absent.parquet")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder for the hub: `datasets` finds the repositories of its names there, and lays them out as the hub does."""
    real = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, *rest, **options: real(str(tmp_path / name), *rest, **options)
    )

    def add(name, configs):
        """A repository of Parquet files, one a configuration and split, which its README lists."""
        listed = []
        for config, splits in configs.items():
            files = [{"split": split, "path": f"{config}/{split}-*"} for split in splits]
            listed.append({"config_name": config, "data_files": files})
            for split, records in splits.items():
                path = tmp_path / name / config / f"{split}-00000-of-00001.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                write(path, records)
        (tmp_path / name / "README.md").write_text(f"---\n{json.dumps({'configs': listed})}\n---\n")

    return add


def test_a_name_of_the_hub_with_its_configuration_and_split(hub):
    def problems(word):
        return [{**GSM8K, "question": word}]

    hub("openai/gsm8k", {name: {split: problems(f"{name} {split}") for split in ("train", "test")} for name in "ab"})
    for config_name, split in (("a", "train"), ("b", "train"), ("b", "test"), ("a", None)):
        prompts = read(ReadingArguments(config_name=config_name, split=split), "openai/gsm8k", default_split="test")
        assert prompts.prompts == [f"{config_name} {split or 'test'}"]
        assert (prompts.name, prompts.verifier) == ("gsm8k", "math")
    with pytest.raises(ValueError, match=r"available configs: \['a', 'b'\]"):
        read_prompts("openai/gsm8k")
    with pytest.raises(ValueError, match="dev"):
        read_prompts("openai/gsm8k", config_name="a", split="dev")


def test_trajectories_from_a_name_of_the_hub(hub):
    hub("user/name", {"default": {"train": [{"prompt": "1+1=", "response": "2"}], "test": [{"prompt": "x"}]}})
    tokenizer = character_tokenizer()
    [trajectory], _ = read_trajectories("user/name", tokenizer, len(tokenizer))
    assert (trajectory.prompt, trajectory.response) == ("1+1=", "2")


ODD_TESTS = {
    "uneven": ({"question": "q", "input_output": {"inputs": ["1"], "outputs": []}}, "input_output"),
    "other names": ({"question": "q", "tests": [{"given": "1", "wanted": "2"}]}, "tests"),
    "a large integer": (
        {"question": "q", "input_output": '{"inputs": [' + "1" * 5000 + '], "outputs": ["1"]}'},
        "input_output",
    ),
    "no JSON": ({"question_content": "q", "public_test_cases": "[{"}, "public_test_cases"),
    "a bad entry point": ({"prompt": "q", "test": "def check(c): pass", "entry_point": "add("}, "test"),
    "no Python": ({"question": "q", "test_list": ["assert f(1 ="]}, "test_list"),
}


@pytest.mark.parametrize("name", ODD_TESTS)
def test_tests_that_cannot_be_run_are_named_where_they_are_read_and_counted(tmp_path, name):
    record, field = ODD_TESTS[name]
    path = tmp_path / "odd.jsonl"
    path.write_text(json.dumps({"question": "q", "tests": "assert f(1)"}) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=rf"odd.jsonl, line 2: field '{field}'"):
        read_prompts(path)
    prompts, invalid = read_prompts(path, skip_invalid=True)
    assert len(prompts.prompts) == 1 and invalid == 1


def test_expected_output_is_a_name_of_the_output(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"question": "q", "tests": [{"input": "1", "expected_output": "2"}]}) + "\n")
    assert read_prompts(path)[0].verifier == "code"
