"""Files are written beside and renamed, and the error of a full disk names the path."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL_BYTES = 2**16
"""Free bytes below which a disk counts as full: what is left where a block did not fit."""


@contextmanager
def naming_full_disk(path: str | Path) -> Iterator[None]:
    """Names the path in the error of a write that failed because the disk was full.

    An error of the system names no file when a write fails, safetensors and torch.save raise errors of their own, and
    that of torch.save does not tell the cause.

    Args:
        path: file or folder that is written to; it need not exist.

    Raises:
        OSError: the disk is full.
    """
    try:
        yield
    except Exception as error:
        if "No space left on device" in str(error) or free_bytes(Path(path)) < FULL_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def free_bytes(path: Path) -> int:
    """Bytes that can still be written to the disk of a path."""
    existing = next(each for each in (path, *path.absolute().parents) if each.exists())
    return shutil.disk_usage(existing).free


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Yields a path beside a file to write to, and renames it at the end, so that a failure leaves what was there."""
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        with naming_full_disk(path):
            yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
