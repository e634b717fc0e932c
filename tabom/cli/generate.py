"""`tabom generate`: answers prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.console import Console

from tabom.cli.arguments import parse_arguments
from tabom.cli.model import ModelArguments, load_to_sample
from tabom.data.encoding import encode_prompt
from tabom.data.text import printable
from tabom.sampling.animation import animate
from tabom.sampling.engine import EngineConfig, sample
from tabom.sampling.sampler import SamplerConfig, decode_response


@dataclass
class GenerateArguments:
    """What is answered and how it is shown."""

    prompt: list[str] = field(metadata={"help": "One or more prompts."})
    animate: bool = field(default=False, metadata={"help": "Show the tokens appear, step by step."})
    color_by: Literal["step", "certainty"] = field(
        default="step", metadata={"help": "What the colours of the animation mean."}
    )


def run(argv: Sequence[str]) -> None:
    """Prints an answer a line, or draws every step."""
    types = (GenerateArguments, ModelArguments, SamplerConfig, EngineConfig)
    arguments, model_arguments, sampler, engine = parse_arguments(types, argv, "tabom generate", "Answer prompts.")
    model = load_to_sample(model_arguments)
    console = Console(highlight=False)
    if arguments.animate:
        for prompt in arguments.prompt:
            animate(model, prompt, sampler, arguments.color_by, console)
        return
    encoded = [encode_prompt(model.tokenizer, prompt) for prompt in arguments.prompt]
    for completion in sample(model, encoded, sampler, engine=engine):
        console.print(printable(decode_response(model, completion.token_ids)), markup=False)
