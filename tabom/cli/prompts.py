"""Reads the prompts and the verifier that the arguments of a command name."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from tabom.cli.commands import PromptArguments, ReadingArguments
from tabom.data.prompts import PromptReader, PromptSet, read_prompts
from tabom.lab.tasks import make_task
from tabom.sampling.config import SamplerConfig


def read(arguments: ReadingArguments, source: str, default_split: str) -> PromptSet:
    """The prompts of a file, a folder or the hub; prints which split was chosen and how many lines were left out."""
    template = Path(arguments.prompt_template).read_text(encoding="utf-8") if arguments.prompt_template else None
    reader = PromptReader(
        arguments.prompt_column, arguments.answer_column, template, arguments.system_prompt, arguments.verifier
    )
    prompts, invalid = read_prompts(
        source,
        split=arguments.split,
        config_name=arguments.config_name,
        default_split=default_split,
        reader=reader,
        verifier_settings=verifier_settings(arguments),
        skip_invalid=arguments.skip_invalid,
    )
    if invalid:
        print(f"{source}: {invalid} invalid lines left out")
    return prompts


def read_task(arguments: PromptArguments, sampler: SamplerConfig, split: str) -> tuple[PromptSet, SamplerConfig]:
    """The prompts of a task of the lab, and the sampler with the length of its responses."""
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r}: a task has the splits train and test")
    task = make_task(arguments.task, **({"givens": arguments.givens} if arguments.task == "sudoku" else {}))
    prompts = task.prompt_set(arguments.num_prompts, split, arguments.prompt_seed)
    return prompts, replace(sampler, max_new_tokens=sampler.max_new_tokens or task.response_length)


def verifier_settings(arguments: ReadingArguments) -> dict[str, Any]:
    """The keywords of `make_verifier` that were given."""
    settings = {"pattern": arguments.answer_pattern, "timeout": arguments.verifier_timeout}
    settings["allow_code_execution"] = arguments.allow_code_execution or None
    return {name: value for name, value in settings.items() if value is not None}
