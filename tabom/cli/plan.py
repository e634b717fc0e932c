"""`tabom plan`: predicts the cost of a whole run."""

from rich.console import Console
from rich.table import Table

from tabom.cli.commands import AdapterArguments, DataArguments, ModelArguments
from tabom.lab.config import PlanConfig
from tabom.lab.plan import architecture, plan
from tabom.training.config import TabomConfig


def run(
    config: PlanConfig,
    data: DataArguments,
    adapter: AdapterArguments,
    model_arguments: ModelArguments,
    training: TabomConfig,
) -> None:
    """Prints FLOP and predicted GPU hours of every part, by the plain loop, exact, and with the block cache."""
    window = training.supervised_window if isinstance(training.supervised_window, int) else config.response
    model = architecture(model_arguments.model)
    plans = {
        how: plan(model, config, how, training.num_train_epochs, min(window, config.response), adapter.use_peft)
        for how in ("plain", "exact", "block cache")
    }
    table = Table(
        "part",
        *(f"{how}: {what}" for how in plans for what in ("FLOP", "H100 h")),
        title=f"{model_arguments.model}, {config.num_prompts} prompts: predicted, not measured",
    )
    for parts in zip(*plans.values(), strict=True):
        cells = [cell for part in parts for cell in (f"{part.flop:.1e}", f"{part.hours(config):.1f}")]
        table.add_row(parts[0].name, *(cells if parts[0].flop else ["on the CPU", ""] * len(plans)))
    hours = [sum(part.hours(config) for part in parts) for parts in plans.values()]
    table.add_row("all", *(cell for total in hours for cell in ("", f"{total:.1f}")))
    table.add_row(f"on {config.gpus} GPUs", *(cell for total in hours for cell in ("", f"{total / config.gpus:.1f}")))
    Console(width=120).print(table)
