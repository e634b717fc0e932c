"""What decoding costs in the engine, exact and with caches, beside the plain loop of fixed batches.

    python -m benchmarks.engine [--rounds 3] [--large]

Prompts of 30 to 250 tokens, answers that end after 40 to 256 of at most 256, blocks of 32, one token a step. All take
the same model, prompts and settings, in turns. Positions a decided token depend on lengths alone, so they are counted
on a tiny model, which is timed along the way; `--large` also times a model under Dream's vocabulary, on fewer prompts.
What a cache changes is measured on the lab's model and its tasks. On a CPU seconds are of processor time, which other
processes of a shared machine change least. Writes benchmarks/results/engine-<device>.json.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measure import environment, result_name, this_device, write_json
from benchmarks.models import random_dream, tiny_dream
from tabom.data.encoding import encode_prompt
from tabom.lab.dry_run import now
from tabom.lab.model import BASE_PATH
from tabom.lab.tasks import make_task
from tabom.models.diffusion_model import DiffusionModel
from tabom.models.loading import load
from tabom.sampling.engine import EngineConfig, sample
from tabom.sampling.sampler import Completion, SamplerConfig, cost_of, decode_response, denoise

LENGTH, BLOCK = 256, 32
ANSWERS_END_AT = (180, 436)
"""Positions, counted from the prompt's first token: an answer ends at the first of them behind its prompt."""

CACHES = {
    "exact": {},
    "prefix": {"cache": "prefix"},
    "prefix, refresh 8": {"cache": "prefix", "cache_refresh": 8},
    "block": {"cache": "block"},
    "block, refresh 8": {"cache": "block", "cache_refresh": 8},
    "block, refresh 4": {"cache": "block", "cache_refresh": 4},
}


SPREADS = {
    "uniform": lambda length: 1.0,
    "mostly short": lambda length: 1 / length,  # as likely to be of 30 to 60 tokens as of 60 to 120
    "all alike": lambda length: float(length == 80),  # answers end after 100
}
"""How likely a prompt is of a length."""


def prompts_of(count: int, spread: str) -> list[list[int]]:
    """Random tokens, 30 to 140 or 180 to 250, so that answers end after 40 to 150 or 186 to 256 tokens."""
    rng = random.Random(0)
    lengths = [*range(30, 141), *range(180, 251)]
    drawn = rng.choices(lengths, [SPREADS[spread](length) for length in lengths], k=count)
    return [[rng.randrange(4, 40) for _ in range(length)] for length in drawn]


