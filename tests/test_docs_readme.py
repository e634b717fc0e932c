"""The commands of "From prompts to a trained model" in README.md answer what it says, already after less training."""

import re
import shlex
from pathlib import Path

from tabom.cli.main import main

README = (Path(__file__).parents[1] / "README.md").read_text()
FEWER = {"2000": "400"}
SHORTER = {"train": ["--max_steps", "60", "--report_to", "none"]}  # of 300


def test_the_first_commands_answer_what_they_are_said_to(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tabom.sampling.animation.time.sleep", lambda seconds: None)
    section = README.partition("## From prompts to a trained model")[2]
    done = []
    for line in re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1].splitlines():
        program, name, *words = shlex.split(line, comments=True)
        assert program == "tabom"
        assert main([name, *(FEWER.get(word, word) for word in words), *SHORTER.get(name, [])]) == 0
        said = capsys.readouterr().out
        if claim := re.search(r"#.*([+-]\d+)", line):
            assert said.split()[-1] == claim[1], line
            done.append(claim[1])
        if "sudoku" in line:
            assert "".join(sorted(said.split()[-1])) == "1111222233334444", said
    assert done == ["+238", "+228"]
