"""What a command writes to stderr tells the user something.

A fresh process runs the commands, because transformers gives some of its remarks once a process and writes them to the
stderr that was there when it was imported.
"""

import json
import re
import subprocess
import sys

import pytest
from transformers import Qwen2Config, Qwen2ForCausalLM

from tabom.lab.model import character_tokenizer

pytestmark = pytest.mark.xdist_group("quiet")  # one process makes what all tests here read

NOISE = re.compile("multivariate|Loading weights|Writing model shards|Tokenizing")

PROGRAM = """
import json, sys
from tabom.cli.main import main

for words in json.loads(sys.argv[1]):
    print("command", *words, file=sys.stderr)
    assert main(words) == 0
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each command of a run from an autoregressive model to a report wrote to stderr."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("quiet")
    tokenizer = character_tokenizer()
    tokenizer.mask_token = None
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "causal")
    tokenizer.save_pretrained(folder / "causal")
    lines = [json.dumps({"prompt": f"{n}+1=", "answer": str(n + 1)}) for n in range(4)]
    (folder / "sums.jsonl").write_text("\n".join(lines) + "\n")
    short = "--max_steps 2 --save_steps 1 --report_to none --disable_tqdm true"
    commands = [
        f"train --model causal --adapt --objective nelbo --data sums.jsonl --output_dir adapted {short}",
        f"train --model adapted --use_peft --objective nelbo --data sums.jsonl --output_dir adapter {short}",
        "merge --adapter adapter --output_dir merged",
        "generate --model adapter --prompt 1+1= --max_new_tokens 2",
        "collect --model merged --prompts sums.jsonl --max_new_tokens 2 --output own.jsonl",
        "evaluate --model adapted merged --prompts sums.jsonl --max_new_tokens 2 --output_dir evaluation",
        "report evaluation adapter -o report.html",
    ]
    words = json.dumps([command.split() for command in commands])
    command = [sys.executable, "-c", PROGRAM, words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parts = done.stderr.split("command ")[1:]
    assert len(parts) == len(commands)
    return {part.split()[0]: part.partition("\n")[2] for part in reversed(parts)} | {"adapt": parts[0]}


@pytest.mark.parametrize("command", ["adapt", "train", "merge", "generate", "collect", "evaluate", "report"])
def test_a_command_says_nothing_that_tells_the_user_nothing(said, command):
    assert not NOISE.findall(said[command])


def test_the_bars_of_long_waits_appear(monkeypatch, capsys):
    """A bar is delayed and not switched off."""
    from transformers.utils import logging

    from tabom.models import progress

    logging.enable_progress_bar()  # an earlier test may have switched it off
    monkeypatch.setattr(progress, "BAR_DELAY_SECONDS", 0.0)
    with progress.bars_of_long_waits():
        list(logging.tqdm(range(3), desc="Loading weights"))
    assert "Loading weights: 100%" in capsys.readouterr().err
    monkeypatch.setattr(progress, "BAR_DELAY_SECONDS", 60.0)
    with progress.bars_of_long_waits():
        list(logging.tqdm(range(3), desc="Loading weights"))
    assert not capsys.readouterr().err
    list(logging.tqdm(range(3), desc="Loading weights"))
    assert "Loading weights" in capsys.readouterr().err, "outside, transformers' bars are as they were"
