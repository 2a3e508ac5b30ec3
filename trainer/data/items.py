"""From the indices of the caches to what a run trains on, and whether that still holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.contract.dataset_config import DatasetConfig, SourceOptions
from trainer.contract.errors import DataError, Problem
from trainer.data.buckets import Bucket
from trainer.data.cache_index import (
    Section,
    find_section,
    read_index,
    source_names,
)
from trainer.data.cache_settings import CacheSettings, changed_settings
from trainer.data.fingerprint import FileIdentity, digest, identify, stat_of
from trainer.data.paired import NAMES
from trainer.data.sources import MediaItem, scan_source
from trainer.data.text_cache import text_file, text_key
from trainer.data.windows import takes_turns

_MAX_LISTED = 10
Texts = Callable[[Sequence[str]], Iterable[str]]
"""Given all captions, returns what must be encoded beside them."""


def no_texts(_captions: Sequence[str]) -> tuple[str, ...]:
    """Return nothing: no technique needs a text."""
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingItem:
    """One encoded window with its encoded caption."""

    key: str
    """Says which source, clip, window and bucket; the same wherever the dataset lies."""
    name: str
    """The clip's path and its window, for messages."""
    source: int
    """Number of the source in the dataset, from 0."""
    clip: str
    """Hash of the clip's content."""
    start: int
    """First frame of the window."""
    bucket: Bucket
    latents: Path
    latents_key: str
    context: Path
    context_key: str
    num_repeats: int
    batch_size: int
    more_contexts: tuple[tuple[Path, str], ...] = ()
    """Files and keys of further captions; each appearance takes `context` or one of these."""
    caption_dropout: float = 0.0
    """Probability of the empty caption."""
    empty_context: tuple[Path, str] | None = None
    """File and key of the empty caption; given where there is dropout."""
    slot: str = ""
    """Items of one slot stand for each other: every appearance shows one of them. Empty: alone."""
    loss_weight: float = 1.0
    """Of its source."""
    has_mask: bool = False
    """Its cache entry has a mask."""

    @property
    def contexts(self) -> tuple[tuple[Path, str], ...]:
        """Files and keys of all its captions."""
        return ((self.context, self.context_key), *self.more_contexts)

    @property
    def identity(self) -> str:
        """What the item shows: content, window and size, wherever its clip and cache lie."""
        return f"{self.clip}:{self.start}@{self.bucket}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedDataset:
    """All items of a run."""

    items: tuple[TrainingItem, ...]
    texts: Mapping[str, tuple[Path, str]]
    """Texts that are encoded beside the captions, the empty one among them -> file and key."""
    problems: tuple[Problem, ...]
    """Clips that are not used, and why; found when they were cached."""
    fingerprint: str
    """Hash of all items: clips, captions, windows, models."""


def load_cached_dataset(
    dataset: DatasetConfig,
    settings: CacheSettings,
    *,
    config: str = "CONFIG",
    texts: Texts = no_texts,
) -> CachedDataset:
    """Return what the caches hold for this dataset, after checking that it still fits.

    Looks at every clip's time stamps (and at its content where those moved) and reads every
    caption, but opens no clip.

    Args:
        dataset: the sources.
        settings: of the variant that shall be trained; identities of None are not compared.
        config: the config's name, for the hint `menma cache CONFIG`.
        texts: given all captions, returns what must be encoded beside them.

    Raises:
        DataError: a cache is missing, unfinished or stale (says which clips), or holds nothing.
        ConfigError: `texts` cannot work with these captions.
    """
    hint = f"run `menma cache {config}`"
    sections: list[Section] = []
    faults: list[str] = []
    captions: set[str] = set()
    for source in dataset.sources:
        section = find_section(read_index(source.cache_path), source, settings)
        if section is None:
            raise DataError(f"{source.media_path} is not cached yet", hint=hint)
        sections.append(section)
        scanned = scan_source(source).items
        captions.update(caption for item in scanned for caption in item.captions)
        faults += _faults(source, section, settings, scanned)
    if faults:
        more = len(faults) - _MAX_LISTED
        listed = [f"  {fault}" for fault in faults[:_MAX_LISTED]]
        listed += [f"  and {more} more"] if more > 0 else []
        raise DataError("\n".join(["the cache is out of date:", *listed]), hint=hint)
    items = tuple(_items(dataset, sections))
    if not items:
        raise DataError("the dataset has no items to train on", hint="run `menma check` on it")
    _require_files(items, hint)
    wanted = ("", *texts(sorted(captions)))
    first, known = dataset.sources[0].cache_path, sections[0].extra_captions
    missing = [text for text in wanted if text not in known]
    if missing:
        raise DataError(
            f"the text {missing[0]!r} is not cached, which a technique needs", hint=hint
        )
    return CachedDataset(
        items=items,
        texts={text: (first / text_file(known[text]), known[text]) for text in wanted},
        problems=tuple(problem for section in sections for problem in section.problems),
        fingerprint=fingerprint(items),
    )


