"""How often an answer of the engine is not the one that its prompt gets alone, as rounding turns near ties.

    python -m benchmarks.alone

Beside it padded batches of `denoise`, the plain loop. Writes benchmarks/results/engine-alone-<device>.json.
"""

from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch

from benchmarks.caches import TASKS
from benchmarks.engine import BLOCK, asked_of
from benchmarks.tools.measure import environment, result_name, this_device, write_json
from benchmarks.tools.models import tiny_dream
from tabom.data.encoding import encode_prompt
from tabom.lab.tasks import make_task
from tabom.models.diffusion_model import DiffusionModel
from tabom.models.loading import SHIPPED_PATH, load
from tabom.sampling.collect import in_groups
from tabom.sampling.completions import Completion
from tabom.sampling.config import SamplerConfig
from tabom.sampling.engine import sample
from tabom.sampling.sampler import denoise

CONTENDERS = ("engine", "denoise in batches of 16")


class Case(NamedTuple):
    """Prompts that a model answers."""

    name: str
    model: DiffusionModel
    prompts: list[list[int]]
    config: SamplerConfig


def cases(count: int, dtype: torch.dtype, temperature: float) -> Iterator[Case]:
    """The lab's model on its tasks, and random weights, whose logits have many near ties, on prompts of any length."""
    model = load(SHIPPED_PATH, dtype=dtype)
    for task_name, block in TASKS:
        task = make_task(task_name)
        prompts = [encode_prompt(model.tokenizer, prompt) for prompt in task.prompt_set(count, "test", 0).prompts]
        settings = {"max_new_tokens": task.response_length, "block_length": block}
        yield Case("the lab's, its tasks", model, prompts, SamplerConfig(**settings, temperature=temperature))
    model = tiny_dream(num_hidden_layers=4)
    model.model.to(dtype)
    prompts = [prompt for prompt, _ in asked_of(count, "wide")]
    yield Case("random weights", model, prompts, SamplerConfig(max_new_tokens=BLOCK, temperature=temperature))


def near_ties(count: int) -> list[dict[str, Any]]:
    """How many answers, tokens and steps, are not those that `denoise` gives their prompts alone.

    Those of the engine, and of `denoise` itself in batches of 16.
    """
    records = []
    for dtype, temperature in product((torch.float32, torch.bfloat16), (0.0, 1.0)):
        for name, model, prompts, config in cases(count, dtype, temperature):
            alone, batched = (
                [answer for group in in_groups(prompts, size) for answer in decoded(model, group, config)]
                for size in (1, 16)
            )
            record = {"model": name, "dtype": str(dtype).removeprefix("torch."), "temperature": temperature}
            record |= {"prompts": len(prompts), "length": config.max_new_tokens}
            for contender, answers in zip(CONTENDERS, (sample(model, prompts, config), batched), strict=True):
                others = sum(
                    (a.token_ids, a.decoding_order) != (b.token_ids, b.decoding_order)
                    for a, b in zip(answers, alone, strict=True)
                )
                records.append(record | {"contender": contender, "other_answers": others})
    return records


def decoded(model: DiffusionModel, prompts: list[list[int]], config: SamplerConfig) -> list[Completion]:
    """What `denoise` makes of a batch."""
    *_, state = denoise(model, prompts, config.max_new_tokens, config)
    return [Completion(*row, 0) for row in zip(*(values.tolist() for values in state[:3]), strict=True)]


def near_ties_table(records: list[dict[str, Any]]) -> str:
    """Answers that are others, a line for each model, dtype and temperature."""
    lines = ["| | answers | engine | `denoise` in batches of 16 |", "| --- | ---: | ---: | ---: |"]
    kinds: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        kinds[record["model"], record["dtype"], record["temperature"]].append(record)
    for (model, dtype, temperature), alike in sorted(kinds.items(), reverse=True):
        how = f"temperature {temperature:g}" if temperature else "greedy"
        others = {name: sum(r["other_answers"] for r in alike if r["contender"] == name) for name in CONTENDERS}
        answers = sum(record["prompts"] for record in alike) // len(CONTENDERS)
        counts = " | ".join(map(str, [answers, *others.values()]))
        lines.append(f"| {model}, {dtype}, {how} | {counts} |")
    return "\n".join(lines)


def main() -> None:
    """Count, and print the table."""
    torch.manual_seed(0)
    device, records = this_device(), near_ties(100)
    path = write_json(result_name("engine-alone", device), environment(device) | {"answers": records})
    print(near_ties_table(records))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
