"""Whatever a file holds, reading it ends in records or a ValueError that names the line; `skip_invalid` counts it."""

import contextlib
import json

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tabom.cli.arguments import parse_arguments
from tabom.cli.main import main
from tabom.cli.model import ModelArguments
from tabom.data.prompts import read_prompts
from tabom.data.sources import MAX_LINE
from tabom.data.tokenized import tokenize
from tabom.data.trajectories import read_trajectories
from tabom.lab.model import character_tokenizer
from tabom.training.config import TabomConfig

TOKENIZER = character_tokenizer()
TOKENIZER.chat_template = "{% for m in messages %}{{ m.role[0] }}={{ m.content }}.{% endfor %}"
RECORDS = [
    {
        "prompt": "1+1=",
        "response": "2",
        "response_token_ids": [5, 6],
        "decoding_order": [1, 0],
        "non_ltr_positions": [1],
        "entropy": [0.1, 2],
        "method": "entropy",
        "data_source": "x",
    },
    {"messages": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]},
    {"problem": "1+1", "solution": "2", "messages": [{"role": "user", "content": "1"}]},
    {"text": "add", "test_list": ["assert f(1) == 2"], "question": {"problem": "1"}},
]
GOOD = json.dumps(RECORDS[0])


def read(path, **options):
    return read_trajectories(path, TOKENIZER, len(TOKENIZER), **options)


@pytest.mark.parametrize(
    "line, problem",
    [
        (b'{"prompt": "\xff"}', "not UTF-8 at byte 13"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "integer of too many digits"),
        (b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "nested too deeply"),
        (b'{"prompt": "\\ud800", "response": "2"}', "field 'prompt': half a surrogate pair at character 0"),
        (b'{"prompt": "1", "response": "\\udc00"}', "field 'response': half a surrogate pair"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}], "response": "1"}', "field 'messages': half a"),
        (b'{"messages": [{"role": 3, "content": "1"}], "response": "1"}', "field 'messages': expected a list"),
        (b'{"prompt": "1", "messages": "x"}', "field 'messages': expected a list"),
        (b'{"prompt": "1", "messages": [3]}', "field 'messages': expected a list"),
        (b'{"messages": [{"role": "assistant", "content": "1"}]}', "field 'messages': has an answer, but nothing"),
        (GOOD.replace("[1, 0]", f"[{2**63}, 0]").encode(), "field 'decoding_order': 9223372036854775808 at position 0"),
        (GOOD.replace("0.1", "1" + "0" * 400).encode(), "field 'entropy': expected a list of finite numbers"),
        (GOOD.replace("0.1", "1e999").encode(), "field 'entropy': expected a list of finite numbers"),
        (GOOD.replace('"entropy", "d', '["entropy"], "d').encode(), "field 'method': expected text"),
        (b'"' + b"x" * MAX_LINE + b'"', f"longer than {MAX_LINE} bytes"),
    ],
)
def test_a_line_that_is_no_record_is_named_and_can_be_left_out(tmp_path, line, problem):
    path = tmp_path / "t.jsonl"
    path.write_bytes(f"{GOOD}\n".encode() + line + f"\n{GOOD}\n".encode())
    with pytest.raises(ValueError, match=r"t\.jsonl, line 2: ") as error:
        read(path)
    assert problem in str(error.value) and len(str(error.value)) < 400
    with pytest.raises(ValueError) as again:
        tokenize(path, TOKENIZER, len(TOKENIZER))
    assert str(again.value) == str(error.value)
    for reader in (read_trajectories, tokenize):
        kept, invalid = reader(path, TOKENIZER, len(TOKENIZER), skip_invalid=True)
        assert (len(kept), invalid) == (2, 1)


def test_other_messages_beside_a_prompt_and_a_response_are_nobody_s_business(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"prompt": "1", "response": "2", "messages": "x"}\n')
    [trajectory], _ = read(path)
    assert (trajectory.prompt, trajectory.response) == ("1", "2")


