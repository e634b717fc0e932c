"""Records in the exact schemas of public data sets: all of a prompt is read, and text that is not used is named."""

import json

import pytest

from tabom.data.prompts import PromptReader, read_prompts
from tabom.data.shapes import warn_of_unused
from tabom.data.tokenized import tokenize
from tabom.data.trajectories import parse_trajectory, read_trajectories
from tabom.lab.model import character_tokenizer

TOKENIZER = character_tokenizer()
TOKENIZER.chat_template = "{% for m in messages %}{{ m.role[0] }}={{ m.content }}.{% endfor %}"


def message(role, content):
    return {"role": role, "content": content}


ALPACA = {
    "instruction": "Sort the numbers.",
    "input": "3 1 2",
    "output": "1 2 3",
    "text": "Below is ...\n\n### Instruction:\nSort the numbers.\n\n### Input:\n3 1 2\n\n### Response:\n1 2 3",
}
ALPACA_CHAT = {
    "instruction": "And now?",
    "input": "",
    "output": "It is 4.",
    "system": "Be brief.",
    "history": [["What is 1+1?", "It is 2."], ["And then?", "It is 3."]],
}
OPENORCA = {
    "id": "niv.242684",
    "system_prompt": "You are a patient teacher.",
    "question": "What is a prime number?",
    "response": "A number with two divisors.",
}
DOLLY = {
    "instruction": "When did Virgin Australia start operating?",
    "context": "Virgin Australia commenced services on 31 August 2000.",
    "response": "It started on 31 August 2000.",
    "category": "closed_qa",
}
SQUAD = {
    "id": "5733be284776f41900661182",
    "title": "University_of_Notre_Dame",
    "context": "The Main Building has a golden dome. On top of it is a statue.",
    "question": "What sits on top of the Main Building?",
    "answers": {"text": ["a statue"], "answer_start": [50]},
}
SVAMP = {
    "ID": "chal-777",
    "Body": "There are 87 oranges and 290 bananas in Philip's collection.",
    "Question": "How big is each group of bananas?",
    "Equation": "(290.0/2.0)",
    "Answer": "145.0",
    "Type": "Common-Division",
    "question_concat": "There are 87 oranges and 290 bananas in Philip's collection. How big is each group of bananas?",
}
ARC = {
    "id": "Mercury_SC_415702",
    "question": "Which skin surface will produce the most heat?",
    "choices": {"text": ["dry palms", "wet palms"], "label": ["A", "B"]},
    "answerKey": "A",
}
ARC_PROMPT = f"{ARC['question']}\n\nA. dry palms\nB. wet palms"
MMLU = {
    "question": "Find the degree of the extension.",
    "subject": "abstract_algebra",
    "choices": ["0", "4"],
    "answer": 1,
}
GSM8K = {"question": "Ann has 3 apples and buys 4. How many?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"}
MATH = {"problem": "What is $1/2$?", "level": "Level 1", "type": "Algebra", "solution": r"It is $\boxed{\frac12}$."}
ULTRACHAT = {
    "prompt": "What is 1+1?",
    "prompt_id": "f0e37e9f7800261167ce91143f98f511",
    "messages": [
        message("user", "What is 1+1?"),
        message("assistant", "It is 2."),
        message("user", "And 2+2?"),
        message("assistant", "It is 4."),
    ],
}
HOTPOT = {"question": "Who is older?", "context": {"title": ["A b"], "sentences": [["A is 3.", "B is 4."]]}}

