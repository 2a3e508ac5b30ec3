"""The lock of a run: held by its supervisor for as long as the run lives.

The operating system releases it when the holder dies, however it dies. It is close-on-exec, so
that neither the trainer nor the workers it forks can keep it.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path

from trainer.contract.errors import BusyError
from trainer.contract.files import disk_errors

UNSUPPORTED = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS})
"""What file systems without locks answer (some NFS). Liveness then rests on pids alone."""
RETRY_S = 0.05
PATIENCE_S = 1.0
"""Who looks whether the lock is held shares it for an instant; that is not a holder."""


class RunLock:
    """An exclusive lock on a file, until `release` or the end of the process."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @classmethod
    def acquire(cls, path: Path) -> RunLock:
        """Take the lock.

        Raises:
            BusyError: somebody else holds it.
            DiskError: the lock file cannot be made.
        """
        descriptor = _open(path)
        deadline = time.monotonic() + PATIENCE_S
        while _is_locked_elsewhere(descriptor):
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise BusyError(f"{path.parent} is held by a living run")
            time.sleep(RETRY_S)
        return cls(descriptor)

    @classmethod
    def adopt(cls, descriptor: int) -> RunLock:
        """Take over a lock that the parent process acquired and handed down."""
        os.set_inheritable(descriptor, False)
        return cls(descriptor)

    def release(self) -> None:
        """Give the lock back."""
        os.close(self.descriptor)


def is_held(path: Path) -> bool | None:
    """Tell whether a process holds the lock; None when the file system cannot say."""
    try:
        descriptor = os.open(path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        return False
    except OSError:  # read-only volume, or somebody else's run
        return None
    try:
        # Shared: of two who look at once, neither takes the other for a holder.
        return _is_locked_elsewhere(descriptor, shared=True)
    finally:
        os.close(descriptor)


def _is_locked_elsewhere(descriptor: int, *, shared: bool = False) -> bool | None:
    """Take the lock if it is free; None when the file system has no locks."""
    try:
        return not _try_lock(descriptor, shared=shared)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return None
        raise


def _open(path: Path) -> int:
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)


if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int, *, shared: bool) -> bool:  # there they are never shared
        os.lseek(descriptor, 0, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(descriptor: int, *, shared: bool) -> bool:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
