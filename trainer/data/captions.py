"""Captions: the texts of an item, from a file beside it or from a line of a list.

What is read is one text or several; `caption_texts` makes of it what is encoded.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from trainer.contract.caption_options import CaptionOptions
from trainer.contract.errors import DataError
from trainer.core.rng import derive_seed

_TRIES_PER_ORDER = 8


def caption_path(media: Path, extension: str) -> Path:
    """Return the caption's file: beside the clip, of its name but for the extension.

    A folder of images `walk` has `walk.txt`.
    """
    return media.with_suffix(extension) if not media.is_dir() else Path(f"{media}{extension}")


def read_captions(media: Path, extension: str) -> tuple[str, ...]:
    """Return what stands in the caption file of a clip, an image or a folder of images.

    It is the UTF-8 file `caption_path`. A `.json` file holds a string or a list of strings, any
    other one text. White space around a text is not part of it.

    Raises:
        DataError: there is no such file, it is empty, or it is no text.
    """
    path = caption_path(media, extension)
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"has no caption: there is no {path.name}") from None
    except UnicodeDecodeError:
        raise DataError(f"its caption {path.name} is not UTF-8 text") from None
    except OSError as error:
        raise DataError(f"its caption {path.name} cannot be read: {error.strerror}") from None
    try:
        captions = several_captions(_from_json(text)) if extension.lower() == ".json" else (text,)
    except ValueError:  # what JSON cannot be, too
        captions = None
    if captions is None:
        raise DataError(
            f"its caption {path.name} is no JSON string or list of strings",
            hint='write it as ["one caption", "another one"]',
        )
    captions = tuple(text for caption in captions if (text := caption.strip()))
    if not captions:
        raise DataError(f"its caption {path.name} is empty")
    return captions


def several_captions(value: object) -> tuple[str, ...] | None:
    """Return the strings of a JSON value that is one or a list of them; else None."""
    listed: list[object] = value if isinstance(value, list) else [value]
    texts = tuple(text for text in listed if isinstance(text, str))
    return texts if len(texts) == len(listed) else None


def caption_texts(captions: Sequence[str], options: CaptionOptions) -> tuple[str, ...]:
    """Return the texts that are encoded for an item, each once; the first is as it was written.

    They depend on the captions and the options alone, so that caching again finds them.

    Args:
        captions: as read, not empty.
        options: what becomes of them.
    """
    if options.caption_lines:
        captions = [line.strip() for text in captions for line in text.splitlines()]
    texts = [text for text in dict.fromkeys(captions) if text]
    if options.shuffle_tags:
        texts = [order for text in texts for order in _tag_orders(text, options)]
    finished = (
        f"{options.caption_prefix}{_with_triggers(text, options)}{options.caption_suffix}"
        for text in texts
    )
    return tuple(dict.fromkeys(finished))


def _tag_orders(text: str, options: CaptionOptions) -> list[str]:
    """Return the caption and other orders of its tags, `caption_variants` in all, if there are."""
    tags = [tag.strip() for tag in text.split(options.tag_separator)]
    tags = [tag for tag in tags if tag]
    if not tags:
        return [text]
    kept, free = tags[: options.keep_tags], tags[options.keep_tags :]
    orders = [_joined(tags, options)]
    draws = random.Random(derive_seed(0, "tags", text))
    for _ in range(_TRIES_PER_ORDER * options.caption_variants):
        if len(orders) == options.caption_variants:
            break
        draws.shuffle(free)
        order = _joined([*kept, *free], options)
        if order not in orders:
            orders.append(order)
    return orders


def _with_triggers(text: str, options: CaptionOptions) -> str:
    missing = [word for word in options.trigger_words if not _holds(text, word)]
    return _joined([*missing, text], options) if missing else text


def _holds(text: str, word: str) -> bool:
    """Tell whether a text has this word (or these) in it, as whole words, in any case."""
    pattern = rf"(?<!\w){re.escape(word)}(?!\w)"
    return re.search(pattern, text, re.IGNORECASE) is not None


def _joined(parts: Iterable[str], options: CaptionOptions) -> str:
    separator = options.tag_separator
    return (separator if separator[-1].isspace() else f"{separator} ").join(parts)


def _from_json(text: str) -> object:
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # "\\ud800" is JSON and no text
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value
