"""`tabom quickstart`: the whole path on the shipped model."""

from collections.abc import Sequence

from tabom.cli.arguments import parse_arguments
from tabom.lab.quickstart import QuickstartConfig, quickstart


def run(argv: Sequence[str]) -> None:
    """Collects, trains, evaluates and reports."""
    (config,) = parse_arguments((QuickstartConfig,), argv, "tabom quickstart", "The whole path, small.")
    quickstart(config)
