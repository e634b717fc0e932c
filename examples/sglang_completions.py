"""Has an SGLang server answer a prompt set, and writes the file that `tabom collect --completions` judges and records.

    python -m sglang.launch_server --model-path SDAR-1.7B-Chat --dllm-algorithm LowConfidence ...
    python examples/sglang_completions.py --prompts problems.jsonl --model SDAR-1.7B-Chat --temperature 1 --samples 8
    tabom collect --prompts problems.jsonl --verifier math --model SDAR-1.7B-Chat --temperature 1 \\
        --completions completions.jsonl --block_size 4 --output t.jsonl

`--block_size` is needed because the server's `step_maps` begin anew in every block. `return_step_maps` is SGLang's pull
request 27943; a server without it returns no step maps, which this script says. It needs nothing but tabom. Its
conversion is tested with recorded replies; it has not yet been run beside a server.
"""

import argparse
import json
import urllib.request
from collections.abc import Iterator
from typing import Any

from tabom.data.encoding import encode_prompt
from tabom.data.prompts import read_prompts
from tabom.models.loading import load_tokenizer


def request(url: str, input_ids: list[int], sampling: dict[str, Any]) -> dict[str, Any]:
    """The reply of the server to the token ids of a prompt."""
    body = {"input_ids": input_ids, "sampling_params": sampling, "return_logprob": True, "return_step_maps": True}
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/generate", json.dumps(body).encode(), headers)) as reply:
        return json.load(reply)


def completion(index: int, reply: dict[str, Any]) -> dict[str, Any]:
    """The line of a reply: token ids, steps from 1, and log-probabilities."""
    about = reply["meta_info"]
    steps = reply.get("step_maps", about.get("step_maps"))
    if steps is None:
        raise SystemExit("the server returned no step_maps: it needs SGLang with pull request 27943")
    line = {"index": index, "token_ids": reply["output_ids"], "step_map": steps}
    if about.get("output_token_logprobs"):  # each is (log-probability, token id, text)
        line["logprobs"] = [logprob for logprob, *_ in about["output_token_logprobs"]]
    return line


def completions(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The line of each response."""
    tokenizer, (prompts, _) = load_tokenizer(options.model), read_prompts(options.prompts)
    sampling = {"temperature": options.temperature, "max_new_tokens": options.max_new_tokens}
    for index, prompt in enumerate(prompts.prompts):
        for _ in range(options.samples):
            yield completion(index, request(options.url, encode_prompt(tokenizer, prompt), sampling))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", required=True, help="as for tabom collect")
    parser.add_argument("--model", required=True, help="folder or hub name of the tokenizer")
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--samples", type=int, default=1, help="responses to each prompt")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--output", default="completions.jsonl")
    arguments = parser.parse_args()
    with open(arguments.output, "w", encoding="utf-8") as lines:
        for each in completions(arguments):
            lines.write(json.dumps(each) + "\n")
