"""Tokens a second of the sampler, beside a straightforward loop that does what Dream's generation code does.

    python -m benchmarks.sampler

That loop computes the head at all positions and finds the nucleus by a sort. Both take the same model, prompts, policy
and number of steps, in turns. Writes benchmarks/results/sampler-<device>.json.
"""

import statistics
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.tools.measure import Timing, environment, is_gpu, result_name, summary, this_device, write_json
from benchmarks.tools.models import random_dream
from tabom.lab.dry_run import now, timed
from tabom.models.diffusion_model import DiffusionModel
from tabom.models.loading import SHIPPED_PATH, load
from tabom.sampling import engine
from tabom.sampling.config import SamplerConfig
from tabom.sampling.engine import sample
from tabom.sampling.sampler import left_pad

SETTINGS = {"greedy": {}, "temperature 0.2, top-p 0.95": {"temperature": 0.2, "top_p": 0.95}}


def straightforward(model: DiffusionModel, prompts: list[list[int]], config: SamplerConfig) -> torch.Tensor:
    """The (B, T) tokens of `dream_steps`."""
    *_, x = dream_steps(model, prompts, config)
    return x[:, -config.max_new_tokens :]


@torch.inference_mode()
def dream_steps(model: DiffusionModel, prompts: list[list[int]], config: SamplerConfig) -> Iterator[torch.Tensor]:
    """Dream's entropy policy, all logits at every step; yields all (B, L) tokens, which are one tensor, after each."""
    inputs = left_pad(model, prompts, config.max_new_tokens)
    x = inputs["input_ids"]
    times = torch.linspace(1, config.eps, config.steps + 1)
    for i in range(config.steps):
        masked = x == model.mask_token_id
        logits = model.model(**inputs).logits
        if model.logits_shift:
            logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
        logits = logits[masked]
        logits[:, model.mask_token_id] = -torch.inf
        if config.temperature > 0:
            logits = logits / config.temperature
        if config.top_p is not None:
            ordered, indices = logits.sort(-1, descending=True)
            remove = ordered.softmax(-1).cumsum(-1) > config.top_p
            remove[:, 1:] = remove[:, :-1].clone()
            remove[:, 0] = False
            logits = logits.masked_fill(torch.zeros_like(remove).scatter(-1, indices, remove), -torch.inf)
        p = logits.softmax(-1)
        token = torch.multinomial(p, 1).squeeze(1) if config.temperature > 0 else p.argmax(-1)
        confidence = torch.full(x.shape, -torch.inf, device=x.device, dtype=p.dtype)
        confidence[masked] = (p * (p + 1e-10).log()).sum(-1)
        share = 1 - times[i + 1] / times[i] if i < config.steps - 1 else 1
        number = int(masked.sum() / len(x) * share)
        if number > 0:
            chosen = confidence.topk(number).indices
            proposed = torch.full_like(x, model.mask_token_id)
            proposed[masked] = token
            x.scatter_(1, chosen, proposed.gather(1, chosen))
        yield x


def time_in_turns(calls: dict[str, Callable[[], Any]], device: torch.device, rounds: int) -> dict[str, Timing]:
    """Whole decodings, the host's work included."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round in range(rounds + 1):
        for name, call in calls.items():
            start = now(device)
            call()
            if round > 0:
                seconds[name].append(now(device) - start)
    return {name: summary(values) for name, values in seconds.items()}


def shares(model: DiffusionModel, prompts: list[list[int]], config: SamplerConfig) -> dict[str, float]:
    """The parts of a decoding that the head, and the statistics of its logits, take."""
    in_statistics: list[float] = []
    read_candidates = engine.read_candidates

    def timed_statistics(*arguments: Any) -> Any:
        start = now(model.device)
        result = read_candidates(*arguments)
        in_statistics.append(now(model.device) - start)
        return result

    start = now(model.device)
    with (
        timed(model.model.get_output_embeddings(), model.device) as in_head,
        patch.object(engine, "read_candidates", timed_statistics),
    ):
        sample(model, prompts, config)
    total = now(model.device) - start
    return {"head": sum(in_head) / total, "statistics": sum(in_statistics) / total}


def measure(
    name: str, model: DiffusionModel, prompts: list[list[int]], length: int, steps: int
) -> list[dict[str, Any]]:
    """One record a setting and loop."""
    records = []
    for settings_name, settings in SETTINGS.items():
        config = SamplerConfig(max_new_tokens=length, steps=steps, policy="dream_entropy", **settings)
        calls = {
            "ours": lambda c=config: sample(model, prompts, c),
            "straightforward": lambda c=config: straightforward(model, prompts, c),
        }
        if not settings:
            ours = torch.tensor([completion.token_ids for completion in calls["ours"]()])
            agreement = (ours == calls["straightforward"]().cpu()).double().mean().item()
            assert is_gpu(model.device) or agreement > 0.95, agreement  # bf16 turns near ties
        timings = time_in_turns(calls, model.device, rounds=5)
        for loop, timing in timings.items():
            record = {"model": name, "settings": settings_name, "loop": loop, "batch": len(prompts)}
            record |= {"prompt": len(prompts[0]), "length": length, "steps": steps, "seconds": timing._asdict()}
            record |= {"tokens_per_second": len(prompts) * length / timing.median}
            records.append(record | {"shares": shares(model, prompts, config) if loop == "ours" else None})
    return records


def print_table(records: list[dict[str, Any]]) -> None:
    """Tokens a second, and where ours spends its time."""
    table = Table("model", "settings", "loop", "tokens a second", "spread, s", "head", "statistics")
    for record in records:
        seconds = record["seconds"]
        parts = [f"{record['shares'][part]:.0%}" for part in ("head", "statistics")] if record["shares"] else ["", ""]
        spread = f"{seconds['low']:.3f}-{seconds['high']:.3f}"
        rate = f"{record['tokens_per_second']:,.0f}"
        table.add_row(record["model"], record["settings"], record["loop"], rate, spread, *parts)
    Console(width=140).print(table)


def main() -> None:
    """The model that ships with the package, and a Dream of a size that suits the device."""
    torch.manual_seed(0)
    device = this_device()
    lab = load(SHIPPED_PATH)
    lab.model.to(device)
    prompts = [lab.tokenizer(f"{i}-{i // 2}=").input_ids for i in range(500, 564)]
    records = measure("the lab's, 1 M parameters, V = 45", lab, prompts, length=16, steps=16)
    name, dream = random_dream(device)
    batch, prompt_length, length, steps = (8, 256, 256, 64) if is_gpu(device) else (2, 32, 32, 16)
    prompts = torch.randint(4, 1000, (batch, prompt_length)).tolist()
    records += measure(name, dream, prompts, length, steps)
    path = write_json(result_name("sampler", device), environment(device) | {"figures": records})
    print_table(records)
    ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(records[::2], records[1::2], strict=True)]
    print(
        f"ours is {', '.join(f'{ratio:.1f}' for ratio in ratios)} times as fast, "
        f"geometric mean {statistics.geometric_mean(ratios):.1f}; wrote {path}"
    )


if __name__ == "__main__":
    main()
