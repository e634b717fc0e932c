"""`tabom evaluate`: decodes prompt sets with models and sampler settings, and measures the responses.

A cell is one model on one prompt set under one sampler. Its responses are stored in a `tabom.data.store.ResponseFolder`
as trajectories with their verdict and the measurements of their decoding. A restart makes only the missing ones. The
processes of a job share these, so a run can be continued with another number of processes.
"""

import re
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tabom.data.json_files import Append
from tabom.data.prompts import PromptSet
from tabom.data.store import ResponseFolder
from tabom.evaluation.config import EvaluateConfig
from tabom.evaluation.measured import Measured, decode_measured
from tabom.evaluation.metrics import Estimate, estimate, pass_at_k
from tabom.models.diffusion_model import DiffusionModel
from tabom.sampling.answerable import check_prompts
from tabom.sampling.collect import (
    VERDICT_BATCH,
    Attempt,
    attempt_id,
    check_samples,
    decode_attempts,
    hit_rate,
    in_groups,
    settings_of,
    to_trajectory,
)
from tabom.sampling.config import EngineConfig, SamplerConfig
from tabom.sampling.ranks import Ranks, joined


class Cell(NamedTuple):
    """One model on one prompt set under one sampler, by name."""

    model: str
    prompts: str
    sampler: str

    def folder(self, output_dir: str | Path) -> Path:
        """The folder of the responses of this cell."""
        return Path(output_dir).joinpath(*(re.sub(r"[^\w.=,-]+", "-", name).strip("-.") for name in self))


def evaluate(
    model: DiffusionModel,
    prompts: PromptSet,
    sampler: SamplerConfig,
    config: EvaluateConfig,
    cell: Cell,
    engine: EngineConfig | None = None,
) -> dict[str, Any] | None:
    """Makes the responses that are missing and measures the cell.

    Under torchrun or accelerate the processes share the responses. The first process returns the result when all are
    finished, the others return None.

    Returns:
        names of the cell, settings, and the figures of `summarise`; `reused`: responses that an earlier run had made.

    Raises:
        ValueError: the cell was begun with other settings or weights, another job writes to it, several samples of a
            prompt would be the same, or the model cannot answer an empty prompt.
    """
    check_samples(config.samples_per_prompt, sampler)
    check_prompts(model, prompts)
    settings = settings_of(model, prompts, sampler, config.max_prompt_length)
    attempts = [(index, repeat) for repeat in range(config.samples_per_prompt) for index in range(len(prompts.prompts))]
    store = ResponseFolder(cell.folder(config.output_dir))
    with joined(config.peer_timeout) as ranks, store.opened(settings, ranks) as (finished, append):
        missing = [attempt for attempt in attempts if attempt_id(*attempt) not in finished]
        make_responses(model, prompts, sampler, config.max_prompt_length, missing, append, cell.prompts, engine, ranks)
    if not ranks.is_first:
        return None
    records = {record["id"]: record for record in store.records()}
    figures = summarise([records[attempt_id(*attempt)] for attempt in attempts])
    return {**cell._asdict(), "settings": settings, "reused": len(attempts) - len(missing), **figures}


def make_responses(
    model: DiffusionModel,
    prompts: PromptSet,
    sampler: SamplerConfig,
    max_prompt_length: int | None,
    attempts: Sequence[Attempt],
    append: Append,
    title: str,
    engine: EngineConfig | None,
    ranks: Ranks,
) -> None:
    """Makes this process's share of the attempts and appends a record of each."""
    decode = partial(decode_measured, model, config=sampler, engine=engine)
    share = (attempts[number] for number in ranks.take(len(attempts)))
    decoded = decode_attempts(model, prompts, sampler, max_prompt_length, share, decode)
    begun = time.perf_counter()
    with ranks.progress(title, len(attempts)) as advance:
        for finished in in_groups(decoded, VERDICT_BATCH):
            seconds = (time.perf_counter() - begun) / len(finished)
            records = [response_record(model, prompts, sampler, index, measured) for (index, _), measured in finished]
            judged = prompts.verdicts([index for (index, _), _ in finished], [record["response"] for record in records])
            append(
                {"id": attempt_id(*attempt), **record, "seconds": seconds, **verdict._asdict()}
                for (attempt, _), record, verdict in zip(finished, records, judged, strict=True)
            )
            advance(len(finished), f"{title}: {hit_rate(ranks.count(verdict.correct for verdict in judged))}")
            begun = time.perf_counter()


def response_record(
    model: DiffusionModel, prompts: PromptSet, sampler: SamplerConfig, index: int, measured: Measured
) -> dict[str, Any]:
    """The record of a response: its trajectory and the measurements of its decoding."""
    shown = measured._asdict()
    completion = shown.pop("completion")
    trajectory = to_trajectory(model, prompts, index, completion, sampler.policy, sampler.cache_name)
    entropy = [float(f"{nats:.4g}") for nats in completion.entropy]
    return {"index": index, "answer": prompts.answers[index], **trajectory.to_record(), "entropy": entropy, **shown}


def by_problem(records: Sequence[dict[str, Any]]) -> dict[int, list[bool]]:
    """The verdicts of each problem, by its index; responses that could not be checked are left out."""
    right = defaultdict(list)
    for record in records:
        if record["correct"] is not None:
            right[record["index"]].append(record["correct"])
    return dict(sorted(right.items()))


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a cell. Standard errors are over problems; the responses of a problem are averaged first."""
    right = by_problem(records)
    pairs = sum(record["pairs"] for record in records)
    samples = max(map(len, right.values()), default=0)
    checked = {index: verdicts for index, verdicts in right.items() if len(verdicts) == samples}
    return {
        "problems": len({record["index"] for record in records}),
        "answers": len(records),
        "unverified": sum(record["correct"] is None for record in records),
        "accuracy": estimate([float(np.mean(verdicts)) for verdicts in right.values()])._asdict(),
        "pass_at": {str(k): pass_estimate(checked, samples, k)._asdict() for k in range(1, samples + 1)},
        "pair_order": sum(record["in_order"] for record in records) / pairs if pairs else None,
        **{name: mean_over_problems(records, name)._asdict() for name in ("tds", "tokens", "steps", "positions")},
        "seconds": mean_over_problems(records, "seconds")._asdict(),
    }


def pass_estimate(right: dict[int, list[bool]], samples: int, k: int) -> Estimate:
    """Unbiased pass@k over the problems with `samples` checked responses."""
    return estimate(pass_at_k(np.array([sum(verdicts) for verdicts in right.values()]), samples, k))


def mean_over_problems(records: Sequence[dict[str, Any]], name: str) -> Estimate:
    """The mean of a figure over problems; the responses of a problem are averaged first."""
    values = defaultdict(list)
    for record in records:
        values[record["index"]].append(record[name])
    return estimate([float(np.mean(each)) for each in values.values()])
