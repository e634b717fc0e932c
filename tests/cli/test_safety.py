"""What comes from elsewhere must not reach the terminal, run code, loop, or end in a traceback."""

import io
import signal
from importlib import import_module

import pytest
import torch
from rich.console import Console

from tabom.cli.main import COMMANDS, main
from tabom.data import encoding
from tabom.data.encoding import encode_prompt
from tabom.data.text import printable
from tabom.models.loading import load
from tabom.sampling.animation import render
from tabom.sampling.sampler import DecodingState
from tests.conftest import random_model

EVIL = {
    "ESC": "\x1b[31mred",
    "OSC": "\x1b]0;title\x07",
    "C1": "\x9b31m",
    "bell": "\x07",
    "return": "safe\rfalse",
    "right to left": "\u202egnp.exe",
    "surrogate": "\udcff",
}


@pytest.mark.parametrize("text", EVIL.values(), ids=EVIL)
def test_control_characters_are_shown_as_text(text):
    shown = printable(f"a {text}\n\tb")
    shown.encode()
    assert not set(shown) & set("\x1b\x9b\x07\r\u202e\udcff")
    assert shown.startswith("a ") and shown.endswith("\n\tb") and "\\" in shown


def test_other_text_stays_what_it_is():
    text = "Grüße, 你好 👩\u200d💻\n\t[bold]x"
    assert printable(text) == text


@pytest.mark.parametrize("text", EVIL.values(), ids=EVIL)
def test_generate_and_its_animation_strip_what_a_terminal_obeys(capsys, monkeypatch, tmp_path, text):
    diffusion_model = random_model(0)
    diffusion_model.model.save_pretrained(tmp_path)
    diffusion_model.tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr("tabom.cli.generate.decode_response", lambda *_: text)
    assert main(["generate", "--model", str(tmp_path), "--prompt", "1+1="]) == 0
    monkeypatch.setattr(type(diffusion_model.tokenizer), "decode", lambda self, ids, **_: text)
    nats = [torch.zeros(1, 1)] * (len(DecodingState._fields) - 2)
    state = DecodingState(torch.tensor([[5]]), torch.tensor([[0]]), *nats)
    terminal = Console(file=io.StringIO(), force_terminal=True, color_system=None)
    terminal.print(render(diffusion_model, text, state, 1, "step"), end="")
    obeyed = ("\x9b", "\x07", "\r", "\u202e", "\x1b]", "\x1b[31m")
    for shown in (capsys.readouterr().out, terminal.file.getvalue()):
        assert shown.strip() and not any(each in shown for each in obeyed)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt"])
def test_pickled_weights_are_refused_with_the_remedy_and_not_read(tmp_path, name):
    diffusion_model = random_model(0)
    diffusion_model.model.save_pretrained(tmp_path)
    diffusion_model.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    with pytest.raises(ValueError, match=rf"{name} is pickled and could run code.*save_pretrained writes"):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "template, problem",
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes more than 2 s"),
        ("{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}", "256 MiB"),
        ("{{ 'x' * 10 ** 16 }}", "takes more memory than there is"),
        ("{{ messages[0].content * 2 ** 23 }}", "writes 33554432 characters; at most 16777216 are read"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails on this conversation: maximum recursion depth"),
        ("{{ '{}'.format() }}", "fails on this conversation: "),
        ("{{ raise_exception('roles must alternate') }}", "fails on this conversation: roles must alternate"),
        ("{{ messages[7].content }}", "fails on this conversation"),
        ("{% broken", "fails on this conversation"),
        ("{{ 1 / 0 }}", "fails on this conversation"),
    ],
)
def test_a_chat_template_is_ended_in_time(monkeypatch, template, problem):
    monkeypatch.setattr(encoding, "TEMPLATE_BYTES", 2**28)
    tokenizer = random_model(0).tokenizer
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=problem):
        encode_prompt(tokenizer, "1+1=")
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert tokenizer.decode(encode_prompt(tokenizer, "1+1=")) == "1+1=", "and the limits are lifted again"


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_ends_in_one_line_with_status_130(capsys, monkeypatch, command):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("tabom.cli.main.parse", lambda name, argv: ())
    monkeypatch.setattr(import_module(f"tabom.cli.{COMMANDS[command].module}"), "run", interrupt)
    assert main(command.split()) == 130
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1 and f"tabom {command}: interrupted; " in error


def test_sigterm_ends_in_one_line_with_status_143(capsys, monkeypatch):
    monkeypatch.setattr("tabom.cli.main.parse", lambda name, argv: ())
    monkeypatch.setattr("tabom.cli.report.run", lambda: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert main(["report"]) == 143 and signal.getsignal(signal.SIGTERM) == before
    assert capsys.readouterr().err == "\ntabom report: ended by SIGTERM; nothing is kept\n"
