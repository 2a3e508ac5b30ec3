"""Putting a finished file under a name that nothing else has, however many processes want it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from trainer.contract.files import disk_errors, fsync

_TAKEN = frozenset({errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR})


def move_unless_taken(source: Path, target: Path) -> bool:
    """Move a file or a folder to a name beside it; return False where that is taken.

    Of several processes that want one name one gets it, and what is there is never replaced, but
    for an empty folder by a folder. A process that is killed leaves `source` or `target`, whole.

    Raises:
        DiskError: the disk is read-only or gone.
    """
    with disk_errors(target):
        moved = _moved_folder(source, target) if source.is_dir() else _moved_file(source, target)
        if moved:
            fsync(target.parent)
    return moved


def _moved_folder(source: Path, target: Path) -> bool:
    try:
        source.rename(target)  # replaces no file, and no folder that holds anything
    except OSError as error:
        if error.errno in _TAKEN or (os.name == "nt" and target.exists()):
            return False
        raise
    return True


def _moved_file(source: Path, target: Path) -> bool:
    if os.name == "nt":  # where renaming replaces nothing
        return _moved_folder(source, target)
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError:  # FAT and some network shares have no hard links, and say so in many ways
        return _moved_without_links(source, target)
    source.unlink()
    return True


def _moved_without_links(source: Path, target: Path) -> bool:
    """Take the name with an empty file, then replace that."""
    try:
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    source.replace(target)
    return True
