"""The job `sample_session`: models that stay loaded, and one sample for each line of stdin.

A line is JSON: `{"prompt": {"prompt": "a cat", "seed": 7}}` asks for a sample, `{"stop": true}`
stops the one that is being made. A `phase` event named `ready` comes at first, and after each
sample or the words on why there is none. The end of stdin ends the job.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TextIO

from pydantic import ValidationError

from trainer.contract.config import Prompt, RunConfig
from trainer.contract.config_io import problems_of
from trainer.contract.errors import ConfigError
from trainer.contract.jobs import SampleSessionRequest
from trainer.contract.variants import Variant
from trainer.jobs.automatic_memory import resolve_for_forwards, working_set_of
from trainer.jobs.base import Emit, explain
from trainer.jobs.build import pick_device
from trainer.jobs.cache_run import progress_events
from trainer.jobs.components import settle_variant, text_encoder_device
from trainer.jobs.config_job import read_config
from trainer.jobs.sample import Sample
from trainer.jobs.sample_failures import in_phase
from trainer.jobs.sample_kept import KeptLatents
from trainer.jobs.sample_lora_checks import check_loras, check_merge
from trainer.jobs.sample_metadata import model_metadata, sample_metadata
from trainer.jobs.sample_run import (
    TransformerFiles,
    loaders_of,
    loras_of,
    merge_events,
    sample_fields,
    transformer_files,
)
from trainer.jobs.sample_studio import Studio, StudioOptions
from trainer.jobs.sample_target import Target, file_options
from trainer.jobs.sample_write import write_drawn, write_latents_alone
from trainer.jobs.step_cache_values import step_cache_values
from trainer.sampling.inputs import check_inputs
from trainer.sampling.requests import SampleRequest
from trainer.sampling.results import latents_beside, require_formats

READY = "ready"


def run(request: SampleSessionRequest, emit: Emit) -> None:
    """Make a sample for each line of stdin.

    Raises:
        MenmaError: the models cannot be used at all; what is wrong with one line is told and does
            not end the job.
    """
    lines = Lines(sys.stdin)
    if request.calibrate:
        raise ConfigError("a session calibrates nothing", hint="calibrate once, without it")
    config = read_config(request, "sample")
    variant = settle_variant(config)
    files = transformer_files(config, variant)
    loras = loras_of(request, config, variant, files)
    for note in check_loras(loras, variant, files):
        emit("warning", message=note)
    device = pick_device(config)
    usual = SampleRequest.of("", variant, config.sampling)
    kind = file_options(request.output, request.set, config.sampling, force=request.force)
    target = Target(request.output, config.name, kind)
    require_formats(kind, [usual])
    if request.merge_loras:
        check_merge(loras, [usual], config)
    forwards = [working_set_of(usual, variant)]
    config = resolve_for_forwards(config, variant, device, forwards, emit)
    tile = config.memory.vae_tile
    options = StudioOptions(
        loras=tuple(loras),
        device=device,
        text_device=text_encoder_device(config, device),
        merge_loras=request.merge_loras,
        on_merge=merge_events(emit),
        tile=(tile, tile) if tile else None,
        keep=True,
        warn=lambda words: emit("warning", message=words),
    )
    studio = Studio(variant, loaders_of(config, variant, files, device), options)
    session = _Session(config, variant, files, studio, options, target, lines, emit)
    emit("phase", name=READY)
    for line in lines:
        session.answer(line)
        emit("phase", name=READY)
    emit("end", reason="done", num_samples=session.num_made)


class Lines:
    """The lines of a stream, read ahead by a thread so that a stop is heard at once."""

    def __init__(self, stream: Iterable[str]) -> None:
        """Begin to read."""
        self.stop = threading.Event()
        self._queue: queue.Queue[Any] = queue.Queue()
        reader = threading.Thread(target=self._read, args=(stream,), daemon=True)
        reader.start()

    def __iter__(self) -> Iterator[Any]:
        """Yield each message that is no stop; a stop before a sample has begun does nothing."""
        while (message := self._queue.get()) is not None:
            yield message

    def _read(self, stream: TextIO) -> None:
        for line in stream:
            try:
                message = json.loads(line)
            except ValueError:
                message = {"wrong": line}
            if isinstance(message, dict) and message.get("stop"):
                self.stop.set()
            elif message is not None:
                self._queue.put(message)
        self._queue.put(None)


class _Stopped(Exception):
    """The sample is not wanted any more."""


@dataclass(slots=True)
class _Session:
    config: RunConfig
    variant: Variant
    files: TransformerFiles
    studio: Studio
    options: StudioOptions
    target: Target
    lines: Lines
    emit: Emit
    num_made: int = field(default=0)
    _num_asked: int = field(default=0)

    def answer(self, message: Any) -> None:
        """Make what a line asks for, or say why not."""
        self.lines.stop.clear()
        try:
            self._make(self._request(message))
        except _Stopped:
            self.emit("log", message="stopped; the models stay loaded")
        except Exception as error:
            known = explain(error)
            if known is None:
                raise
            fields = {"message": known.message[:8000], "hint": known.hint}
            self.emit("error", **fields, code=known.exit_code, of_line=True)

    def _request(self, message: Any) -> SampleRequest:
        wanted = message.get("prompt") if isinstance(message, dict) else None
        try:
            prompt = Prompt.model_validate(wanted)
        except ValidationError as error:
            raise ConfigError(problems=problems_of(error, Prompt)) from error
        index, self._num_asked = self._num_asked, self._num_asked + 1
        request = SampleRequest.of(prompt, self.variant, self.config.sampling, index=index)
        request.check(self.variant)
        self.target.check([request], [request.name or ""], first_index=index)
        for note in check_inputs([request], multiple=self.variant.pixel_multiple):
            self.emit("log", message=note)
        return request

    def _make(self, request: SampleRequest) -> None:
        progress = progress_events(self.emit)

        def on_step(done: int, steps: int) -> None:
            progress("steps", done, steps)
            self._leave_if_stopped()

        step_cache = step_cache_values(self.config, self.variant, lambda: self.files, [request])
        self.studio.encode_texts([request])
        self.studio.encode_files(request)
        self._leave_if_stopped()
        latents = self.studio.draw(request, on_step, step_cache)
        self._leave_if_stopped()
        made, kind = self.studio.evaluations, self.target.files
        models = model_metadata(self.config, self.variant, self.files, step_cache)
        index = self._num_asked - 1
        decoding = self.studio.decoding() if kind.decodes else nullcontext()
        metadata = sample_metadata(request, self.options.loras, made, models)
        place = self.target.path(index, request, request.name or "")
        kept = KeptLatents(
            lambda _, drawn: write_latents_alone(
                place, request, drawn, files=kind, metadata=metadata
            )
        )
        try:
            with in_phase("decode"), decoding as decode:
                path = write_drawn(
                    place,
                    request,
                    latents,
                    decode=decode,
                    files=kind,
                    metadata=metadata,
                    on_latents=lambda beside: kept.paths.update({index: beside}),
                )
        except BaseException:
            kept.keep({index: latents})
            if kept.paths:
                self.emit("warning", message=kept.words())
            raise
        self.num_made += 1
        beside = latents_beside(path) if kind.save_latents else None
        self.emit("sample", **sample_fields(Sample(path, request, made, index, beside)))

    def _leave_if_stopped(self) -> None:
        if self.lines.stop.is_set():
            raise _Stopped
