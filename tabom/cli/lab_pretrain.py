"""`tabom lab pretrain`: makes the shipped model from nothing."""

from collections.abc import Sequence

from tabom.cli.arguments import parse_arguments
from tabom.lab.pretrain import PretrainConfig, pretrain


def run(argv: Sequence[str]) -> None:
    """Trains and saves."""
    (config,) = parse_arguments(
        (PretrainConfig,), argv, "tabom lab pretrain", "Pre-train the model that ships with the package."
    )
    print(f"saved to {pretrain(config)}")
