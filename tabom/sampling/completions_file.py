"""`tabom collect --completions`: judges and records the responses that another engine has returned.

A line of the file is a JSON object:

    {"index": 3, "token_ids": [...], "step_map": [...], "logprobs": [...]}

`index` is that of the prompt in the prompt set, from 0; a prompt may have several lines. `token_ids` is the response
with its special tokens, and `step_map` the step that unmasked each token, from 1, 0 for never. `logprobs` (nats, one a
token, each when it was unmasked) is what the objective `policy` needs. `examples/sglang_completions.py` writes such a
file. Lines that are added to it later are judged by a second run.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tabom.data.encoding import encode_prompt
from tabom.data.fields import RecordError, integers, numbers
from tabom.data.histories import count_on, make_trajectory
from tabom.data.prompts import PromptSet
from tabom.data.sources import JsonLines, in_order
from tabom.data.store import TrajectoryFile
from tabom.data.trajectories import STEP_LIMIT, Trajectory, misplaced, response_blocks
from tabom.sampling.collect import (
    VERDICT_BATCH,
    Attempt,
    CollectReport,
    attempt_id,
    attempt_record,
    in_groups,
)
from tabom.sampling.config import CollectConfig
from tabom.sampling.ranks import Ranks


def record_completions(
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptSet,
    config: CollectConfig,
    temperature: float,
    block_size: int | None = None,
) -> CollectReport:
    """Appends the responses in `config.completions` to `config.output`, as `collect` appends its own.

    Args:
        tokenizer: of the model that made the responses.
        temperature: at which they were sampled; 0 for greedy ones.
        block_size: tokens of a block, counted from the first prompt token, where the steps begin anew in every block
            (SGLang); None: they count on.

    Raises:
        ValueError: a line is invalid (names file, line and field), `config.output` was begun with other settings, or
            there are several processes.
    """
    ranks, path = Ranks(), Path(config.completions)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"completions={config.completions}: expected one process, as nothing is decoded")
    lines = JsonLines(path)
    settings = {
        "policy": "completions",
        "completions": str(path),
        "prompts": prompts.fingerprint(),
        "verifier": prompts.verifier,
        "temperature": temperature,
        "max_prompt_length": None,
        "block_size": block_size,
    }
    read = list(read_completions(lines, tokenizer, prompts, block_size))
    store = TrajectoryFile(Path(config.output), config.overwrite)
    with store.opened(settings, ranks) as (verdicts, append):
        missing = [each for each in read if attempt_id(*each[0]) not in verdicts]
        counts = Counter(verdicts.values())
        with ranks.progress("judging", len(missing)) as advance:
            for group in in_groups(missing, VERDICT_BATCH):
                judged = prompts.verdicts([index for (index, _), _ in group], [each.response for _, each in group])
                append(
                    attempt_record(
                        attempt, trajectory, verdict, temperature=temperature if trajectory.logprob else None
                    )
                    for (attempt, trajectory), verdict in zip(group, judged, strict=True)
                )
                counts.update(verdict.correct for verdict in judged)
                advance(len(group), "judging")
    return CollectReport(counts.total(), counts[True], counts[None], len(missing), 0.0)


def read_completions(
    lines: JsonLines, tokenizer: PreTrainedTokenizerBase, prompts: PromptSet, block_size: int | None
) -> Iterator[tuple[Attempt, Trajectory]]:
    """The responses of a file, each with the index of its prompt and its number among those to this prompt."""
    seen: Counter[int] = Counter()
    for place, record in in_order(lines):
        try:
            if isinstance(record, ValueError):
                raise record
            index, trajectory = parse_completion(record, tokenizer, prompts, block_size)
        except ValueError as error:
            raise misplaced(lines.path, place, error) from error
        yield (index, seen[index]), trajectory
        seen[index] += 1


def parse_completion(
    record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, prompts: PromptSet, block_size: int | None
) -> tuple[int, Trajectory]:
    """The index of the prompt, and the trajectory of a line."""
    index = record.get("index")
    if type(index) is not int or not 0 <= index < len(prompts.prompts):
        raise RecordError("index", f"expected 0 to {len(prompts.prompts) - 1}, got {index!r:.60}")
    for name in ("token_ids", "step_map"):
        if name not in record:
            raise RecordError(name, f"missing; the record has {', '.join(record)!s:.200}")
    token_ids = integers(record, "token_ids", 0, len(tokenizer))
    steps = integers(record, "step_map", 0, STEP_LIMIT)
    if not token_ids or len(steps) != len(token_ids):
        raise RecordError("step_map", f"has {len(steps)} steps for {len(token_ids)} tokens; one a token expected")
    order = [step - 1 for step in steps]
    prompt = prompts.prompts[index]
    if block_size is not None:
        order = count_on(order, response_blocks(len(encode_prompt(tokenizer, prompt)), len(order), block_size))
    mask = tokenizer.mask_token_id
    trajectory = make_trajectory(tokenizer, prompt, token_ids, order, mask, "completions", prompts.name)
    if record.get("logprobs") is None:
        return index, trajectory
    return index, replace(trajectory, logprob=logprobs_of(record, len(token_ids)))


def logprobs_of(record: dict[str, Any], count: int) -> list[float]:
    """The log-probabilities of a line."""
    logprobs = numbers(record, "logprobs", count)
    if max(logprobs) > 0:
        raise RecordError("logprobs", f"{max(logprobs)}; expected logarithms of probabilities, at most 0")
    return logprobs
