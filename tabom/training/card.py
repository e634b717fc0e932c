"""The model card: method, data, settings and results of a run, in the hub's README format."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

SETTINGS = (
    *("objective", "supervised_window", "rank_window", "rank_weight", "form", "margin", "temperature"),
    *("learning_rate", "lr_scheduler_type", "num_train_epochs", "max_steps", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "weight_decay", "max_grad_norm", "seed"),
)
"""Fields of `TabomConfig` that say how the model came about."""

WORDS = """# {name}

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
    args: Any,
    origins: Counter[tuple[str | None, str | None]],
    log_history: Sequence[dict[str, Any]],
) -> ModelCard:
    """The card of a trained model.

    Args:
        name: of the model.
        base: folder or hub name that it was trained from.
        args: a `TabomConfig`.
        origins: how many trajectories there are of each data source and method.
        log_history: of the trainer's state; the last value of every figure is reported.
    """
    figures: dict[str, tuple[int, float]] = {}
    for entry in log_history:
        figures |= {key: (entry["step"], value) for key, value in entry.items() if key not in ("step", "epoch")}
    is_hub_name = not Path(base).exists() and base.count("/") == 1
    evaluated = {key.removeprefix("eval_"): value for key, (_, value) in figures.items() if key.startswith("eval_")}
    data = ModelCardData(
        library_name="transformers",
        tags=["tabom", "diffusion-language-model"],
        pipeline_tag="text-generation",
        base_model=base if is_hub_name else None,
        model_name=name if evaluated else None,
        eval_results=[
            EvalResult("text-generation", "held-out", "held-out data", key, value) for key, value in evaluated.items()
        ]
        or None,
    )
    lines = [
        f"- {count} trajectories of {source or 'unnamed'}, method {method or 'unnamed'}"
        for (source, method), count in origins.most_common()
    ]
    settings = {field: getattr(args, field) for field in SETTINGS if hasattr(args, field)}
    text = WORDS.format(
        name=name,
        base=base,
        objective=args.objective,
        data="\n".join(lines),
        settings=table("setting", {key: str(getattr(value, "value", value)) for key, value in settings.items()}),
        results=table("figure", {key: f"{value:.6g} (step {step})" for key, (step, value) in figures.items()}),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def table(heading: str, values: dict[str, str]) -> str:
    """A Markdown table of names and values."""
    rows = "".join(f"| {name} | {value} |\n" for name, value in values.items())
    return f"| {heading} | value |\n| --- | --- |\n{rows}" if rows else "none logged"
