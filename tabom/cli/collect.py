"""`tabom collect`: collects verified trajectories."""

from collections.abc import Sequence

from tabom.cli.arguments import parse_arguments
from tabom.cli.model import ModelArguments, load_to_sample
from tabom.cli.prompts import PromptArguments
from tabom.lab.tasks import make_task
from tabom.sampling.collect import CollectConfig, check_samples, collect
from tabom.sampling.engine import EngineConfig
from tabom.sampling.sampler import SamplerConfig


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
    check_samples(config.samples_per_prompt, sampler)
    if arguments.task is not None:
        if arguments.split not in (None, "train", "test"):
            raise ValueError(f"split={arguments.split!r}: a task has the splits train and test")
        task = make_task(arguments.task, **({"givens": arguments.givens} if arguments.task == "sudoku" else {}))
        prompts = task.prompt_set(arguments.num_prompts, arguments.split or "train", arguments.prompt_seed)
        sampler.max_new_tokens = sampler.max_new_tokens or task.response_length
    else:
        prompts = arguments.read(arguments.prompts)
    report = collect(load_to_sample(model_arguments), prompts, sampler, config, engine)
    if report is None:
        return  # the first process speaks for all
    print(f"{config.output}: {report.correct} right of {report.attempts} attempts ({report.new_attempts} made now)")
    if report.unverified:
        print(f"{report.unverified} more had no answer to be checked against: kept, with `correct: null`")
    if report.new_attempts:
        print(f"{report.positions_per_token:.1f} positions computed a decided token")
