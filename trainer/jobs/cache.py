"""The cache job: clips to latents, captions to context, only what is not there yet.

Order of things: find out what the dataset gives (and stop there if it is `strict` and something is
wrong), encode captions, let go of the text encoder, encode windows while the next ones are being
decoded, write the index, count what this config does not need. Killed at any moment it leaves whole
entries only, and the next run goes on from them. Nothing is removed unless that is asked for:
another config may need it.
"""

from __future__ import annotations

import gc
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from trainer.contract.dataset_config import DatasetConfig
from trainer.contract.errors import ConfigError, DataError, Problem
from trainer.contract.variants import Variant
from trainer.data.buckets import Bucket
from trainer.data.cache_index import Unneeded, find_section, locked, read_index
from trainer.data.cache_settings import CacheDtype, CacheSettings, uses_image_encoder
from trainer.data.entries import entry_key
from trainer.data.items import Texts, no_texts
from trainer.data.latent_cache import LatentEntry, write_latents
from trainer.data.masks import read_alpha_mask, read_mask
from trainer.data.media import Clip, index_clip, read_window
from trainer.data.paired import NAMES
from trainer.data.plan import PlannedItem, plan_source
from trainer.data.sources.paired import kind_of
from trainer.data.text_cache import text_file, text_key, write_text_entry
from trainer.jobs.cache_sections import Work, mark_unfinished, write_finished
from trainer.jobs.window_encoder import (
    DecodedWindow,
    ImageEncoding,
    LazyModel,
    TextEncoding,
    VideoEncoder,
    WindowEncoder,
)


class Report(Protocol):
    """Told of progress; phases are `clips`, `captions` and `latents`."""

    def __call__(self, phase: str, done: int, total: int, name: str = "") -> None:
        """`done` of `total` are finished, `name` just now."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOptions:
    """How to encode; of these only `dtype` changes what is stored."""

    dtype: CacheDtype = "bf16"
    """Precision of the stored tensors."""
    num_threads: int = 4
    """Clips that are looked at or decoded at once."""
    max_decoded: int = 4
    """Decoded windows in memory at once, the one being encoded included."""
    text_batch: int = 8
    """Captions given to the text encoder at once."""
    tile: tuple[int, int] | None = None
    """(height, width) in pixels: encode in overlapping tiles."""
    extra_captions: tuple[str, ...] = ("",)
    """Encoded, too, though no item has them: the empty one serves caption dropout."""
    texts: Texts = no_texts
    """Given all captions, returns more of these."""
    prune: bool = False
    """Remove every entry of the cache folders that this dataset does not need."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheReport:
    """What a cache job did."""

    encoded: int
    """Windows encoded now, ..."""
    reused: int
    """... already there, ..."""
    removed: Unneeded
    """... and entries (of captions, too) that this dataset does not need: those removed, ..."""
    unneeded: Unneeded
    """... and those that were left where they are."""
    captions_encoded: int
    captions_reused: int
    buckets: dict[Bucket, int]
    """Windows in each bucket, all sources together, without repeats."""
    problems: tuple[Problem, ...]
    """Every clip and caption that is not used, and why."""
    notes: tuple[str, ...]
    """What is no fault and yet worth knowing."""


@dataclass(frozen=True, slots=True)
class _Task:
    """One window that is not there yet."""

    work: Work
    planned: PlannedItem
    entry: LatentEntry


def _require_image_encoder(
    variant: Variant, image_encoder: LazyModel[ImageEncoding] | None
) -> None:
    if uses_image_encoder(variant) and image_encoder is None:
        raise ConfigError(
            f"{variant.name} sees the first frame through CLIP: an image encoder is needed",
            hint="set model.image_encoder",
        )


