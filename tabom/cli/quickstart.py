"""`tabom quickstart`: the whole path on the shipped model."""

from tabom.lab.config import QuickstartConfig
from tabom.lab.quickstart import quickstart


def run(config: QuickstartConfig) -> None:
    """Collects, trains, evaluates and reports."""
    quickstart(config)
