"""`tabom collect`: collects verified trajectories."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from tabom.cli.arguments import parse_arguments
from tabom.cli.model import ModelArguments, load_to_sample
from tabom.data.prompts import read_prompts
from tabom.lab.tasks import make_task
from tabom.sampling.collect import CollectConfig, collect
from tabom.sampling.engine import EngineConfig
from tabom.sampling.sampler import SamplerConfig


@dataclass
class PromptArguments:
    """Which prompts are answered: a task of the lab, or a file."""

    task: str | None = field(default=None, metadata={"help": "addition, subtraction, sorting, reversing or sudoku."})
    givens: int = field(default=8, metadata={"help": "Cells of the sudoku that are given."})
    num_prompts: int = field(default=1000, metadata={"help": "Prompts drawn from the task."})
    split: Literal["train", "test"] = field(default="train", metadata={"help": "Split of the task's prompts."})
    prompt_seed: int = field(default=0, metadata={"help": "Draws the task's prompts."})
    prompts: str | None = field(
        default=None, metadata={"help": "JSONL file with a prompt and an optional answer a line."}
    )
    skip_invalid: bool = field(default=False, metadata={"help": "Count and skip lines that do not parse."})


def run(argv: Sequence[str]) -> None:
    """Makes the attempts and says how many were right."""
    arguments, model_arguments, sampler, engine, config = parse_arguments(
        (PromptArguments, ModelArguments, SamplerConfig, EngineConfig, CollectConfig),
        argv,
        "tabom collect",
        "Answer a prompt set and keep the right answers with their decoding order.",
    )
    if (arguments.task is None) == (arguments.prompts is None):
        raise ValueError(f"task={arguments.task!r}, prompts={arguments.prompts!r}: give exactly one of them")
    if config.samples_per_prompt > 1 and not sampler.is_random:
        raise ValueError(
            f"samples_per_prompt={config.samples_per_prompt} with temperature=0: all samples of a prompt would be the "
            "same; give --temperature or --alg_temp above 0, or a random --policy"
        )
    if arguments.task is not None:
        task = make_task(arguments.task, **({"givens": arguments.givens} if arguments.task == "sudoku" else {}))
        prompts = task.prompt_set(arguments.num_prompts, arguments.split, arguments.prompt_seed)
        sampler.max_new_tokens = sampler.max_new_tokens or task.response_length
    else:
        prompts, invalid = read_prompts(arguments.prompts, skip_invalid=arguments.skip_invalid)
        if invalid:
            print(f"{arguments.prompts}: {invalid} invalid lines left out")
    report = collect(load_to_sample(model_arguments), prompts, sampler, config, engine)
    print(f"{config.output}: {report.correct} right of {report.attempts} attempts ({report.new_attempts} made now)")
    if report.new_attempts:
        print(f"{report.positions_per_token:.1f} positions computed a decided token")