PROMPTS = {  # record, prompt, response to train on (None: none), answer to compare with, unused text
    "alpaca": (ALPACA, "Sort the numbers.\n\n3 1 2", "1 2 3", None, ["output"]),
    "alpaca without input": (ALPACA | {"input": ""}, "Sort the numbers.", "1 2 3", None, ["output"]),
    "alpaca with history": (
        ALPACA_CHAT,
        [
            message("system", "Be brief."),
            message("user", "What is 1+1?"),
            message("assistant", "It is 2."),
            message("user", "And then?"),
            message("assistant", "It is 3."),
            message("user", "And now?"),
        ],
        "It is 4.",
        None,
        ["output"],
    ),
    "openorca": (
        OPENORCA,
        [message("system", "You are a patient teacher."), message("user", OPENORCA["question"])],
        OPENORCA["response"],
        None,
        ["response"],
    ),
    "openorca without system": (
        OPENORCA | {"system_prompt": ""},
        OPENORCA["question"],
        OPENORCA["response"],
        None,
        ["response"],
    ),
    "dolly": (DOLLY, f"{DOLLY['instruction']}\n\n{DOLLY['context']}", DOLLY["response"], None, ["response"]),
    "squad": (SQUAD, f"{SQUAD['context']}\n\n{SQUAD['question']}", "a statue", "a statue", []),
    "svamp": (SVAMP, SVAMP["question_concat"], "145.0", "145.0", []),
    "arc": (ARC, ARC_PROMPT, "A", "A", []),
    "mmlu": (MMLU, f"{MMLU['question']}\n\nA. 0\nB. 4", "B", "B", []),
    "mmlu with numbers": (
        {"question": "How many?", "choices": ["2", "1", "0"], "answer": 2},
        "How many?\n\nA. 2\nB. 1\nC. 0",
        "C",
        "C",
        [],
    ),
    "a number that is a choice": (
        {"question": "1+3?", "choices": [3, 4], "answer": 4},
        "1+3?\n\nA. 3\nB. 4",
        "4",
        "4",
        [],
    ),
    "history of messages": (
        {"question": "And then?", "answer": "It is 3.", "history": [message("user", "1+1?"), message("model", "2")]},
        [message("user", "1+1?"), message("assistant", "2"), message("user", "And then?")],
        "It is 3.",
        "It is 3.",
        [],
    ),
    "history of tokens": ({"question": "1+1?", "answer": "2", "history": [[1, 2, 3]]}, "1+1?", "2", "2", []),
    "mmlu with labels": (
        {"question": "How many?", "options": ["A) two", "B) three"], "answer": "B"},
        "How many?\n\nA) two\nB) three",
        "B",
        "B",
        [],
    ),
    "gsm8k": (GSM8K, GSM8K["question"], GSM8K["answer"], GSM8K["answer"], []),
    "ultrachat": (ULTRACHAT, ULTRACHAT["messages"][:3], "It is 4.", None, []),
    "a context that is no text": (HOTPOT | {"answer": "B"}, "Who is older?", "B", "B", ["context"]),
    "sharegpt with a system": (
        {"system": "Be brief.", "conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]},
        [message("system", "Be brief."), message("user", "1+1?")],
        "2",
        "2",
        [],
    ),
}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("name", PROMPTS)
def test_all_of_a_prompt_is_read_and_unused_text_is_named_once(tmp_path, caplog, name):
    record, prompt, response, answer, unused = PROMPTS[name]
    path = write(tmp_path / "d.jsonl", record, record)
    prompts, _ = read_prompts(path)
    assert (prompts.prompts, prompts.answers) == ([prompt] * 2, [answer] * 2)
    assert warnings(caplog) == ([f"{path}: text in fields that are not used: {', '.join(unused)}"] if unused else [])

    trajectory = parse_trajectory(record, TOKENIZER, None)
    assert (trajectory.prompt, trajectory.response) == (prompt, response)


def warnings(caplog):
    """The warnings of unused text since the last call."""
    found = [record.getMessage() for record in caplog.records if record.name == "tabom.data.shapes"]
    caplog.clear()
    return found


@pytest.mark.parametrize("reader", [tokenize, read_trajectories])
def test_training_names_the_text_that_it_does_not_use_also_from_the_cache(tmp_path, caplog, reader):
    records = [ALPACA, GSM8K | {"hint": "Add the apples."}, GSM8K | {"hint": "Count them.", "proof": "3 and 4"}]
    path = write(tmp_path / "d.jsonl", *records)
    for _ in range(2):
        reader(path, TOKENIZER, len(TOKENIZER))
        assert warnings(caplog) == [f"{path}: text in fields that are not used: hint, proof"]
    reader(write(path, ALPACA), TOKENIZER, len(TOKENIZER))
    assert warnings(caplog) == []


def test_what_our_own_records_say_of_themselves_is_no_unused_text(tmp_path, caplog):
    own = {"id": "0-0", "prompt": "1+1=", "response": "2", "correct": True, "why": "2 is the answer", "cache": "a b"}
    tokenize(write(tmp_path / "d.jsonl", own), TOKENIZER, len(TOKENIZER))
    assert warnings(caplog) == []


@pytest.mark.parametrize(
    "record, problem",
    [
        (ALPACA | {"history": ["What is 1+1?"]}, "field 'history': expected a list of pairs of texts"),
        (ALPACA | {"history": [["q", 3]]}, "field 'history': expected a list of pairs of texts"),
        (ALPACA | {"system": {"text": "x"}}, "field 'system': expected text"),
        (
            ARC | {"choices": {"text": ["a"], "label": ["A", "B"]}},
            "field 'choices': has labels ['A', 'B'] for 1 choices",
        ),
        (MMLU | {"answer": 7}, "field 'answer': 7, with 2 choices"),
    ],
)
def test_parts_that_cannot_be_read_are_named(tmp_path, record, problem):
    path = write(tmp_path / "d.jsonl", record)
    for reader in (read_prompts, lambda path: read_trajectories(path, TOKENIZER, len(TOKENIZER))):
        with pytest.raises(ValueError, match=r"d\.jsonl, line 1: ") as error:
            reader(path)
        assert problem in str(error.value)


def test_a_letter_is_judged_as_a_choice(tmp_path):
    prompts, _ = read_prompts(write(tmp_path / "d.jsonl", ARC))
    assert prompts.verifier == "math"
    responses = ["The answer is (A).", r"\boxed{A}", "B", "The answer is (B)."]
    assert [verdict.correct for verdict in prompts.verdicts([0] * 4, responses)] == [True, True, False, False]


def test_a_column_of_ones_own_takes_the_place_of_the_shape(tmp_path, caplog):
    path = write(tmp_path / "d.jsonl", DOLLY)
    prompts, _ = read_prompts(path, reader=PromptReader(prompt_column="context", answer_column="instruction"))
    assert (prompts.prompts, prompts.answers) == ([DOLLY["context"]], [DOLLY["instruction"]])
    assert warnings(caplog) == [f"{path}: text in fields that are not used: response"]


SOLUTION = r"Half is \boxed{\frac12}."
CHAT = [message("user", "Half of 1?"), message("assistant", SOLUTION)]
VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [message("user", "Ann has 3 apples and buys 4. How many?")],
    "ability": "math",
    "reward_model": {"ground_truth": "7", "style": "rule"},
    "extra_info": {"answer": GSM8K["answer"], "index": 0, "question": GSM8K["question"], "split": "train"},
}

