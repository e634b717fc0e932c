"""`tabom report`: one HTML file of responses, training curves and evaluations."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from tabom.cli.commands import ModelArguments, ReportArguments
from tabom.cli.model import load_to_sample
from tabom.data.trajectories import parse_trajectory
from tabom.models.loading import load_tokenizer
from tabom.models.writing import aside
from tabom.report.alternatives import replay_tokens
from tabom.report.gather import Source, describe_record, gather
from tabom.report.page import render

T = TypeVar("T")


def run(arguments: ReportArguments, model_arguments: ModelArguments) -> None:
    """Gathers the data, replays responses with `--replay`, and writes the page."""
    gathered = gather(arguments.inputs, arguments.limit)
    described = {}
    for source in gathered.sources:
        maker = replace(model_arguments, model=model_arguments.model or source.settings.get("model"))
        described[source.name] = describe(source, maker, arguments.replay)
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    page = render(gathered, described, arguments.title)
    with aside(output) as part:
        part.write_text(page, encoding="utf-8")
    size = output.stat().st_size / 2**20
    print(f"{arguments.output}: {sum(map(len, described.values()))} responses, {size:.2f} MiB")


def describe(source: Source, model_arguments: ModelArguments, replay: bool) -> list[dict]:
    """The data of a source's records on the page."""
    if not replay:
        path = model_arguments.model or "shipped"
        tokenizer = load_tokenizer(path, trust_remote_code=model_arguments.trust_remote_code)
        return [named(source, describe_record, record, tokenizer, source.settings, None) for record in source.records]
    model = load_to_sample(model_arguments)
    vocab_size = model.model.config.vocab_size
    described = []
    for record in source.records:
        trajectory = named(source, parse_trajectory, record, model.tokenizer, vocab_size)
        replayed = replay_tokens(model, trajectory)
        described.append(describe_record(record, model.tokenizer, source.settings, replayed))
    return described


def named(source: Source, function: Callable[..., T], *arguments: Any) -> T:
    """Calls a function on a record of a source, which its error then names."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise ValueError(f"{source.name}: {error}") from error