def mutate(line, rng):
    """A few bytes changed, put in, taken out or repeated."""
    line = bytearray(line)
    for _ in range(rng.randrange(1, 5)):
        at, kind = rng.randrange(len(line) + 1), rng.randrange(5)
        if kind == 0:
            line[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            line[at:at] = rng.choice([b'"', b"[", b"{", b"}", b",", b"\\", b"\\ud83d", b"-", b"e9", b"null", b"\x00"])
        elif kind == 2:
            del line[at : at + rng.randrange(1, 9)]
        elif kind == 3:
            line[at:at] = line[at : at + 9] * rng.randrange(1, 4)
        else:
            line[at:at] = b"9" * rng.choice([1, 20, 310])
    return bytes(line).replace(b"\n", b" ")


def test_thirty_thousand_mutated_lines_raise_nothing_else(tmp_path, rng):
    path = tmp_path / "t.jsonl"
    lines = [mutate(json.dumps(rng.choice(RECORDS)).encode(), rng) for _ in range(30_000)]
    path.write_bytes(GOOD.encode() + b"\n" + b"\n".join(lines))
    kept, invalid = read(path, skip_invalid=True)
    assert invalid > 10_000 and len(kept) > 100
    assert len(kept) + invalid == 1 + sum(bool(line.strip()) for line in lines)
    table, also_invalid = tokenize(path, TOKENIZER, len(TOKENIZER), skip_invalid=True)
    assert also_invalid >= invalid  # of some the chat template does not take the prompt
    assert len(table) + also_invalid == len(kept) + invalid and len(table) > 100
    prompts, invalid = read_prompts(path, verifier_settings={"allow_code_execution": True}, skip_invalid=True)
    assert invalid > 10_000 and len(prompts.prompts) > 100


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
    max_leaves=6,
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(RECORDS), st.dictionaries(st.sampled_from(sorted(set().union(*RECORDS))), JSON, max_size=3))
def test_fields_of_any_kind_raise_nothing_else(tmp_path, record, changes):
    path = tmp_path / "t.jsonl"
    path.write_text(f"{GOOD}\n{json.dumps(record | changes)}\n")
    assert len(read(path, skip_invalid=True)[0]) in (1, 2)
    read_prompts(path, verifier_settings={"allow_code_execution": True}, skip_invalid=True)


CONFIGS = [
    "a: [1",
    "a: b: c",
    "\t- x",
    "[" * 5000,
    "margin: " + "9" * 5000,
    "&a [*a, *a]",
    "!!python/object/apply:os.system ['true']",
    "margin: \x00",
    "margin: {a: 1}",
    "margin: [1, 2]",
    "learning_rate: {}",
    "seed: [1]",
    "? [a, b]\n: 3",
    "bf16: 2024-01-01",
]


@pytest.mark.parametrize("content", CONFIGS, ids=range(len(CONFIGS)))
def test_a_config_that_is_none_ends_in_one_line(tmp_path, capsys, content):
    path = tmp_path / "c.yaml"
    path.write_text(content)
    try:
        status = main(["train", "--config", str(path), "--data", str(tmp_path / "x.jsonl")])
    except SystemExit as exit:
        status = exit.code
    error = capsys.readouterr().err
    assert status == 2 and len(error) < 600 and len(error.splitlines()) == 1


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60) | st.dictionaries(st.sampled_from(["margin", "form", "seed", "model", "bf16"]), JSON))
def test_configs_of_any_kind_raise_nothing_else(tmp_path, content):
    path = tmp_path / "c.yaml"
    path.write_bytes(content if isinstance(content, bytes) else yaml.safe_dump(content).encode(errors="replace"))
    argv = ["--config", str(path), "--output_dir", str(tmp_path)]
    with contextlib.suppress(ValueError, SystemExit):
        parse_arguments((ModelArguments, TabomConfig), argv, "tabom train", "")
