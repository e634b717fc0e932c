"""Checkpoints that are there whole or not at all: written aside, synced to the disk, then renamed.

The last file written lists all others with their sizes and says what run they belong to, so that a checkpoint that is
no longer whole, or another run's, is recognised before anything is loaded.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

MANIFEST = "tabom_checkpoint.json"
SAVING = ".saving"
"""Folder in the output folder where a checkpoint is written."""


def publish(written: Path, final: Path, run: dict[str, Any]) -> None:
    """Makes a written checkpoint visible under its name, in one step.

    Args:
        run: JSON; what another run must agree with to go on from here.
    """
    files = {str(path.relative_to(written)): path.stat().st_size for path in files_under(written)}
    (written / MANIFEST).write_text(json.dumps({"run": run, "files": files}, indent=1))
    for folder, _, names in os.walk(written):
        for path in (*(Path(folder, name) for name in names), Path(folder)):
            sync(path)
    shutil.rmtree(final, ignore_errors=True)  # an earlier run's
    written.rename(final)
    sync(final.parent)


def files_under(folder: Path) -> Iterator[Path]:
    """Every file, at any depth."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_run(checkpoint: Path) -> dict[str, Any]:
    """What run a checkpoint belongs to, once it was found whole.

    Raises:
        ValueError: something is missing; says what.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{checkpoint}: no readable {MANIFEST}, which is written last: it was not finished") from error
    for name, size in manifest["files"].items():
        path = checkpoint / name
        if not path.is_file():
            raise ValueError(f"{checkpoint}: {name} is missing")
        if path.stat().st_size != size:
            raise ValueError(f"{checkpoint}: {name} has {path.stat().st_size} bytes of {size}")
    if not any(name.startswith(("optimizer", "global_step")) for name in manifest["files"]):  # the latter: DeepSpeed
        raise ValueError(
            f"{checkpoint}: holds no state of the optimizer (save_only_model), so it cannot be gone on with"
        )
    return manifest["run"]


def newest_whole(output_dir: str | Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a folder that is whole, and why newer ones are passed over."""
    broken = []
    names = sort_checkpoints(str(output_dir), PREFIX_CHECKPOINT_DIR) if Path(output_dir).is_dir() else []
    for name in reversed(names):
        try:
            read_run(Path(name))
        except ValueError as error:
            broken.append(str(error))
        else:
            return Path(name), broken
    return None, broken


def check_same_run(checkpoint: Path, run: dict[str, Any]) -> None:
    """Refuses to go on with a checkpoint of another run.

    Raises:
        ValueError: the checkpoint is not whole, or differs; names what differs.
    """
    begun_with = read_run(checkpoint)
    for name in begun_with | run:
        if begun_with.get(name) != run.get(name):
            raise ValueError(
                f"{checkpoint} was begun with {name}={begun_with.get(name)!r}, now {name}={run.get(name)!r}: "
                "go on with the same, or begin in another output_dir"
            )
