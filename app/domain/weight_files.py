"""What a weight file is, told from the header of a safetensors file, or from a published name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.contract.memory_model.header import variant_of_file
from trainer.contract.safetensors_header import METADATA, metadata_of, read_header
from trainer.contract.variants import VARIANTS, Expert

WeightKind = Literal["transformer", "vae", "text_encoder", "image_encoder"]
SUFFIXES = frozenset({".safetensors", ".sft", ".pth"})
TOKENIZER_FILES = ("spiece.model", "tokenizer.json")
_TOKENIZER_FOLDERS = (".", "tokenizer", "google/umt5-xxl")
"""Where Menma looks for a tokenizer: below the text encoder's folder, and below its parent."""
_EMBEDDED_TOKENIZER = "spiece_model"
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
_LAYER = re.compile(r"(?:^|\.)blocks\.0\.")
_PUBLISHED = (
    (re.compile(r"wan_?2[._]1_vae.*\.pth", re.IGNORECASE), "vae", "2.1"),
    (re.compile(r"wan_?2[._]2_vae.*\.pth", re.IGNORECASE), "vae", "2.2"),
    (re.compile(r"models_t5_umt5.*\.pth", re.IGNORECASE), "text_encoder", ""),
    (re.compile(r"models_clip_open-clip.*\.pth", re.IGNORECASE), "image_encoder", ""),
)
"""Names of torch files in the official repositories: their content is not looked at here."""
_HIGH = re.compile(r"high[-_ ]?noise|(?:^|[-_])high(?:[-_.]|$)", re.IGNORECASE)
_LOW = re.compile(r"low[-_ ]?noise|(?:^|[-_])low(?:[-_.]|$)", re.IGNORECASE)
_SECOND = re.compile(r"wan[-_ ]?2[._-]?2", re.IGNORECASE)
_VAE_MARKS = ("decoder.middle.0.residual.0.gamma", "decoder.mid_block.resnets.0.norm1.gamma")
_VAE_FIRST = ("encoder.conv1.weight", "encoder.conv_in.weight")
_TEXT_MARKS = ("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",
               "blocks.1.pos_embedding.embedding.weight")  # fmt: skip
"""umT5 has position biases in each layer, other T5s in the first only."""
_IMAGE_MARKS = ("visual.cls_embedding", "vision_model.embeddings.class_embedding")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """A file, or a folder of shards, that is a part of a Wan model."""

    path: Path
    kind: WeightKind
    variants: tuple[str, ...] = ()
    """Of a transformer: what it can be, the likeliest first. Shapes do not tell all apart."""
    expert: Expert | None = None
    """Of a transformer: which of Wan 2.2's two, as its name says."""
    vae: Literal["", "2.1", "2.2"] = ""
    """Of a VAE."""
    num_bytes: int = 0

    @property
    def variant(self) -> str:
        """The likeliest variant of a transformer."""
        return self.variants[0] if self.variants else ""


def recognise(path: Path) -> WeightFile | None:
    """Return what a file is, or a folder of shards; None: no part of a Wan model.

    Args:
        path: safetensors files are known by their header, torch files by their published name.
    """
    try:
        size = _size(path)
    except OSError:
        return None
    if path.suffix == ".pth":
        return _published(path, size)
    header = read_header(path)
    names = [name for name in header if name != METADATA]
    if not names or any(".lora_" in name or ".vace_" in name for name in names):
        return None
    if _ends(names, ("patch_embedding.weight",)) and any(map(_LAYER.search, names)):
        return _transformer(path, size)
    if _ends(names, _VAE_MARKS):
        return WeightFile(path=path, kind="vae", vae=_vae_version(header), num_bytes=size)
    if _ends(names, _TEXT_MARKS):
        return WeightFile(path=path, kind="text_encoder", num_bytes=size)
    if _ends(names, _IMAGE_MARKS):
        return WeightFile(path=path, kind="image_encoder", num_bytes=size)
    return None


def is_shard(name: str) -> bool:
    """Tell whether a file name is that of one part of a model: its folder is the model."""
    return _SHARD.search(name) is not None


def has_tokenizer(text_encoder: Path) -> bool:
    """Tell whether Menma finds a tokenizer with a text encoder: in its file, or near it."""
    if _EMBEDDED_TOKENIZER in read_header(text_encoder):
        return True
    home = (text_encoder if text_encoder.is_dir() else text_encoder.parent).absolute()
    return any(
        (folder / inner / name).is_file()
        for folder in (home, home.parent)
        for inner in _TOKENIZER_FOLDERS
        for name in TOKENIZER_FILES
    )


def _size(path: Path) -> int:
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _published(path: Path, size: int) -> WeightFile | None:
    for pattern, kind, version in _PUBLISHED:
        if pattern.fullmatch(path.name):
            return WeightFile(path=path, kind=kind, vae=version, num_bytes=size)  # type: ignore[arg-type]  # of the table above
    return None


def _transformer(path: Path, size: int) -> WeightFile | None:
    found = variant_of_file(path)
    if found is None:
        return None
    alike = [v.name for v in VARIANTS.values() if v.transformer == found.transformer]
    if metadata_of(read_header(path)).get("menma.variant") in VARIANTS:
        alike = [found.name]  # Menma wrote it
    words = f"{path.parent.parent.name}/{path.parent.name}/{path.name}"
    expert = _expert(path)
    if expert is not None or _SECOND.search(words):
        alike.sort(key=lambda name: not VARIANTS[name].experts)
    of_two = VARIANTS[alike[0]].experts
    return WeightFile(
        path=path,
        kind="transformer",
        variants=tuple(alike),
        expert=(expert or "low_noise") if of_two else None,
        num_bytes=size,
    )


def _expert(path: Path) -> Expert | None:
    folder = path if path.is_dir() else path.parent
    if folder.name == "transformer" and (folder.parent / "transformer_2").is_dir():
        return "high_noise"  # as diffusers calls them
    for name in (path.name, path.parent.name, path.parent.parent.name):
        if _HIGH.search(name):
            return "high_noise"
        if _LOW.search(name):
            return "low_noise"
        if name == "transformer_2":
            return "low_noise"
    return None


def _vae_version(header: Mapping[str, Any]) -> Literal["2.1", "2.2"]:
    for name, tensor in header.items():
        if name.endswith(_VAE_FIRST) and isinstance(tensor, Mapping):
            return "2.2" if list(tensor.get("shape", ()))[1:2] == [12] else "2.1"
    return "2.1"


def _ends(names: Iterable[str], endings: tuple[str, ...]) -> bool:
    return any(name.endswith(endings) for name in names)
