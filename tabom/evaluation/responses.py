"""Decodes prompt sets and counts right responses. Every measure is an array of scores in [0, 1], one per prompt."""

from collections.abc import Sequence

import numpy as np

from tabom.data.encoding import encode_prompt
from tabom.data.prompts import PromptSet
from tabom.models.diffusion_model import DiffusionModel
from tabom.sampling.completions import Completion, decode_response
from tabom.sampling.config import SamplerConfig
from tabom.sampling.engine import sample


def complete(model: DiffusionModel, prompts: PromptSet, config: SamplerConfig) -> list[Completion]:
    """One completion for each prompt."""
    return sample(model, [encode_prompt(model.tokenizer, prompt) for prompt in prompts.prompts], config)


def count_right(model: DiffusionModel, prompts: PromptSet, config: SamplerConfig) -> tuple[int, int]:
    """How many responses are right, and how many could be checked."""
    responses = [decode_response(model, completion.token_ids) for completion in complete(model, prompts, config)]
    verdicts = [verdict.correct for verdict in prompts.verdicts(range(len(responses)), responses)]
    return verdicts.count(True), len(verdicts) - verdicts.count(None)


def grade(model: DiffusionModel, prompts: PromptSet, completions: Sequence[Completion]) -> np.ndarray:
    """1 where the completion is right, 0 elsewhere."""
    responses = [decode_response(model, completion.token_ids) for completion in completions]
    verdicts = prompts.verdicts(range(len(responses)), responses)
    return np.array([verdict.correct is True for verdict in verdicts], dtype=float)


def accuracy(model: DiffusionModel, prompts: PromptSet, config: SamplerConfig) -> np.ndarray:
    """1 where the response is right, 0 elsewhere."""
    return grade(model, prompts, complete(model, prompts, config))
