"""Checkpoints: folders that are whole or absent, with a manifest that proves it.

    checkpoints/
      step-00000500/          manifest.json, progress.json, the engine's files, the caller's files
      .step-00001000.partial  being written; removed at the next start
      .step-00000500.old      being replaced or deleted; put back at the next start if need be

Nothing is trusted that is not verified: the newest checkpoint is found by reading the manifests
and comparing every file's size and digest, not from a pointer file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from trainer.contract.errors import DiskError, ModelFileError
from trainer.contract.files import disk_errors, fsync, write_json
from trainer.core.seams import Engine
from trainer.engine.state_files import await_parts, read_layout

FORMAT = 1
_MANIFEST = "manifest.json"
_PROGRESS = "progress.json"
_NAME = re.compile(r"step-(\d{8,})")
_CHUNK = 1 << 22

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose files were found as its manifest describes them."""

    path: Path
    step: int
    sequence: int
    """Counts the saves of a run; the step may repeat when an older checkpoint was resumed."""
    progress: dict[str, Any]
    """What the caller gave to `save`."""
    engine: str
    world_size: int
    zero_stage: int


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        root: the run's `checkpoints` folder; made at the first save.
        keep_last: how many stay on disk.
        warn: told about every broken checkpoint that is passed over; default: the log.
    """

    def __init__(
        self, root: Path, keep_last: int, warn: Callable[[str], None] = logger.warning
    ) -> None:
        if keep_last < 1:
            raise ValueError("keep_last must be at least 1")
        self._root = root
        self._keep_last = keep_last
        self._warn = warn

    def tidy(self) -> None:
        """Remove what an interrupted save or deletion left. Once at the start, on one rank only.

        Raises:
            DiskError: the folder cannot be written.
        """
        if not self._root.is_dir():
            return
        with disk_errors(self._root):
            for leftover in self._root.glob(".step-*.partial"):
                shutil.rmtree(leftover)
            for old in self._root.glob(".step-*.old"):
                place = self._root / old.name.removeprefix(".").removesuffix(".old")
                if place.exists() or not (old / _MANIFEST).is_file():
                    shutil.rmtree(old)
                else:  # killed between the two renames of a replacement
                    old.rename(place)
            fsync(self._root)

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        progress: dict[str, Any],
        engine: Engine,
    ) -> Checkpoint:
        """Save the engine's state, what `write` adds, and `progress`. A collective call.

        `write` gets the folder and is called on every rank, so that it may use the engine's
        collective calls; it must write a file on one rank only. `progress` is JSON, rank 0's
        counts. Older checkpoints are deleted only when the new one was read back from the disk.

        Raises:
            DiskError: on every rank, some rank could not write; the earlier checkpoints are
                intact and nothing of the new one is left.
        """
        partial = self._root / f".step-{step:08d}.partial"
        try:
            with _together(engine, "make the folder of the checkpoint"), disk_errors(partial):
                if engine.rank == 0:
                    _make_empty(partial)
            with _together(engine, "save its weights"), disk_errors(partial):
                engine.save_state(partial)
            with _together(engine, "save its part"), disk_errors(partial):
                write(partial)
            with _together(engine, "finish the checkpoint"), disk_errors(partial):
                if engine.rank == 0:
                    self._finish(partial, step, progress, engine.world_size)
        except BaseException:
            if engine.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        return _open(self._root / f"step-{step:08d}")

    def latest(self) -> Checkpoint | None:
        """Return the checkpoint saved last among those that are whole, or None.

        Broken ones are reported and left alone.
        """
        for folder in self._newest_first():
            try:
                return self.load(folder)
            except ModelFileError as error:
                self._warn(f"not resuming from {folder}: {error.message}")
        return None

    def load(self, path: Path) -> Checkpoint:
        """Return the checkpoint in `path` after comparing every file with its manifest.

        Raises:
            ModelFileError: it is missing or broken; the message says which file and why.
        """
        checkpoint = _open(path)
        _verify(path, _read_manifest(path))
        return checkpoint

    def resolve(self, resume: str) -> Checkpoint | None:
        """Return what `--resume` asks for.

        Args:
            resume: "auto" (the latest, None if there is none), "never" (None), or a path: a
                checkpoint, a folder of checkpoints, or a run directory.

        Raises:
            ModelFileError: the path holds no whole checkpoint.
        """
        if resume == "never":
            return None
        if resume == "auto":
            return self.latest()
        path = Path(resume)
        if (path / _MANIFEST).is_file():
            return self.load(path)
        for folder in (path / "checkpoints", path):
            found = CheckpointStore(folder, self._keep_last, self._warn).latest()
            if found is not None:
                return found
        raise ModelFileError(
            f"{path} holds no whole checkpoint",
            hint="give a folder such as runs/NAME/checkpoints/step-00000500, or --resume auto",
        )

    def _finish(self, partial: Path, step: int, progress: dict[str, Any], world_size: int) -> None:
        write_json(partial / _PROGRESS, progress)
        await_parts(partial)
        names = sorted(_files_in(partial))
        for name in names:
            fsync(partial / name)
        manifest = {
            "format": FORMAT,
            "step": step,
            "sequence": 1 + max((found.sequence for found in self._readable()), default=0),
            **read_layout(partial),
            "world_size": world_size,
            "files": _describe(partial, names),
        }
        write_json(partial / _MANIFEST, manifest)
        for folder in [path for path in partial.rglob("*") if path.is_dir()]:
            fsync(folder)
        fsync(partial)
        try:
            _verify(partial, manifest)
        except ModelFileError as error:
            raise DiskError(
                f"the checkpoint was not written rightly: {error.message}",
                hint="the disk or its file system is faulty; earlier checkpoints are intact",
            ) from error
        self._put_in_place(partial, self._root / f"step-{step:08d}")
        self._rotate()

    def _put_in_place(self, partial: Path, place: Path) -> None:
        old = _hidden(place)
        if place.exists():
            place.rename(old)
        partial.rename(place)
        fsync(self._root)
        if old.exists():
            shutil.rmtree(old)

    def _rotate(self) -> None:
        whole = sorted(self._readable(), key=lambda found: found.sequence, reverse=True)
        for checkpoint in whole[self._keep_last :]:
            hidden = _hidden(checkpoint.path)
            # First out of sight, and no longer complete, so that half of it is never taken for one.
            checkpoint.path.rename(hidden)
            (hidden / _MANIFEST).unlink()
            shutil.rmtree(hidden)
        fsync(self._root)

    def _readable(self) -> Iterator[Checkpoint]:
        """Yield those whose manifest is readable and whose files have the right sizes."""
        for folder in self._folders():
            try:
                checkpoint = _open(folder)
                _check_sizes(folder, _read_manifest(folder))
            except ModelFileError:
                continue
            yield checkpoint

    def _folders(self) -> list[Path]:
        if not self._root.is_dir():
            return []
        return [path for path in self._root.iterdir() if _NAME.fullmatch(path.name)]

    def _newest_first(self) -> list[Path]:
        def order(folder: Path) -> tuple[int, str]:
            try:
                return _open(folder).sequence, folder.name
            except ModelFileError:  # reported by `latest`, which cannot open it either
                return (1 << 62), folder.name

        return sorted(self._folders(), key=order, reverse=True)


@contextmanager
def _together(engine: Engine, what: str) -> Iterator[None]:
    """Run a block on every rank; where it fails on one, it fails on all, and none waits."""
    done = False
    try:
        yield
        done = True
    finally:
        failed = engine.any_rank(not done)
    if failed:
        raise DiskError(
            f"another process of this run could not {what}",
            hint="its own message says why; earlier checkpoints are intact",
        )


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _hidden(place: Path) -> Path:
    hidden = place.parent / f".{place.name}.old"
    if hidden.exists():
        shutil.rmtree(hidden)
    return hidden


def _open(path: Path) -> Checkpoint:
    manifest = _read_manifest(path)
    try:
        return Checkpoint(
            path=path,
            step=int(manifest["step"]),
            sequence=int(manifest["sequence"]),
            progress=_read_object(path, _PROGRESS),
            engine=str(manifest["engine"]),
            world_size=int(manifest["world_size"]),
            zero_stage=int(manifest["zero_stage"]),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise _broken(path, f"its manifest is damaged: {error!r}") from error


def _read_object(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((path / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(path, f"{name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise _broken(path, f"{name} is not a JSON object")
    return content


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = _read_object(path, _MANIFEST)
    if not isinstance(manifest.get("files"), dict):
        raise _broken(path, f"{_MANIFEST} lists no files")
    if manifest.get("format") != FORMAT:
        raise _broken(path, f"it has format {manifest.get('format')}, this version reads {FORMAT}")
    return manifest


def _describe(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    digests = _digests([folder / name for name in names])
    return {
        name: {"size": (folder / name).stat().st_size, "blake2b": digest}
        for name, digest in zip(names, digests, strict=True)
    }


def _check_sizes(path: Path, manifest: dict[str, Any]) -> list[str]:
    names = []
    for name, entry in manifest["files"].items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise _broken(path, f"its manifest names a file outside of it: {name!r}")
        try:
            size = (path / name).stat().st_size
        except OSError as error:
            raise _broken(path, f"{name} is missing") from error
        if not isinstance(entry, dict) or size != entry.get("size"):
            raise _broken(path, f"{name} has {size} bytes, not what the manifest says")
        names.append(name)
    if _PROGRESS not in names:
        raise _broken(path, f"its manifest does not name {_PROGRESS}")
    return names


def _verify(path: Path, manifest: dict[str, Any]) -> None:
    names = _check_sizes(path, manifest)
    try:
        digests = _digests([path / name for name in names])
    except OSError as error:
        raise _broken(path, f"it cannot be read: {error}") from error
    for name, digest in zip(names, digests, strict=True):
        if digest != manifest["files"][name].get("blake2b"):
            raise _broken(path, f"{name} is not what was written")


def _digests(files: list[Path]) -> list[str]:
    with ThreadPoolExecutor(max_workers=min(8, len(files) or 1)) as pool:
        return list(pool.map(_digest, files))


def _digest(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    with file.open("rb") as stream:
        if hasattr(os, "posix_fadvise"):  # read what the disk has, not what the cache remembers
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _files_in(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield path.relative_to(folder).as_posix()


def _broken(path: Path, reason: str) -> ModelFileError:
    return ModelFileError(
        f"{path} is not a whole checkpoint: {reason}",
        hint="resume from another one (--resume PATH), or from the start (--resume never)",
    )
