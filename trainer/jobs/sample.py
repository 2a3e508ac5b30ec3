"""The sample job: prompts to files, with one large model on the device at a time.

Texts are encoded and the text encoder is let go; images and control videos are encoded, and their
encoders are let go; all samples are drawn, and the transformers are let go; then they are decoded
and written one after the other, also those that were drawn before something went wrong. What is
drawn and cannot be decoded is kept as latents.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainer.contract.lora_use import LoRAUse
from trainer.contract.variants import Expert, Variant
from trainer.jobs.sample_failures import Failures, StopDrawing, in_phase, subject_of
from trainer.jobs.sample_kept import KeptLatents
from trainer.jobs.sample_loras import LoRASwitch, OnMerge
from trainer.jobs.sample_metadata import DescribeFile, sample_metadata
from trainer.jobs.sample_target import Target
from trainer.jobs.sample_write import decode_with, write_drawn, write_latents_alone
from trainer.models.wan.conditioning import LatentEncoder
from trainer.sampling.conditions import (
    Conditions,
    ImageEncoder,
    TextEncoder,
    encode_files,
    encode_texts,
)
from trainer.sampling.experts import ExpertSwitch
from trainer.sampling.pipeline import (
    Evaluations,
    OnEstimate,
    SamplingModels,
    VideoDecoder,
    generate,
)
from trainer.sampling.requests import SampleRequest
from trainer.sampling.results import FileOptions, describe_file, latents_beside
from trainer.sampling.schedule import walk_of
from trainer.sampling.step_cache.cache import BlockObserver
from trainer.sampling.step_cache.values import StepCacheValues

Progress = Callable[[str, int, int], None]
"""Told of (phase, done, total); phases are `texts`, `inputs`, `steps` and `decode`."""


class Vae(LatentEncoder, VideoDecoder, Protocol):
    """A Wan VAE, both ways."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleLoaders:
    """How to get each model. Called when it is needed; the result is let go afterwards."""

    text_encoder: Callable[[], TextEncoder]
    transformer: Callable[[Expert], nn.Module]
    """Models with one transformer are asked for `low_noise`."""
    vae: Callable[[], Vae]
    image_encoder: Callable[[], ImageEncoder] | None = None
    """For variants with an image branch."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A written sample."""

    path: Path
    request: SampleRequest
    evaluations: Evaluations
    """How often the transformer worked for it."""
    index: int = 0
    """Its place among all requests of the run."""
    latents: Path | None = None
    """File of its latents, where they were wanted beside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Which of a run's samples one process makes."""

    rank: int = 0
    size: int = 1
    """It makes every `size`-th sample, from number `rank` on."""
    is_shared: bool = False
    """Other processes make the same samples with it, each a part of the tokens."""
    writes: bool = True
    """Whether it decodes and writes them."""

    def has(self, index: int) -> bool:
        """Return whether the sample with this number is its own."""
        return index % self.size == self.rank


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOptions:
    """How to sample."""

    name: str = "sample"
    """Files are `<name>_<index>_<seed>.<ending>`."""
    files: FileOptions = field(default_factory=FileOptions)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What each file says of the models, in addition."""
    loras: tuple[LoRAUse, ...] = ()
    """Used by all samples; `SampleRequest.lora_strengths` counts by them."""
    merge_loras: bool = False
    """Add the LoRAs to the weights instead of attaching them; see `check_merge`."""
    on_merge: OnMerge = lambda _expert, _rounding: None
    part: Part = Part()
    """Which of the requests are made here."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tile: tuple[int, int] | None = None
    """(height, width) in pixels: decode in overlapping tiles."""
    step_cache: StepCacheValues = field(default_factory=StepCacheValues)
    """What step caches know of the model."""
    observer: BlockObserver | None = None
    """Watches the blocks in the place of step caches."""
    progress: Progress = lambda _phase, _done, _total: None
    on_sample: Callable[[Sample], None] = lambda _sample: None
    """Told of each file when it is written."""
    preview: Callable[[int, SampleRequest], OnEstimate] | None = None
    """Given (index, request): what is told of the sample's clean estimates."""
    on_failure: Callable[[str], None] = lambda _words: None
    """Told why a sample is not made, when others are."""
    on_kept: Callable[[KeptLatents], None] = lambda _kept: None
    """Told of latents that are not decoded, where some are left."""


