"""The commands of "From prompts to a report" in README.md answer what it says, already after less training."""

import re
import shlex
from pathlib import Path

from tabom.cli.main import main

README = (Path(__file__).parents[1] / "README.md").read_text()
FEWER = {"2000": "400"}
SHORTER = {"train": ["--max_steps", "60", "--report_to", "none"]}  # of 300


def test_the_python_example_runs_as_pasted_and_leaves_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = README.partition("## Train")[2]
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], {})
    assert (tmp_path / "runs" / "first" / "model.safetensors").is_file()


def test_readme_is_read_in_one_sitting():
    assert len(README.splitlines()) <= 120


def test_the_first_commands_answer_what_they_are_said_to(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tabom.sampling.animation.time.sleep", lambda seconds: None)
    section = README.partition("## From prompts to a report")[2]
    done = []
    for line in re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1].splitlines():
        program, name, *words = shlex.split(line, comments=True)
        assert program == "tabom"
        assert main([name, *(FEWER.get(word, word) for word in words), *SHORTER.get(name, [])]) == 0
        said = capsys.readouterr().out
        if claim := re.search(r"#.*([+-]\d+)", line):
            assert said.split()[-1] == claim[1], line
            done.append(claim[1])
    assert done == ["+238", "+228"]
