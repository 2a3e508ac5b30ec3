"""Writes the caches of a job in musubi-tuner's format, with a dataset TOML that names them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tomlkit

from trainer.contract.dataset_config import MEDIA_KEYS, SourceOptions
from trainer.contract.errors import DataError
from trainer.contract.files import write_text
from trainer.contract.variants import Variant
from trainer.data.entries import read_entry
from trainer.data.latent_cache import EncodedWindow
from trainer.data.media import probe
from trainer.data.musubi_cache import ClipShape, write_context_file, write_latents_file
from trainer.data.plan import PlannedItem
from trainer.data.text_cache import text_file, text_key
from trainer.jobs.cache_sections import Work

DATASET_FILE = "dataset.toml"
_KEYS = (
    *MEDIA_KEYS,
    "control_directory",
    "resolution",
    "caption_extension",
    "batch_size",
    "num_repeats",
    "enable_bucket",
    "bucket_no_upscale",
    "target_frames",
)
"""Keys that musubi-tuner's training looks at; what is cached is in the files."""
_HEAD = """\
# Dataset of musubi-tuner, written by `menma cache --write-musubi`: its caches are in these folders.
"""


def require_exportable(variant: Variant) -> None:
    """Refuse models that musubi-tuner has no caches for.

    Raises:
        DataError: it is one of these.
    """
    if variant.vae != "2.1" or variant.conditioning == "first_last_frame":
        raise DataError(
            f"musubi-tuner has no caches that {variant.name} could be trained on",
            hint="leave out --write-musubi",
        )


def export_caches(works: Sequence[Work], variant: Variant, folder: Path | None) -> int:
    """Write what the sources have cached into `folder`, one sub-folder a source; None: nothing.

    Returns:
        How many cache files were written.

    Raises:
        DataError: musubi-tuner has no such model, two clips of a source have one name there, or a
            file that is not Menma's is in the way.
        DiskError: the disk is full, read-only or gone.
    """
    if folder is None:
        return 0
    require_exportable(variant)
    count = 0
    tables: list[dict[str, Any]] = []
    for number, work in enumerate(works, start=1):
        own = folder / f"{number:02d}-{_name(work.plan.source)}"
        own.mkdir(parents=True, exist_ok=True)
        _require_names(work)
        for planned in work.plan.items:
            count += sum(1 for _ in _export_item(work, planned, variant, own))
        tables.append(_table(work.plan.source, own))
    write_text(folder / DATASET_FILE, _HEAD + tomlkit.dumps({"datasets": tables}))
    return count


def _export_item(
    work: Work, planned: PlannedItem, variant: Variant, folder: Path
) -> Iterator[Path]:
    item = planned.item
    entries = [entry for entry in planned.entries if entry.file not in work.failed]
    if not work.failed_captions.isdisjoint(item.captions) or not entries:
        return
    dtype = work.settings.dtype
    info = probe(item.path, item.kind)
    clip = ClipShape(item.path.stem, item.kind, info.width, info.height)
    for entry in entries:
        tensors = read_entry(work.folder / entry.file, entry.key)
        encoded = EncodedWindow(
            latents_CFHW=tensors["latents"],
            extra_channels_CFHW=tensors.get("extra_channels"),
            image_context_TD=tensors.get("image_context"),
        )
        control = variant.conditioning == "control"
        yield write_latents_file(
            folder,
            clip,
            entry.window,
            encoded,
            dtype,
            control=control,
            first_frame=not control or work.plan.source.control_first_frame,
        )
    key = text_key(item.caption, work.settings)
    context = read_entry(work.folder / text_file(key), key)["context"]
    yield write_context_file(folder, clip.stem, item.caption, context, dtype)


def _require_names(work: Work) -> None:
    """musubi-tuner names files by the clip's name alone."""
    seen: dict[str, Path] = {}
    for planned in work.plan.items:
        path = planned.item.path
        other = seen.setdefault(path.stem, path)
        if other != path:
            raise DataError(
                f"{other} and {path} would have one cache file in musubi-tuner",
                hint="rename one of them, or leave out --write-musubi",
            )


def _table(source: SourceOptions, folder: Path) -> dict[str, Any]:
    """Return a source as musubi-tuner's `[[datasets]]`."""
    table: dict[str, Any] = {}
    for key in _KEYS:
        value = getattr(source, key)
        if value is None or value == SourceOptions.model_fields[key].default:
            continue
        if isinstance(value, Path):
            value = str(value.absolute())
        table[key] = list(value) if isinstance(value, tuple) else value
    table["caption_extension"] = source.caption_extension  # it has no default there
    table["cache_directory"] = str(folder.absolute())
    return dict(sorted(table.items()))


def _name(source: SourceOptions) -> str:
    found = "".join(c if c.isalnum() or c in "-_" else "-" for c in source.media_path.stem)
    return found.strip("-")[:60] or source.kind
