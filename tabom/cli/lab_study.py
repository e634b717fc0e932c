"""`tabom lab study`: the objectives compared, on a grid."""

from tabom.lab.config import StudyConfig
from tabom.lab.study import study
from tabom.lab.study_report import report


def run(config: StudyConfig) -> None:
    """Makes the missing runs and writes the report of all runs."""
    path = study(config)
    report(path)
    print(f"{path}, and beside it tables.md, paths.png and passes.png")
