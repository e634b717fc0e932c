"""`tabom lab study`: the objectives compared, on a grid."""

from collections.abc import Sequence

from tabom.cli.arguments import parse_arguments
from tabom.lab.study import StudyConfig, study


def run(argv: Sequence[str]) -> None:
    """Makes the runs that are not yet there, and the report of all that are."""
    (config,) = parse_arguments((StudyConfig,), argv, "tabom lab study", "Compare the objectives on a grid.")
    print(study(config))
