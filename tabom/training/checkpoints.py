"""Atomic checkpoints: written to another folder, synced to the disk, then renamed.

The last file written is a manifest, which lists all other files with their sizes and content hashes and describes the
run, so that a damaged checkpoint, or one of another run, is recognised before anything is loaded. The manifest holds a
hash of its own content, too.

The hash is xxHash's XXH3 with 128 bits: it finds accidents, not forgeries, and costs little more than reading the file.
Measured with a file of 1 GB on two CPU cores: 0.42 s from the disk (reading alone 0.45 s), 0.07 s from the page cache
(0.05 s).
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from tabom.data.json_files import read_json

MANIFEST = "tabom_checkpoint.json"
HASH = "xxh3_128"
"""Field of the manifest that holds a hash, in hexadecimal digits."""

SAVING = ".saving"
"""Folder within the output folder that a checkpoint is first written to."""

READ_BYTES = 2**20
"""How much of a file is read at once to hash it."""


def publish(written: Path, final: Path, run: dict[str, Any]) -> None:
    """Writes the manifest of a checkpoint and renames its folder, so that it appears complete.

    Args:
        run: description of the run as JSON values; only a run with the same description can resume.
    """
    files = {
        str(path.relative_to(written)): {"bytes": path.stat().st_size, HASH: content_hash(path)}
        for path in files_under(written)
    }
    (written / MANIFEST).write_bytes(manifest_bytes({"run": run, "files": files}))
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


def content_hash(path: Path) -> str:
    """The hash of what a file holds."""
    content = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(READ_BYTES):
            content.update(chunk)
    return content.hexdigest()


def manifest_bytes(content: dict[str, Any]) -> bytes:
    """The file of a manifest: its content, and the hash of that."""
    digest = xxhash.xxh3_128_hexdigest(json.dumps(content, allow_nan=False).encode())
    return json.dumps({**content, HASH: digest}, indent=1).encode()


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        ValueError: there is none, it is damaged, or the checkpoint holds no state of the optimizer.
    """
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise ValueError(f"{checkpoint}: no {MANIFEST}, which is written last: it was not finished")
    manifest = read_json(path, dict, "the checkpoint is damaged")
    manifest.pop(HASH, None)
    if path.read_bytes() != manifest_bytes(manifest):
        raise ValueError(f"{path} is not what was written: the checkpoint is damaged, or from an earlier version")
    if not any(name.startswith(("optimizer", "global_step")) for name in manifest["files"]):  # the latter: DeepSpeed
        raise ValueError(
            f"{checkpoint}: holds no state of the optimizer (save_only_model), so training cannot continue from it"
        )
    return manifest


def check_whole(checkpoint: Path) -> None:
    """Reads all files of a checkpoint and compares them with the manifest.

    Raises:
        ValueError: a file is missing, cannot be read, or is not what was written; names it.
    """
    files = read_manifest(checkpoint)["files"]
    for name, written in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise ValueError(f"{checkpoint}: {name} is missing")
        if path.stat().st_size != written["bytes"]:
            raise ValueError(f"{checkpoint}: {name} has {path.stat().st_size} bytes of {written['bytes']}")
    for name, written in files.items():
        try:
            found = content_hash(checkpoint / name)
        except OSError as error:  # a sector of the disk that cannot be read any more
            raise ValueError(f"{checkpoint}: {name} cannot be read: {error}") from error
        if found != written[HASH]:
            raise ValueError(f"{checkpoint}: {name} is damaged: its {HASH} is {found}, written was {written[HASH]}")


def newest_first(output_dir: str | Path) -> list[Path]:
    """The checkpoints of a folder, whole or not."""
    names = sort_checkpoints(str(output_dir), PREFIX_CHECKPOINT_DIR) if Path(output_dir).is_dir() else []
    return [Path(name) for name in reversed(names)]


def check_same_run(checkpoint: Path, run: dict[str, Any]) -> None:
    """Refuses to resume a checkpoint of another run.

    Raises:
        ValueError: the checkpoint has no whole manifest, or belongs to another run; names the difference.
    """
    begun_with = read_manifest(checkpoint)["run"]
    for name in begun_with | run:
        if begun_with.get(name) != run.get(name):
            raise ValueError(
                f"{checkpoint} was begun with {name}={begun_with.get(name)!r}, now {name}={run.get(name)!r}: "
                "continue with the same settings, or begin in another output_dir"
            )
