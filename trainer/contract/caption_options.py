"""Options of a source that say what becomes of its captions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from trainer.contract.options import Options


def _leading_dot(value: Any) -> Any:
    return f".{value}" if isinstance(value, str) and value and value[0] != "." else value


def _as_list(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class CaptionOptions(Options):
    """Keys about captions, for `general` and for a source.

    A caption is made in this order: the text (or one of its lines), its tags shuffled, trigger
    words in front, then prefix and suffix around it.
    """

    caption_extension: Annotated[str, BeforeValidator(_leading_dot), Field(min_length=2)] = ".txt"
    """A folder's captions are files of the clip's name with this extension; `.json` files hold one
    caption as a string, or a list of captions of which every epoch takes one."""
    caption_lines: bool = False
    """Each line of a caption is a caption of its own, of which every epoch takes one."""
    caption_prefix: str = Field(default="", max_length=10_000)
    """Put in front of each caption, as it is (mind the space)."""
    caption_suffix: str = Field(default="", max_length=10_000)
    """Put behind each caption, as it is."""
    trigger_words: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_as_list)
    ] = ()
    """Words that are put in front of each caption that lacks them, in this order."""
    caption_dropout: float = Field(default=0.0, ge=0, le=1)
    """Probability that an item is trained with the empty caption, drawn anew each time."""
    shuffle_tags: bool = False
    """Take captions for lists of tags, and give them in another order every epoch."""
    tag_separator: str = Field(default=",", min_length=1, max_length=20)
    """What stands between two tags."""
    keep_tags: int = Field(default=0, ge=0)
    """So many tags at the start stay where they are when others are shuffled."""
    caption_variants: int = Field(default=4, ge=2, le=100)
    """With `shuffle_tags`: orders of each caption that are encoded, the original one included;
    every epoch takes one of them."""
