"""Captions: the text of an item, from a file beside it or from a line of a list."""

from __future__ import annotations

from pathlib import Path

from trainer.contract.errors import DataError


def read_caption(media: Path, extension: str) -> str:
    """Return the caption of a clip, an image or a folder of images.

    It is in a UTF-8 file beside it, of the same name but for the extension; a folder `walk`
    has `walk.txt`. White space around it is not part of it.

    Raises:
        DataError: there is no such file, it is empty, or it is no text.
    """
    path = media.with_suffix(extension) if not media.is_dir() else Path(f"{media}{extension}")
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