RESPONSES = {  # record, response to train on, answer to compare with
    "messages and an answer": ({"messages": CHAT, "answer": "1/2"}, SOLUTION, "1/2"),
    "messages and an output": ({"messages": CHAT, "output": "1/2"}, SOLUTION, SOLUTION),
    "openr1": ({"problem": "?", "solution": "s", "answer": "1/2", "messages": CHAT}, SOLUTION, "1/2"),
    "a question too": ({"question": "?", "answer": "1/2", "messages": CHAT}, SOLUTION, "1/2"),
    "an open conversation": ({"messages": CHAT[:1], "answer": "1/2"}, "1/2", "1/2"),
    "ones own response": ({"prompt": "?", "response": "r", "messages": CHAT, "answer": "1/2"}, "r", "1/2"),
    "math": (MATH, MATH["solution"], MATH["solution"]),
    "math500": (MATH | {"answer": r"\frac12"}, MATH["solution"], r"\frac12"),
    "aime": ({"Problem": "1+1?", "Solution": "It is 2.", "Answer": 2}, "It is 2.", "2"),
    "prm800k": ({"question": {"problem": "1+1?", "ground_truth_answer": "2"}}, None, "2"),
    "humaneval": ({"prompt": "def f():", "canonical_solution": " return 1"}, " return 1", None),
    "mbpp": ({"text": "Write f.", "code": "def f(): pass", "test_list": ["assert f()"]}, "def f(): pass", None),
    "verl": (VERL, None, "7"),
}


@pytest.mark.parametrize("name", RESPONSES)
def test_the_response_to_train_on_and_the_answer_to_compare_with(tmp_path, name):
    record, response, answer = RESPONSES[name]
    if response is None:
        with pytest.raises(ValueError, match=r"field 'response': missing.*; the record has (problem|data_source)"):
            parse_trajectory(record, TOKENIZER, None)
    else:
        assert parse_trajectory(record, TOKENIZER, None).response == response
    prompts, _ = read_prompts(write(tmp_path / "d.jsonl", record), reader=PromptReader(verifier="exact"))
    assert prompts.answers == [answer]