def run_sample(
    requests: Sequence[SampleRequest],
    variant: Variant,
    loaders: SampleLoaders,
    output: Path,
    options: SampleOptions | None = None,
) -> list[Sample]:
    """Sample all requests and write them into `output`; nothing is overwritten unasked.

    A sample that becomes NaN or does not fit into memory leaves the others alone. Whatever goes
    wrong, what was drawn until then is decoded and written before the error is raised; what cannot
    be, or a signal comes while it is decoded, is kept as files of latents.

    Args:
        requests: what to make.
        variant: the model.
        loaders: where the models come from.
        output: folder, made if it is not there, or a file; see `sample_target`.
        options: LoRAs, device, names, and which of the requests are this process's.

    Raises:
        ConfigError: a request does not fit the model; before anything is loaded.
        DataError: an image or control video cannot be read.
        ModelFileError: a LoRA is for another model.
        NonFiniteError: a sample became NaN or infinite.
        OutOfMemoryError: a sample does not fit.
        DiskError: a file could not be written.
    """
    options = options or SampleOptions()
    for request in requests:
        request.check(variant)
    mine = {i: one for i, one in enumerate(requests) if options.part.has(i)}
    if not mine:
        return []
    failures = Failures(options.on_failure) if len(mine) > 1 else Failures()
    target = Target(output, options.name, options.files)
    run = _Run(mine, variant, loaders, options, failures, target)
    contexts = run.encode_texts()
    conditions = run.encode_inputs()
    samples: list[Sample] = []
    with run.keeping_drawn():
        run.draw(contexts, conditions)
        run.release()
        if run.latents and options.part.writes:
            samples = run.write()
    run.failures.end(len(samples), len(mine))
    return samples


