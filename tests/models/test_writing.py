"""The error of a full disk, here the device /dev/full and a disk that says it is full."""

import errno
from collections import namedtuple
from pathlib import Path

import pytest

from tabom.data.json_files import appending
from tabom.models.writing import aside, naming_full_disk

FULL = Path("/dev/full")
Usage = namedtuple("Usage", "free")

pytestmark = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")


@pytest.mark.parametrize("rejected", [None, FULL])
def test_the_error_of_a_full_disk_names_the_file(rejected):
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'") as error:
        fill(rejected)
    assert error.value.errno == errno.ENOSPC


def fill(rejected):
    with appending(FULL, rejected) as append:
        append([{"id": "0-0"}])


def test_an_error_that_does_not_tell_the_cause_names_the_full_disk(monkeypatch, tmp_path):
    def fail():
        with naming_full_disk(tmp_path / "new" / "file"):
            raise RuntimeError("unexpected pos 64 vs 0")

    with pytest.raises(RuntimeError, match="unexpected pos"):
        fail()
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(free=4096))
    with pytest.raises(OSError, match=r"No space left on device: '.*new/file'"):
        fail()


def test_what_is_written_aside_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    with pytest.raises(KeyError), aside(path) as part:
        part.write_text("ne")
        raise KeyError
    assert path.read_text() == "old"
    with aside(path) as part:
        part.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
