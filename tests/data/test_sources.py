"""Files as editors and other programs write them are read, or one line says what is there and what to do."""

import json

import pytest

from tabom.data.prompts import read_prompts
from tabom.data.sources import read_records

RECORDS = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}]
BOM = b"\xef\xbb\xbf"
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
INDENTED = "\n".join(json.dumps(record, indent=2) for record in RECORDS).encode()

READABLE = {
    "d.jsonl": BOM + LINES,
    "two files.jsonl": b"".join(BOM + line + b"\n" for line in LINES.splitlines()),
    "windows.jsonl": LINES.replace(b"\n", b"\r\n"),
    "indented.jsonl": INDENTED,
    "blank lines.jsonl": b"\n\n" + INDENTED,
    "bom indented.jsonl": BOM + INDENTED,
    "indented list.jsonl": json.dumps(RECORDS, indent=1).encode(),
    "list.json": BOM + json.dumps(RECORDS).encode(),
    "indented list.json": json.dumps(RECORDS, indent=4).encode(),
    "lines.json": LINES,
    "t.csv": BOM + b"prompt,answer\na,1\nb,2\n",
}


@pytest.mark.parametrize("name", READABLE)
def test_it_is_read(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(READABLE[name])
    found = [record for _, record in read_records(path)]
    assert [{name: str(value) for name, value in record.items()} for record in found] == RECORDS


UNREADABLE = {
    "list.jsonl": (json.dumps(RECORDS).encode(), "line 1: expected a JSON object, got a list; name the file .json"),
    "half indented.jsonl": (b'[{"prompt": "a",\n"answer": "1"}]', "line 1: not valid JSON: Expecting property name"),
    "utf-16.jsonl": (LINES.decode().encode("utf-16"), "line 1: not UTF-8 at byte 1; save the file as UTF-8"),
    "cut.json": (b'[{"prompt": "a"', "cut.json: not readable as json: "),
    "text.json": (b'"text"', "text.json: not readable as json: "),
    "cut lines.json": (LINES[:-9], "cut lines.json: not readable as json: "),
    "cut indented.jsonl": (INDENTED[:-9], "cut indented.jsonl: not readable as json: "),
    "empty.json": (b"", "empty.json: not readable as json: the file holds no record"),
    "utf-16.csv": ("prompt\na\n".encode("utf-16"), "utf-16.csv: not readable as csv: .*utf-8"),
    "t.parquet": (b"x", "t.parquet: not readable as parquet: Parquet file size"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_one_line_says_what_is_there(tmp_path, name):
    content, problem = UNREADABLE[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{tmp_path}/.*{problem}") as error:
        read_prompts(path)
    assert len(str(error.value).splitlines()) == 1