def test_a_column_may_be_inside_another(tmp_path):
    path = write(tmp_path / "d.jsonl", VERL)
    for column, answer in (("reward_model.ground_truth", "7"), ("extra_info.answer", GSM8K["answer"])):
        reader = PromptReader(prompt_column="extra_info.question", answer_column=column)
        prompts, _ = read_prompts(path, reader=reader)
        assert (prompts.prompts, prompts.answers, prompts.verifier) == ([GSM8K["question"]], [answer], "math")
    with pytest.raises(ValueError, match=r"field 'reward_model.truth': missing; the record has .*reward_model"):
        read_prompts(path, reader=PromptReader(answer_column="reward_model.truth"))


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
USED_TOOL = [message("user", "1+1?"), CALLED, message("tool", "2"), message("assistant", "It is 2.")]


@pytest.mark.parametrize(
    "messages, expected",
    [
        ([{"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1"}]}], ["u=1+1"]),
        ([{"from": "human", "value": "a"}, {"from": "chatgpt", "value": "b"}], ["u=a", "a=b"]),
        ([{"from": "user", "value": "a"}, {"from": "bing", "value": "b"}], ["u=a", "a=b"]),
        ([{"from": "human", "value": "a"}, {"from": "observation", "value": "b"}], ["u=a", "t=b"]),
        ([{"from": "human", "value": "a"}, {"from": "Bard", "value": "b"}], ["u=a", "a=b"]),
        (USED_TOOL, ["u=1+1?", "a=", "t=2", "a=It is 2."]),
    ],
)
def test_messages_of_every_public_form(messages, expected):
    record = {"conversations" if "from" in messages[0] else "messages": [*messages, message("user", "z")]}
    trajectory = parse_trajectory(record | {"answer": "x"}, with_tools(), None)
    found = [f"{each['role'][0]}={each['content']}" for each in trajectory.prompt]
    assert found == [*expected, "u=z"]


def with_tools():
    """A tokenizer whose chat template writes calls of tools."""
    tokenizer = character_tokenizer()
    called = "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments | length }}{% endfor %}"
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}={{ m.content }}" + called + ".{% endfor %}"
    return tokenizer


def test_a_call_of_a_tool_is_in_the_prompt_or_refused():
    trajectory = parse_trajectory({"messages": USED_TOOL}, with_tools(), None)
    [row], _ = tokenize([trajectory], with_tools())
    assert with_tools().decode(row["prompt_token_ids"]) == "u=1+1<unk>.a=add1.t=2."
    with pytest.raises(ValueError, match="the chat template does not write the tool call 'add'"):
        tokenize([trajectory], TOKENIZER)


IMAGE = [{"type": "image", "image": "x"}, {"type": "text", "text": "What is it?"}]


@pytest.mark.parametrize(
    "messages, problem",
    [
        ([message("user", IMAGE)], "a part of type 'image'; only text is read"),
        ([message("user", ["text"])], "expected a list of {"),
        ([message("user", "1+1?"), CALLED], "the closing message calls a tool"),
        ([message("user", "q"), CALLED | {"tool_calls": ["add"]}, message("user", "q")], "tool_calls: expected"),
        ([{"from": "human", "value": "a"}, {"from": "function_call", "value": "{}"}], "give it as tool_calls"),
        ([message("oracle", "a")], "role 'oracle': expected one of system, "),
    ],
)
@pytest.mark.parametrize("skip_invalid", [False, True])
def test_messages_that_cannot_be_learnt_say_why(tmp_path, messages, problem, skip_invalid):
    records = [{"messages": messages, "answer": "x"}, GSM8K]
    path = write(tmp_path / "d.jsonl", *records)
    if skip_invalid:
        assert read_trajectories(path, TOKENIZER, len(TOKENIZER), skip_invalid=True)[1] == 1
        return
    with pytest.raises(ValueError, match=r"d\.jsonl, line 1: field 'messages': ") as error:
        read_trajectories(path, TOKENIZER, len(TOKENIZER))
    assert problem in str(error.value) and len(str(error.value).splitlines()) == 1


def test_the_warning_of_unused_text_is_safe_to_print(caplog):
    warn_of_unused("x.jsonl", ["\x1b[2Jname", "\ud800"])
    assert "x.jsonl: text in fields that are not used: \\x1b[2Jname, \\ud800" in caplog.text
