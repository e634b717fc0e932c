"""Tokens appearing in the terminal, coloured by the step or the certainty of their unmasking."""

import math
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Literal

from rich.console import Console
from rich.live import Live
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from tabom.data.encoding import Prompt, encode_prompt
from tabom.data.text import printable
from tabom.models.diffusion_model import DiffusionModel
from tabom.sampling.completions import response_length
from tabom.sampling.config import SamplerConfig
from tabom.sampling.sampler import DecodingState, denoise

ANIMATION_SECONDS = 3.0
STEP_SECONDS = 0.15
"""The least duration of an animation, and of each of its steps."""

PARTIAL_CHARACTER = "▯"
"""Shown for a token whose character still lacks other tokens."""


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
    blocks = config.plan(length, len(encoded), model.block_size)
    steps = blocks.count * blocks.steps
    console.print(legend(color_by))
    with Live(console=console, auto_refresh=False) as live:
        for state in denoise(model, [encoded], length, config):
            live.update(render(model, prompt, state, steps, color_by), refresh=True)
            time.sleep(max(STEP_SECONDS, ANIMATION_SECONDS / steps))


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
    tokens, order, entropy = (column[0].tolist() for column in state[:3])
    ends = [i for i, token in enumerate(tokens) if order[i] >= 0 and token == model.eos_token_id]
    end = min(ends, default=len(tokens))  # the text ends where the first end token stands
    for i, piece in enumerate(pieces(model.tokenizer, tokens[:end], order[:end])):
        share = order[i] / max(steps - 1, 1) if color_by == "step" else math.sqrt(entropy[i] / most_uncertain)
        drawing.append(printable(piece), style="dim" if order[i] < 0 else f"bold {heat(share)}")
    return drawing


def legend(color_by: Literal["step", "certainty"]) -> Text:
    """What the colours mean."""
    first, last = {"step": ("decided first", "decided last"), "certainty": ("certain", "uncertain")}[color_by]
    shown = Text("· masked  ", style="dim")
    shown.append(f"{first} ", style=heat(0))
    for tenth in range(11):
        shown.append("█", style=heat(tenth / 10))
    return shown.append(f" {last}", style=heat(1))


def pieces(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], order: Sequence[int]) -> Iterator[str]:
    """The text that each token adds to the unmasked ones before it, a dot for every masked token.

    A byte-level token may end inside a character; the character is then given to the token that completes it.
    """
    for is_masked, run in groupby(zip(tokens, order, strict=True), key=lambda token: token[1] < 0):
        token_ids = [token for token, _ in run]
        if is_masked:
            yield from "·" * len(token_ids)
            continue
        shown, waiting = 0, 0
        for end in range(1, len(token_ids) + 1):
            text = tokenizer.decode(token_ids[:end], clean_up_tokenization_spaces=False)
            if text.endswith("\ufffd"):
                waiting += 1
                continue
            yield from [""] * waiting
            yield text[shown:].replace("\ufffd", PARTIAL_CHARACTER)
            shown, waiting = len(text), 0
        yield from [PARTIAL_CHARACTER] * waiting


def heat(share: float) -> str:
    """A colour between green (0) and red (1)."""
    share = min(max(share, 0.0), 1.0)
    return f"rgb({round(255 * min(2 * share, 1))},{round(200 * min(2 - 2 * share, 1))},60)"
