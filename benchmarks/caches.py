"""What each cache of the engine changes in the lab model's answers.

    python -m benchmarks.caches

Every task is answered exactly and with each cache. The table shows the accuracy, how many tokens and whole answers are
the same as without a cache, how similar the decoding orders are, and how many positions the model computes for a token.
Writes benchmarks/results/engine-caches-<device>.json.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.tools.measure import environment, result_name, this_device, write_json
from tabom.data.encoding import encode_prompt
from tabom.lab.tasks import make_task
from tabom.models.loading import SHIPPED_PATH, load
from tabom.sampling.completions import Completion, cost_of, decode_response
from tabom.sampling.config import SamplerConfig
from tabom.sampling.engine import sample

CACHES = {
    "exact": {},
    "prefix": {"cache": "prefix"},
    "prefix, refresh 8": {"cache": "prefix", "cache_refresh": 8},
    "block": {"cache": "block"},
    "block, refresh 8": {"cache": "block", "cache_refresh": 8},
    "block, refresh 4": {"cache": "block", "cache_refresh": 4},
}


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


TASKS = (("subtraction", 4), ("sorting", 8), ("sudoku", 16), ("sudoku", 8))
"""Tasks of the lab's model, with the block length."""


def fidelity(count: int) -> list[dict[str, Any]]:
    """What each cache changes of the lab model's answers, task by task."""
    model = load(SHIPPED_PATH)
    records = []
    for task_name, block in TASKS:
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


def print_caches(fidelities: list[dict[str, Any]]) -> None:
    """Prints what each cache changes."""
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


if __name__ == "__main__":
    torch.manual_seed(0)
    device = this_device()
    fidelities = fidelity(500)
    path = write_json(result_name("engine-caches", device), environment(device) | {"caches": fidelities})
    print_caches(fidelities)
    print(f"wrote {path}")
