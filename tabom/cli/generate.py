"""`tabom generate`: answers prompts."""

from rich.console import Console

from tabom.cli.commands import GenerateArguments, ModelArguments
from tabom.cli.model import load_to_sample
from tabom.data.encoding import encode_prompt
from tabom.data.text import printable
from tabom.sampling.animation import animate
from tabom.sampling.completions import decode_response
from tabom.sampling.config import EngineConfig, SamplerConfig
from tabom.sampling.engine import sample


def run(
    arguments: GenerateArguments, model_arguments: ModelArguments, sampler: SamplerConfig, engine: EngineConfig
) -> None:
    """Prints one response a line, or draws every step."""
    model = load_to_sample(model_arguments)
    console = Console(highlight=False)
    if arguments.animate:
        for prompt in arguments.prompt:
            animate(model, prompt, sampler, arguments.color_by, console)
        return
    encoded = [encode_prompt(model.tokenizer, prompt) for prompt in arguments.prompt]
    for completion in sample(model, encoded, sampler, engine=engine):
        console.print(printable(decode_response(model, completion.token_ids)), markup=False)
