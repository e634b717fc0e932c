"""JSON lines: what is written is read, whatever its strings hold and wherever its writer was killed."""

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tabom.data.json_files import appending, drop_torn_line, finished_lines, read_json, write_json

SEPARATORS = "a\u2028b\u2029c\x85d\re\nf\r\ng\x0bh\x0ci\x1cj\x1dk\x1el\x1fm\x00"
"""Everything at which `str.splitlines` or text mode would end a line."""

TEXT = st.text(st.characters(), max_size=20) | st.sampled_from([SEPARATORS, "\ud800", "\udfff", "\ufeff", "😀"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
RECORDS = st.lists(st.dictionaries(TEXT, VALUES, max_size=4), max_size=5)
EVERY_TIME_ANEW = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def as_read(record):
    """Halves of surrogate pairs that happen to stand together are one character in any JSON."""
    return json.loads(json.dumps(record))


@EVERY_TIME_ANEW
@given(RECORDS)
def test_any_record_is_read_as_it_was_written(tmp_path, records):
    path = tmp_path / "r.jsonl"
    path.unlink(missing_ok=True)
    with appending(path) as append:
        append(records[:2])
        append(records[2:])
    assert list(finished_lines(path)) == list(map(as_read, records))
    path.read_bytes().decode("utf-8")


@EVERY_TIME_ANEW
@given(VALUES)
def test_any_document_is_read_as_it_was_written(tmp_path, content):
    write_json(tmp_path / "d.json", [content])
    assert read_json(tmp_path / "d.json", list, "") == [as_read(content)]


def test_a_file_cut_at_any_byte_keeps_its_whole_lines_and_goes_on(tmp_path):
    path = tmp_path / "r.jsonl"
    records = [{"text": SEPARATORS, "number": number} for number in range(3)]
    with appending(path) as append:
        append(records)
    content = path.read_bytes()
    assert content.count(b"\n") == 3
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        whole = content[:size].count(b"\n")
        assert list(finished_lines(path)) == records[:whole]
        drop_torn_line(path)
        assert path.stat().st_size == content[:size].rfind(b"\n") + 1
        with appending(path) as append:
            append(records[whole:])
        assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"a", b"a\n", b"a\nb", b"\n", b"a\n" + b"x" * 200_000, b"x" * 200_000])
def test_a_torn_line_is_cut_off_at_any_length(tmp_path, content):
    path = tmp_path / "t"
    path.write_bytes(content)
    drop_torn_line(path)
    assert path.read_bytes() == content[: content.rfind(b"\n") + 1]


@pytest.mark.parametrize(
    "line, problem", [(b"{", "not valid JSON"), (b"\xff", "not UTF-8"), (b"[]", "expected a JSON")]
)
def test_a_damaged_line_is_named(tmp_path, line, problem):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"{}\n" + line + b"\n{}\n")
    with pytest.raises(ValueError, match=rf"r\.jsonl, line 2: {problem}.*; delete the line"):
        list(finished_lines(path))


@pytest.mark.parametrize("number, said", [(float("nan"), "nan"), (float("-inf"), "-inf")])
def test_a_number_that_is_not_finite_is_named_and_costs_no_other_record(tmp_path, number, said):
    path = tmp_path / "r.jsonl"
    bad = {"id": "1-0", "text": "x", "certainty": {"entropy": [0.5, number, number]}}
    with (
        pytest.raises(FloatingPointError, match=rf"r\.jsonl: record 1-0, certainty\.entropy\[1\]={said} cannot be"),
        appending(path) as append,
    ):
        append([{"id": "0-0"}, bad])
    assert list(finished_lines(path)) == [{"id": "0-0"}]


def test_a_document_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "d.json"
    (tmp_path / ".d.part.json").write_text("[1, ")  # of a process that was killed
    write_json(path, [1])
    for bad, error in ((float("nan"), FloatingPointError), (object(), TypeError)):
        with pytest.raises(error):
            write_json(path, [bad])
    assert read_json(path, list, "") == [1]
    assert os.listdir(tmp_path) == ["d.json"], "nothing is left beside it"


@pytest.mark.parametrize("content", [b"", b"[1, ", b"\xff", b"[" * 100_000, b'{"a": 1}', b"null"])
def test_a_torn_document_is_named_with_the_remedy(tmp_path, content):
    path = tmp_path / "d.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"d\.json.*; write it again$") as error:
        read_json(path, list, "write it again")
    assert len(str(error.value)) < 400 + len(str(path))
