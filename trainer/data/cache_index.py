"""The cache folder: its index, its lock, and what may be removed from it.

`cache_index.json` says which items a source has, what their clips and captions were when they were
encoded, and which entries belong to them; so training starts without opening a single video. It
has one section for each source and each way to encode it, so two configs may share a folder: the
place of a source in its config does not count. A section is written unfinished before its first
entry changes, and finished when all are there.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from trainer.contract.dataset_config import DatasetConfig, SourceOptions
from trainer.contract.errors import BusyError, Problem
from trainer.contract.files import disk_errors, write_json
from trainer.data.buckets import Bucket
from trainer.data.cache_settings import CacheSettings, changed_settings
from trainer.data.entries import LATENTS_SUFFIX, TEXT_SUFFIX, is_menma_entry
from trainer.data.fingerprint import FileIdentity, digest
from trainer.data.latent_cache import LatentEntry
from trainer.data.windows import Window

INDEX_NAME = "cache_index.json"
INDEX_VERSION = "2"
"""Another one counts as no index; entries are of their own format and are found again."""
LOCK_NAME = "cache.lock"
_ENTRY_SUFFIXES = (LATENTS_SUFFIX, TEXT_SUFFIX)


@dataclass(frozen=True, slots=True)
class IndexedItem:
    """One clip with its caption as they were when they were cached."""

    identity: FileIdentity
    caption_key: str
    """`text_cache.text_key` of the caption; names its file, too."""
    entries: tuple[LatentEntry, ...]
    whole: bool = True
    """`entries` are all that the clip gives; none of its windows failed."""
    more_caption_keys: tuple[str, ...] = ()
    """Of further texts, of which every epoch takes one."""
    paired: Mapping[str, FileIdentity] = field(default_factory=dict)
    """What its `control` video and its `mask` were, if it has any."""

    @property
    def caption_keys(self) -> tuple[str, ...]:
        """Keys of all its texts."""
        return (self.caption_key, *self.more_caption_keys)


@dataclass(frozen=True, slots=True)
class Section:
    """One source's part of an index."""

    settings: Mapping[str, Any]
    """`CacheSettings.for_source` at the time."""
    items: Mapping[str, IndexedItem]
    """By the items' names."""
    problems: tuple[Problem, ...] = ()
    """What could not be used, and why."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Names of clips that gave nothing -> `fingerprint.stat_of` them."""
    extra_captions: Mapping[str, str] = field(default_factory=dict)
    """Captions that belong to no item (the empty one) -> their key."""
    finished: bool = False


@dataclass(frozen=True, slots=True)
class Unneeded:
    """Entries of a cache folder that nobody asked for: how many, and their size."""

    count: int = 0
    num_bytes: int = 0

    def __add__(self, other: Unneeded) -> Unneeded:
        return Unneeded(self.count + other.count, self.num_bytes + other.num_bytes)


def source_names(dataset: DatasetConfig) -> list[str]:
    """Return a name of each source: its kind, its place seen from the cache folder, its number.

    The number tells sources of one dataset apart that are named alike; the relative place lets a
    dataset be moved with its cache. The order of training hangs on these names.
    """
    names: list[str] = []
    for source in dataset.sources:
        base = _base(source)
        number = sum(name.rpartition(" #")[0] == base for name in names)
        names.append(f"{base} #{number}")
    return names


def section_name(source: SourceOptions, settings: CacheSettings) -> str:
    """Return the section of a source that is encoded in this way; all identities are known."""
    return f"{_base(source)} #{digest(settings.for_source(source))}"


def find_section(
    sections: Mapping[str, Section], source: SourceOptions, settings: CacheSettings
) -> Section | None:
    """Return a source's section that fits these settings; else the one that differs least.

    Identities of None fit any. Among equals the one written last is taken.
    """
    wanted = settings.for_source(source)
    best: tuple[int, Section] | None = None
    for section in _sections_of(sections, source):
        differences = len(changed_settings(dict(section.settings), wanted))
        if best is None or differences <= best[0]:
            best = (differences, section)
    return None if best is None else best[1]


def is_cached(source: SourceOptions, settings: CacheSettings) -> bool:
    """Tell whether a source has been cached to the end with these settings."""
    section = find_section(read_index(source.cache_path), source, settings)
    return (
        section is not None
        and section.finished
        and not changed_settings(dict(section.settings), settings.for_source(source))
    )


def known_identities(source: SourceOptions) -> dict[str, FileIdentity]:
    """Return what the clips of a source were when they were cached, by the items' names."""
    return {
        name: item.identity
        for section in _sections_of(read_index(source.cache_path), source)
        for name, item in section.items.items()
    }


