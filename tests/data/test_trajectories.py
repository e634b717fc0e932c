import json
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from tabom.data import encoding
from tabom.data.encoding import encode_prompt, encode_response
from tabom.data.trajectories import (
    Trajectory,
    fit_response,
    non_ltr_positions,
    parse_trajectory,
    read_trajectories,
)
from tabom.lab.model import character_tokenizer

TOKENIZER = character_tokenizer()
IDS = TOKENIZER("abc").input_ids
MESSAGES = [{"role": "user", "content": "q"}]


def parse(record):
    return parse_trajectory(record, TOKENIZER, len(TOKENIZER))


@pytest.mark.parametrize("prompt_field", ["prompt", "instruction", "question"])
@pytest.mark.parametrize("response_field", ["response", "output", "gen_text", "answer"])
def test_every_spelling_of_the_authors_records(prompt_field, response_field):
    record = {
        prompt_field: "q",
        response_field: "abc",
        "response_token_ids": IDS,
        "decoding_order": [2, -1, 0],
    }
    trajectory = parse(record)
    assert (trajectory.prompt, trajectory.response) == ("q", "abc")
    assert (trajectory.response_token_ids, trajectory.decoding_order) == (IDS, [2, -1, 0])


def test_messages_with_and_without_the_closing_answer():
    assert parse({"messages": MESSAGES, "response": "abc"}).prompt == MESSAGES
    closed = parse({"messages": [*MESSAGES, {"role": "assistant", "content": "abc"}]})
    assert (closed.prompt, closed.response) == (MESSAGES, "abc")


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "HUMAN", "content": "q"}, {"role": "ASSISTANT", "content": "abc"}]},  # Ling-Coder
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "abc"}]},  # ShareGPT
        {"messages": [{"role": "User", "content": "q", "from": None}, {"role": "assistant", "content": "abc"}]},
    ],
)
def test_published_names_of_roles(record):
    found = parse(record)
    assert (found.prompt, found.response) == (MESSAGES, "abc")


