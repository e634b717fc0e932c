"""What `tabom export` writes reads back as it was, whatever the records hold, or the field is named."""

import json
import re

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tabom.cli.commands import ExportArguments
from tabom.cli.export import run
from tabom.cli.main import main
from tabom.data.conversations import without_none
from tabom.data.sources import read_records

FORMATS = {"jsonl": "t.jsonl", "parquet": "t.parquet", "datasets": "folder"}
LONG = {"prompt": "p", "response": "r", "decoding_order": list(range(3000)), "response_token_ids": [7] * 3000}
CHAT = {"prompt": [{"role": "user", "content": "q"}], "response": "r"}

TEXT = st.text(max_size=5) | st.sampled_from(["5", "NA", "", "1.0", "nan", "a\nb\r\n", "\u2028", '"', ","])
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
    max_leaves=5,
)
TYPED = [
    TEXT,
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    NUMBERS,
    st.lists(st.integers(0, 2**31), max_size=5),
    st.lists(st.fixed_dictionaries({"role": TEXT, "content": TEXT}), max_size=3),
]
COLUMNS = st.sampled_from([*TYPED, VALUES])
RECORDS = (
    st.lists(st.sampled_from(["prompt", "response", "x"]), min_size=1, unique=True)
    .flatmap(lambda names: st.fixed_dictionaries({name: COLUMNS for name in names}))
    .flatmap(lambda columns: st.lists(st.fixed_dictionaries({}, optional=columns), min_size=1))
    .filter(any)
)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def exported(folder, records, to):
    """The records that are read back."""
    source, output = write(folder / "source.jsonl", records), folder / FORMATS[to]
    run(ExportArguments(data=[str(source)], output=str(output), to=to))
    return [without_none(record) for _, record in read_records(output)]


@pytest.mark.parametrize("to", FORMATS)
@example([{"prompt": None}])
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(RECORDS)
def test_any_records_read_back_or_their_field_is_named(tmp_path, to, records):
    try:
        found = exported(tmp_path, records, to)
    except ValueError as error:
        if any(without_none(records)):
            assert to != "jsonl" and re.match(r"field '\w+': .*; use --to jsonl$", str(error)), error
        else:
            assert "no record to export" in str(error)
    else:
        assert found == without_none(records)


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("records", [[LONG], [LONG, CHAT | {"prompt": "q"}], [CHAT, CHAT | {"why": "x"}]])
def test_trajectories_read_back_in_every_format(tmp_path, records, to):
    assert exported(tmp_path, records, to) == records


MIXED = {
    "a number and a word": [{"answer": 5}, {"answer": "five"}],
    "text and conversations": [CHAT, {"prompt": "q"}],
    "30 digits": [{"answer": 10**29 + 1}],
    "large integers and fractions": [{"answer": 2**53 + 1}, {"answer": 0.5}],
    "an object without fields": [{"answer": {}}],
    "half a surrogate pair": [{"answer": "\ud800"}],
}


@pytest.mark.parametrize("name", MIXED)
def test_what_a_column_cannot_hold_is_refused_and_jsonl_holds_it(tmp_path, name):
    assert exported(tmp_path, MIXED[name], "jsonl") == MIXED[name]
    field = "prompt" if "prompt" in MIXED[name][0] else "answer"
    for to in ("parquet", "datasets"):
        with pytest.raises(ValueError, match=f"^field '{field}': .*; use --to jsonl$"):
            exported(tmp_path, MIXED[name], to)


@pytest.mark.parametrize("name, content", [("t.jsonl", b"{"), ("t.parquet", b"PAR1")])
def test_the_name_of_the_output_chooses_the_format(tmp_path, capsys, name, content):
    source = write(tmp_path / "source.jsonl", [LONG])
    assert main(["export", "--data", str(source), "--output", str(tmp_path / "new" / name)]) == 0
    assert (tmp_path / "new" / name).read_bytes().startswith(content)
    assert main(["export", "--data", str(source), "--output", str(tmp_path / "folder")]) == 0
    assert [record for _, record in read_records(tmp_path / "folder")] == [LONG]
    assert [record for _, record in read_records(tmp_path / "new" / name)] == [LONG]


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (["--output", "t.csv"], "output=t.csv, to=None: expected a name in .jsonl or .parquet"),
        (["--output", "t.jsonl", "--to", "parquet"], "output=t.jsonl, to='parquet': expected a name"),
        (["--output", "t.parquet", "--to", "datasets"], "output=t.parquet, to='datasets': expected a name"),
        (["--output", "folder", "--to", "jsonl"], "output=folder, to='jsonl': expected a name"),
        (["--push_to", "x/y", "--to", "jsonl"], "to='jsonl', push_to='x/y': give output, or push_to alone"),
        ([], "output=None, to=None, push_to=None: give output"),
    ],
)
def test_another_name_is_refused_before_anything_is_read(tmp_path, monkeypatch, capsys, arguments, problem):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--data", "absent.jsonl", *arguments]) == 2
    error = capsys.readouterr().err
    assert problem in error and len(error.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_an_export_onto_its_own_source_and_one_that_fails_leave_it_whole(tmp_path, capsys):
    source = write(tmp_path / "t.jsonl", MIXED["a number and a word"])
    before = source.read_bytes()
    assert main(["export", "--data", str(source), "--output", str(source)]) == 0
    assert [json.loads(line) for line in source.read_bytes().splitlines()] == MIXED["a number and a word"]
    source.write_bytes(before + b'{"x": NaN}\n')
    assert main(["export", "--data", str(source), "--output", str(source)]) == 1
    assert source.read_bytes() == before + b'{"x": NaN}\n' and list(tmp_path.iterdir()) == [source]
