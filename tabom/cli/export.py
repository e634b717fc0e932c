"""`tabom export`: trajectories in other formats, through `datasets`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tabom.cli.arguments import parse_arguments
from tabom.data.sources import read_records


@dataclass
class ExportArguments:
    """What is exported, and where to."""

    data: list[str] = field(metadata={"help": "Files, folders of `datasets` or hub names of trajectories."})
    output: str | None = field(default=None, metadata={"help": "File, or folder for `datasets`."})
    to: Literal["parquet", "jsonl", "csv", "datasets"] = field(
        default="parquet", metadata={"help": "Format; datasets: a folder for load_from_disk."}
    )
    push_to: str | None = field(default=None, metadata={"help": "Hub name of a data set to push to."})


def run(argv: Sequence[str]) -> None:
    """Reads all records, writes and pushes them."""
    (arguments,) = parse_arguments((ExportArguments,), argv, "tabom export", "Trajectories in other formats.")
    if arguments.output is None and arguments.push_to is None:
        raise ValueError("output=None, push_to=None: give at least one")
    import datasets

    records = [record for source in arguments.data for record in valid(source)]
    names = {name: None for record in records for name in record}  # from_list takes the first record's for all
    table = datasets.Dataset.from_list([names | record for record in records])
    if arguments.output is not None:
        Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
        writers = {"parquet": table.to_parquet, "jsonl": table.to_json, "csv": table.to_csv}
        writers.get(arguments.to, table.save_to_disk)(arguments.output)
    if arguments.push_to is not None:
        table.push_to_hub(arguments.push_to)
    print(f"{arguments.output or arguments.push_to}: {len(table)} records, fields {', '.join(table.column_names)}")


def valid(source: str) -> list[dict[str, Any]]:
    """The records of a source.

    Raises:
        ValueError: one of them does not parse.
    """
    records = []
    for place, record in read_records(source, default_split="train"):
        if isinstance(record, ValueError):
            raise ValueError(f"{source}, {place}: {record}") from record
        records.append(record)
    return records
