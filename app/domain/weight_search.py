"""Models on the disk: weight files in the usual places, put together to what one training needs."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from app.domain.config_file import find_configs
from app.domain.weight_files import (
    SUFFIXES,
    WeightFile,
    WeightKind,
    has_tokenizer,
    is_shard,
    recognise,
)
from trainer.contract.variants import VARIANTS

DEPTH = 6
"""So many folders below a place are looked into."""
MOST_FILES = 4000
"""So many weight files are looked into, over all places."""
_MOST_FOLDERS = 20_000
_OF_WAN = ("wan", "umt5", "clip")
"""Parts of names of repositories in the Hugging Face cache."""
_SKIPPED = frozenset({"node_modules", "menma_cache", "runs", "__pycache__", "site-packages"})
_COMFY = ("COMFYUI_PATH", "COMFYUI_HOME")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """The weight files of one model, as `[model]` names them; None: not known."""

    variant: str
    transformer: Path | None = None
    transformer_high_noise: Path | None = None
    vae: Path | None = None
    text_encoder: Path | None = None
    tokenizer: Path | None = None
    image_encoder: Path | None = None

    @property
    def title(self) -> str:
        """What the model is called."""
        known = VARIANTS.get(self.variant)
        return known.title if known is not None else self.variant or "a model of your own"

    @property
    def main(self) -> Path | None:
        """The transformer, whichever there is."""
        return self.transformer or self.transformer_high_noise


@dataclass(frozen=True, slots=True)
class Weights:
    """All parts of Wan models that were found."""

    files: tuple[WeightFile, ...] = ()
    tokenizers: tuple[Path, ...] = ()
    """Folders with umT5's `spiece.model`."""
    places: tuple[Path, ...] = field(default=())
    """Where was looked."""

    def models(self) -> list[ModelFiles]:
        """Return the models that can be put together, the most complete ones first."""
        found = [self.completed(model) for model in _transformers(self.files)]
        return sorted(found, key=lambda model: (_num_missing(model), model.variant))

    def completed(self, model: ModelFiles) -> ModelFiles:
        """Return a model with the encoders and the VAE that fit it and lie nearest."""
        known = VARIANTS.get(model.variant)
        near = model.main
        vae = model.vae or self._nearest("vae", near, known.vae if known else "")
        text_encoder = model.text_encoder or self._nearest("text_encoder", near)
        image_encoder = model.image_encoder
        if known is not None and known.transformer.image_dim is not None:
            image_encoder = image_encoder or self._nearest("image_encoder", near)
        tokenizer = model.tokenizer
        if tokenizer is None and text_encoder is not None and not has_tokenizer(text_encoder):
            tokenizer = next(iter(self.tokenizers), None)
        return ModelFiles(
            variant=model.variant,
            transformer=model.transformer,
            transformer_high_noise=model.transformer_high_noise,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            image_encoder=image_encoder,
        )

    def _nearest(self, kind: WeightKind, near: Path | None, vae: str = "") -> Path | None:
        fitting = [f for f in self.files if f.kind == kind and (not vae or f.vae == vae)]
        if not fitting:
            return None

        def key(file: WeightFile) -> tuple[bool, int, int]:
            rounded = "fp8" in file.path.name.lower()
            return rounded, -_common(file.path, near), -file.num_bytes

        return min(fitting, key=key).path


def usual_places(runs_dir: Path, home: Path | None = None) -> list[Path]:
    """Return the folders in which weights mostly lie, as far as they exist.

    Those are `models` here and at home, ComfyUI's models, the Hugging Face cache, and the folders
    of the weights that earlier configs name.

    Args:
        runs_dir: folder of the runs.
        home: the user's folder; None: the real one.
    """
    home = Path.home() if home is None else home
    here = Path.cwd()
    places = [here / "models", home / "models"]
    comfy = [here, here.parent, home, Path("/workspace"), Path("/opt")]
    places += [folder / "ComfyUI" / "models" for folder in comfy]
    places += [Path(os.environ[name]) / "models" for name in _COMFY if os.environ.get(name)]
    places += _of_configs(runs_dir)
    places += _repositories(home)
    found: dict[Path, Path] = {}
    for place in places:
        try:
            if place.is_dir():
                found.setdefault(place.resolve(), place)
        except OSError:  # it may not be looked at
            continue
    return list(found.values())


