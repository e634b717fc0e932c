"""Checks of a record's fields, which name the field, its value and what was expected."""

from math import isfinite
from typing import Any


class RecordError(ValueError):
    """Raised for a field of a record that is missing or wrong; names the field, its value and what was expected."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"field {field!r}: {problem}")


def text(record: dict[str, Any], field: str) -> str:
    """A field that must be a string."""
    value = record[field]
    if not isinstance(value, str):
        raise RecordError(field, f"expected text, got {value!r:.60}")
    check_unicode(field, value)
    return value


def texts(record: dict[str, Any], field: str) -> list[str]:
    """A field that must be a list of strings."""
    values = record[field]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise RecordError(field, f"expected a list of texts, got {values!r:.60}")
    for value in values:
        check_unicode(field, value)
    return values


def optional_text(record: dict[str, Any], field: str) -> str | None:
    """A field that is a string, null or missing."""
    return None if record.get(field) is None else text(record, field)


def check_unicode(field: str, value: str) -> None:
    """Raises a RecordError for half of a surrogate pair, which JSON can express but no tokenizer accepts."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RecordError(field, f"half a surrogate pair at character {error.start}") from error


def integers(record: dict[str, Any], field: str, low: int, high: int | None) -> list[int]:
    """A field that must be a list of integers in [low, high)."""
    values = record[field]
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise RecordError(field, f"expected a list of integers, got {values!r:.60}")
    for position, value in enumerate(values):
        if value < low or (high is not None and value >= high):
            bound = "" if high is None else f" and below {high}"
            raise RecordError(field, f"{value} at position {position}; expected at least {low}{bound}")
    return values


def numbers(record: dict[str, Any], field: str, count: int) -> list[float]:
    """A field that must be a list of `count` finite numbers."""
    values = record[field]
    if not isinstance(values, list) or not all(is_finite_number(value) for value in values):
        raise RecordError(field, f"expected a list of finite numbers, got {values!r:.60}")
    if len(values) != count:
        raise RecordError(field, f"has {len(values)} numbers for {count} response tokens; one a token expected")
    return [float(value) for value in values]


def number_or_none(record: dict[str, Any], field: str) -> float | None:
    """A field that is a finite number, else None: other programs may mean something else by its name."""
    value = record.get(field)
    return float(value) if is_finite_number(value) else None


def is_finite_number(value: Any) -> bool:
    """Whether a JSON value is a number that a float holds."""
    if type(value) is int:
        return abs(value) < 2**1023
    return type(value) is float and isfinite(value)


def as_text(value: Any) -> str | None:
    """A JSON value as text; None stays None.

    Whole floats lose their point, because Parquet and CSV store integers with gaps as floats.
    """
    if value is None:
        return None
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def lookup(record: dict[str, Any], path: str) -> Any:
    """The value of a field, or of a field in an object, as in `reward_model.ground_truth`; None if there is none."""
    if path in record or "." not in path:
        return record.get(path)
    name, _, rest = path.partition(".")
    inner = record.get(name)
    return lookup(inner, rest) if isinstance(inner, dict) else None
