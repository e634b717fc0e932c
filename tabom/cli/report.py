"""`tabom report`: one HTML file of responses, training curves and evaluations."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tabom.cli.arguments import parse_arguments
from tabom.cli.model import ModelArguments, load_to_sample
from tabom.data.trajectories import parse_trajectory
from tabom.evaluation.report.alternatives import replay_tokens
from tabom.evaluation.report.gather import Source, describe_record, gather
from tabom.evaluation.report.page import render
from tabom.lab.model import BASE_PATH
from tabom.models.loading import load_tokenizer
from tabom.sampling.policies import check_at_least


@dataclass
class ReportArguments:
    """What is reported."""

    inputs: list[str] = field(
        metadata={"help": "Files of trajectories, folders of training runs or evaluations; --inputs may be left out."}
    )
    output: str = field(default="report.html", metadata={"help": "The file, also -o."})
    title: str = field(default="TABOM report", metadata={"help": "Heading of the page."})
    limit: int = field(default=200, metadata={"help": "Responses of each file or cell."})
    replay: bool = field(
        default=False,
        metadata={"help": "Replay the responses with the model that made them, for probabilities and alternatives."},
    )

    def __post_init__(self) -> None:
        check_at_least("limit", self.limit, 1)


def name_inputs(argv: Sequence[str]) -> list[str]:
    """`RUN FILE -o PAGE` as `--inputs RUN FILE --output PAGE`; an option takes one value."""
    inputs: list[str] = []
    rest: list[str] = []
    for before, word in zip(["", *argv], argv, strict=False):
        is_value = before.startswith("-") or word.startswith("-")
        (rest if is_value else inputs).append("--output" if word == "-o" else word)
    return [*rest, "--inputs", *inputs] if inputs else rest


def run(argv: Sequence[str]) -> None:
    """Gathers, replays if asked to, and writes the page."""
    arguments, model_arguments = parse_arguments(
        (ReportArguments, ModelArguments),
        name_inputs(argv),
        "tabom report",
        "One self-contained HTML file: tabom report RUN_OR_FILE... -o report.html",
    )
    gathered = gather(arguments.inputs, arguments.limit)
    described = {}
    for source in gathered.sources:
        maker = replace(model_arguments, model=model_arguments.model or source.model)
        described[source.name] = describe(source, maker, arguments.replay)
    Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.output).write_text(render(gathered, described, arguments.title), encoding="utf-8")
    size = Path(arguments.output).stat().st_size / 2**20
    print(f"{arguments.output}: {sum(map(len, described.values()))} responses, {size:.2f} MiB")


def describe(source: Source, model_arguments: ModelArguments, replay: bool) -> list[dict]:
    """What the page is told of a source's records."""
    if not replay:
        path = model_arguments.model or BASE_PATH
        tokenizer = load_tokenizer(path, trust_remote_code=model_arguments.trust_remote_code)
        return [describe_record(record, tokenizer, None) for record in source.records]
    family = load_to_sample(model_arguments)
    vocab_size = family.model.config.vocab_size
    return [
        describe_record(
            record, family.tokenizer, replay_tokens(family, parse_trajectory(record, family.tokenizer, vocab_size))
        )
        for record in source.records
    ]
