"""Writing files so that what was there before survives any failure. Standard library only."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trainer.contract.errors import DiskError

DISK_ERRNOS = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "disk quota exceeded",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission to write",
    errno.EPERM: "no permission to write",
    errno.EIO: "input/output error",
    errno.EFBIG: "file too large for this file system",
    errno.ENAMETOOLONG: "its name is too long",
}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn write failures of the machine (full, read-only, …) into a `DiskError` naming `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRNOS:
            raise
        raise DiskError(
            f"cannot write {path}: {DISK_ERRNOS[error.errno]}{_free_space(path)}",
            hint="free some space or choose another folder; files written before are intact",
        ) from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is fsynced and renamed to `path`.

    On any exception the temporary file is removed and `path` stays as it was.

    Raises:
        DiskError: the disk is full, read-only or gone.
    """
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            prefix=f".{in_bytes(path.name, 80)}.", suffix=".partial", dir=path.parent
        )
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            fsync(temporary)
            _apply_umask(temporary)
            temporary.replace(path)
            fsync(path.parent)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


def in_bytes(text: str, limit: int) -> str:
    """Return the beginning of a text that takes `limit` bytes at most: file systems count those."""
    # Of a name that is not UTF-8 the letters that Python reads as half a character are left out.
    return text.encode(errors="ignore")[:limit].decode(errors="ignore")


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the content of `path` in one step."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Replace the content of `path` in one step, UTF-8."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Replace the content of `path` by indented JSON in one step."""
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n"
    write_bytes(path, utf8(text))


def utf8(json_text: str) -> bytes:
    r"""Return JSON as UTF-8; what has none becomes its JSON escape, such as `\udcff`.

    Python reads a file name that is not UTF-8 as lone surrogates; messages and indices name it.
    """
    return json_text.encode("utf-8", "backslashreplace")


def fsync(path: Path) -> None:
    """Flush a file or a folder to the disk; folders are skipped where the system cannot."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot fsync a folder
        if not path.is_dir() or error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(descriptor)


def _apply_umask(path: Path) -> None:
    # mkstemp makes private files; outputs shall get the mode that open() would have given them.
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _free_space(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return ""
    return f" ({usage.free / 2**30:.2f} GiB free of {usage.total / 2**30:.1f} GiB at {folder})"
