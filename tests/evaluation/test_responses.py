import numpy as np
import pytest

from tabom import PromptSet, SamplerConfig
from tabom.evaluation.responses import accuracy, complete, sampled_pass_at


def test_accuracy_by_the_check_of_the_prompt_set(model):
    config = SamplerConfig(max_new_tokens=3)
    prompts = PromptSet("digits", ["12+34=", "9="], ["", ""], check=lambda prompt, answer, response: prompt == "9=")
    assert len(complete(model, prompts, config)) == 2
    assert accuracy(model, prompts, config).tolist() == [0, 1]


def test_samples_of_a_prompt_have_different_seeds(monkeypatch, model):
    """The estimate of each prompt is that of the right answers over the seeds seed, seed + 1, ..."""
    right = np.array([[1, 0, 0], [0, 0, 1], [0, 0, 1], [0, 0, 1]])  # (samples, prompts)
    monkeypatch.setattr(
        "tabom.evaluation.responses.accuracy", lambda model, prompts, config: right[config.seed - 7].astype(float)
    )
    ticks = []
    prompts = PromptSet("three", ["a", "b", "c"], [None] * 3)
    estimates = sampled_pass_at((1, 4), model, prompts, SamplerConfig(seed=7), lambda: ticks.append(1))
    assert estimates[1] == pytest.approx([0.25, 0, 0.75])
    assert estimates[4] == pytest.approx([1, 0, 1])
    assert len(ticks) == 4
