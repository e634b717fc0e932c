"""JSON files and JSON lines files that stay readable if their writer is killed.

Lines end at "\\n" and nowhere else: JSON strings may hold the other characters that end a line of text, such as U+2028,
U+2029 and U+0085. No file ever holds NaN or an infinity, which are not JSON.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from tabom.data.sources import MAX_LINE, parse_json_object, read_lines
from tabom.models.writing import aside, naming_full_disk

T = TypeVar("T")

Record = dict[str, Any]
"""A JSON object."""

Append = Callable[[Iterable[Record]], None]
"""Appends records; they are on the disk when it returns."""


@contextmanager
def appending(path: Path, rejected: Path | None = None) -> Iterator[Append]:
    """Opens a file of JSON lines, which must be new or end in a complete line, and yields a function that appends.

    Args:
        rejected: file for the records with `"correct": false`; default: `path`.
    """
    with naming_full_disk(path), ExitStack() as stack:  # closing a file writes, too
        files = [stack.enter_context(each.open("ab")) for each in (path, rejected) if each is not None]

        def append(records: Iterable[Record]) -> None:
            for record in records:
                file = files[-1] if record.get("correct") is False else files[0]
                file.write(to_json(record, file.name) + b"\n")
            for file in files:
                write_to_disk(file)

        yield append


def finished_lines(path: Path) -> Iterator[Record]:
    """The records of a file of JSON lines, one at a time; a last line that does not end is left out.

    Raises:
        ValueError: another line is not a JSON object.
    """
    for number, _, line in read_lines(path):
        if len(line) <= MAX_LINE and not line.endswith(b"\n"):
            return
        record = parse_json_object(line)
        if isinstance(record, ValueError):
            raise ValueError(f"{path}, line {number}: {record}; delete the line, and its record is made again")
        yield record


def drop_torn_line(path: Path) -> None:
    """Cuts off a last line that does not end, because its writer was killed or the disk was full."""
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        whole = 0
        while end > 0 and whole == 0:
            start = max(end - 2**16, 0)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            whole, end = (0 if newline < 0 else start + newline + 1), start
        file.truncate(whole)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file atomically: into a temporary file, which is flushed to the disk and then renamed."""
    with aside(path) as part, part.open("wb") as file:
        file.write(to_json(content, str(path), indent=1) + b"\n")
        write_to_disk(file)


def read_json(path: Path, kind: type[T], remedy: str) -> T:
    """The content of a JSON file; NaN and infinities, which some programs write, are read as null.

    Args:
        kind: type that the file must hold, dict or list.
        remedy: what the error tells the user to do.

    Raises:
        ValueError: the file is incomplete, or holds another type.
    """
    try:
        content = json.loads(path.read_bytes(), parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not whole ({error}); {remedy}") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path}: expected a {kind.__name__}, got {content!r:.60}; {remedy}")
    return content


def to_json(content: Any, destination: str, **layout: Any) -> bytes:
    """JSON in UTF-8. Half a surrogate pair, which UTF-8 cannot hold, is written as its JSON escape.

    Args:
        destination: name of the file, for the error.
        layout: `indent` and `separators` of `json.dumps`.

    Raises:
        FloatingPointError: a number is not finite.
    """
    try:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, **layout)
    except ValueError as error:
        found = next(not_finite(content))
        raise FloatingPointError(
            f"{destination}: {found} cannot be written as JSON; check the weights and the dtype of the model that it "
            "comes from"
        ) from error
    return text.encode("utf-8", "backslashreplace")


def not_finite(content: Any, name: str = "") -> Iterator[str]:
    """Names every number that is not finite, such as `entropy[3]=nan`, after the id of its record."""
    if isinstance(content, float) and not isfinite(content):
        yield f"{name}={content}"
    elif isinstance(content, dict):
        of_record = f"record {content['id']}, " if "id" in content else ""
        for key, value in content.items():
            yield from not_finite(value, f"{name}.{key}" if name else f"{of_record}{key}")
    elif isinstance(content, list | tuple):
        for index, value in enumerate(content):
            yield from not_finite(value, f"{name}[{index}]")


def write_to_disk(file: BinaryIO) -> None:
    """Flushes a file through to the disk."""
    file.flush()
    os.fsync(file.fileno())
