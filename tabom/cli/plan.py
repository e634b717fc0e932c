"""`tabom plan`: what a whole run computes, before any of it is run."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from tabom.cli.arguments import parse_arguments
from tabom.cli.model import ModelArguments
from tabom.cli.train import DataArguments
from tabom.lab.plan import PlanConfig, architecture, plan
from tabom.training.config import TabomConfig


def run(argv: Sequence[str]) -> None:
    """Prints FLOP and predicted GPU hours of every part, by the plain loop, exact, and with the block cache."""
    types = (PlanConfig, DataArguments, ModelArguments, TabomConfig)
    config, data, model_arguments, training = parse_arguments(
        types, argv, "tabom plan", "What a whole run computes, part by part.", takes_recipe=True
    )
    window = training.supervised_window if isinstance(training.supervised_window, int) else config.response
    model = architecture(model_arguments.model)
    plans = {
        how: plan(model, config, how, training.num_train_epochs, min(window, config.response), data.use_peft)
        for how in ("plain", "exact", "block cache")
    }
    table = Table(
        "part",
        *(f"{how}: {what}" for how in plans for what in ("FLOP", "H100 h")),
        title=f"{model_arguments.model}, {config.prompts} prompts: predicted, not measured",
    )
    for parts in zip(*plans.values(), strict=True):
        cells = [cell for part in parts for cell in (f"{part.flop:.1e}", f"{part.hours(config):.1f}")]
        table.add_row(parts[0].name, *(cells if parts[0].flop else ["on the CPU", ""] * len(plans)))
    hours = [sum(part.hours(config) for part in parts) for parts in plans.values()]
    table.add_row("all", *(cell for total in hours for cell in ("", f"{total:.1f}")))
    table.add_row(f"on {config.gpus} GPUs", *(cell for total in hours for cell in ("", f"{total / config.gpus:.1f}")))
    Console(width=120).print(table)
