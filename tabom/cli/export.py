"""`tabom export`: trajectories in other formats. A format that would change a record is refused."""

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from tabom.cli.commands import ExportArguments, check_file
from tabom.data.json_files import to_json
from tabom.data.sources import READERS, read_records
from tabom.models.writing import aside, naming_full_disk

FORMATS = {".jsonl": "jsonl", ".parquet": "parquet", "": "datasets"}
"""Formats by the suffix of the output."""

Record = dict[str, Any]


def run(arguments: ExportArguments) -> None:
    """Reads all records, writes and pushes them."""
    to = chosen_format(arguments)
    for source in arguments.data:
        check_file("data", source)
    records = [record for source in arguments.data for record in valid(source)]
    if not any(records):
        raise ValueError(f"data={arguments.data}: no record to export")
    table = None if to == "jsonl" and arguments.push_to is None else as_table(records)
    if arguments.output is not None:
        output = Path(arguments.output)
        output.parent.mkdir(parents=True, exist_ok=True)
        if to == "datasets":
            with naming_full_disk(output):
                table.save_to_disk(output)
        else:
            with aside(output) as part:
                write_lines(part, records) if to == "jsonl" else table.to_parquet(part)
    if arguments.push_to is not None:
        table.push_to_hub(arguments.push_to)
    fields = ", ".join(dict.fromkeys(name for record in records for name in record))
    print(f"{arguments.output or arguments.push_to}: {len(records)} records, fields {fields}")


def chosen_format(arguments: ExportArguments) -> str | None:
    """The format of the output; None if records are only pushed.

    Raises:
        ValueError: there is no output, or its name is that of another format.
    """
    output, to = arguments.output, arguments.to
    if output is None and (to is not None or arguments.push_to is None):
        raise ValueError(f"output=None, to={to!r}, push_to={arguments.push_to!r}: give output, or push_to alone")
    if output is None:
        return None
    suffix = Path(output).suffix
    if to == "datasets" and suffix not in (".jsonl", *READERS):
        return to  # a folder may have a point in its name
    if suffix not in FORMATS or to not in (None, FORMATS[suffix]):
        raise ValueError(
            f"output={output}, to={to!r}: expected a name in .jsonl or .parquet, or a folder for datasets; CSV cannot "
            "hold the lists of a trajectory"
        )
    return FORMATS[suffix]


def valid(source: str) -> list[Record]:
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


def write_lines(path: Path, records: list[Record]) -> None:
    """Writes JSON lines."""
    with path.open("wb") as file:
        file.writelines(to_json(record, str(path)) + b"\n" for record in records)


def as_table(records: list[Record]) -> datasets.Dataset:
    """The records as columns of Arrow, which `datasets` and Parquet hold.

    Raises:
        ValueError: a column would have several types, or objects without fields; names the field.
    """
    names = dict.fromkeys(name for record in records for name in record)
    columns = {}
    for name in names:
        try:
            columns[name] = pa.array([record.get(name) for record in records])
            problem = "an object without fields" if is_empty(columns[name].type) else ""
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            problem = " ".join(str(error).split())
        if problem:
            raise ValueError(
                f"field {name!r}: a column has one type, and Parquet and datasets cannot hold these values "
                f"({problem}); use --to jsonl"
            )
    return datasets.Dataset(datasets.table.InMemoryTable(pa.table(columns)))


def is_empty(kind: pa.DataType) -> bool:
    """Whether a type holds an object without fields, which Parquet cannot write."""
    inner = [kind.field(index).type for index in range(kind.num_fields)]
    return (pa.types.is_struct(kind) and not inner) or any(map(is_empty, inner))
