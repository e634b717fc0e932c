"""`tabom evaluate`: models on prompt sets under sampler settings; every answer is kept, a restart repeats none.

A cell is one model on one prompt set under one sampler. Its folder holds `settings.json` and a file of answers a rank,
which are trajectories with their verdict and what their decoding showed. Ranks take one attempt after another that no
file holds, whoever wrote it, so a run may go on with another number of ranks.
"""

import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tabom.data.prompts import PromptSet
from tabom.evaluation.measured import Measured, decode_measured
from tabom.evaluation.metrics import Estimate, estimate, pass_at_k
from tabom.models.diffusion_model import DiffusionModel
from tabom.sampling.collect import (
    JUDGED_AT_ONCE,
    Attempt,
    answer,
    attempt_id,
    check_samples,
    drop_torn_line,
    hit_rate,
    in_groups,
    to_trajectory,
    write_line,
    write_to_disk,
)
from tabom.sampling.engine import EngineConfig
from tabom.sampling.policies import check_at_least
from tabom.sampling.ranks import Ranks
from tabom.sampling.sampler import SamplerConfig, response_length


@dataclass
class EvaluateConfig:
    """How many answers are made and where they are kept."""

    output_dir: str = field(metadata={"help": "Folder of answers and results; a second run on it continues it."})
    samples_per_prompt: int = field(
        default=1, metadata={"help": "Answers a prompt, with seeds seed, seed + 1, ... Needs temperature > 0."}
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Tokens; longer prompts lose the end of their last message. Default: no limit."}
    )

    def __post_init__(self) -> None:
        for name in ("samples_per_prompt", "max_prompt_length"):
            check_at_least(name, getattr(self, name), 1)


class Cell(NamedTuple):
    """One model on one prompt set under one sampler, by name."""

    model: str
    prompts: str
    sampler: str

    def folder(self, output_dir: str | Path) -> Path:
        """Where its answers are."""
        return Path(output_dir).joinpath(*(re.sub(r"[^\w.=,-]+", "-", name).strip("-.") for name in self))


def evaluate(
    model: DiffusionModel,
    prompts: PromptSet,
    sampler: SamplerConfig,
    config: EvaluateConfig,
    cell: Cell,
    engine: EngineConfig | None = None,
) -> dict[str, Any] | None:
    """Makes this rank's share of the missing answers; the first rank waits for all and measures the cell, else None.

    Raises:
        ValueError: the cell was begun with other settings, or several samples of a prompt would be the same.
    """
    check_samples(config.samples_per_prompt, sampler)
    folder = cell.folder(config.output_dir)
    settings = {
        "model": model.model.config.name_or_path,
        "prompts": prompts.fingerprint(),
        "verifier": prompts.verifier,
        **asdict(sampler),
        "max_new_tokens": response_length(model, sampler),
        "max_prompt_length": config.max_prompt_length,
    }
    keep_settings(folder, settings)
    ranks = Ranks()
    own = folder / f"answers-{ranks.rank}.jsonl"
    drop_torn_line(own)
    wanted = [(i, k) for k in range(config.samples_per_prompt) for i in range(len(prompts.prompts))]
    make_answers(model, prompts, sampler, config, wanted, own, str(cell.prompts), engine, ranks)
    if not ranks.is_first:
        return None
    answers = {record["id"]: record for record in read_answers(folder)}
    return {**cell._asdict(), "settings": settings, **summarise([answers[attempt_id(*each)] for each in wanted])}


def keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Writes the settings of a new cell, or checks that they are those it was begun with."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    if not path.exists():
        write_json(path, settings)
    begun_with = json.loads(path.read_text())
    for name, value in settings.items():
        if begun_with.get(name) != value:
            raise ValueError(
                f"{folder} was begun with {name}={begun_with.get(name)!r}, now {name}={value!r}; continue with the "
                "same settings, or choose another output_dir"
            )


