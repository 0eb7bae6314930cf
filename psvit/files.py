"""Writing results whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder whose files move into ``target`` when the block ends without an error.

    Each file appears in ``target`` by one rename, so it is never seen half written; after an
    error or Ctrl-C nothing is left behind. Other files in ``target`` stay.

    Raises:
        OSError: ``target`` can't be made or written; raised before the block runs.
    """
    made = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    kept = False
    try:
        work = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=target))
        try:
            yield work
            for file in sorted(work.iterdir()):
                os.replace(file, target / file.name)
            kept = True
        finally:
            shutil.rmtree(work, ignore_errors=True)
    finally:
        if made and not kept:
            shutil.rmtree(target, ignore_errors=True)


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A temporary path beside ``target`` that is renamed to it when the block ends well.

    Raises:
        OSError: the folder can't be written; raised before the block runs.
    """
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder", str(target))
    work = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=target.parent))
    try:
        yield work / target.name
        os.replace(work / target.name, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def clear_unfinished(folder: Path) -> None:
    """Removes what a killed process left of files that it hadn't finished."""
    for left in folder.glob(".unfinished-*"):
        shutil.rmtree(left, ignore_errors=True)