def test_an_unknown_role_is_named(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('\n{"messages": [{"role": "user", "content": "q"}, {"role": "oracle", "content": "abc"}]}\n')
    with pytest.raises(ValueError, match=r"line 2: field 'messages': role 'oracle': expected one of .*human.*gpt"):
        read_trajectories(path, TOKENIZER, len(TOKENIZER))


@pytest.mark.parametrize(
    "response, expected",
    [(42, "42"), (42.0, "42"), (0.5, "0.5"), (-3, "-3"), ([{"role": "assistant", "content": "z"}], "z")],
)
def test_numbers_and_a_message_of_the_assistant_are_responses(response, expected):
    for name in ("completion", "answer", "response"):
        assert parse({"prompt": "q", name: response}).response == expected
        assert parse({"prompt": MESSAGES, name: response}).prompt == MESSAGES


def test_without_ids_and_order_the_response_is_tokenized_and_decodes_left_to_right():
    trajectory = parse({"prompt": "q", "response": "abc"})
    assert trajectory.response_token_ids == IDS
    assert trajectory.decoding_order == [0, 1, 2]


def test_what_is_written_reads_back():
    for prompt in ("q", MESSAGES):
        trajectory = Trajectory(prompt, "abc", IDS, [1, 0, 2], [1], "entropy", "sorting", [0.5, 0, 2.0])
        trajectory = replace(trajectory, logprob=[-0.5, 0.0, -2.0], temperature=0.7, reward=0.25, group="q1")
        assert parse(json.loads(json.dumps(trajectory.to_record()))) == trajectory


def test_a_record_without_reward_or_group_has_them_from_its_verdict_and_prompt():
    """Old records, and those of other programs, which mean something else by these names."""
    old = {"prompt": "q", "response": "abc", "correct": False}
    assert parse(old).reward == 0 and parse(old | {"correct": True}).reward == 1
    assert parse(old | {"correct": None}).reward is None and parse(old | {"reward": 0.3}).reward == 0.3
    other = parse(
        {"prompt": "r", "response": "abc", "reward": "good", "group": 3, "temperature": "hot", "logprob": -9.0}
    )
    assert (other.reward, other.temperature, other.logprob) == (None, None, None)
    assert parse(old).group == parse(old | {"response": "x"}).group != other.group
    assert parse(old | {"group": "g"}).group == "g"


BROKEN = [
    ('{"prompt": "q", ', "not valid JSON"),
    ("[1]", "expected a JSON object"),
    ('{"prompt": "q", "response": "abc", "logprob": [-1.0]}', "'logprob': has 1 numbers for 3 response tokens"),
    ('{"prompt": "q", "response": "abc", "logprob": [-1.0, 0.5, 0]}', "'logprob': 0.5; expected logarithms"),
    ('{"response": "abc"}', "'prompt': missing"),
    ('{"prompt": "q"}', "'response': missing"),
    ('{"prompt": 3, "response": "abc"}', "'prompt': expected text"),
    ('{"messages": "q", "response": "abc"}', "'messages': expected a list"),
    ('{"prompt": ["q"], "response": "abc"}', "'prompt': expected a list of {"),
    ('{"prompt": "q", "response": true}', "'response': expected text, got True"),
    ('{"prompt": "q", "response": NaN}', "'response': expected text, got nan"),
    ('{"prompt": "q", "completion": ["abc"]}', "'completion': expected a list of {"),
    (
        '{"prompt": "q", "completion": [{"role": "user", "content": "abc"}]}',
        "'completion': expected one message of the assistant",
    ),
    ('{"prompt": "q", "response": ""}', "'response_token_ids': is empty"),
    ('{"prompt": "q", "response": "abc", "decoding_order": [0, 1]}', "'decoding_order': has 2 steps for 3"),
    (
        '{"prompt": "q", "response": "abc", "decoding_order": [0, 1, -2]}',
        "'decoding_order': -2 at position 2",
    ),
    (
        '{"prompt": "q", "response": "abc", "decoding_order": [0, 1, true]}',
        "'decoding_order': expected a list",
    ),
    ('{"prompt": "q", "response": "abc", "response_token_ids": [1, 2, 999]}', "999 at position 2; expected"),
    ('{"prompt": "q", "response": "abc", "entropy": [0.1, NaN, 1]}', "'entropy': expected a list of finite numbers"),
    ('{"prompt": "q", "response": "abc", "entropy": [0.1]}', "'entropy': has 1 numbers for 3 response tokens"),
    ('{"prompt": "q", "response": "abc", "non_ltr_positions": [3]}', "'non_ltr_positions': 3 at position 0"),
]


@pytest.mark.parametrize("line, problem", BROKEN)
def test_a_broken_line_is_named_by_file_line_and_field_and_can_be_skipped(tmp_path, line, problem):
    path = tmp_path / "t.jsonl"
    good = '{"prompt": "q", "response": "abc"}'
    path.write_text(f"{good}\n\n{line}\n{good}\n")
    with pytest.raises(ValueError, match=r"t\.jsonl, line 3: ") as error:
        read_trajectories(path, TOKENIZER, len(TOKENIZER))
    assert problem in str(error.value)
    kept, invalid = read_trajectories(path, TOKENIZER, len(TOKENIZER), skip_invalid=True)
    assert (len(kept), invalid) == (2, 1)


def test_method_filter(tmp_path):
    path = tmp_path / "t.jsonl"
    lines = [{"prompt": "q", "response": "abc", "method": m} for m in ("default", "other", "default")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(read_trajectories(path, TOKENIZER, len(TOKENIZER), method=["default"])[0]) == 2
    with pytest.raises(ValueError, match="method none or some"):
        read_trajectories(path, TOKENIZER, len(TOKENIZER), method=["none", "some"])


def test_non_ltr_positions():
    assert non_ltr_positions([0, 1, 2]) == []
    assert non_ltr_positions([2, 0, 3, 1, 3, -1]) == [1, 3]


def test_prompts_go_through_the_chat_template_where_there_is_one():
    tokenizer = character_tokenizer()
    assert tokenizer.decode(encode_prompt(tokenizer, "1+2=")) == "1+2="
    with pytest.raises(ValueError, match="chat template"):
        encode_prompt(tokenizer, MESSAGES)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] + ' ' + m.content }}{% endfor %}="
    assert tokenizer.decode(encode_prompt(tokenizer, "abc")) == "u abc="
    assert encode_prompt(tokenizer, [{"role": "user", "content": "abc"}]) == encode_prompt(tokenizer, "abc")