def read_index(folder: Path) -> dict[str, Section]:
    """Return the sections of a cache folder; one that cannot be read counts as not there.

    Such an index is rebuilt by the next cache job; no entry is lost by that.
    """
    try:
        content = json.loads((folder / INDEX_NAME).read_text("utf-8"))
        if content["format"] != INDEX_VERSION:
            return {}
        return {name: _section(values) for name, values in content["sections"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_index(folder: Path, sections: Mapping[str, Section]) -> None:
    """Replace a cache folder's index in one step.

    Raises:
        DiskError: the disk is full, read-only or gone.
    """
    content = {name: _to_json(section) for name, section in sections.items()}
    write_json(folder / INDEX_NAME, {"format": INDEX_VERSION, "sections": content})


def unneeded_entries(folder: Path, sections: Iterable[Section], *, remove: bool) -> Unneeded:
    """Count entries that none of these sections names, and remove them if told to.

    Only files that carry Menma's own mark count. What killed writers left is removed in any case.
    The caller holds the lock.
    """
    wanted = {file for section in sections for file in _files(section)}
    found = Unneeded()
    with disk_errors(folder):
        for path in sorted(folder.iterdir()):
            if _is_left_over(path):
                path.unlink(missing_ok=True)
            elif _is_stale(path, wanted):
                found += Unneeded(1, path.stat().st_size)
                if remove:
                    path.unlink()
    return found


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a cache folder for one job.

    The lock is the operating system's, so it ends with the process, however that ends.

    Raises:
        BusyError: another process holds it.
        DiskError: the folder cannot be written.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK_NAME).open("a+", encoding="utf-8")
    with file:
        if not _try_lock(file):
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise BusyError(f"{folder} is being cached by {holder}", hint="wait for it to end")
        file.truncate(0)
        file.write(f"process {os.getpid()}\n")
        file.flush()
        try:
            yield
        finally:
            with suppress(OSError):  # what ended the job counts
                file.truncate(0)


def _is_left_over(path: Path) -> bool:
    """Tell whether a killed writer left this file (`files.atomic_path` names them so)."""
    ours = any(f"{ending}." in path.name for ending in (*_ENTRY_SUFFIXES, INDEX_NAME))
    return ours and path.name.startswith(".") and path.name.endswith(".partial")


def _is_stale(path: Path, wanted: Container[str]) -> bool:
    named_so = path.name.endswith(_ENTRY_SUFFIXES) and path.name not in wanted
    return named_so and is_menma_entry(path)


def _try_lock(file: IO[str]) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(1 << 20)  # Windows locks are mandatory: leave the text readable
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some network file systems have no locks. Entries are written whole and named by their
        # content, so two jobs would only do the same work twice.
        return error.errno in {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}
    return True


def _base(source: SourceOptions) -> str:
    return f"{source.kind} {_relative(source)}"


def _sections_of(sections: Mapping[str, Section], source: SourceOptions) -> Iterator[Section]:
    base = _base(source)
    return (item for name, item in sections.items() if name.rpartition(" #")[0] == base)


def _relative(source: SourceOptions) -> str:
    try:
        relative = os.path.relpath(source.media_path, source.cache_path)
    except ValueError:  # another drive
        return source.media_path.as_posix()
    return Path(relative).as_posix()


def _files(section: Section) -> Iterator[str]:
    for item in section.items.values():
        for key in item.caption_keys:
            yield f"{key}{TEXT_SUFFIX}"
        for entry in item.entries:
            yield entry.file
    for key in section.extra_captions.values():
        yield f"{key}{TEXT_SUFFIX}"


def _to_json(section: Section) -> dict[str, Any]:
    return {
        "finished": section.finished,
        "settings": dict(section.settings),
        "skipped": dict(section.skipped),
        "extra_captions": dict(section.extra_captions),
        "items": {name: _item_to_json(item) for name, item in section.items.items()},
        "problems": [
            {
                "message": problem.message,
                "file": problem.file and str(problem.file),
                "line": problem.line,
                "hint": problem.hint,
            }
            for problem in section.problems
        ],
    }


def _item_to_json(item: IndexedItem) -> dict[str, Any]:
    return {
        **_identity_to_json(item.identity),
        "caption": item.caption_key,
        "more_captions": list(item.more_caption_keys),
        "paired": {what: _identity_to_json(known) for what, known in item.paired.items()},
        "whole": item.whole,
        "entries": [
            [entry.file, entry.key, list(entry.window), list(entry.bucket)]
            for entry in item.entries
        ],
    }


def _identity_to_json(identity: FileIdentity) -> dict[str, Any]:
    return {
        "content": identity.content,
        "stat": identity.stat,
        "settled": identity.settled,
    }


def _identity(values: Mapping[str, Any]) -> FileIdentity:
    return FileIdentity(values["content"], values["stat"], values["settled"])


def _section(values: Mapping[str, Any]) -> Section:
    problems = tuple(
        Problem(
            item["message"],
            file=Path(item["file"]) if item["file"] else None,
            line=item["line"],
            hint=item["hint"],
        )
        for item in values["problems"]
    )
    return Section(
        values["settings"],
        {name: _item(item) for name, item in values["items"].items()},
        problems,
        values["skipped"],
        values["extra_captions"],
        values["finished"],
    )


def _item(values: Mapping[str, Any]) -> IndexedItem:
    entries = tuple(
        LatentEntry(Path(file).name, key, Window(*window), Bucket(*bucket))
        for file, key, window, bucket in values["entries"]
    )
    return IndexedItem(
        _identity(values),
        values["caption"],
        entries,
        values["whole"],
        tuple(values.get("more_captions", ())),
        {what: _identity(known) for what, known in values.get("paired", {}).items()},
    )
