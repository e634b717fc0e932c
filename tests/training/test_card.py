"""The model card: what it says of method, data, settings and results."""

from collections import Counter

from tabom.training.card import model_card

SETTINGS = {"objective": "tabom", "learning_rate": 3e-5, "data": "abc", "adapter": [{"r": 16, "bias": None}]}
ORIGINS = Counter({("gsm8k", "entropy"): 3, (None, None): 1})
HISTORY = [
    {"step": 1, "epoch": 0.5, "loss": 2.0},
    {"step": 1, "epoch": 0.5, "eval_accuracy": 0.75, "eval_runtime": 3.0},
    {"step": 2, "epoch": 1.0, "loss": 1.0},
    {"step": 2, "epoch": 1.0, "eval_accuracy": 0.25, "eval_runtime": 3.0},
]


def test_the_results_are_those_of_the_weights_that_are_saved():
    """Not those of a later evaluation, nor of an earlier one."""
    for step, accuracy in ((1, 0.75), (2, 0.25)):
        card = model_card("x", "somebody/base", SETTINGS, ORIGINS, HISTORY, step, "some/where/gsm8k_test.jsonl")
        [result] = card.data.eval_results
        assert (result.metric_type, result.metric_value) == ("accuracy", accuracy)
        assert result.dataset_name == "held-out gsm8k_test.jsonl"
        assert f"| eval_accuracy | {accuracy:g} (step {step}) |" in card.text
        assert "| loss | 1 (step 2) |" in card.text


def test_settings_and_adapter():
    card = model_card("x", "somebody/base", SETTINGS, ORIGINS, [], 0)
    assert card.data.base_model == "somebody/base" and card.data.library_name == "peft"
    assert "| learning_rate | 3e-05 |" in card.text and "| adapter r | 16 |" in card.text
    assert "- 3 trajectories of gsm8k, method entropy\n- 1 trajectories of unnamed, method unnamed" in card.text
    assert "abc" not in card.text and "bias" not in card.text and card.data.eval_results is None
    card = model_card("x", "/no/hub/name", {**SETTINGS, "adapter": []}, Counter(), [], 0)
    assert card.data.base_model is None and card.data.library_name == "transformers"
