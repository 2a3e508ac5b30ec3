"""What a dataset will become: for each source its clips, their windows and buckets, and problems.

Used before encoding and by `menma check`. Opens each clip, reads no more of it than it must.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeVar

from trainer.contract.dataset_config import SourceOptions
from trainer.contract.errors import DataError, Problem
from trainer.data.buckets import choose_size
from trainer.data.cache_index import IndexedItem, Section
from trainer.data.cache_settings import CacheSettings, changed_settings
from trainer.data.fingerprint import FileIdentity, identify, stat_of
from trainer.data.latent_cache import LatentEntry, latent_entry
from trainer.data.masks import no_alpha
from trainer.data.media import index_clip
from trainer.data.paired import common_frames, conditions
from trainer.data.resampling import constant_rate
from trainer.data.sources import MediaItem, scan_source
from trainer.data.windows import Window, choose_windows, round_down_frames, shortest_window

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class PlannedItem:
    """A clip and the entries it gives."""

    item: MediaItem
    identity: FileIdentity
    entries: tuple[LatentEntry, ...]
    paired: Mapping[str, FileIdentity] = field(default_factory=dict)
    """Identities of `item.paired`."""
    varying_rate: bool = False
    """Its frames are taken as they come, though they are not shown for equal times."""


@dataclass(frozen=True, slots=True)
class SourcePlan:
    """All clips of a source that can be used, and the problems of the others."""

    source: SourceOptions
    items: tuple[PlannedItem, ...]
    problems: tuple[Problem, ...]
    skipped: Mapping[str, str]
    """Names of clips that give nothing -> `fingerprint.stat_of` them."""
    notes: tuple[str, ...]
    """What is no fault and yet worth knowing."""


def plan_source(
    source: SourceOptions,
    settings: CacheSettings,
    known: Section | None = None,
    *,
    num_threads: int = 4,
    report: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> SourcePlan:
    """List what a source gives; clips that `known` has under the same settings are not opened."""
    scan = scan_source(source)
    problems = list(scan.problems)
    trusted: Mapping[str, IndexedItem] = known.items if known is not None else {}
    if known is not None and changed_settings(dict(known.settings), settings.for_source(source)):
        trusted = {name: replace(item, whole=False) for name, item in trusted.items()}

    def plan(item: MediaItem) -> PlannedItem | Problem:
        try:
            return _plan_item(item, source, settings, trusted.get(item.name))
        except DataError as error:
            return Problem(error.message, file=item.path, hint=error.hint)

    items, skipped = [], {}
    for done, (item, planned) in enumerate(in_threads(plan, scan.items, num_threads), start=1):
        if isinstance(planned, Problem):
            problems.append(planned)
            skipped[item.name] = stat_of(item.path)
        else:
            items.append(planned)
        report(done, len(scan.items), item.name)
    lengths = [{entry.window.num_frames for entry in item.entries} for item in items]
    notes = (*length_notes(source, lengths), *_rate_notes(source, items))
    return SourcePlan(source, tuple(items), tuple(problems), skipped, notes)


def _rate_notes(source: SourceOptions, items: Sequence[PlannedItem]) -> Iterator[str]:
    varying = [item.item.name for item in items if item.varying_rate]
    if varying:
        listed = ", ".join(varying[:3]) + (", ..." if len(varying) > 3 else "")
        yield (
            f"{source.media_path}: the frame rate of {len(varying)} clips varies ({listed}), and "
            'their frames are taken as they come; set source_fps = "auto" to go by their time '
            "stamps"
        )


def plan_windows(
    num_frames: int, width: int, height: int, source: SourceOptions, pixel_multiple: int
) -> tuple[tuple[int, int], list[Window]]:
    """Return the size that a clip is brought to, and its windows.

    Raises:
        DataError: it is too short for any window, or too small.
    """
    size = choose_size(width, height, source, pixel_multiple)
    if source.kind == "image":
        return size, [Window(0, 1)]
    windows = choose_windows(num_frames, source)
    if not windows:
        raise DataError(
            f"is too short: it has {num_frames} frames, the shortest of target_frames needs "
            f"{shortest_window(source)}",
            hint="add a smaller number to target_frames, or remove the clip",
        )
    return size, windows


def length_notes(source: SourceOptions, lengths: Sequence[set[int]]) -> tuple[str, ...]:
    """Say how many clips are too short for each of `target_frames`.

    Args:
        source: the source.
        lengths: for each of its clips the lengths of its windows.
    """
    if source.kind == "image" or source.frame_extraction in {"full", "adaptive"}:
        return ()
    shorter = {
        target: sum(round_down_frames(target) not in found for found in lengths)
        for target in sorted(set(source.target_frames))
    }
    return tuple(
        f"{source.media_path}: {count} of {len(lengths)} clips are shorter than target_frames "
        f"{target} and give no window of that length"
        for target, count in shorter.items()
        if count
    )


def in_threads(
    work: Callable[[T], R], items: Sequence[T], num_threads: int
) -> Iterator[tuple[T, R]]:
    """Yield each item with what `work` makes of it, in order; leaving early drops what waits."""
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="menma-clips")
    try:
        yield from zip(items, pool.map(work, items), strict=True)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _plan_item(
    item: MediaItem, source: SourceOptions, settings: CacheSettings, known: IndexedItem | None
) -> PlannedItem:
    identity = identify(item.path, known.identity if known else None)
    paired = identify_paired(item, known)
    if known is not None and known.whole and known.identity.content == identity.content:
        before = {what: file.content for what, file in known.paired.items()}
        if before == {what: file.content for what, file in paired.items()}:
            return PlannedItem(item, identity, known.entries, paired)
    fps = source.source_fps
    clip = index_clip(item.path, item.kind, target_fps=settings.target_fps, source_fps=fps)
    if source.alpha_mask and not clip.images:
        raise no_alpha()
    num_frames = common_frames(
        item, clip, source, conditioning=settings.conditioning, target_fps=settings.target_fps
    )
    size, windows = plan_windows(
        num_frames, clip.width, clip.height, source, settings.pixel_multiple
    )
    more = conditions(paired, source, settings.conditioning)
    entries = tuple(
        latent_entry(identity.content, window, size, settings, fps, more) for window in windows
    )
    varying = fps is None and not constant_rate(clip.pts)
    return PlannedItem(item, identity, entries, paired, varying)


def identify_paired(item: MediaItem, known: IndexedItem | None) -> dict[str, FileIdentity]:
    """Return the identities of what belongs to a clip.

    Raises:
        DataError: a file cannot be read.
    """
    before = known.paired if known is not None else {}
    return {what: identify(path, before.get(what)) for what, path in item.paired.items()}