def run_cache(
    dataset: DatasetConfig,
    *,
    variant: Variant,
    vae: LazyModel[VideoEncoder],
    text_encoder: LazyModel[TextEncoding],
    image_encoder: LazyModel[ImageEncoding] | None = None,
    num_training: int | None = None,
    options: CacheOptions | None = None,
    report: Report = lambda phase, done, total, name="": None,
) -> CacheReport:
    """Bring the caches of all sources up to date.

    The text encoder is loaded first and gone before VAE and image encoder are loaded; none is
    loaded when there is nothing for it to do.

    Args:
        dataset: the sources.
        variant: the model that shall be trained.
        vae: makes the latents.
        text_encoder: makes the contexts.
        image_encoder: for variants that see the first frame through CLIP.
        num_training: so many sources are trained on, those after them are validated on; None: all
            are trained on.
        options: how to encode.
        report: is told of progress.

    Raises:
        DataError: nothing can be trained on, or none of the validation sources can be used; or the
            dataset is `strict` and something cannot be used (found before anything is encoded, as
            far as it can be seen without decoding all).
        ConfigError: the variant needs an image encoder and there is none, or `options.texts` cannot
            work with these captions.
        BusyError: another process caches into the same folder.
        DiskError: the disk is full, read-only or gone.
        OutOfMemoryError: the device cannot encode a window of this size.
    """
    options = options or CacheOptions()
    _require_image_encoder(variant, image_encoder)
    settings = CacheSettings.of(
        variant,
        vae=vae.identity,
        text_encoder=text_encoder.identity,
        image_encoder=image_encoder.identity if image_encoder else None,
        dtype=options.dtype,
    )
    with ExitStack() as locks:
        for folder in dict.fromkeys(source.cache_path.resolve() for source in dataset.sources):
            locks.enter_context(locked(folder))
        works = _plan(dataset, settings, options, report)
        _require_clips(works, len(works) if num_training is None else num_training)
        options = _with_texts(options, works)
        captions = _cache_captions(works, text_encoder, options, report, dataset.general.strict)
        _release_memory()
        encode = WindowEncoder(variant, vae, image_encoder, options.tile)
        windows = _cache_windows(works, encode, options, report, dataset.general.strict)
        unneeded = write_finished(works, options.extra_captions, prune=options.prune)
    return CacheReport(
        encoded=windows[0],
        reused=windows[1],
        removed=unneeded if options.prune else Unneeded(),
        unneeded=Unneeded() if options.prune else unneeded,
        captions_encoded=captions[0],
        captions_reused=captions[1],
        buckets=dict(sorted(Counter(entry.bucket for entry in _usable_entries(works)).items())),
        problems=tuple(problem for work in works for problem in work.problems),
        notes=tuple(
            dict.fromkeys(note for work in works for note in (*work.plan.notes, *work.notes))
        ),
    )


def _plan(
    dataset: DatasetConfig, settings: CacheSettings, options: CacheOptions, report: Report
) -> list[Work]:
    works = []
    failed: dict[Path, set[str]] = {}
    for source in dataset.sources:
        plan = plan_source(
            source,
            settings,
            find_section(read_index(source.cache_path), source, settings),
            num_threads=options.num_threads,
            report=lambda done, total, clip: report("clips", done, total, clip),
        )
        folder = source.cache_path.resolve()
        shared = failed.setdefault(folder, set())
        works.append(Work(folder, plan, settings, list(plan.problems), shared))
    problems = [problem for work in works for problem in work.problems]
    if problems and dataset.general.strict:
        raise DataError(_listed("the dataset is strict, and not all of it can be used", problems))
    return works


def _require_clips(works: Sequence[Work], num_training: int) -> None:
    for of, part in (
        ("the dataset", works[:num_training]),
        ("validation.sources", works[num_training:]),
    ):
        if part and not any(work.plan.items for work in part):
            problems = [problem for work in part for problem in work.problems]
            raise DataError(_listed(f"no clip of {of} can be used", problems))


def _with_texts(options: CacheOptions, works: Sequence[Work]) -> CacheOptions:
    """Add what techniques need to the extra captions."""
    captions = {c for work in works for planned in work.plan.items for c in planned.item.captions}
    extra = dict.fromkeys((*options.extra_captions, *options.texts(sorted(captions))))
    return replace(options, extra_captions=tuple(extra))


def _cache_captions(
    works: Sequence[Work],
    text_encoder: LazyModel[TextEncoding],
    options: CacheOptions,
    report: Report,
    strict: bool,
) -> tuple[int, int]:
    """Encode missing captions; return how many were encoded and how many were there."""
    missing: dict[str, list[Work]] = {}
    reused: set[str] = set()
    for work in works:
        captions = {text for planned in work.plan.items for text in planned.item.captions}
        for caption in sorted(captions | set(options.extra_captions)):
            key = text_key(caption, work.settings)
            if entry_key(work.folder / text_file(key)) == key:
                reused.add(caption)
            else:
                missing.setdefault(caption, []).append(work)
    if not missing:
        return 0, len(reused)
    encode = text_encoder.load()
    todo = sorted(missing, key=len)  # of like length in a batch: little padding
    for start in range(0, len(todo), options.text_batch):
        batch = todo[start : start + options.text_batch]
        with torch.inference_mode():
            contexts = encode(batch)
        mark_unfinished(
            [work for caption in batch for work in missing[caption]], options.extra_captions
        )
        for done, (caption, context) in enumerate(zip(batch, contexts, strict=True), start + 1):
            for work in missing[caption]:
                _store_caption(work, caption, context, strict)
            report("captions", done, len(todo), caption)
    return len(missing), len(reused - missing.keys())


