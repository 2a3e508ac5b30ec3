"""Captions: the text of an item, from a file beside it or from a line of a list."""

from __future__ import annotations

from pathlib import Path

from trainer.contract.errors import DataError


def caption_path(media: Path, extension: str) -> Path:
    """Return the caption's file: beside the clip, of its name but for the extension.

    A folder of images `walk` has `walk.txt`.
    """
    return media.with_suffix(extension) if not media.is_dir() else Path(f"{media}{extension}")


def read_caption(media: Path, extension: str) -> str:
    """Return the caption of a clip, an image or a folder of images.

    It is in the UTF-8 file `caption_path`. White space around it is not part of it.

    Raises:
        DataError: there is no such file, it is empty, or it is no text.
    """
    path = caption_path(media, extension)
    try:
        caption = path.read_text("utf-8-sig").strip()
    except FileNotFoundError:
        raise DataError(f"has no caption: there is no {path.name}") from None
    except UnicodeDecodeError:
        raise DataError(f"its caption {path.name} is not UTF-8 text") from None
    except OSError as error:
        raise DataError(f"its caption {path.name} cannot be read: {error.strerror}") from None
    if not caption:
        raise DataError(f"its caption {path.name} is empty")
    return caption
