"""The job `cache`: from a config to cached latents and captions."""

from __future__ import annotations

import time
from functools import partial
from itertools import islice

from trainer.contract.errors import Problem
from trainer.contract.jobs import CacheRequest
from trainer.jobs.base import MAX_LISTED, Emit
from trainer.jobs.build import pick_device, technique_texts
from trainer.jobs.cache import CacheOptions, CacheReport, Report, run_cache
from trainer.jobs.components import (
    lazy_image_encoder,
    lazy_text_encoder,
    lazy_vae,
    settle_variant,
)
from trainer.jobs.config_job import read_config

_MIN_INTERVAL_S = 0.2


def run(request: CacheRequest, emit: Emit) -> None:
    """Bring the caches of a config up to date; its `end` event holds the counts.

    Raises:
        MenmaError: see `cache.run_cache`.
    """
    config = read_config(request, "cache")
    variant = settle_variant(config)
    device = pick_device(config)
    tile = config.memory.vae_tile
    report = run_cache(
        config.load_all_sources(),
        variant=variant,
        vae=lazy_vae(config, variant, device),
        text_encoder=lazy_text_encoder(config, device),
        image_encoder=lazy_image_encoder(config, device),
        num_training=len(config.dataset.load().sources),
        options=CacheOptions(
            dtype=config.memory.cache_dtype,
            tile=(tile, tile) if tile else None,
            prune=request.prune,
            from_musubi=request.from_musubi,
            write_musubi=request.write_musubi,
            texts=partial(technique_texts, config),
        ),
        report=progress_events(emit),
    )
    emit_report(report, emit)


def emit_report(report: CacheReport, emit: Emit) -> None:
    """Send what a cache job did: warnings, notes, and the counts."""
    emit_problems(report.problems, emit)
    for note in report.notes:
        emit("log", message=note)
    emit(
        "end",
        reason="done",
        encoded=report.encoded,
        reused=report.reused,
        removed=report.removed.count,
        removed_bytes=report.removed.num_bytes,
        unneeded=report.unneeded.count,
        unneeded_bytes=report.unneeded.num_bytes,
        captions_encoded=report.captions_encoded,
        captions_reused=report.captions_reused,
        adopted=report.adopted,
        captions_adopted=report.captions_adopted,
        exported=report.exported,
        num_buckets=len(report.buckets),
        buckets={str(b): count for b, count in islice(report.buckets.items(), MAX_LISTED)},
        num_problems=len(report.problems),
    )


def emit_problems(problems: tuple[Problem, ...], emit: Emit) -> None:
    """Send one warning a clip or caption that is not used."""
    for problem in problems:
        emit("warning", message=str(problem), file=str(problem.file or ""), hint=problem.hint)


def progress_events(emit: Emit) -> Report:
    """Return a progress callback that sends `phase` events, a few a second at most.

    They say how long the rest takes, `eta_s`, at the pace since the phase's first event: what was
    loaded before it does not count.
    """
    last: dict[str, float] = {}
    began: dict[str, tuple[float, int]] = {}

    def report(phase: str, done: int, total: int, name: str = "") -> None:
        now = time.monotonic()
        start, first = began.setdefault(phase, (now, done))
        if done < first:  # the same phase, anew
            start, first = began[phase] = (now, done)
        if done == total or now - last.get(phase, 0.0) >= _MIN_INTERVAL_S:
            last[phase] = now
            left = {}
            if first < done < total:
                left = {"eta_s": round((now - start) / (done - first) * (total - done), 1)}
            emit("phase", name=phase, done=done, total=total, detail=name, **left)

    return report
