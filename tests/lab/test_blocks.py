"""The block-causal base of the lab: how it is pre-trained, and collect, train and evaluate with it."""

import json
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch

from tabom import SamplerConfig, load
from tabom.cli.main import main
from tabom.evaluation.responses import accuracy
from tabom.lab.experiment import STRONG_TASKS, WEAK_TASKS
from tabom.lab.model import character_tokenizer, tiny_model
from tabom.lab.pretrain import MIXTURE, encode, response_logits
from tabom.lab.tasks import Reversing, Sorting, Sudoku
from tabom.models.diffusion_model import describe

SIZE = 4


@pytest.mark.parametrize("task", [Sorting(), Reversing(), Sudoku()], ids=lambda task: task.name)
def test_all_blocks_are_pretrained_as_they_are_decoded(rng, task):
    """The logits of each block are those behind the clean blocks before it."""
    model = describe(tiny_model(character_tokenizer(), SIZE).eval(), character_tokenizer())
    input_ids, prompt_length = encode(model.tokenizer, list(islice(task.stream("train", 0), 3)), SIZE)
    masked = torch.rand(input_ids[:, prompt_length:].shape) < 0.5
    noisy = input_ids.clone()
    noisy[:, prompt_length:][masked] = model.mask_token_id
    found = response_logits(model.model, input_ids, prompt_length, masked)
    for block in range(prompt_length // SIZE, input_ids.shape[1] // SIZE):
        start, end = max(block * SIZE, prompt_length), (block + 1) * SIZE
        ids = torch.cat([input_ids[:, :start], noisy[:, start:end]], dim=1)
        expected = model.model(**model.inputs(ids)).logits[:, start:]
        torch.testing.assert_close(found[:, start - prompt_length : end - prompt_length], expected)


def test_answers_end_with_the_block():
    tokenizer = character_tokenizer()
    [problem] = islice(Reversing().stream("train", 0), 1)
    input_ids, prompt_length = encode(tokenizer, [problem], SIZE)
    assert prompt_length == 17 and tokenizer.decode(input_ids[0]) == problem.prompt + problem.answer + 3 * "<eos>"
    assert encode(tokenizer, [problem])[0].tolist() == input_ids[:, :25].tolist()


def test_both_bases_were_pretrained_with_equally_many_positions():
    """Positions through the model: 2000 steps with full attention, and 1369 with clean text and noisy blocks."""
    computed = dict.fromkeys((None, SIZE), 0)
    for block_size in computed:
        model = tiny_model(character_tokenizer(), block_size)
        rows = []
        model.model.embed_tokens.register_forward_hook(lambda *args, rows=rows: rows.append(args[1][0].numel()))
        for task, count in MIXTURE.items():
            input_ids, prompt_length = encode(
                character_tokenizer(), list(islice(task.stream("train", 0), count)), block_size
            )
            masked = torch.ones(input_ids[:, prompt_length:].shape, dtype=torch.bool)
            response_logits(model, input_ids, prompt_length, masked)
        computed[block_size] = sum(rows)
    assert computed == {None: 3022, SIZE: 4416}
    assert round(2000 * computed[None] / computed[SIZE]) == 1369


def test_the_shipped_block_causal_model_is_what_it_is_said_to_be():
    """Strong on what the other base is strong on, weak but not hopeless on sudokus at four tokens a step."""
    base = load("shipped-block")
    assert base.block_size == SIZE and base.model.num_parameters() == load("shipped").model.num_parameters()
    for task in STRONG_TASKS:
        prompts = task.prompt_set(60, "test", 9)
        assert accuracy(base, prompts, SamplerConfig(max_new_tokens=task.response_length)).mean() > 0.85, task
    sudoku = WEAK_TASKS["sudoku"]
    fast = SamplerConfig(max_new_tokens=sudoku.response_length, tokens_per_step=4)
    assert 0.1 < accuracy(base, sudoku.prompt_set(200, "test", 9), fast).mean() < 0.9


def exact_positions(prompt_length: int, response_length: int, tokens_per_step: int) -> int:
    """The prompt once, the steps of each block, and each block but the last once more for its keys and values."""
    blocks = response_length // SIZE
    return prompt_length + blocks * (SIZE // tokens_per_step) * SIZE + (blocks - 1) * SIZE


def test_collect_then_train_then_evaluate(capsys, tmp_path):
    """Sudokus of four blocks, through the command line; the training stops and goes on."""
    data, sudoku = tmp_path / "t.jsonl", ["--max_new_tokens", "16"]
    common = ["--model", "shipped-block", *sudoku]
    assert main(["collect", *common, "--task", "sudoku", "--num_prompts", "32", "--output", str(data)]) == 0
    assert f"{exact_positions(24, 16, 1) / 16:.1f} positions computed a decided token" in capsys.readouterr().out
    orders = [json.loads(line)["decoding_order"] for line in data.read_text().splitlines()[1:]]
    assert len(orders) > 8
    for order in orders:
        blocks = [order[i : i + SIZE] for i in range(0, 16, SIZE)]
        assert sorted(order) == list(range(16)) and all(max(a) < min(b) for a, b in pairwise(blocks))
    assert any(order != sorted(order) for order in orders), "inside a block the order is free"

    def train(folder: str, steps: int, *options: str) -> Path:
        path = tmp_path / folder
        arguments = ["--data", str(data), "--output_dir", str(path), "--max_steps", str(steps), *options]
        arguments += ["--learning_rate", "1e-3", "--lr_scheduler_type", "constant", "--use_cpu", "true"]
        assert main(["train", "--model", "shipped-block", "--save_steps", "2", *arguments]) == 0
        return path

    whole = train("whole", 4)
    train("stopped", 2)
    stopped = train("stopped", 4, "--resume_from_checkpoint", "auto")
    weights = [load(folder).model.state_dict() for folder in (whole, stopped, "shipped-block")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    assert load(stopped).block_size == SIZE

    samplers = ["--samplers", "tokens_per_step=1", "tokens_per_step=2", "--output_dir", str(tmp_path / "e")]
    evaluated = ["--model", "shipped-block", str(stopped), "--task", "sudoku", "--num_prompts", "8"]
    assert main(["evaluate", *evaluated, *sudoku, *samplers]) == 0
    results = json.loads((tmp_path / "e" / "results.json").read_text())
    found = [
        (result["model"], result["sampler"], result["steps"]["mean"], result["positions"]["mean"]) for result in results
    ]
    assert found == [
        (model, f"tokens_per_step={pace}", 16 / pace, exact_positions(24, 16, pace))
        for model in ("shipped-block", str(stopped))
        for pace in (1, 2)
    ]
