"""The commands of docs/method.md for parallel decoding, on the lab's model."""

import json

from examples.slowest_right import slowest_right
from tabom.__main__ import main


def test_responses_of_several_paces_are_collected_put_together_and_trained_on(tmp_path):
    paths = {pace: tmp_path / f"t-{pace}.jsonl" for pace in (1, 2, 4)}
    for pace, path in paths.items():
        task = ["--task", "subtraction", "--num_prompts", "80"]
        assert main(["collect", *task, "--tokens_per_step", str(pace), "--output", str(path)]) == 0
    right = {pace: [json.loads(line) for line in path.read_text().splitlines()] for pace, path in paths.items()}
    prompts = {pace: {record["prompt"] for record in records} for pace, records in right.items()}
    assert prompts[2] - prompts[1] and prompts[4] - prompts[2] - prompts[1], "or nothing is shown"

    lines = list(slowest_right([str(path) for path in paths.values()]))
    kept = [json.loads(line) for line in lines]
    assert sorted(record["prompt"] for record in kept) == sorted(set().union(*prompts.values()))
    for record in kept:
        slowest = next(pace for pace in paths if record["prompt"] in prompts[pace])
        assert max(record["decoding_order"]) + 1 == 4 // slowest

    merged = tmp_path / "t.jsonl"
    merged.write_text("".join(lines))
    training = ["--data", str(merged), "--tokens_per_step", "4", "--max_steps", "1", "--report_to", "none"]
    assert main(["train", "--model", "shipped", *training, "--output_dir", str(tmp_path / "run")]) == 0


def test_all_responses_of_the_slowest_pace_are_kept(tmp_path):
    for name, groups in (("1", "aab"), ("2", "bcc")):
        (tmp_path / name).write_text("".join(json.dumps({"group": group, "of": name}) + "\n" for group in groups))
    kept = [json.loads(line) for line in slowest_right([str(tmp_path / name) for name in "12"])]
    assert [each["group"] + each["of"] for each in kept] == ["a1", "a1", "b1", "c2", "c2"]