def make_answers(
    model: DiffusionModel,
    prompts: PromptSet,
    sampler: SamplerConfig,
    config: EvaluateConfig,
    wanted: Sequence[Attempt],
    path: Path,
    title: str,
    engine: EngineConfig | None,
    ranks: Ranks,
) -> None:
    """Makes this rank's share of those attempts that no file beside `path` holds, and appends a record of each."""
    done = {record["id"] for record in read_answers(path.parent)}
    decode = partial(decode_measured, model, config=sampler, engine=engine)
    with ranks.progress(title, len(wanted)) as advance, path.open("a") as lines:

        def missing() -> Iterator[Attempt]:
            for number in ranks.take(len(wanted)):
                if attempt_id(*wanted[number]) not in done:
                    yield wanted[number]
                else:
                    advance(1, title)

        begun = time.perf_counter()
        answers = answer(model, prompts, sampler, config.max_prompt_length, missing(), decode)
        for finished in in_groups(answers, JUDGED_AT_ONCE):
            seconds = (time.perf_counter() - begun) / len(finished)
            records = [answer_record(model, prompts, sampler, index, measured) for (index, _), measured in finished]
            judged = prompts.verdicts([index for (index, _), _ in finished], [record["response"] for record in records])
            for (attempt, _), record, verdict in zip(finished, records, judged, strict=True):
                write_line(lines, {"id": attempt_id(*attempt), **record, "seconds": seconds, **verdict._asdict()})
            write_to_disk(lines)
            counts = ranks.count(verdict.correct for verdict in judged)
            advance(len(finished), f"{title}: {hit_rate(counts)}")
            begun = time.perf_counter()


def answer_record(
    model: DiffusionModel, prompts: PromptSet, sampler: SamplerConfig, index: int, measured: Measured
) -> dict[str, Any]:
    """The trajectory of an answer and what its decoding showed."""
    shown = measured._asdict()
    completion = shown.pop("completion")
    trajectory = to_trajectory(model, prompts, index, completion, sampler.policy, sampler.cache_name)
    entropy = [float(f"{nats:.4g}") for nats in completion.entropy]
    return {"index": index, "answer": prompts.answers[index], **trajectory.to_record(), "entropy": entropy, **shown}


def read_answers(folder: Path) -> Iterator[dict[str, Any]]:
    """The answers of all ranks; a line that a rank is still writing is left out."""
    for path in sorted(folder.glob("answers-*.jsonl")):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)


def by_problem(answers: Sequence[dict[str, Any]]) -> dict[int, list[bool]]:
    """Whether each checked answer of a problem is right; problems that nobody could check are left out."""
    right = defaultdict(list)
    for record in answers:
        if record["correct"] is not None:
            right[record["index"]].append(record["correct"])
    return dict(sorted(right.items()))


def summarise(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a cell. Every error is over problems, whose answers are averaged first."""
    right = by_problem(answers)
    pairs = sum(record["pairs"] for record in answers)
    samples = max(map(len, right.values()), default=0)
    checked = {index: verdicts for index, verdicts in right.items() if len(verdicts) == samples}
    return {
        "problems": len({record["index"] for record in answers}),
        "answers": len(answers),
        "unverified": sum(record["correct"] is None for record in answers),
        "accuracy": estimate([float(np.mean(verdicts)) for verdicts in right.values()])._asdict(),
        "pass_at": {str(k): pass_estimate(checked, samples, k)._asdict() for k in range(1, samples + 1)},
        "pair_order": sum(record["in_order"] for record in answers) / pairs if pairs else None,
        **{name: mean_over_problems(answers, name)._asdict() for name in ("tds", "tokens", "steps", "positions")},
        "seconds": mean_over_problems(answers, "seconds")._asdict(),
    }


def pass_estimate(right: dict[int, list[bool]], samples: int, k: int) -> Estimate:
    """Unbiased pass@k over the problems with `samples` checked answers."""
    return estimate(pass_at_k(np.array([sum(verdicts) for verdicts in right.values()]), samples, k))


def mean_over_problems(answers: Sequence[dict[str, Any]], name: str) -> Estimate:
    """A figure of the answers, averaged over each problem's first."""
    values = defaultdict(list)
    for record in answers:
        values[record["index"]].append(record[name])
    return estimate([float(np.mean(each)) for each in values.values()])


def write_json(path: Path, content: Any) -> None:
    """Writes a file whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    part.replace(path)
