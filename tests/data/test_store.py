"""Both layouts of the store: several processes, restarts, other jobs, other settings, records of any kind."""

import itertools
import json
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore

from tabom.data.store import ResponseFolder, TrajectoryFile
from tabom.sampling.ranks import Ranks
from tests.data.test_json_files import EVERY_TIME_ANEW, SEPARATORS, VALUES, as_read

SETTINGS = {"model": "a/b", "temperature": 0.5, "eos": None, "verifier": SEPARATORS}
RECORDS = {f"{i}-0": {"id": f"{i}-0", "correct": [True, False, None][i % 3], "text": SEPARATORS} for i in range(12)}


def trajectory_file(folder):
    return TrajectoryFile(folder / "t.jsonl")


def answer_folder(folder):
    return ResponseFolder(folder / "cell")


@pytest.fixture(params=[trajectory_file, answer_folder])
def make(request):
    return request.param


def fill(store, ranks=None, wanted=RECORDS, settings=SETTINGS):
    """Appends those of the wanted records that the store does not have; returns the ids of the others."""
    with store.opened(settings, ranks or Ranks()) as (verdicts, append):
        missing = [record for name, record in wanted.items() if name not in verdicts]
        for number, record in enumerate(missing):
            if ranks is None or number % ranks.size == ranks.rank:
                append([record])
        return set(verdicts)


def content(store):
    """Every record by its id; none is there twice."""
    found = list(store.records())
    by_id = {record["id"]: record for record in found}
    assert len(by_id) == len(found)
    return by_id


def together(size):
    """The processes of a job, which here are threads."""
    meeting = HashStore()
    return [Ranks(rank, size, meeting) for rank in range(size)]


def run_all(jobs):
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


@EVERY_TIME_ANEW
@given(contents=st.lists(VALUES, max_size=6), layout=st.sampled_from([trajectory_file, answer_folder]), data=st.data())
def test_records_of_any_kind_are_read_as_they_were_written(tmp_path_factory, contents, layout, data):
    store = layout(tmp_path_factory.mktemp("any"))
    verdicts = st.sampled_from([True, False, None])
    wanted = {str(i): {"id": str(i), "correct": data.draw(verdicts), "x": each} for i, each in enumerate(contents)}
    assert fill(store, wanted=wanted, settings={"x": contents}) == set()
    assert content(store) == {name: as_read(record) for name, record in wanted.items()}
    assert fill(store, wanted=wanted, settings={"x": as_read(contents)}) == set(wanted)


def test_a_second_run_finds_everything_and_adds_the_rest(tmp_path, make):
    first = dict(itertools.islice(RECORDS.items(), 5))
    assert fill(make(tmp_path), wanted=first) == set()
    assert fill(make(tmp_path)) == set(first)
    assert content(make(tmp_path)) == RECORDS
    assert make(tmp_path).settings() == SETTINGS


def test_files_on_the_disk(tmp_path):
    fill(trajectory_file(tmp_path))
    fill(answer_folder(tmp_path))
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()) == [
        *("cell/.lock", "cell/answers-0.jsonl", "cell/settings.json", "t.jsonl", "t.jsonl.lock", "t.jsonl.rejected")
    ]
    kept, rejected = (
        [json.loads(line) for line in (tmp_path / name).read_text("utf-8").split("\n")[:-1]]
        for name in ("t.jsonl", "t.jsonl.rejected")
    )
    assert rejected[0] == json.loads((tmp_path / "cell" / "settings.json").read_bytes()) == SETTINGS
    assert {record["correct"] for record in kept} == {True, None}
    assert {record["correct"] for record in rejected[1:]} == {False}


def test_several_processes_share_a_store_and_one_goes_on(tmp_path, make):
    half = dict(itertools.islice(RECORDS.items(), 6))
    for size, wanted in ((3, half), (2, RECORDS)):
        found = []
        jobs = [
            lambda ranks=ranks, wanted=wanted, found=found: found.append(fill(make(tmp_path), ranks, wanted))
            for ranks in together(size)
        ]
        run_all(jobs)
        assert found == [set() if size == 3 else set(half)] * size, "all processes see the same finished records"
        assert content(make(tmp_path)) == wanted
    assert not list(tmp_path.glob("*.rank*"))
    assert fill(make(tmp_path)) == set(RECORDS)


def test_killed_at_any_byte_each_record_is_there_once_in_the_end(tmp_path, make, rng):
    """Files of one process and of three, cut anywhere; records that are in the output and in a shard count once."""
    store = make(tmp_path)
    fill(store)
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".jsonl", ".rejected")]
    whole = {path: path.read_bytes() for path in files}
    for _ in range(40):
        for path, data in whole.items():
            path.write_bytes(data[: rng.randrange(len(data) + 1)])
        if isinstance(store, TrajectoryFile):
            for rank in (0, 11):
                for path, data in whole.items():
                    name = path.name.replace("t.jsonl", f"t.jsonl.rank{rank}")
                    (tmp_path / name).write_bytes(data[: rng.randrange(len(data) + 1)])
            (tmp_path / "t.jsonl.rank11").unlink()  # killed while the shard was deleted
        before = fill(make(tmp_path))
        assert content(make(tmp_path)) == RECORDS and before <= set(RECORDS)
        assert not list(tmp_path.glob("*.rank*"))


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"temperature": 1.0}, "was begun with temperature=0.5, now temperature=1.0; continue with the same"),
        ({"eos": 3}, "was begun with eos=None, now eos=3"),
    ],
)
def test_other_settings_are_refused(tmp_path, make, changed, said):
    fill(make(tmp_path))
    with pytest.raises(ValueError, match=said):
        fill(make(tmp_path), settings={**SETTINGS, **changed})
    assert content(make(tmp_path)) == RECORDS