CHAT = "{% for m in messages %}{{ m.role[0] }}={{ m.content }}.{% endfor %}{% if add_generation_prompt %}a-{% endif %}"


def test_a_long_conversation_loses_the_end_of_its_last_message_and_keeps_the_turn_of_the_assistant():
    tokenizer = character_tokenizer()
    tokenizer.chat_template = CHAT
    conversation = [{"role": "system", "content": "xyz"}, {"role": "user", "content": "0123456789"}]
    whole = tokenizer.decode(encode_prompt(tokenizer, conversation))
    assert whole == "s=xyz.u=0123456789.a-"
    for max_length in range(4, len(whole) + 2):
        shortened = tokenizer.decode(encode_prompt(tokenizer, conversation, max_length))
        assert shortened == (whole if max_length >= len(whole) else whole[: max_length - 3] + ".a-")
    with pytest.raises(ValueError, match=r"max_length=3 tokens.*needs 3 after"):
        encode_prompt(tokenizer, conversation, 3)


def test_long_plain_text_keeps_its_end():
    assert TOKENIZER.decode(encode_prompt(TOKENIZER, "12345+1=", 4)) == "5+1="
    assert encode_prompt(TOKENIZER, "1+1=", 4) == encode_prompt(TOKENIZER, "1+1=")


def test_a_response_is_encoded_as_the_chat_template_ends_it():
    tokenizer = character_tokenizer()
    assert tokenizer.decode(encode_response(tokenizer, "q", "abc")) == "abc"
    tokenizer.chat_template = CHAT.replace("=", "-", 1)
    assert tokenizer.decode(encode_response(tokenizer, "q", "xyz")) == "xyz."
    tokenizer.chat_template += "{% if not add_generation_prompt %}=={% endif %}"
    assert tokenizer.decode(encode_response(tokenizer, "q", "xyz")) == "xyz.=="
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    with pytest.raises(ValueError, match="writes a prompt differently"):
        encode_response(tokenizer, "q", "xyz")


def test_a_response_is_tokenized_without_its_prompt_whose_tokens_stand_before_it_already(monkeypatch):
    tokenizer, texts = character_tokenizer(), []
    encode = encoding.encode_text
    monkeypatch.setattr(encoding, "encode_text", lambda tokenizer, text: texts.append(text) or encode(tokenizer, text))
    encode_response(tokenizer, "q" * 100, "xyz")
    tokenizer.chat_template = CHAT.replace("=", "-", 1)
    encode_response(tokenizer, "q" * 100, "xyz")
    assert texts and all(text.startswith("xyz") for text in texts)


def test_a_response_is_cut_and_filled_up():
    trajectory = Trajectory("q", "abc", [5, 6, 7, 8], [3, 0, 2, 5], non_ltr_positions=[1, 2], entropy=[1, 2, 3, 4])
    cut = fit_response(trajectory, 2, pad_token_id=0)
    assert (cut.response_token_ids, cut.decoding_order, cut.non_ltr_positions) == ([5, 6], [3, 0], [1])
    assert (cut.entropy, fit_response(trajectory, 6, pad_token_id=0).entropy) == ([1, 2], [1, 2, 3, 4, 0, 0])
    filled = fit_response(trajectory, 6, pad_token_id=0)
    assert (filled.response_token_ids, filled.decoding_order) == ([5, 6, 7, 8, 0, 0], [3, 0, 2, 5, 6, 7])
    assert fit_response(trajectory, 6) == trajectory


def test_the_tokenizer_saves_and_loads(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "sort 72=-+.z"
    assert loaded(text).input_ids == TOKENIZER(text).input_ids
    assert loaded.decode(loaded(text).input_ids) == text
