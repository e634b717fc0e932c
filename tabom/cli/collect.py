"""`tabom collect`: collects verified trajectories."""

from dataclasses import asdict

from tabom.cli.commands import ModelArguments, PromptArguments
from tabom.cli.model import load_to_sample
from tabom.cli.prompts import read, read_task
from tabom.models.loading import load_tokenizer
from tabom.sampling.answerable import empty_prompts, remarks_on
from tabom.sampling.collect import CollectReport, check_samples, collect
from tabom.sampling.completions_file import record_completions
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
    if config.completions is not None:
        check_no_decoding(config, sampler, engine)
    check_samples(config.samples_per_prompt, sampler)
    if arguments.task is not None:
        prompts, sampler = read_task(arguments, sampler, arguments.split or "train")
    else:
        prompts = read(arguments, arguments.prompts, default_split="train")
    if config.completions is not None:
        tokenizer = load_tokenizer(model_arguments.model or "shipped")
        say(config, record_completions(tokenizer, prompts, config, sampler.temperature, model_arguments.block_size))
        return
    model = load_to_sample(model_arguments)
    if arguments.skip_invalid and (empty := empty_prompts(model, prompts)):
        prompts = prompts.without(empty)
        print(f"{prompts.name}: {len(empty)} prompts without a token left out, which this model cannot answer")
    for remark in remarks_on(model, prompts, config.max_prompt_length):
        print(remark)
    report = collect(model, prompts, sampler, config, engine)
    if report is not None:  # only the first process prints
        say(config, report)


def say(config: CollectConfig, report: CollectReport) -> None:
    """Prints how many were right, and the cost of what was decoded."""
    print(f"{config.output}: {report.correct} right of {report.attempts} attempts ({report.new_attempts} made now)")
    if report.unverified:
        print(f"{report.unverified} more had no answer to be checked against: kept, with `correct: null`")
    if report.positions_per_token:
        print(f"{report.positions_per_token:.1f} positions computed a decided token")


def check_no_decoding(config: CollectConfig, sampler: SamplerConfig, engine: EngineConfig) -> None:
    """Raises a ValueError for a setting of the decoding, which responses that are there already do not need."""
    plain = {
        SamplerConfig: SamplerConfig(temperature=sampler.temperature),
        EngineConfig: EngineConfig(),
        CollectConfig: CollectConfig(config.output, completions=config.completions, overwrite=config.overwrite),
    }
    for given in (sampler, engine, config):
        for name, value in asdict(given).items():
            if value != getattr(plain[type(given)], name):
                raise ValueError(
                    f"{name}={value!r} with completions={config.completions}: nothing is decoded, so it has no effect; "
                    "leave it out"
                )
