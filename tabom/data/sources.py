"""Reads records from JSON lines, lists, and through `datasets` from JSON, Parquet, CSV, folders and the hub."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

REJECTED = ".rejected"
"""What `tabom collect` appends to the name of its output for the file of wrong responses."""

MAX_LINE = 2**24
"""The most bytes of a line of JSON."""

BOM = b"\xef\xbb\xbf"
"""The mark that some programs put in front of UTF-8."""

PROGRESS_BAR_RECORDS = 10_000
"""With fewer records no progress bar is shown, because they are tokenized in seconds."""

BATCH = 100
"""How many records of a table are read at once."""

READERS = {".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
"""The name of a file's format in `datasets`, by suffix."""

ONLY_EMPTY_IS_MISSING = {"keep_default_na": False, "na_values": [""]}
"""Options of CSV with which pandas reads `None`, `NA` and `null` as the texts that they are."""

Placed = tuple[str, dict[str, Any] | ValueError]
"""The place of a record ("line 3"), and the record or the error of parsing it."""


class JsonLines:
    """The records of a JSONL file by index, without blank lines. Only offsets are held in memory.

    A file of wrong responses (`.rejected`, see `tabom.data.store.TrajectoryFile`) begins with a line of settings, which
    is no record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = ((number, start, len(line)) for number, start, line in read_lines(path))
        lines = islice(lines, 1 if path.suffix == REJECTED else 0, None)
        self.lines = np.fromiter(chain.from_iterable(lines), dtype=np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.lines)

    def read(self, indices: Sequence[int]) -> Iterator[Placed]:
        """The records of these indices."""
        with open(self.path, "rb") as file:
            for number, start, size in self.lines[indices].tolist():
                file.seek(start)
                record = parse_json_object(file.read(size))
                yield f"line {number}", record if isinstance(record, ValueError) else present(record)

    @property
    def fingerprint(self) -> str:
        """Changes when the file changes."""
        status = self.path.stat()
        return f"{self.path.resolve()} {status.st_size} {status.st_mtime_ns}"


class Table:
    """The records of a `datasets.Dataset` by index. Fields that are None, as Arrow fills them in, are left out.

    `split` is the name of the split if it was chosen by default, else None.
    """

    def __init__(self, table: Any, split: str | None = None) -> None:
        self.table = table.with_format(None)
        self.split = split

    def __len__(self) -> int:
        return len(self.table)

    def read(self, indices: Sequence[int]) -> Iterator[Placed]:
        """The records of these indices."""
        columns = self.table[indices]
        for index, values in zip(indices, zip(*columns.values(), strict=True), strict=True):
            yield f"record {index + 1}", present(dict(zip(columns, values, strict=True)))

    @property
    def fingerprint(self) -> str:
        """Changes when the data set changes."""
        return self.table._fingerprint


class Listed:
    """Records in memory."""

    fingerprint = None
    """None: another process could not recognise them."""

    def __init__(self, records: Sequence[Any]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def read(self, indices: Sequence[int]) -> Iterator[tuple[str, Any]]:
        """The records of these indices."""
        for index in indices:
            record = self.records[index]
            yield f"record {index + 1}", present(record) if isinstance(record, dict) else record


Records = JsonLines | Table | Listed


def open_records(
    source: Any, split: str | None = None, config_name: str | None = None, default_split: str = "test"
) -> Records:
    """The records of a source, by index.

    Args:
        source: a file (.jsonl, .json, .parquet, .csv, .tsv), a folder that `datasets` saved or can load, a hub name,
            a `datasets.Dataset`, or a sequence.
        split: of a folder or a hub name; default: `default_split`, else the only one there is.
        config_name: of a hub name.

    Raises:
        ValueError: the split does not exist, or there are several and none is chosen.
        TypeError: the source is none of these.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        if path.suffix == ".jsonl" or (path.is_file() and path.suffix not in READERS):
            return load_file(path, "json") if is_indented(path) else JsonLines(path)
        return load_table(path, str(source), split, config_name, default_split)

    import datasets

    if isinstance(source, datasets.Dataset):
        return Table(source)
    if isinstance(source, datasets.DatasetDict):
        raise ValueError(
            f"a DatasetDict of {', '.join(source)}: pass one of them, such as data[{next(iter(source))!r}]"
        )
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")) or hasattr(source, "keys"):  # a DataFrame
        raise TypeError(f"{type(source).__name__}: expected a datasets.Dataset, or a list of records or trajectories")
    return Listed(source)


