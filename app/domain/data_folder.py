"""What lies in a folder of clips or images, by its file names and caption files; no file of media
is opened, `menma check` does that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.contract.dataset_config import CACHE_FOLDER, MediaKind
from trainer.contract.media_kinds import (
    IMAGE_EXTENSIONS,
    OTHER_MEDIA_EXTENSIONS,
    VIDEO_EXTENSIONS,
)

CAPTION_EXTENSION = ".txt"
_MEDIA = IMAGE_EXTENSIONS | VIDEO_EXTENSIONS | OTHER_MEDIA_EXTENSIONS
_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Medium:
    """The clips, or the images, of a folder."""

    items: tuple[str, ...] = ()
    """Names; a folder of images is a clip, too."""
    without_caption: tuple[str, ...] = ()
    """Those that have no caption file, an empty one, or one that is no text."""

    @property
    def num_items(self) -> int:
        """How many there are."""
        return len(self.items)

    @property
    def num_usable(self) -> int:
        """How many have a caption; the others are not trained on."""
        return len(self.items) - len(self.without_caption)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFolder:
    """A folder that somebody wants to train on."""

    path: Path
    problem: str = ""
    """Why it cannot be read; empty: it can."""
    videos: Medium = Medium()
    images: Medium = Medium()
    unread: tuple[str, ...] = ()
    """Media that Menma does not read, such as GIFs."""
    inner: tuple[str, ...] = ()
    """Folders in it that hold media: they are not searched."""
    first_caption: str = ""
    """Of the first item that has one."""

    def medium(self, kind: MediaKind) -> Medium:
        """Return the clips or the images."""
        return self.videos if kind == "video" else self.images

    @property
    def kinds(self) -> tuple[MediaKind, ...]:
        """What there is, the more frequent kind first."""
        kinds: tuple[MediaKind, ...] = ("video", "image")
        found = [kind for kind in kinds if self.medium(kind).items]
        return tuple(sorted(found, key=lambda kind: -self.medium(kind).num_items))


def look_into(path: Path) -> DataFolder:
    """Return what lies in a folder. Its folders are not searched, as in training."""
    try:
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    except FileNotFoundError:
        return DataFolder(path=path, problem="there is no such folder")
    except NotADirectoryError:
        return DataFolder(path=path, problem="it is a file, a folder is needed")
    except OSError as error:
        return DataFolder(path=path, problem=f"cannot be read: {error.strerror or error}")
    clip_folders, inner = _folders(entries)
    videos = [entry for entry in entries if entry.suffix.lower() in VIDEO_EXTENSIONS]
    images = [entry for entry in entries if entry.suffix.lower() in IMAGE_EXTENSIONS]
    unread = [e.name for e in entries if e.suffix.lower() in OTHER_MEDIA_EXTENSIONS]
    captions = {item: caption_of(item) for item in (*videos, *clip_folders, *images)}
    return DataFolder(
        path=path,
        videos=_medium(sorted((*videos, *clip_folders)), captions),
        images=_medium(images, captions),
        unread=tuple(unread),
        inner=tuple(inner),
        first_caption=next(filter(None, captions.values()), ""),
    )


def caption_of(item: Path) -> str:
    """Return the caption beside a clip or an image; "" where it has none that can be read."""
    file = Path(f"{item}{CAPTION_EXTENSION}")
    if not item.is_dir():
        file = item.with_suffix(CAPTION_EXTENSION)
    try:
        return file.read_text("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def some(names: Sequence[str]) -> str:
    """Return a few names, and how many there are more."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _folders(entries: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Return the folders of images, which are clips, and those that hold other media."""
    clips, others = [], []
    for entry in entries:
        if entry.name == CACHE_FOLDER or not entry.is_dir():
            continue
        try:
            suffixes = {inner.suffix.lower() for inner in entry.iterdir()}
        except OSError:
            continue
        if suffixes & IMAGE_EXTENSIONS:
            clips.append(entry)
        elif suffixes & _MEDIA:
            others.append(entry.name)
    return clips, others


def _medium(items: Sequence[Path], captions: dict[Path, str]) -> Medium:
    return Medium(
        items=tuple(item.name for item in items),
        without_caption=tuple(item.name for item in items if not captions[item]),
    )
