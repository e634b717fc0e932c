"""`tabom lab study`: the objectives compared, on a grid."""

from collections.abc import Sequence

from tabom.cli.arguments import parse_arguments
from tabom.lab.study import StudyConfig, study
from tabom.lab.study_report import report


def run(argv: Sequence[str]) -> None:
    """Makes the runs that are not yet there, and the report of all that are."""
    (config,) = parse_arguments((StudyConfig,), argv, "tabom lab study", "Compare the objectives on a grid.")
    path = study(config)
    report(path)
    print(f"{path}, and beside it tables.md, paths.png and passes.png")
