"""umT5's tokenizer: cleaning, pieces, end mark; read from `spiece.model` or `tokenizer.json`.

transformers' own T5 tokenizers are not used: from version 5 on they rebuild the vocabulary with
another unknown id and without byte fallback, so unseen characters get wrong ids.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from trainer.contract.errors import ModelFileError

MAX_TOKENS = 512
"""Tokens of a prompt that the transformers were trained with, the end mark included."""

_SPECIAL_IDS = {"<pad>": 0, "</s>": 1, "<unk>": 3}
_FILE_NAMES = ("spiece.model", "tokenizer.json")
_WHITESPACE = re.compile(r"\s+")


class Tokenizer(Protocol):
    """Text to umT5's ids."""

    num_pieces: int
    """Ids are below this."""

    def encode(self, prompt: str) -> list[int]:
        """Return the ids of the cleaned prompt and the end mark, however many there are."""
        ...


def clean_prompt(prompt: str) -> str:
    """Mend broken encodings, resolve HTML entities (twice) and collapse white space."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return _WHITESPACE.sub(" ", text).strip()


def truncate(ids: Sequence[int], max_tokens: int = MAX_TOKENS) -> list[int]:
    """Cut `ids` to `max_tokens`; the last one stays the end mark, as in the official code."""
    return [*ids[: max_tokens - 1], ids[-1]] if len(ids) > max_tokens else list(ids)


class SentencePieceTokenizer:
    """The sentencepiece model as released (`spiece.model`).

    Raises:
        ModelFileError: the bytes are no such model, or not umT5's.
    """

    def __init__(self, model: bytes, origin: str) -> None:
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ModelFileError(
                f"{origin} is not a sentencepiece model", hint="download spiece.model of umT5 again"
            ) from error
        processor = self._processor
        ids = (processor.pad_id(), processor.eos_id(), processor.unk_id())
        _check_special_ids(dict(zip(_SPECIAL_IDS, ids, strict=True)), origin)
        self.num_pieces: int = self._processor.get_piece_size()

    def encode(self, prompt: str) -> list[int]:
        """Return the ids of the cleaned prompt and the end mark."""
        ids: list[int] = self._processor.encode(clean_prompt(prompt))
        return [*ids, _SPECIAL_IDS["</s>"]]


class JsonTokenizer:
    """The same model in Hugging Face's format (`tokenizer.json`).

    Raises:
        ModelFileError: the file is damaged, not umT5's, or was rewritten with wrong ids.
    """

    def __init__(self, path: Path) -> None:
        import tokenizers

        try:
            text = path.read_text(encoding="utf-8")
            content = json.loads(text)
            # It raises plain Exception for anything it does not like.
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:
            raise ModelFileError(
                f"{path} is not a tokenizer: {error}", hint="download it again, or use spiece.model"
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        _check_special_ids(_json_special_ids(content, self._tokenizer), str(path))
        self.num_pieces: int = self._tokenizer.get_vocab_size(with_added_tokens=False)

    def encode(self, prompt: str) -> list[int]:
        """Return the ids of the cleaned prompt and the end mark."""
        encoding = self._tokenizer.encode(clean_prompt(prompt), add_special_tokens=False)
        return [*encoding.ids, _SPECIAL_IDS["</s>"]]


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Read `spiece.model`, `tokenizer.json`, or a folder that holds one of them.

    Raises:
        ModelFileError: there is none, or it is not umT5's.
    """
    path = Path(path)
    if path.is_dir():
        return find_tokenizer([path])
    if not path.is_file():
        raise ModelFileError(f"{path} does not exist", hint="check the path to the tokenizer")
    if path.suffix == ".json":
        return JsonTokenizer(path)
    return SentencePieceTokenizer(path.read_bytes(), str(path))


def find_tokenizer(folders: Iterable[Path]) -> Tokenizer:
    """Return the tokenizer in the first of `folders` that holds one.

    Raises:
        ModelFileError: none does, or it is not umT5's.
    """
    places = [folder / name for folder in folders for name in _FILE_NAMES]
    for place in places:
        if place.is_file():
            return load_tokenizer(place)
    raise ModelFileError(
        "no tokenizer found; looked for " + ", ".join(str(place) for place in places),
        hint="give model.tokenizer: umT5's spiece.model (google/umt5-xxl) or the folder it is in",
    )


def _json_special_ids(content: dict[str, Any], tokenizer: Any) -> dict[str, int | None]:
    ids: dict[str, int | None] = {
        piece: tokenizer.token_to_id(piece) for piece in ("<pad>", "</s>")
    }
    return ids | {"<unk>": content.get("model", {}).get("unk_id")}


def _check_special_ids(ids: Mapping[str, int | None], origin: str) -> None:
    if ids != _SPECIAL_IDS:
        raise ModelFileError(
            f"{origin} is not umT5's tokenizer: its ids are {ids}, umT5's {_SPECIAL_IDS}",
            hint="T5 and XLM-R tokenizers differ; so does a tokenizer.json that transformers 5 has "
            "saved. Use spiece.model of google/umt5-xxl",
        )
