"""Atomic checkpoints: written to another folder, synced to the disk, then renamed.

The last file written is a manifest, which lists all other files with their sizes and describes the run, so that an
incomplete checkpoint, or one of another run, is recognised before anything is loaded.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from tabom.training.renamed import RENAMED

MANIFEST = "tabom_checkpoint.json"
SAVING = ".saving"
"""Folder within the output folder that a checkpoint is first written to."""


def publish(written: Path, final: Path, run: dict[str, Any]) -> None:
    """Writes the manifest of a checkpoint and renames its folder, so that it appears complete.

    Args:
        run: description of the run as JSON values; only a run with the same description can resume.
    """
    files = {str(path.relative_to(written)): path.stat().st_size for path in files_under(written)}
    (written / MANIFEST).write_text(json.dumps({"run": run, "files": files}, indent=1, allow_nan=False))
    for folder, _, names in os.walk(written):
        for path in (*(Path(folder, name) for name in names), Path(folder)):
            sync(path)
    shutil.rmtree(final, ignore_errors=True)  # a checkpoint of an earlier run
    written.rename(final)
    sync(final.parent)


def files_under(folder: Path) -> Iterator[Path]:
    """All files of a folder, at any depth."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_run(checkpoint: Path) -> dict[str, Any]:
    """The description of the run in the manifest, after checking that the checkpoint is complete.

    Raises:
        ValueError: a file is missing or has another size; names it.
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
            f"{checkpoint}: holds no state of the optimizer (save_only_model), so training cannot continue from it"
        )
    return {RENAMED.get(name, name): value for name, value in manifest["run"].items()}


def newest_whole(output_dir: str | Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint of a folder, and the reasons why newer ones are not complete."""
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
    """Refuses to resume a checkpoint of another run.

    Raises:
        ValueError: the checkpoint is incomplete, or belongs to another run; names the difference.
    """
    begun_with = read_run(checkpoint)
    for name in begun_with | run:
        if begun_with.get(name) != run.get(name):
            raise ValueError(
                f"{checkpoint} was begun with {name}={begun_with.get(name)!r}, now {name}={run.get(name)!r}: "
                "continue with the same settings, or begin in another output_dir"
            )
