"""Files that belong to clips by their names: control videos and masks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from trainer.contract.dataset_config import MediaKind, SourceOptions
from trainer.contract.errors import DataError
from trainer.contract.media_kinds import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from trainer.data.sources.item import list_images


class PairedFolder:
    """The media of a folder, by their names without extension."""

    def __init__(self, folder: Path, what: str) -> None:
        """List the folder.

        Args:
            folder: of control videos or masks; None of its sub-folders is searched, a folder of
                images is one clip.
            what: they are called so in messages, e.g. "mask".

        Raises:
            DataError: it cannot be read.
        """
        self._folder = folder
        self._what = what
        self._found: dict[str, list[Path]] = {}
        try:
            for path in sorted(folder.iterdir()):
                if not path.name.startswith(".") and _is_media(path):
                    self._found.setdefault(_stem(path), []).append(path)
        except OSError as error:
            reason = error.strerror or str(error)
            raise DataError(f"the folder of {what}s cannot be read: {reason}") from None

    def of(self, media: Path) -> Path:
        """Return the file or folder of images that has the name of a clip.

        Raises:
            DataError: there is none, or more than one.
        """
        found = self._found.get(_stem(media), [])
        if not found:
            raise DataError(
                f"has no {self._what}: there is no {_stem(media)}.* in {self._folder}",
                hint=f"add it, or move the clip to a source without {self._what}s",
            )
        if len(found) > 1:
            names = " and ".join(path.name for path in found)
            raise DataError(f"has {len(found)} {self._what}s: {names}", hint="leave one of them")
        return found[0]


def paired_folders(source: SourceOptions) -> Mapping[str, PairedFolder]:
    """Return the folders of a source's `control` videos and `mask`s, those that it has.

    Raises:
        DataError: one cannot be read.
    """
    given = {
        "control": (source.control_directory, f"control {source.kind}"),
        "mask": (source.mask_directory, "mask"),
    }
    return {key: PairedFolder(folder, what) for key, (folder, what) in given.items() if folder}


def kind_of(path: Path) -> MediaKind:
    """Return what a file is by its name; a folder of images is a video."""
    return "image" if path.suffix.lower() in IMAGE_EXTENSIONS and path.is_file() else "video"


def _is_media(path: Path) -> bool:
    if path.is_dir():
        return bool(list_images(path))
    return path.suffix.lower() in IMAGE_EXTENSIONS | VIDEO_EXTENSIONS


def _stem(path: Path) -> str:
    return path.name if path.is_dir() else path.stem
