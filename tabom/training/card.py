"""The model card: method, data, settings and results of a run, in the hub's README format."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

CARD_TEMPLATE = """# {name}

A diffusion language model, post-trained from `{base}` with the objective `{objective}` of
[TABOM](https://arxiv.org/abs/2605.11854). Load it with `tabom.load`.

## Data

{data}

## Settings

{settings}

## Results

{results}
"""


def model_card(
    name: str,
    base: str,
    settings: dict[str, Any],
    origins: Counter[tuple[str | None, str | None]],
    log_history: Sequence[dict[str, Any]],
    step: int,
    eval_prompts: str | None = None,
) -> ModelCard:
    """The card of a trained model.

    Args:
        name: of the model.
        base: folder or hub name that it was trained from.
        settings: all that decided the weights, with `objective` and `adapter`.
        origins: the number of trajectories of each data source and method.
        log_history: log of the trainer's state; the last value of every figure is reported.
        step: step of the weights; evaluations at other steps are left out.
        eval_prompts: source of the problems of `eval_accuracy`.
    """
    is_hub_name = not Path(base).exists() and base.count("/") == 1
    figures = last_figures(log_history, step)
    evaluated = {key: figures[f"eval_{key}"][1] for key in ("accuracy", "loss") if f"eval_{key}" in figures}
    held_out = {"accuracy": Path(eval_prompts).name if eval_prompts else "prompts", "loss": "trajectories"}
    data = ModelCardData(
        library_name="peft" if settings["adapter"] else "transformers",
        tags=["tabom", "diffusion-language-model"],
        pipeline_tag="text-generation",
        base_model=base if is_hub_name else None,
        model_name=name if evaluated else None,
        eval_results=[
            EvalResult("text-generation", "held-out", f"held-out {held_out[key]}", key, value)
            for key, value in evaluated.items()
        ]
        or None,
    )
    lines = [
        f"- {count} trajectories of {source or 'unnamed'}, method {method or 'unnamed'}"
        for (source, method), count in origins.most_common()
    ]
    shown = {key: value for key, value in settings.items() if key not in ("data", "adapter")}
    for adapter in settings["adapter"]:
        shown |= {f"adapter {key}": value for key, value in adapter.items() if value not in (None, False, {}, [])}
    text = CARD_TEMPLATE.format(
        name=name,
        base=base,
        objective=settings["objective"],
        data="\n".join(lines),
        settings=table("setting", {key: str(value) for key, value in shown.items()}),
        results=table("figure", {key: f"{value:.6g} (step {step})" for key, (step, value) in figures.items()}),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def last_figures(log_history: Sequence[dict[str, Any]], evaluated_step: int) -> dict[str, tuple[int, float]]:
    """The last step and value of every figure; figures of evaluations only at `evaluated_step`."""
    figures: dict[str, tuple[int, float]] = {}
    for entry in log_history:
        for key, value in entry.items():
            is_of_other_weights = key.startswith("eval_") and entry["step"] != evaluated_step
            if key not in ("step", "epoch") and not is_of_other_weights:
                figures[key] = entry["step"], value
    return figures


def table(heading: str, values: dict[str, str]) -> str:
    """A Markdown table of names and values."""
    rows = "".join(f"| {name} | {value} |\n" for name, value in values.items())
    return f"| {heading} | value |\n| --- | --- |\n{rows}" if rows else "none logged"
