"""On what kind of volume a folder is."""

from __future__ import annotations

import re
from pathlib import Path

MOUNTS = Path("/proc/self/mounts")
NETWORK = frozenset(
    """
    nfs nfs4 cifs smb3 smbfs 9p afs beegfs ceph glusterfs gpfs lustre pvfs2 wekafs
    fuse.sshfs fuse.glusterfs fuse.s3fs fuse.rclone fuse.gcsfuse fuse.juicefs
    """.split()  # noqa: SIM905  (quoted one by one they are hard to read)
)
"""File systems whose files other machines may have open at the same time."""


def network_volume(folder: Path, mounts: Path = MOUNTS) -> str:
    """Return the file system of a folder that is on a network volume; empty: it is not, or unknown.

    Args:
        folder: need not exist.
        mounts: the table of mounts (Linux).
    """
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    place = folder.resolve()
    found, kind = Path("/"), ""
    for line in lines:
        parts = line.split(" ")
        if len(parts) < 3:
            continue
        mounted = Path(re.sub(r"\\([0-7]{3})", _character, parts[1]))
        if place.is_relative_to(mounted) and len(mounted.parts) >= len(found.parts):
            found, kind = mounted, parts[2]
    return kind if kind in NETWORK else ""


def _character(octal: re.Match[str]) -> str:
    """Return what stands for a space and its like, such as `\\040`."""
    return chr(int(octal[1], 8))