def read_records(
    source: str | Path, split: str | None = None, config_name: str | None = None, default_split: str = "test"
) -> Iterator[Placed]:
    """Yields the records of a source; the arguments are those of `open_records`."""
    yield from in_order(open_records(source, split, config_name, default_split))


def in_order(records: Records) -> Iterator[Placed]:
    """Yields all records in order."""
    for start in range(0, len(records), BATCH):
        yield from records.read(range(start, min(start + BATCH, len(records))))


def load_table(path: Path, name: str, split: str | None, config_name: str | None, default_split: str) -> Table:
    """The records that `datasets` reads."""
    import datasets

    if path.suffix in READERS:
        return load_file(path, READERS[path.suffix])
    saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    tables = datasets.load_from_disk(str(path)) if saved else load_from_hub(name, split, config_name)
    if not isinstance(tables, datasets.DatasetDict):
        return Table(tables)
    chosen = split or (next(iter(tables)) if len(tables) == 1 else default_split)
    if chosen not in tables:
        raise ValueError(f"{name}, split={split!r}: expected one of {', '.join(tables)}")
    return Table(tables[chosen], None if split else chosen)


def load_from_hub(name: str, split: str | None, config_name: str | None) -> Any:
    """The data set of a folder of data files or of a name of the hub.

    Raises:
        FileNotFoundError: neither a folder here nor a data set that the hub gives.
    """
    import datasets

    try:
        return datasets.load_dataset(name, config_name, split=split)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{name}: expected a file, a folder, or a data set that the hub gives (hub: {' '.join(str(error).split())})"
        ) from error


@contextmanager
def bars_of_many(records: int) -> Iterator[None]:
    """Shows the progress bars of `datasets` only for at least `PROGRESS_BAR_RECORDS` records."""
    import datasets
    from datasets.utils import are_progress_bars_disabled

    hidden = records < PROGRESS_BAR_RECORDS and not are_progress_bars_disabled()
    if hidden:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hidden:
            datasets.enable_progress_bars()


def load_file(path: Path, name: str) -> Table:
    """The records of a file in the format of this name in `datasets`.

    Raises:
        ValueError: the file is not in this format, or holds no record.
    """
    import datasets
    from pyarrow import ArrowInvalid

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    options = ONLY_EMPTY_IS_MISSING if name == "csv" else {}
    options = options | ({"sep": "\t"} if path.suffix == ".tsv" else {})
    try:
        with bars_of_many(0):  # reading takes little time beside what follows
            return Table(datasets.load_dataset(name, data_files=str(path), split="train", **options))
    except (datasets.exceptions.DatasetGenerationError, StopIteration, ArrowInvalid) as error:
        problem = "the file holds no record" if isinstance(error, StopIteration) else error.__cause__ or error
        raise ValueError(f"{path}: not readable as {name}: {' '.join(str(problem).split())}") from error


def is_indented(path: Path) -> bool:
    """Whether a file begins like JSON whose objects are written over several lines."""
    return next((line.removeprefix(BOM).strip() in (b"{", b"[") for _, _, line in read_lines(path)), False)


def present(record: dict[str, Any]) -> dict[str, Any]:
    """The fields that are there."""
    return {name: value for name, value in record.items() if value is not None}


def read_lines(path: str | Path) -> Iterator[tuple[int, int, bytes]]:
    """Lines that are not blank: their number (from 1), the byte where they start, and no more of them than needed.

    Of a line that is too long only the first `MAX_LINE` + 1 bytes are held.
    """
    with open(path, "rb") as lines:
        number, start = 1, 0
        while line := lines.readline(MAX_LINE + 1):
            if len(line) > MAX_LINE or line.strip():
                yield number, start, line
            while len(line) > MAX_LINE and not line.endswith(b"\n"):  # passes over the rest
                line = lines.readline(MAX_LINE + 1)
            number, start = number + 1, lines.tell()


def parse_json_object(line: bytes) -> dict[str, Any] | ValueError:
    """The object in a line, or what is wrong with it."""
    if len(line) > MAX_LINE:
        return ValueError(f"longer than {MAX_LINE} bytes")
    try:
        record = json.loads(line.removeprefix(BOM).decode("utf-8"))
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 at byte {error.start + 1}; save the file as UTF-8")
    except json.JSONDecodeError as error:
        return ValueError(f"not valid JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return ValueError("not valid JSON: nested too deeply")
    except ValueError:
        return ValueError("not valid JSON: an integer of too many digits")
    if isinstance(record, list):
        return ValueError("expected a JSON object, got a list; name the file .json if it holds one list of all records")
    return record if isinstance(record, dict) else ValueError(f"expected a JSON object, got {record!r:.60}")