def fingerprint(items: Sequence[TrainingItem]) -> str:
    """Return a hash of all items: clips, captions, windows, models."""
    return digest(
        sorted(
            [i.key, i.latents_key, i.context_key, *(key for _, key in i.more_contexts)]
            for i in items
        )
    )


def _faults(
    source: SourceOptions,
    section: Section,
    settings: CacheSettings,
    scanned: Sequence[MediaItem],
) -> Iterator[str]:
    """Say in which ways a section differs from what caching would make now."""
    if not section.finished:
        yield f"{source.media_path}: caching was interrupted"
        return
    changes = changed_settings(dict(section.settings), settings.for_source(source))
    if changes:
        for key, (before, now) in changes.items():
            yield f"{source.media_path}: {key} was {before} and is {now}"
        return
    found = {item.name: item for item in scanned}
    for name in sorted(section.items.keys() - found.keys()):
        yield f"{source.media_path / name}: the clip or its caption is gone"
    for item in found.values():
        yield from _item_faults(item, section, _cached_text_settings(section, settings))


def _item_faults(item: MediaItem, section: Section, settings: CacheSettings) -> Iterator[str]:
    indexed = section.items.get(item.name)
    if indexed is None:
        skipped = section.skipped.get(item.name)
        if skipped is None:
            yield f"{item.path}: is new"
        elif skipped != stat_of(item.path):
            yield f"{item.path}: could not be used, and has changed since"
        return
    if tuple(text_key(text, settings) for text in item.captions) != indexed.caption_keys:
        yield f"{item.path}: its caption has changed"
    if _content_changed(item.path, indexed.identity):
        yield f"{item.path}: has changed"
    for what in sorted(item.paired.keys() | indexed.paired.keys()):
        path, known = item.paired.get(what), indexed.paired.get(what)
        if path is None:
            yield f"{item.path}: its {NAMES[what]} is gone"
        elif known is None:
            yield f"{path}, the {NAMES[what]} of {item.path.name}: is new"
        elif _content_changed(path, known):
            yield f"{path}, the {NAMES[what]} of {item.path.name}: has changed"


def _content_changed(path: Path, known: FileIdentity) -> bool:
    try:
        return identify(path, known).content != known.content
    except DataError:
        return True


def _cached_text_settings(section: Section, settings: CacheSettings) -> CacheSettings:
    """Take the text encoder's identity from the cache where the run does not know it."""
    if settings.text_encoder is not None:
        return settings
    return replace(settings, text_encoder=section.settings["text_encoder"])


def _items(dataset: DatasetConfig, sections: Sequence[Section]) -> Iterator[TrainingItem]:
    names = source_names(dataset)
    for number, (source, section) in enumerate(zip(dataset.sources, sections, strict=True)):
        for name, indexed in section.items.items():
            first, *more = (
                (source.cache_path / text_file(key), key) for key in indexed.caption_keys
            )
            for entry in indexed.entries:
                start, num_frames = entry.window
                slot = f"{names[number]}/{name}@{entry.bucket}"
                window = f" [{start}:{start + num_frames}]" if source.kind == "video" else ""
                yield TrainingItem(
                    key=f"{names[number]}/{name}:{start}+{num_frames}@{entry.bucket}",
                    name=f"{_media_folder(source) / name}{window}",
                    source=number,
                    clip=indexed.identity.content,
                    start=start,
                    bucket=entry.bucket,
                    latents=source.cache_path / entry.file,
                    latents_key=entry.key,
                    context=first[0],
                    context_key=first[1],
                    num_repeats=source.num_repeats,
                    batch_size=source.batch_size,
                    more_contexts=tuple(more),
                    caption_dropout=source.caption_dropout,
                    empty_context=_empty_context(source, section),
                    slot=slot if takes_turns(source) else "",
                    loss_weight=source.loss_weight,
                    has_mask="mask" in indexed.paired or source.alpha_mask,
                )


def _empty_context(source: SourceOptions, section: Section) -> tuple[Path, str] | None:
    if not source.caption_dropout:
        return None
    key = section.extra_captions.get("", "")
    return source.cache_path / text_file(key), key


def _media_folder(source: SourceOptions) -> Path:
    return source.media_path.parent if source.jsonl_file is not None else source.media_path


def _require_files(items: Sequence[TrainingItem], hint: str) -> None:
    present: Mapping[Path, set[str]] = {
        folder: {path.name for path in folder.iterdir()}
        for folder in {item.latents.parent for item in items}
    }
    for item in items:
        texts = [path for path, _ in item.contexts]
        if item.empty_context is not None:
            texts.append(item.empty_context[0])
        for path in (item.latents, *texts):
            if path.name not in present[path.parent]:
                raise DataError(f"{path}, the cache of {item.name}, is gone", hint=hint)