def search(places: Sequence[Path]) -> Weights:
    """Look for weights in folders; what cannot be read is passed over.

    Args:
        places: folders; they are looked into several levels deep.
    """
    files: dict[Path, WeightFile] = {}
    tokenizers: dict[Path, None] = {}
    looked = 0
    for folder, names in islice(_walk(places), _MOST_FOLDERS):
        if "spiece.model" in names:
            tokenizers[folder] = None
        shards = [name for name in names if is_shard(name)]
        paths = [folder] if shards else []
        paths += [
            folder / name
            for name in names
            if Path(name).suffix.lower() in SUFFIXES and name not in shards
        ]
        for path in paths:
            looked += 1
            found = recognise(path) if looked <= MOST_FILES else None
            if found is not None:
                files.setdefault(path.resolve(), found)
    return Weights(tuple(files.values()), tuple(tokenizers), tuple(places))


def _walk(places: Sequence[Path]) -> Iterator[tuple[Path, list[str]]]:
    seen: set[Path] = set()
    pending = [(place, 0) for place in reversed(places)]
    while pending:
        folder, depth = pending.pop()
        try:
            real = folder.resolve()
            if real in seen:
                continue
            seen.add(real)
            with os.scandir(folder) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError:
            continue
        names = []
        inner = []
        for entry in listed:
            try:
                is_dir = entry.is_dir()
            except OSError:
                continue
            if not is_dir:
                names.append(entry.name)
            elif depth < DEPTH and entry.name not in _SKIPPED and not entry.name.startswith("."):
                inner.append((Path(entry.path), depth + 1))
        yield folder, names
        pending += reversed(inner)


def _of_configs(runs_dir: Path) -> Iterator[Path]:
    """Yield the folders of the weights that configs name, the newest configs first."""
    fields = ("transformer", "transformer_high_noise", "vae", "text_encoder", "image_encoder")
    for config in find_configs(runs_dir)[:200]:
        try:
            model = tomllib.loads(config.read_text(encoding="utf-8")).get("model")
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(model, dict):
            yield from (Path(model[f]).parent for f in fields if isinstance(model.get(f), str))


def _repositories(home: Path) -> Iterator[Path]:
    """Yield the folders of Wan's repositories in the Hugging Face cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or home / ".cache"
    default = Path(os.environ.get("HF_HOME") or Path(cache) / "huggingface") / "hub"
    hub = Path(os.environ.get("HF_HUB_CACHE") or default)
    try:
        folders = sorted(hub.iterdir())
    except OSError:
        return
    for folder in folders:
        words = folder.name.lower()
        if words.startswith("models--") and any(part in words for part in _OF_WAN):
            yield folder / "snapshots"


def _transformers(files: Iterable[WeightFile]) -> Iterator[ModelFiles]:
    """Yield models by their transformers; of Wan 2.2, the two experts that belong together."""
    transformers = [file for file in files if file.kind == "transformer"]
    low = [file for file in transformers if file.expert == "low_noise"]
    for file in transformers:
        if file.expert is None:
            yield ModelFiles(variant=file.variant, transformer=file.path)
        elif file.expert == "high_noise":
            partner = _partner(file, low)
            if partner is not None:
                low.remove(partner)
            yield ModelFiles(
                variant=file.variant,
                transformer=partner.path if partner else None,
                transformer_high_noise=file.path,
            )
    for file in low:
        yield ModelFiles(variant=file.variant, transformer=file.path)


def _partner(high: WeightFile, low: Sequence[WeightFile]) -> WeightFile | None:
    """Return the low-noise expert of the same model, size and place."""
    alike = [file for file in low if file.variant == high.variant]

    def key(file: WeightFile) -> tuple[int, int]:
        return abs(file.num_bytes - high.num_bytes), -_common(file.path, high.path)

    return min(alike, key=key, default=None)


def _num_missing(model: ModelFiles) -> int:
    known = VARIANTS.get(model.variant)
    needed = [model.main, model.vae, model.text_encoder]
    if known is not None and known.experts:
        needed += [model.transformer, model.transformer_high_noise]
    if known is not None and known.transformer.image_dim is not None:
        needed.append(model.image_encoder)
    return sum(path is None for path in needed)


def _common(path: Path, near: Path | None) -> int:
    """Return how many folders two paths share."""
    if near is None:
        return 0
    parts = zip(path.absolute().parts, near.absolute().parts, strict=False)
    count = 0
    for one, other in parts:
        if one != other:
            break
        count += 1
    return count