@dataclass(frozen=True, slots=True)
class _Run:
    requests: dict[int, SampleRequest]
    variant: Variant
    loaders: SampleLoaders
    options: SampleOptions
    failures: Failures
    target: Target
    evaluations: dict[int, Evaluations] = field(default_factory=dict)
    """Of each request that was drawn."""
    latents: dict[int, Tensor] = field(default_factory=dict)
    """Drawn and not in a file of their own yet, on the CPU."""
    kept: KeptLatents = field(init=False)
    describe_file: DescribeFile = field(default_factory=lambda: cache(describe_file))

    def __post_init__(self) -> None:
        object.__setattr__(self, "kept", KeptLatents(self._write_latents))

    @contextmanager
    def keeping_drawn(self) -> Iterator[None]:
        """Keep as latents what is drawn and not written when this ends, however it does."""
        try:
            yield
        finally:
            if self.latents and self.options.part.writes:
                try:
                    self.kept.keep(self.latents)
                finally:
                    if self.kept.paths:
                        self.options.on_kept(self.kept)

    def encode_texts(self) -> dict[str, Tensor]:
        self._report("texts", 0)
        with in_phase("texts"):
            encoder = self.loaders.text_encoder()
            contexts = encode_texts(encoder, self.requests.values())
        del encoder
        self.release()
        return contexts

    def encode_inputs(self) -> dict[int, Conditions]:
        requests = self.requests
        if not any(one.files for one in requests.values()):
            return dict.fromkeys(requests, Conditions())
        self._report("inputs", 0)
        conditions = {}
        with in_phase("inputs"):
            vae, image_encoder = self.loaders.vae(), self._image_encoder()
            for index, request in requests.items():
                encoded = encode_files(
                    request, self.variant, vae, image_encoder, self.options.device
                )
                conditions[index] = encoded.to("cpu")
                self._report("inputs", len(conditions))
        del vae, image_encoder
        self.release()
        return conditions

    def draw(self, contexts: dict[str, Tensor], conditions: dict[int, Conditions]) -> None:
        """Fill `latents` with those of every sample that can be drawn."""
        options = self.options
        switch = ExpertSwitch(self.loaders.transformer, options.device)
        loras = LoRASwitch(
            options.loras,
            has_experts=self.variant.experts,
            merges=options.merge_loras,
            on_merge=options.on_merge,
        )
        models = SamplingModels(
            variant=self.variant,
            transformer=lambda expert: loras.ready(switch(expert), expert),
            contexts=contexts,
            device=options.device,
            step_cache=options.step_cache,
        )
        evaluations = {i: walk_of(one).num_steps for i, one in self.requests.items()}
        before = 0
        with suppress(StopDrawing):
            for index, request in self.requests.items():

                def on_step(done: int, steps: int, before: int = before) -> None:
                    loras.on_step(done, steps)
                    options.progress("steps", before + done, sum(evaluations.values()))

                def on_end(made: Evaluations, index: int = index) -> None:
                    self.evaluations[index] = made

                loras.begin(request)
                # Processes that share a video wait for each other in every layer.
                with (
                    self.failures.noted(spares_others=not options.part.is_shared),
                    in_phase("steps", subject_of(index, request)),
                ):
                    result = generate(
                        models,
                        request,
                        conditions=conditions[index],
                        on_step=on_step,
                        on_estimate=options.preview and options.preview(index, request),
                        observer=options.observer,
                        on_end=on_end,
                    )
                    self.latents[index] = result.cpu()
                if index not in self.latents:
                    self.release()
                before += evaluations[index]
        if self.failures.is_interrupted and options.part.writes:
            # Who sends SIGTERM may send SIGKILL soon: decoding takes longer than it may wait.
            self.kept.keep(self.latents)

    def write(self) -> list[Sample]:
        samples: list[Sample] = []
        with suppress(StopDrawing):
            with self.failures.noted(spares_others=False), in_phase("decode"):
                vae = self.loaders.vae() if self.options.files.decodes else None
            for index in list(self.latents):
                request = self.requests[index]
                subject = subject_of(index, request)
                with (
                    self.failures.noted(spares_others=True),
                    in_phase("decode", subject),
                ):
                    samples.append(self._write(index, vae))
                    del self.latents[index]
                    self.kept.done(index, wanted=self.options.files.save_latents)
                    self.options.on_sample(samples[-1])
                self.release()
                self._report("decode", len(samples))
        return samples

    def _write(self, index: int, vae: Vae | None) -> Sample:
        request, options = self.requests[index], self.options
        files = options.files
        # Latents that are wanted take the name of those that are kept.
        with self.kept.aside(index) if files.save_latents else nullcontext():
            path = write_drawn(
                self._path(index),
                request,
                self.latents[index],
                decode=None if vae is None else decode_with(vae, options.device, options.tile),
                files=files,
                metadata=self._metadata(index),
                on_latents=lambda beside: self.kept.paths.update({index: beside}),
            )
        beside = latents_beside(path) if files.save_latents else None
        return Sample(path, request, self.evaluations[index], index, beside)

    def _write_latents(self, index: int, latents: Tensor) -> Path:
        return write_latents_alone(
            self._path(index),
            self.requests[index],
            latents,
            files=self.options.files,
            metadata=self._metadata(index),
        )

    def _path(self, index: int) -> Path:
        request = self.requests[index]
        return self.target.path(index, request, request.name or "")

    def _metadata(self, index: int) -> dict[str, Any]:
        if not self.options.files.metadata:
            return {}
        return sample_metadata(
            self.requests[index],
            self.options.loras,
            self.evaluations[index],
            {"variant": self.variant.name, **self.options.metadata},
            describe_file=self.describe_file,
        )

    def _image_encoder(self) -> ImageEncoder | None:
        if self.variant.transformer.image_dim is None or self.loaders.image_encoder is None:
            return None
        return self.loaders.image_encoder()

    def _report(self, phase: str, done: int) -> None:
        self.options.progress(phase, done, len(self.requests))

    def release(self) -> None:
        """Give the memory of models back that nothing refers to any more."""
        gc.collect()
        if self.options.device.type == "cuda":
            torch.cuda.empty_cache()
