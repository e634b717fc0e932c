"""Stores of the finished records of a job, in append-only files of JSON lines.

A job that is killed loses only the records that it was working on. After a restart it reads which records are finished
and makes the others. A store keeps the settings that all its records share, and refuses to continue with different
ones. Each process of a job appends to files of its own, and a lock keeps other jobs out.

The two layouts differ in their files only: `TrajectoryFile` is what `tabom collect` writes, `ResponseFolder` what
`tabom evaluate` writes.
"""

import glob
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import chain, islice
from pathlib import Path

from tabom.data.job_lock import Processes, locked
from tabom.data.json_files import Append, Record, appending, drop_torn_line, finished_lines, read_json, write_json
from tabom.data.sources import MAX_LINE, REJECTED, parse_json_object

Verdicts = dict[str, bool | None]
"""The verdict of each finished record by its id: true, false, or null if nobody could check it."""


class Store(ABC):
    """Settings and finished records of a job; every record has an `id` and a verdict, `correct`.

    Args:
        name: what error messages call the store.
        command: the command that writes such stores.
        remedy: what a user can do instead of going on with this store.
        lock: file that a job locks while it runs.
    """

    def __init__(self, name: str, command: str, remedy: str, lock: Path) -> None:
        self.name, self.command, self.remedy, self.lock = name, command, remedy, lock

    @abstractmethod
    def settings(self) -> Record:
        """The settings that the store was created with; empty if it does not exist yet."""

    @abstractmethod
    def lines(self) -> Iterator[Record]:
        """The records of all files, unchecked. A last line that is still being written is left out."""

    @abstractmethod
    def begin(self, settings: Record) -> None:
        """Prepares the files for appending: writes or checks the settings, and repairs the files of a killed job."""

    @abstractmethod
    def appending(self, settings: Record, processes: Processes) -> AbstractContextManager[Append]:
        """Yields the function that appends to the files of this process."""

    @abstractmethod
    def end(self, settings: Record, processes: Processes, verdicts: Verdicts) -> None:
        """Called in the first process after all have appended everything, with the verdicts that `opened` yielded."""

    @contextmanager
    def opened(self, settings: Record, processes: Processes) -> Iterator[tuple[Verdicts, Append]]:
        """Opens the store in all processes of a job at once, for as long as the job makes records.

        Yields the verdicts of the records that were finished before, the same in every process, and a function that
        appends records.

        Args:
            settings: JSON values that all records of the store share.

        Raises:
            ValueError: the store was begun with other settings, another job has it open, or a file is damaged.
        """
        with locked(self.lock, processes, self.name, self.remedy, prepare=lambda: self.begin(settings)):
            verdicts = self.verdicts()
            processes.signal("read")
            processes.wait_for("read", processes.size)  # so that nobody appends while another process still reads
            with self.appending(settings, processes) as append:
                yield verdicts, append
            processes.signal("written")
            if processes.rank == 0:
                processes.wait_for("written", processes.size)
                self.end(settings, processes, verdicts)

    def records(self) -> Iterator[Record]:
        """The finished records, one at a time.

        Raises:
            ValueError: a line is damaged, or was not written by such a store.
        """
        for record in self.lines():
            if not isinstance(record.get("id"), str) or "correct" not in record:
                raise ValueError(
                    f"{self.name}: holds records without id and verdict, so not from `tabom {self.command}`; "
                    f"{self.remedy}"
                )
            yield record

    def verdicts(self) -> Verdicts:
        """The verdicts of the finished records."""
        return {record["id"]: record["correct"] for record in self.records()}

    def check_settings(self, settings: Record, noted_in: Path) -> None:
        """Compares the settings in the file `noted_in`, with which the store was created, with the current ones.

        Raises:
            ValueError: one differs. A setting that an earlier version did not note cannot be compared, so the store is
                refused as well; the error says how users who know that it was the same can add it.
        """
        begun_with = self.settings()
        for name, value in settings.items():
            if begun_with.get(name) == value:
                continue
            if name in begun_with:
                raise ValueError(
                    f"{self.name} was begun with {name}={begun_with[name]!r}, now {name}={value!r}; "
                    f"continue with the same settings, or {self.remedy}"
                )
            entry = json.dumps({name: value}, ensure_ascii=False)[1:-1]
            raise ValueError(
                f"{self.name} was begun without a note of its {name}, now {name}={value!r}; "
                f"if you know that it was the same, add {entry} to the settings in {noted_in}, else {self.remedy}"
            )


