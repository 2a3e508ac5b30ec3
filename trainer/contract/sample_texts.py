"""Texts of samples: what no encoder of texts and no file could hold is refused at once."""

from __future__ import annotations

from pydantic import field_validator
from pydantic_core import PydanticCustomError

from trainer.contract.options import Options


class SampleTexts(Options):
    """A part of a prompt and of `[sampling]`."""

    @field_validator("prompt", "negative_prompt", "name", check_fields=False)
    @classmethod
    def _is_unicode(cls, value: str | None) -> str | None:
        """Refuse halves of characters: of a shell's bytes that are no UTF-8, of JSON's \\ud83d."""
        if value is not None and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise PydanticCustomError("unicode", "holds what is no UTF-8 text")
        return value
