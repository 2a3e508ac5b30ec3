"""Frames of videos and images as small PNG files, for screens that draw them.

The app decodes no video itself: the trainer's job `frames` does, and what it made is kept in the
user's cache folder until it is too much or the file changes.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from app.runs.ask import Cancelled, ask
from trainer.contract.errors import RunError, UserError
from trainer.contract.files import write_json

MAX_CACHE_BYTES = 256 * 2**20
"""The pictures that were not looked at for the longest are removed above this."""
TIMEOUT_S = 120.0
_FACTS = "frames.json"
_YOUNG_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipFrames:
    """Pictures of a clip, and what it is."""

    paths: tuple[Path, ...]
    """PNG files, in the order asked for. They may be removed later: draw them, do not keep them."""
    numbers: tuple[int, ...]
    """The frame that each shows, from 0."""
    num_frames: int
    """Frames of the whole clip; 1: an image."""
    width: int
    """Of the clip as seen, in pixels."""
    height: int
    fps: float | None
    """Rate of a video of constant rate; None: images, or its rate varies."""


def clip_frames(
    path: Path,
    *,
    num_frames: int = 8,
    frames: Sequence[int] = (),
    max_width: int = 320,
    max_height: int = 320,
    cancelled: Callable[[], bool] = lambda: False,
    cache: Path | None = None,
) -> ClipFrames:
    """Return frames of a video, a folder of images or an image. Call it from a worker thread.

    The first time takes a process of about a second, later ones read the cache. With Textual's
    `@work(thread=True)`, `cancelled=lambda: get_current_worker().is_cancelled` (taken before, in
    the worker's thread) ends the process when the screen has moved on or the app is left.

    Args:
        path: what to look at.
        num_frames: how many, evenly spread, first and last among them; a shorter clip gives all.
        frames: frames to show instead; those below 0 count from the end.
        max_width: of the pictures in pixels; they keep their aspect and are never enlarged. Half
            blocks show one pixel a column and two a row.
        max_height: the same for the height.
        cancelled: asked several times a second while the process works.
        cache: folder of the pictures; None: `$XDG_CACHE_HOME/menma/frames`.

    Raises:
        MenmaError: it is missing, damaged or no video (`message` says which and why), the cache
            cannot be written, or it takes longer than two minutes.
        Cancelled: `cancelled` said so (`app.runs.ask.Cancelled`).
    """
    path = path.absolute()
    request = {
        "path": str(path),
        "num_frames": num_frames,
        "frames": list(frames),
        "max_width": max_width,
        "max_height": max_height,
    }
    try:
        folder = (cache or frames_cache()) / _key(request, path)
        known = _read(folder)
        return known if known is not None else _make(folder, request, cancelled)
    except OSError as error:
        if error.filename is not None and Path(error.filename) == path:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        raise RunError(f"no pictures of {path}: {error}") from error


def frames_cache() -> Path:
    """Return the user's folder of pictures."""
    if os.name == "nt":
        root = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local")
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "menma" / "frames"


def _make(folder: Path, request: dict[str, Any], cancelled: Callable[[], bool]) -> ClipFrames:
    """Let the job write into a folder of its own, then put that in its place."""
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _make_room(folder.parent)
    deadline = time.monotonic() + TIMEOUT_S

    def is_over() -> bool:
        return cancelled() or time.monotonic() > deadline

    made = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        end = ask("frames", {**request, "output": str(made)}, cancelled=is_over)
        facts = {key: end[key] for key in ("numbers", "num_frames", "width", "height", "fps")}
        write_json(made / _FACTS, {"files": end["files"], **facts})
        if _read(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # another thread was faster, with the same pictures
            made.replace(folder)
        found = _read(folder)
    except Cancelled:
        if cancelled():
            raise
        raise RunError(f"{request['path']}: no pictures after {TIMEOUT_S:.0f} s") from None
    except KeyError as error:
        raise RunError(f"the job's answer has no {error}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    if found is None:
        raise RunError(f"the pictures in {folder} cannot be read")
    return found


def _read(folder: Path) -> ClipFrames | None:
    """Return what a folder holds, and mark it as looked at; None: it is not whole."""
    try:
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        paths = tuple(folder / Path(name).name for name in facts["files"])
        if not all(path.is_file() for path in paths):
            return None
        (folder / _FACTS).touch()
        return ClipFrames(
            paths=paths,
            numbers=tuple(facts["numbers"]),
            num_frames=facts["num_frames"],
            width=facts["width"],
            height=facts["height"],
            fps=facts["fps"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _key(request: dict[str, Any], path: Path) -> str:
    """Name what is asked for and the state of the file: its size and time, or its images'."""
    files = [path, *sorted(path.iterdir())] if path.is_dir() else [path]
    state = [(file.name, (status := file.stat()).st_mtime_ns, status.st_size) for file in files]
    return sha256(json.dumps([request, state]).encode()).hexdigest()[:32]


def _make_room(cache: Path) -> None:
    """Remove the pictures that were not looked at for the longest, and what was left half made."""
    found = []
    for folder in cache.iterdir():
        with suppress(OSError):
            facts = folder / _FACTS
            looked_at = (facts if facts.exists() else folder).stat().st_mtime
            size = sum(file.stat().st_size for file in folder.iterdir())
            is_whole = "." not in folder.name
            if is_whole or time.time() - looked_at > _YOUNG_S:
                found.append((is_whole, looked_at, size, folder))
    total = sum(size for _, _, size, _ in found)
    for is_whole, _, size, folder in sorted(found):
        if not is_whole or total > MAX_CACHE_BYTES:
            shutil.rmtree(folder, ignore_errors=True)
            total -= size