class TrajectoryFile(Store):
    """A file of trajectories, and beside it `<output>.rejected`: a line of settings, then the wrong responses.

    The file itself holds the right responses and those that could not be checked. If there are several processes, each
    appends to a pair of files of its own, a shard called `<output>.rank<N>`. The first process moves the shards into
    the output at the end of the job; shards of a killed job are moved at the beginning of the next.

    Args:
        overwrite: delete what the files hold when the store is opened.
    """

    def __init__(self, output: Path, overwrite: bool = False) -> None:
        lock = output.with_name(output.name + ".lock")
        super().__init__(f"output={output}", "collect", "choose another output, or --overwrite", lock)
        self.output, self.overwrite = output, overwrite
        self.rejected = output.with_name(output.name + REJECTED)

    def settings(self) -> Record:
        """The first line of the file of wrong responses."""
        if not self.rejected.exists():
            return {}
        with self.rejected.open("rb") as lines:
            line = lines.readline(MAX_LINE + 1)
        settings = parse_json_object(line) if line.endswith(b"\n") else {}
        if isinstance(settings, ValueError):
            raise ValueError(f"{self.rejected}, line 1, which holds the settings: {settings}; {self.remedy}")
        return settings

    def lines(self) -> Iterator[Record]:
        """The records of both files."""
        return chain(finished_lines(self.output), islice(finished_lines(self.rejected), 1, None))

    def begin(self, settings: Record) -> None:
        """Also moves the shards of a killed job into the output."""
        if self.overwrite:
            for store in (*self.shards(), self):
                store.delete()
        self.begin_files(settings)
        if shards := self.shards():
            self.merge(shards, settings, self.verdicts())

    def begin_files(self, settings: Record) -> None:
        """Prepares these two files, without shards."""
        if self.output.exists() and not self.rejected.exists():
            raise ValueError(f"{self.name}: exists, but not from `tabom collect`; {self.remedy}")
        for path in (self.rejected, self.output):  # in this order: an output without companion is somebody else's
            path.touch()
            drop_torn_line(path)
        if self.rejected.stat().st_size == 0:
            with appending(self.rejected) as append:
                append([settings])
        self.check_settings(settings, self.rejected)

    @contextmanager
    def appending(self, settings: Record, processes: Processes) -> Iterator[Append]:
        """Appends to the output itself if there is one process, else to a shard."""
        own = self
        if processes.size > 1:
            own = self.shard(processes.rank)
            own.begin_files(settings)
        with appending(own.output, own.rejected) as append:
            yield append

    def end(self, settings: Record, processes: Processes, verdicts: Verdicts) -> None:
        """Moves the shards of all processes into the output."""
        if processes.size > 1:
            self.merge([self.shard(rank) for rank in range(processes.size)], settings, verdicts)

    def merge(self, shards: Iterable["TrajectoryFile"], settings: Record, verdicts: Verdicts) -> None:
        """Moves the records of shards into the output.

        A merge that was killed can be repeated: records that the output holds already, by its `verdicts`, are skipped.
        """
        done = set(verdicts)
        for shard in shards:
            shard.begin_files(settings)
            with appending(self.output, self.rejected) as append:
                append(record for record in shard.records() if record["id"] not in done)
            done |= set(shard.verdicts())
            shard.delete()

    def shard(self, rank: int) -> "TrajectoryFile":
        """The files of one of several processes."""
        return TrajectoryFile(self.output.with_name(f"{self.output.name}.rank{rank}"))

    def shards(self) -> list["TrajectoryFile"]:
        """The shards that exist, for any number of processes."""
        found = self.output.parent.glob(f"{glob.escape(self.output.name)}.rank*.rejected")
        return [TrajectoryFile(rejected.with_suffix("")) for rejected in sorted(found)]

    def delete(self) -> None:
        """Deletes the output first, because an output without its companion counts as a file of another program."""
        self.output.unlink(missing_ok=True)
        self.rejected.unlink(missing_ok=True)


class ResponseFolder(Store):
    """A folder with `settings.json` and the responses of each process, right and wrong, in `answers-<N>.jsonl`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), "evaluate", "choose another output_dir", folder / ".lock")
        self.folder, self.settings_file = folder, folder / "settings.json"

    def settings(self) -> Record:
        """The content of settings.json."""
        if not self.settings_file.exists():
            return {}
        remedy = f"nothing else says what made the answers beside it: restore the file, or {self.remedy}"
        return read_json(self.settings_file, dict, remedy)

    def lines(self) -> Iterator[Record]:
        """The records of all processes."""
        return chain.from_iterable(map(finished_lines, self.files()))

    def files(self) -> list[Path]:
        """The files of responses, for any number of processes."""
        return sorted(self.folder.glob("answers-*.jsonl"))

    def begin(self, settings: Record) -> None:
        """Also refuses a folder that holds responses but no settings."""
        for path in self.files():
            drop_torn_line(path)
        if not self.settings_file.exists():
            if any(path.stat().st_size for path in self.files()):
                raise ValueError(f"{self.name} holds answers but no settings.json; restore it, or {self.remedy}")
            write_json(self.settings_file, settings)
        self.check_settings(settings, self.settings_file)

    def appending(self, settings: Record, processes: Processes) -> AbstractContextManager[Append]:
        """Appends to a file of this process."""
        return appending(self.folder / f"answers-{processes.rank}.jsonl")

    def end(self, settings: Record, processes: Processes, verdicts: Verdicts) -> None:
        """Does nothing: the files of the processes stay separate."""
