"""What a source finds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from trainer.contract.dataset_config import MediaKind
from trainer.contract.errors import Problem
from trainer.contract.media_kinds import IMAGE_EXTENSIONS


@dataclass(frozen=True, slots=True)
class MediaItem:
    """One clip or image with its caption."""

    name: str
    """Path below the source's folder: unique in it, and the same wherever the dataset lies."""
    path: Path
    """A file, or a folder of images."""
    kind: MediaKind
    caption: str
    """What is encoded for it; of several texts the first."""
    more_captions: tuple[str, ...] = ()
    """Other texts that are encoded for it, of which every epoch takes one."""
    control: Path | None = None
    """Its control video or image."""
    mask: Path | None = None
    """Its mask: an image, a video or a folder of images."""

    @property
    def captions(self) -> tuple[str, ...]:
        """All texts that are encoded for it."""
        return (self.caption, *self.more_captions)

    @property
    def paired(self) -> dict[str, Path]:
        """The files that belong to it, by what they are."""
        given = {"control": self.control, "mask": self.mask}
        return {key: path for key, path in given.items() if path is not None}


@dataclass(frozen=True, slots=True)
class SourceScan:
    """The items of one source, in a fixed order, and what was left out."""

    items: tuple[MediaItem, ...]
    problems: tuple[Problem, ...] = ()


def list_images(folder: Path) -> list[Path]:
    """Return a folder's images in the order people count: frame 2 before frame 10."""
    images = (
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_EXTENSIONS and not path.name.startswith(".")
    )
    return sorted(images, key=natural_key)


def natural_key(path: Path) -> tuple[list[tuple[int, int | str]], str]:
    """Sort key of a name with its digits read as numbers."""
    parts = re.split(r"(\d+)", path.name)
    key: list[tuple[int, int | str]] = [
        (0, int(part)) if part.isdecimal() else (1, part) for part in parts if part
    ]
    return key, path.name