@contextmanager
def answers_that_end(model: DiffusionModel) -> Iterator[None]:
    """Adds to the hidden states in front of the head what makes the end token certain at ANSWERS_END_AT."""
    head = model.model.get_output_embeddings()
    end = head.weight[model.eos_token_id].detach()
    direction = 1e3 * end / end.square().sum()
    positions: list[torch.Tensor] = []

    def keep_positions(_model: torch.nn.Module, _args: tuple, inputs: dict[str, Any]) -> None:
        positions[:] = [inputs["position_ids"] + model.logits_shift]

    def add(_head: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        ends = torch.isin(positions[0], torch.tensor(ANSWERS_END_AT, device=positions[0].device))
        return (args[0] + ends[..., None] * direction.to(args[0]),)

    hooks = [
        model.model.register_forward_pre_hook(keep_positions, with_kwargs=True),
        head.register_forward_pre_hook(add),
    ]
    yield
    for hook in hooks:
        hook.remove()


def plain(
    model: DiffusionModel, prompts: list[list[int]], config: SamplerConfig, batch_size: int
) -> tuple[list[Completion], int]:
    """Fixed batches, each decoded by `denoise` until all of its responses are done; also the positions computed."""
    completions, positions = [], 0
    for start in range(0, len(prompts), batch_size):
        *_, state = denoise(model, prompts[start : start + batch_size], config.max_new_tokens, config)
        rows = zip(*(values.tolist() for values in state[:3]), strict=True)
        completions += [Completion(*row, 0) for row in rows]
        positions += state.positions
    return completions, positions


def measure(
    name: str, model: DiffusionModel, count: int, spread: str, batch_size: int, rounds: int, length: int = LENGTH
) -> list[dict[str, Any]]:
    """One record a contender, which take turns."""
    prompts = prompts_of(count, spread)
    config = SamplerConfig(max_new_tokens=length, block_length=BLOCK, policy="confidence", stop_early=True)
    engine = EngineConfig(compute_budget=batch_size * (max(map(len, prompts)) + length))
    completions: dict[str, list[Completion]] = {}
    positions: dict[str, int] = {}

    def run_plain() -> None:
        completions["plain loop"], positions["plain loop"] = plain(model, prompts, config, batch_size)

    def run_engine(cache: str) -> None:
        completions[cache] = sample(model, prompts, replace(config, **CACHES[cache]), engine=engine)
        positions[cache] = cost_of(completions[cache]).positions

    calls: dict[str, Callable[[], None]] = {"plain loop": run_plain}
    calls |= {cache: lambda c=cache: run_engine(c) for cache in CACHES}
    seconds: dict[str, list[float]] = {contender: [] for contender in calls}
    with answers_that_end(model):
        for _ in range(rounds):
            for contender, call in calls.items():
                start = seconds_now(model.device)
                call()
                seconds[contender].append(seconds_now(model.device) - start)
    records = []
    for contender in calls:
        tokens = cost_of(completions[contender]).tokens
        record = {"model": name, "contender": contender, "prompts": count, "lengths": spread, "batch_size": batch_size}
        record |= {"tokens": tokens, "positions_per_token": positions[contender] / tokens}
        record |= {"seconds": seconds[contender], "tokens_per_second": tokens / statistics.median(seconds[contender])}
        records.append(record | agreement(completions[contender], completions["plain loop"]))
    return records


def seconds_now(device: torch.device) -> float:
    """Of the wall's clock on a GPU, of the processor on a CPU."""
    return time.process_time() if device.type == "cpu" else now(device)


def agreement(ours: list[Completion], exact: list[Completion]) -> dict[str, float]:
    """The share of equal tokens, of equal responses, and the mean Spearman correlation of the decoding orders."""
    equal = [np.equal(a.token_ids, b.token_ids).mean() for a, b in zip(ours, exact, strict=True)]
    orders = [(np.array(a.decoding_order), np.array(b.decoding_order)) for a, b in zip(ours, exact, strict=True)]
    correlations = []
    for a, b in orders:
        both = (a >= 0) & (b >= 0)
        ranks = [order[both].argsort().argsort() for order in (a, b)]  # no ties: one token a step
        correlations.append(np.corrcoef(*ranks)[0, 1] if both.sum() > 1 else 1.0)
    same = np.mean([a.token_ids == b.token_ids for a, b in zip(ours, exact, strict=True)])
    return {
        "equal_tokens": float(np.mean(equal)),
        "equal_responses": float(same),
        "order_correlation": float(np.mean(correlations)),
    }


def fidelity(count: int) -> list[dict[str, Any]]:
    """What each cache changes of the lab model's answers, task by task."""
    model = load(BASE_PATH)
    records = []
    for task_name, block in (("subtraction", 4), ("sorting", 8), ("sudoku", 16), ("sudoku", 8)):
        task = make_task(task_name)
        prompts = task.prompt_set(count, "test", 0)
        encoded = [encode_prompt(model.tokenizer, prompt) for prompt in prompts.prompts]
        config = SamplerConfig(max_new_tokens=task.response_length, block_length=block)
        exact: list[Completion] = []
        for name, cache in CACHES.items():
            completions = sample(model, encoded, replace(config, **cache))
            exact = exact or completions
            right = [
                prompts.is_correct(i, decode_response(model, completion.token_ids))
                for i, completion in enumerate(completions)
            ]
            record = {"task": task_name, "block_length": block, "contender": name, "prompts": count}
            record |= {"accuracy": float(np.mean(right)), "accuracy_error": float(np.std(right) / count**0.5)}
            record |= {"positions_per_token": cost_of(completions).positions_per_token}
            records.append(record | agreement(completions, exact))
    return records


def print_tables(records: list[dict[str, Any]], fidelities: list[dict[str, Any]]) -> None:
    """Costs, and what caches change."""
    table = Table("model", "lengths", "contender", "positions a token", "fewer", "tokens a second", "faster")
    for record in records:
        if record["contender"] == "plain loop":
            plain = record
        fewer = plain["positions_per_token"] / record["positions_per_token"]
        faster = [b / a for a, b in zip(record["seconds"], plain["seconds"], strict=True)]
        table.add_row(
            record["model"],
            record["lengths"],
            record["contender"],
            f"{record['positions_per_token']:.1f}",
            f"{fewer:.2f}",
            f"{record['tokens_per_second']:.1f}",
            f"{statistics.median(faster):.2f} ({min(faster):.2f} to {max(faster):.2f})",
        )
    Console(width=140).print(table)
    table = Table(
        "task", "block", "contender", "accuracy", "equal tokens", "equal answers", "order", "positions a token"
    )
    for record in fidelities:
        table.add_row(
            record["task"],
            str(record["block_length"]),
            record["contender"],
            f"{record['accuracy']:.1%} ±{record['accuracy_error']:.1%}",
            f"{record['equal_tokens']:.1%}",
            f"{record['equal_responses']:.1%}",
            f"{record['order_correlation']:.3f}",
            f"{record['positions_per_token']:.1f}",
        )
    Console(width=140).print(table)


def main() -> None:
    """Positions and seconds on a tiny model, fidelity on the lab's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=32, help="of a tiny model; a quarter of them of the large one")
    parser.add_argument("--rounds", type=int, default=1, help="of every contender")
    parser.add_argument("--large", action="store_true", help="also a model under Dream's vocabulary")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = this_device()
    tiny = tiny_dream()
    records = []
    for spread in SPREADS:
        records += measure("tiny", tiny, arguments.prompts, spread, arguments.prompts // 2, arguments.rounds)
    if arguments.large:
        name, model = random_dream(device)
        count = arguments.prompts // 4
        records += measure(name, model, count, "mostly short", count // 2, arguments.rounds)
    fidelities = fidelity(500)
    path = write_json(result_name("engine", device), environment(device) | {"figures": records, "caches": fidelities})
    print_tables(records, fidelities)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
