"""`tabom collect`: collects verified trajectories."""

from tabom.cli.commands import ModelArguments, PromptArguments
from tabom.cli.model import load_to_sample
from tabom.cli.prompts import read, read_task
from tabom.sampling.answerable import empty_prompts, remarks_on
from tabom.sampling.collect import check_samples, collect
from tabom.sampling.config import CollectConfig, EngineConfig, SamplerConfig


def run(
    arguments: PromptArguments,
    config: CollectConfig,
    model_arguments: ModelArguments,
    sampler: SamplerConfig,
    engine: EngineConfig,
) -> None:
    """Makes the attempts and prints how many were right."""
    if (arguments.task is None) == (arguments.prompts is None):
        raise ValueError(f"task={arguments.task!r}, prompts={arguments.prompts!r}: give exactly one of them")
    check_samples(config.samples_per_prompt, sampler)
    if arguments.task is not None:
        prompts, sampler = read_task(arguments, sampler, arguments.split or "train")
    else:
        prompts = read(arguments, arguments.prompts, default_split="train")
    model = load_to_sample(model_arguments)
    if arguments.skip_invalid and (empty := empty_prompts(model, prompts)):
        prompts = prompts.without(empty)
        print(f"{prompts.name}: {len(empty)} prompts without a token left out, which this model cannot answer")
    for remark in remarks_on(model, prompts, config.max_prompt_length):
        print(remark)
    report = collect(model, prompts, sampler, config, engine)
    if report is None:
        return  # only the first process prints
    print(f"{config.output}: {report.correct} right of {report.attempts} attempts ({report.new_attempts} made now)")
    if report.unverified:
        print(f"{report.unverified} more had no answer to be checked against: kept, with `correct: null`")
    if report.new_attempts:
        print(f"{report.positions_per_token:.1f} positions computed a decided token")
