"""Records from anywhere: JSON lines; and through `datasets` JSON, Parquet, CSV, saved data sets and the hub."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_LINE = 2**24
"""Bytes of a line of JSON."""

READERS = {".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
"""How `datasets` calls the format of a file."""


def read_records(
    source: str | Path, split: str | None = None, config_name: str | None = None, default_split: str = "test"
) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    """Pairs of a place ("line 3") and a record, or the error that this line gives.

    A field that Arrow fills with None because other records have it is left out.

    Args:
        source: a file (.jsonl, .json, .parquet, .csv, .tsv), a folder that `datasets` saved or can load, or a hub name.
        split: of a folder or a hub name; default: `default_split`, else the only one there is.
        config_name: of a hub name.

    Raises:
        ValueError: no such split.
        ModuleNotFoundError: a source that needs `datasets`, and it is not installed.
    """
    path = Path(source)
    if path.suffix == ".jsonl" or (path.is_file() and path.suffix not in READERS):
        for number, record in read_json_lines(path):
            yield f"line {number}", record if isinstance(record, ValueError) else present(record)
        return
    for number, record in enumerate(load_table(path, str(source), split, config_name, default_split), start=1):
        yield f"record {number}", present(record)


def load_table(path: Path, name: str, split: str | None, config_name: str | None, default_split: str) -> Any:
    """A `datasets.Dataset`."""
    import datasets

    if path.suffix in READERS:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        options = {"sep": "\t"} if path.suffix == ".tsv" else {}
        return datasets.load_dataset(READERS[path.suffix], data_files=str(path), split="train", **options)
    saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    tables = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(name, config_name, split=split)
    if not isinstance(tables, datasets.DatasetDict):
        return tables
    chosen = split or (next(iter(tables)) if len(tables) == 1 else default_split)
    if chosen not in tables:
        raise ValueError(f"{name}, split={split!r}: expected one of {', '.join(tables)}")
    return tables[chosen]


def present(record: dict[str, Any]) -> dict[str, Any]:
    """The fields that are there."""
    return {name: value for name, value in record.items() if value is not None}


def read_json_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """Pairs of line number (from 1) and JSON object, or the error that this line gives; blank lines are left out.

    Whatever the bytes are, nothing else is raised, and no more than one line of at most `MAX_LINE` bytes is held.
    """
    with open(path, "rb") as lines:
        number = 0
        while line := lines.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                while line and not line.endswith(b"\n"):
                    line = lines.readline(MAX_LINE)
                yield number, ValueError(f"longer than {MAX_LINE} bytes")
            elif line.strip():
                yield number, parse_json_object(line)


def parse_json_object(line: bytes) -> dict[str, Any] | ValueError:
    """The object in a line, or what is wrong with it."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 at byte {error.start + 1}")
    except json.JSONDecodeError as error:
        return ValueError(f"not valid JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return ValueError("not valid JSON: nested too deeply")
    except ValueError:
        return ValueError("not valid JSON: an integer of too many digits")
    return record if isinstance(record, dict) else ValueError(f"expected a JSON object, got {record!r:.60}")
