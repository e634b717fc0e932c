"""`tabom generate`: answers prompts."""

import sys

from rich.console import Console

from tabom.cli.commands import GenerateArguments, ModelArguments
from tabom.cli.model import load_to_sample
from tabom.data.encoding import encode_prompt
from tabom.data.progress import progress
from tabom.data.prompts import PromptReader, PromptSet
from tabom.data.text import printable
from tabom.models.diffusion_model import DiffusionModel
from tabom.sampling.animation import animate
from tabom.sampling.answerable import remarks_on
from tabom.sampling.completions import Completion, decode_response, response_length
from tabom.sampling.config import EngineConfig, SamplerConfig
from tabom.sampling.engine import Decision, sample


def run(
    arguments: GenerateArguments, model_arguments: ModelArguments, sampler: SamplerConfig, engine: EngineConfig
) -> None:
    """Prints one response a line, or draws every step."""
    model = load_to_sample(model_arguments)
    if arguments.system_prompt is not None and model.tokenizer.chat_template is None:
        raise ValueError(
            f"system_prompt={arguments.system_prompt!r}: this model's tokenizer has no chat template to put it in; "
            "leave it out"
        )
    console = Console(highlight=False)
    reader = PromptReader(system_prompt=arguments.system_prompt)
    prompts = [reader.dress(prompt) for prompt in arguments.prompt]
    for remark in remarks_on(model, PromptSet("prompt", prompts, [None] * len(prompts))):
        print(remark, file=sys.stderr)
    if arguments.animate:
        for prompt in prompts:
            animate(model, prompt, sampler, arguments.color_by, console)
        return
    encoded = [encode_prompt(model.tokenizer, prompt) for prompt in prompts]
    for completion in sample_with_progress(model, encoded, sampler, engine):
        console.print(printable(decode_response(model, completion.token_ids)), markup=False)


def sample_with_progress(
    model: DiffusionModel, prompts: list[list[int]], sampler: SamplerConfig, engine: EngineConfig
) -> list[Completion]:
    """The completions; shows meanwhile how many tokens are decided."""
    length = response_length(model, sampler)
    with progress(
        "decoding", sum(sampler.plan(length, len(prompt), model.block_size).length for prompt in prompts)
    ) as show:
        decided = 0

        def observe(decision: Decision) -> None:
            nonlocal decided
            decided += int(decision.chosen.sum())
            show(decided, "decoding")

        return sample(model, prompts, sampler, engine=engine, observer=observe)
