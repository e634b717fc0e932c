"""Tokens appearing in the terminal, coloured by the step or the certainty of their unmasking."""

import math
import time
from typing import Literal

from rich.console import Console
from rich.live import Live
from rich.text import Text

from tabom.data.encoding import Prompt, encode_prompt
from tabom.data.text import printable
from tabom.models.diffusion_model import DiffusionModel
from tabom.sampling.sampler import DecodingState, SamplerConfig, denoise, response_length

SECONDS_PER_STEP = 0.15


def animate(
    model: DiffusionModel,
    prompt: Prompt,
    config: SamplerConfig,
    color_by: Literal["step", "certainty"],
    console: Console,
) -> None:
    """Decodes one prompt and draws every step; green is early or certain, red is late or uncertain."""
    encoded = encode_prompt(model.tokenizer, prompt)
    length = response_length(model, config)
    steps = sum(block.steps for block in config.plan(length))
    with Live(console=console, auto_refresh=False) as live:
        for state in denoise(model, [encoded], length, config):
            live.update(render(model, prompt, state, steps, color_by), refresh=True)
            time.sleep(SECONDS_PER_STEP)


def render(
    model: DiffusionModel,
    prompt: Prompt,
    state: DecodingState,
    steps: int,
    color_by: Literal["step", "certainty"],
) -> Text:
    """The prompt and the first response of `state`, a dot for every masked token."""
    drawing = Text()
    drawing.append(printable(prompt if isinstance(prompt, str) else prompt[-1]["content"]), style="dim")
    drawing.append(" ")
    most_uncertain = math.log(model.model.config.vocab_size)
    responses = zip(state.tokens[0].tolist(), state.decoding_order[0].tolist(), state.entropy[0].tolist(), strict=True)
    for token, step, entropy in responses:
        if step < 0:
            drawing.append("·", style="dim")
            continue
        share = step / max(steps - 1, 1) if color_by == "step" else math.sqrt(entropy / most_uncertain)
        drawing.append(printable(model.tokenizer.decode([token])), style=f"bold {heat(share)}")
    return drawing


def heat(share: float) -> str:
    """A colour between green (0) and red (1)."""
    share = min(max(share, 0.0), 1.0)
    return f"rgb({round(255 * min(2 * share, 1))},{round(200 * min(2 - 2 * share, 1))},60)"
