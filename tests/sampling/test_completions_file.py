"""Responses of another engine: judged and recorded as if `collect` had decoded them."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from examples import sglang_completions as script
from tabom.cli.main import main
from tabom.lab.model import character_tokenizer

TOKENIZER = character_tokenizer()
PROMPTS = [{"prompt": "12+34=", "answer": "46"}, {"prompt": "5+3=", "answer": "8"}]


def ids(text):
    return TOKENIZER(text, add_special_tokens=False).input_ids


def line(index, text, steps, **others):
    return {"index": index, "token_ids": ids(text), "step_map": steps, **others}


@pytest.fixture
def collect(tmp_path):
    """Writes prompts and completions, and runs the command on them."""

    def run(lines, *options):
        for name, content in (("p.jsonl", PROMPTS), ("c.jsonl", lines)):
            (tmp_path / name).write_text("".join(json.dumps(each) + "\n" for each in content))
        words = ["collect", "--prompts", str(tmp_path / "p.jsonl"), "--completions", str(tmp_path / "c.jsonl")]
        return main([*words, "--output", str(tmp_path / "t.jsonl"), *options])

    return run


def records(path):
    return {each["id"]: each for each in map(json.loads, path.read_text().splitlines()) if "id" in each}


LINES = [
    line(0, "46", [2, 1], logprobs=[-0.5, -0.25]),
    line(1, "9", [1], logprobs=[-1.0]),
    line(0, "45", [1, 1], logprobs=[-0.5, -2.0]),
]


def test_responses_are_judged_and_recorded(collect, tmp_path, capsys):
    assert collect(LINES, "--temperature", "0.8") == 0
    assert "1 right of 3 attempts (3 made now)" in capsys.readouterr().out
    right, wrong = records(tmp_path / "t.jsonl"), records(tmp_path / "t.jsonl.rejected")
    assert right.keys() == {"0-0"} and wrong.keys() == {"0-1", "1-0"}
    assert (right["0-0"]["decoding_order"], right["0-0"]["logprob"]) == ([1, 0], [-0.5, -0.25])
    assert right["0-0"]["reward"] == 1 and wrong["0-1"]["reward"] == 0
    assert right["0-0"]["group"] == wrong["0-1"]["group"] != wrong["1-0"]["group"]
    assert {each["temperature"] for each in (*right.values(), *wrong.values())} == {0.8}
    assert collect([*LINES, line(1, "8", [1], logprobs=[-1.0])], "--temperature", "0.8") == 0
    assert "2 right of 4 attempts (1 made now)" in capsys.readouterr().out


def test_steps_that_begin_anew_in_every_block_count_on(collect, tmp_path):
    """The prompt has 6 tokens: with blocks of 4 the response has tokens in the blocks [2, 4, ..]."""
    assert collect([line(0, "46aabb", [2, 1, 3, 1, 2, 0])], "--block_size", "4") == 0
    (found,) = records(tmp_path / "t.jsonl.rejected").values()
    assert found["decoding_order"] == [1, 0, 4, 2, 3, -1]
    assert "temperature" not in found and "logprob" not in found


def test_a_policy_learns_from_them(collect, tmp_path):
    assert collect(LINES, "--temperature", "1") == 0
    words = [
        "train",
        "--data",
        str(tmp_path / "t.jsonl"),
        "--with_rejected",
        "--objective",
        "policy",
        "--use_cpu",
        "true",
    ]
    words += ["--max_steps", "1", "--report_to", "none", "--output_dir", str(tmp_path / "out")]
    assert main(words) == 0


@pytest.mark.parametrize(
    "lines, options, message",
    [
        ([line(2, "46", [1, 2])], [], "c.jsonl, line 1: field 'index': expected 0 to 1, got 2"),
        ([line(0, "46", [1])], [], "'step_map': has 1 steps for 2 tokens"),
        ([{"index": 0, "token_ids": [5]}], [], "'step_map': missing; the record has index, token_ids"),
        ([line(0, "46", [1, 2], logprobs=[-1])], [], "'logprobs': has 1 numbers for 2 response tokens"),
        ([line(0, "46", [1, 2], logprobs=[-1, 0.5])], [], "'logprobs': 0.5; expected logarithms"),
        (LINES, ["--policy", "random"], "policy='random' with completions="),
        (LINES, ["--samples_per_prompt", "2", "--temperature", "1"], "samples_per_prompt=2 with completions="),
        (LINES, ["--look_every", "2"], "look_every=2 with completions="),
    ],
)
def test_what_is_wrong_or_has_no_effect_is_named(collect, capsys, lines, options, message):
    assert collect(lines, *options) == 2
    assert message in capsys.readouterr().err


def test_the_script_asks_a_server_and_writes_such_a_file():
    """With a server that answers as SGLang does."""
    asked = []

    class Server(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            reply = {
                "text": "46",
                "output_ids": [8, 10],
                "meta_info": {"output_token_logprobs": [[-0.5, 8, None], [-0.1, 10, None]], "step_maps": [2, 1]},
            }
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        reply = script.request(f"http://127.0.0.1:{server.server_port}", [5, 6], {"temperature": 1.0})
    finally:
        server.shutdown()
        server.server_close()
    assert asked[0]["input_ids"] == [5, 6] and asked[0]["return_step_maps"] and asked[0]["return_logprob"]
    expected = {"index": 3, "token_ids": [8, 10], "step_map": [2, 1], "logprobs": [-0.5, -0.1]}
    assert script.completion(3, reply) == expected
    assert script.completion(3, {**reply, "step_maps": [2, 1], "meta_info": {}}) == {
        name: value for name, value in expected.items() if name != "logprobs"
    }
    with pytest.raises(SystemExit, match="no step_maps"):
        script.completion(3, {**reply, "meta_info": {}})
