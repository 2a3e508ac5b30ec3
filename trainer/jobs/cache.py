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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

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
from trainer.data.latent_cache import EncodedWindow, LatentEntry, write_latents
from trainer.data.masks import latent_mask, read_alpha_mask, read_mask
from trainer.data.media import Clip, index_clip, read_window
from trainer.data.paired import NAMES
from trainer.data.plan import PlannedItem, plan_source
from trainer.data.sources.paired import kind_of
from trainer.data.text_cache import text_file, text_key, write_text_entry
from trainer.jobs.cache_sections import Work, mark_unfinished, write_finished
from trainer.jobs.musubi_adoption import Adoption, unused_caches
from trainer.jobs.musubi_export import export_caches, require_exportable
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
    from_musubi: bool = False
    """Take what musubi-tuner has encoded, where it fits (`musubi_adoption`)."""
    write_musubi: Path | None = None
    """Write the caches in musubi-tuner's format, too, into this folder (`musubi_export`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheReport:
    """What a cache job did."""

    encoded: int
    """Windows encoded now, ..."""
    reused: int
    """... already there, ..."""
    adopted: int
    """... taken from musubi-tuner's caches, ..."""
    removed: Unneeded
    """... and entries (of captions, too) that this dataset does not need: those removed, ..."""
    unneeded: Unneeded
    """... and those that were left where they are."""
    captions_encoded: int
    captions_reused: int
    captions_adopted: int
    exported: int
    """Files written in musubi-tuner's format."""
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

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of its pixels."""
        return self.entry.bucket.width, self.entry.bucket.height

    @property
    def rates(self) -> dict[str, Any]:
        """How its clip, and what belongs to it, are resampled in time."""
        settings, source = self.work.settings, self.work.plan.source
        return {"target_fps": settings.target_fps, "source_fps": source.source_fps}


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
        DataError: nothing can be trained on, or no validation source can be used; or the dataset
            is `strict` and something cannot be used (found as early as decoding allows).
        ConfigError: an image encoder is needed and missing, or `options.texts` cannot work.
        BusyError: another process caches into the same folder.
        DiskError: the disk is full, read-only or gone.
        OutOfMemoryError: the device cannot encode a window of this size.
    """
    options = options or CacheOptions()
    _require_models(variant, image_encoder, options)
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
        adoption = Adoption(variant, wanted=options.from_musubi)
        captions = _cache_captions(works, text_encoder, options, report, adoption)
        _release_memory()
        encode = WindowEncoder(variant, vae, image_encoder, options.tile)
        windows = _cache_windows(works, encode, options, report, adoption)
        unneeded = write_finished(works, options.extra_captions, prune=options.prune)
        exported = export_caches(works, variant, options.write_musubi)
    return CacheReport(
        encoded=windows[0],
        reused=windows[1],
        adopted=adoption.latents,
        removed=unneeded if options.prune else Unneeded(),
        unneeded=Unneeded() if options.prune else unneeded,
        captions_encoded=captions[0],
        captions_reused=captions[1],
        captions_adopted=adoption.captions,
        exported=exported,
        buckets=dict(sorted(Counter(entry.bucket for entry in _usable_entries(works)).items())),
        problems=tuple(problem for work in works for problem in work.problems),
        notes=_notes(works, adoption, encoded=windows[0]),
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
        strict = dataset.general.strict
        works.append(Work(folder, plan, settings, list(plan.problems), shared, strict))
    problems = [problem for work in works for problem in work.problems]
    if problems and dataset.general.strict:
        raise DataError(_listed("the dataset is strict, and not all of it can be used", problems))
    return works


def _require_models(
    variant: Variant, image_encoder: LazyModel[ImageEncoding] | None, options: CacheOptions
) -> None:
    if uses_image_encoder(variant) and image_encoder is None:
        raise ConfigError(
            f"{variant.name} sees the first frame through CLIP: an image encoder is needed",
            hint="set model.image_encoder",
        )
    if options.write_musubi is not None:
        require_exportable(variant)


def _notes(works: list[Work], adoption: Adoption, *, encoded: int) -> tuple[str, ...]:
    """Return what is no fault and yet worth knowing, with what other caches are good for."""
    notes = [note for work in works for note in (*work.plan.notes, *work.notes)]
    if adoption.wanted:
        notes += adoption.notes()
    elif encoded:
        notes += unused_caches(works)
    return tuple(dict.fromkeys(notes))


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
    adoption: Adoption,
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
    if adoption.wanted:
        _adopt_captions(missing, encode, adoption, options)
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
                _store_caption(work, caption, context)
            report("captions", done, len(todo), caption)
    return len(missing), len(reused - missing.keys())


def _adopt_captions(
    missing: dict[str, list[Work]],
    encode: TextEncoding,
    adoption: Adoption,
    options: CacheOptions,
) -> None:
    """Store what musubi-tuner has of the missing captions, and take it out of them."""

    def encoded(caption: str) -> Tensor:
        with torch.inference_mode():
            return encode([caption])[0]

    for caption, works in list(missing.items()):
        own = partial(encoded, caption)
        contexts = {id(work): adoption.context(work, caption, own) for work in works}
        taken = [work for work in works if contexts[id(work)] is not None]
        mark_unfinished(taken, options.extra_captions)
        for work in taken:
            context = contexts[id(work)]
            assert context is not None
            _store_caption(work, caption, context)
        missing[caption] = [work for work in works if contexts[id(work)] is None]
        if not missing[caption]:
            del missing[caption]


def _store_caption(work: Work, caption: str, context: Tensor) -> None:
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
        _note_problem(work, Problem(message, file=path))


def _paths_with(work: Work, caption: str) -> list[Path]:
    return [planned.item.path for planned in work.plan.items if caption in planned.item.captions]


def _cache_windows(
    works: Sequence[Work],
    encode: WindowEncoder,
    options: CacheOptions,
    report: Report,
    adoption: Adoption,
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
    if adoption.wanted:
        _adopt_windows(tasks, encode, adoption, options)
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
            _note_problem(task.work, problem)
        report("latents", done, len(tasks), task.planned.item.name)
    return encoded, len(reused)


def _adopt_windows(
    tasks: dict[Path, _Task], encode: WindowEncoder, adoption: Adoption, options: CacheOptions
) -> None:
    """Store what musubi-tuner has of the missing windows, and take it out of them."""
    for path, task in list(tasks.items()):
        try:
            own = partial(_encoded, task, encode)
            mask = partial(_latent_mask, task, adoption.variant)
            found = adoption.window(task.work, task.planned, task.entry, own, mask)
        except DataError:  # our own encoding failed, or the clip: told when it is encoded
            continue
        if found is not None:
            mark_unfinished([task.work], options.extra_captions)
            name = task.planned.item.name
            write_latents(task.work.folder, task.entry, found, task.work.settings, name)
            del tasks[path]


def _encoded(task: _Task, encode: WindowEncoder) -> EncodedWindow:
    return encode(_decode(task, index_clip))


def _latent_mask(task: _Task, variant: Variant) -> Tensor | None:
    mask = _decode_mask(task, index_clip)
    return None if mask is None else latent_mask(mask, variant.vae_stride)


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
    item = task.planned.item
    control = None
    if item.control is not None:
        other = index(item.control, kind_of(item.control), **task.rates)
        with _named("control", other):
            control = read_window(other, task.entry.window.frames, task.size)
    clip = index(item.path, item.kind, **task.rates)
    return DecodedWindow(
        frames_FHW3=read_window(clip, task.entry.window.frames, task.size),
        control_FHW3=control,
        control_first_frame=task.work.plan.source.control_first_frame,
        mask_FHW=_decode_mask(task, index),
    )


def _decode_mask(task: _Task, index: Callable[..., Clip]) -> Tensor | None:
    """Return the mask of a window in pixels, (F, H, W); None: its clip has none."""
    item, frames = task.planned.item, task.entry.window.frames
    if item.mask is not None:
        other = index(item.mask, kind_of(item.mask), **task.rates)
        with _named("mask", other):
            return read_mask(other, frames, task.size)
    if task.work.plan.source.alpha_mask:
        return read_alpha_mask(index(item.path, item.kind, **task.rates), frames, task.size)
    return None


@contextmanager
def _named(what: str, other: Clip) -> Iterator[None]:
    """Say of a problem that it is of what belongs to a clip."""
    try:
        yield
    except DataError as error:
        raise DataError(f"its {NAMES[what]} {other.path.name}: {error.message}") from None


def _usable_entries(works: Sequence[Work]) -> Iterator[LatentEntry]:
    for work in works:
        for planned in work.plan.items:
            if work.failed_captions.isdisjoint(planned.item.captions):
                yield from (e for e in planned.entries if e.file not in work.failed)


def _note_problem(work: Work, problem: Problem) -> None:
    if work.strict:
        raise DataError(_listed("the dataset is strict, and not all of it can be used", [problem]))
    work.problems.append(problem)


def _listed(head: str, problems: Sequence[Problem]) -> str:
    return "\n".join([f"{head}:", *(f"  {problem}" for problem in problems)])


def _release_memory() -> None:
    gc.collect()  # the text encoder is gone for good only now, cycles included
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