def test_a_setting_that_was_not_noted_is_refused_until_the_user_adds_it(tmp_path, make):
    """An earlier version did not note it, so nobody but the user can know that it is the same."""
    store = make(tmp_path)
    fill(store)
    now = {**SETTINGS, "weights": "float32, sha256 0"}
    said = 'was begun without a note of its weights, now .* add "weights": "float32, sha256 0" to the settings in '
    with pytest.raises(ValueError, match=said) as error:
        fill(make(tmp_path), settings=now)
    path = Path(str(error.value).partition("to the settings in ")[2].partition(", else")[0])
    path.write_bytes(path.read_bytes().replace(b'"model"', b'"weights": "float32, sha256 0", "model"', 1))
    assert fill(make(tmp_path), settings=now) == set(RECORDS)


def test_shards_of_other_settings_are_refused(tmp_path):
    fill(trajectory_file(tmp_path))
    (tmp_path / "t.jsonl.rank0.rejected").write_text('{"model": "another"}\n')
    with pytest.raises(ValueError, match=r"t\.jsonl\.rank0 was begun with"):
        fill(trajectory_file(tmp_path))
    assert fill(TrajectoryFile(tmp_path / "t.jsonl", overwrite=True)) == set()
    assert content(trajectory_file(tmp_path)) == RECORDS and not list(tmp_path.glob("*.rank*"))


def test_another_job_is_kept_out(tmp_path, make):
    said = "another job is writing to it; wait for it, or choose another"
    with make(tmp_path).opened(SETTINGS, Ranks()), pytest.raises(ValueError, match=said):
        fill(make(tmp_path))
    assert fill(make(tmp_path)) == set()


def test_every_process_of_a_job_holds_the_lock(tmp_path, make):
    """The first one of two has ended by a fault: as long as the other lives, nobody else may write."""
    first, second = together(2)
    release, opened = threading.Event(), threading.Event()

    def fail():
        with pytest.raises(KeyError), make(tmp_path).opened(SETTINGS, first):
            opened.wait(60)
            raise KeyError

    def stay():
        with make(tmp_path).opened(SETTINGS, second):
            opened.set()
            release.wait(60)

    staying = threading.Thread(target=stay)
    staying.start()
    fail()
    with pytest.raises(ValueError, match="another job is writing to it"):
        fill(make(tmp_path))
    release.set()
    staying.join(60)
    assert fill(make(tmp_path)) == set()


def test_somebody_elses_file_is_left_alone(tmp_path):
    foreign = tmp_path / "t.jsonl"
    foreign.write_text("precious\n")
    with pytest.raises(ValueError, match="exists, but not from `tabom collect`"):
        fill(trajectory_file(tmp_path))
    assert foreign.read_text() == "precious\n"


def test_answers_without_settings_are_refused(tmp_path):
    store = answer_folder(tmp_path)
    fill(store)
    before = (tmp_path / "cell" / "answers-0.jsonl").read_bytes()
    store.settings_file.unlink()
    with pytest.raises(ValueError, match=r"holds answers but no settings\.json; restore it, or choose another"):
        fill(store)
    assert (tmp_path / "cell" / "answers-0.jsonl").read_bytes() == before


def test_a_run_killed_before_its_first_line_starts_anew(tmp_path, make, monkeypatch):
    """Killed while its files were being made: whichever exists, the next run goes on."""

    touch = Path.touch

    def touch_and_die(path):
        touch(path)
        raise KeyboardInterrupt

    def die(part, path):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "touch", touch_and_die)
    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        fill(make(tmp_path))
    monkeypatch.undo()
    assert fill(make(tmp_path)) == set()
    assert content(make(tmp_path)) == RECORDS


@pytest.mark.parametrize("damage, problem", [(b"{\n", "line 1: not valid JSON"), (b"{}\n", "without id and verdict")])
def test_a_damaged_file_of_records_is_named(tmp_path, make, damage, problem):
    fill(make(tmp_path))
    for path in (tmp_path / "t.jsonl", tmp_path / "cell" / "answers-0.jsonl"):
        if path.exists():
            path.write_bytes(damage)
    with pytest.raises(ValueError, match=problem):
        fill(make(tmp_path))


@pytest.mark.parametrize("damage", [b"{\n", b"\xff\n", b"[]\n"])
def test_damaged_settings_are_named(tmp_path, make, damage):
    fill(make(tmp_path))
    for path in (tmp_path / "t.jsonl.rejected", tmp_path / "cell" / "settings.json"):
        if path.exists():
            path.write_bytes(damage)
    with pytest.raises(ValueError, match=r"(t\.jsonl\.rejected|settings\.json).*choose another"):
        fill(make(tmp_path))


def test_a_number_that_is_not_finite_costs_no_finished_record(tmp_path, make):
    with pytest.raises(FloatingPointError, match=r"record 9-0, entropy\[1\]=nan cannot be written"):
        fill(make(tmp_path), wanted={**RECORDS, "9-0": {"id": "9-0", "correct": False, "entropy": [0, float("nan")]}})
    expected = dict(itertools.islice(RECORDS.items(), 9))
    assert content(make(tmp_path)) == expected and fill(make(tmp_path)) == set(expected)