def _store_caption(work: Work, caption: str, context: Tensor, strict: bool) -> None:
    if torch.isfinite(context).all():
        write_text_entry(work.folder, caption, context, work.settings)
        if context.shape[0] >= work.settings.text_len:
            work.notes += [
                f"{path}: its caption fills all {work.settings.text_len} tokens that the model "
                "reads; what goes beyond is cut off"
                for path in _paths_with(work, caption)
            ]
        return
    work.failed_captions.add(caption)
    for path in _paths_with(work, caption):
        message = "the text encoder made NaN or infinite values of its caption"
        _note_problem(work, Problem(message, file=path), strict)


def _paths_with(work: Work, caption: str) -> list[Path]:
    return [planned.item.path for planned in work.plan.items if caption in planned.item.captions]


def _cache_windows(
    works: Sequence[Work],
    encode: WindowEncoder,
    options: CacheOptions,
    report: Report,
    strict: bool,
) -> tuple[int, int]:
    """Encode missing windows; return how many were encoded and how many were there."""
    tasks: dict[Path, _Task] = {}  # two clips of equal content share their entries
    reused: set[Path] = set()
    for work in works:
        for planned in work.plan.items:
            for entry in planned.entries:
                path = work.folder / entry.file
                if path in tasks or path in reused:
                    continue
                if entry_key(path) == entry.key:
                    reused.add(path)
                else:
                    tasks[path] = _Task(work, planned, entry)
    encoded = 0
    for done, (task, decoded) in enumerate(_decoded(list(tasks.values()), options), start=1):
        try:
            window = encode(decoded.result())
            mark_unfinished([task.work], options.extra_captions)
            name = task.planned.item.name
            write_latents(task.work.folder, task.entry, window, task.work.settings, name)
            encoded += 1
        except DataError as error:
            task.work.failed.add(task.entry.file)
            problem = Problem(error.message, file=task.planned.item.path, hint=error.hint)
            _note_problem(task.work, problem, strict)
        report("latents", done, len(tasks), task.planned.item.name)
    return encoded, len(reused)


def _decoded(
    tasks: Sequence[_Task], options: CacheOptions
) -> Iterator[tuple[_Task, Future[DecodedWindow]]]:
    """Yield tasks in order with their frames, decoding ahead, `max_decoded` at once at most."""
    waiting: deque[tuple[_Task, Future[DecodedWindow]]] = deque()
    pool = ThreadPoolExecutor(options.num_threads, thread_name_prefix="menma-decode")
    # Windows of one clip follow each other: list its frames once, but not all clips' at once.
    index = lru_cache(maxsize=6 * options.num_threads)(index_clip)
    try:
        for task in tasks:
            if len(waiting) >= options.max_decoded:
                yield waiting.popleft()
            waiting.append((task, pool.submit(_decode, task, index)))
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _decode(task: _Task, index: Callable[..., Clip]) -> DecodedWindow:
    item, source = task.planned.item, task.work.plan.source
    frames, bucket = task.entry.window.frames, task.entry.bucket
    size = bucket.width, bucket.height
    rates = {"target_fps": task.work.settings.target_fps, "source_fps": source.source_fps}
    clip = index(item.path, item.kind, **rates)
    paired = {what: index(path, kind_of(path), **rates) for what, path in item.paired.items()}
    control = mask = None
    if source.alpha_mask:
        mask = read_alpha_mask(clip, frames, size)
    for what, other in paired.items():
        try:
            if what == "mask":
                mask = read_mask(other, frames, size)
            else:
                control = read_window(other, frames, size)
        except DataError as error:
            raise DataError(f"its {NAMES[what]} {other.path.name}: {error.message}") from None
    return DecodedWindow(
        frames_FHW3=read_window(clip, frames, size),
        control_FHW3=control,
        control_first_frame=source.control_first_frame,
        mask_FHW=mask,
    )


def _usable_entries(works: Sequence[Work]) -> Iterator[LatentEntry]:
    for work in works:
        for planned in work.plan.items:
            if work.failed_captions.isdisjoint(planned.item.captions):
                yield from (e for e in planned.entries if e.file not in work.failed)


def _note_problem(work: Work, problem: Problem, strict: bool) -> None:
    if strict:
        raise DataError(_listed("the dataset is strict, and not all of it can be used", [problem]))
    work.problems.append(problem)


def _listed(head: str, problems: Sequence[Problem]) -> str:
    return "\n".join([f"{head}:", *(f"  {problem}" for problem in problems)])


def _release_memory() -> None:
    gc.collect()  # the text encoder is gone for good only now, cycles included
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
