"""The sample job: prompts to files, with one large model on the device at a time.

Texts are encoded and the text encoder is let go; images and control videos are encoded, and their
encoders are let go; all samples are drawn, and the transformers are let go; then they are decoded
and written one after the other.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainer.contract.lora_use import LoRAUse
from trainer.contract.variants import Expert, Variant
from trainer.jobs.sample_loras import LoRASwitch, described, uses_in
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
    SamplingModels,
    VideoDecoder,
    decode_frames,
    generate,
)
from trainer.sampling.requests import SampleRequest
from trainer.sampling.results import OutputKind, write_sample
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


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOptions:
    """How to sample."""

    name: str = "sample"
    """Files are `<name>_<index>_<seed>.mp4`."""
    kind: OutputKind = "video"
    loras: tuple[LoRAUse, ...] = ()
    """Beside the transformer while it samples; `SampleRequest.lora_strengths` counts by them."""
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


def run_sample(
    requests: Sequence[SampleRequest],
    variant: Variant,
    loaders: SampleLoaders,
    output: Path,
    options: SampleOptions | None = None,
) -> list[Sample]:
    """Sample all requests and write them into `output`, where nothing is overwritten.

    Args:
        requests: what to make.
        variant: the model.
        loaders: where the models come from.
        output: folder, made if it is not there.
        options: LoRAs, device, names.

    Raises:
        ConfigError: a request does not fit the model; before anything is loaded.
        DataError: an image or control video cannot be read.
        ModelFileError: a LoRA is for another model.
        NonFiniteError: a sample became NaN or infinite.
        DiskError: a file could not be written.
    """
    run = _Run(tuple(requests), variant, loaders, options or SampleOptions())
    for request in requests:
        request.check(variant)
    contexts = run.encode_texts()
    conditions = run.encode_inputs()
    latents = run.draw(contexts, conditions)
    run.release()
    return run.write(latents, output)


@dataclass(frozen=True, slots=True)
class _Run:
    requests: tuple[SampleRequest, ...]
    variant: Variant
    loaders: SampleLoaders
    options: SampleOptions
    evaluations: list[Evaluations] = field(default_factory=list)
    """Of each request that was drawn."""

    def encode_texts(self) -> dict[str, Tensor]:
        self._report("texts", 0)
        encoder = self.loaders.text_encoder()
        contexts = encode_texts(encoder, self.requests)
        del encoder
        self.release()
        return contexts

    def encode_inputs(self) -> list[Conditions]:
        if not any(request.files for request in self.requests):
            return [Conditions()] * len(self.requests)
        self._report("inputs", 0)
        vae, image_encoder = self.loaders.vae(), self._image_encoder()
        device = self.options.device
        conditions = []
        for request in self.requests:
            encoded = encode_files(request, self.variant, vae, image_encoder, device)
            conditions.append(encoded.to("cpu"))
            self._report("inputs", len(conditions))
        del vae, image_encoder
        self.release()
        return conditions

    def draw(self, contexts: dict[str, Tensor], conditions: list[Conditions]) -> list[Tensor]:
        switch = ExpertSwitch(self.loaders.transformer, self.options.device)
        loras = LoRASwitch(self.options.loras, has_experts=self.variant.experts)
        models = SamplingModels(
            variant=self.variant,
            transformer=lambda expert: loras.ready(switch(expert), expert),
            contexts=contexts,
            device=self.options.device,
            step_cache=self.options.step_cache,
        )
        evaluations = [walk_of(request).num_steps for request in self.requests]
        latents: list[Tensor] = []
        for index, (request, condition) in enumerate(zip(self.requests, conditions, strict=True)):
            before = sum(evaluations[:index])

            def on_step(done: int, steps: int, before: int = before) -> None:
                loras.on_step(done, steps)
                self.options.progress("steps", before + done, sum(evaluations))

            loras.begin(request)
            result = generate(
                models,
                request,
                conditions=condition,
                on_step=on_step,
                observer=self.options.observer,
                on_end=self.evaluations.append,
            )
            latents.append(result.cpu())
        return latents

    def write(self, latents: list[Tensor], output: Path) -> list[Sample]:
        vae = self.loaders.vae()
        samples: list[Sample] = []
        for index, (request, result) in enumerate(zip(self.requests, latents, strict=True)):
            frames = decode_frames(vae, result.to(self.options.device), tile=self.options.tile)
            name = f"{request.name or self.options.name}_{index:02d}"
            path = write_sample(
                output,
                name,
                request,
                frames,
                metadata=self._metadata(request, self.evaluations[index]),
                kind=self.options.kind,
            )
            samples.append(Sample(path, request, self.evaluations[index]))
            self.options.on_sample(samples[-1])
            self._report("decode", len(samples))
        return samples

    def _image_encoder(self) -> ImageEncoder | None:
        if self.variant.transformer.image_dim is None or self.loaders.image_encoder is None:
            return None
        return self.loaders.image_encoder()

    def _metadata(self, request: SampleRequest, evaluations: Evaluations) -> dict[str, Any]:
        loras = [described(use) for use in uses_in(request, self.options.loras)]
        described_run = {"variant": self.variant.name, "evaluations": asdict(evaluations)}
        return described_run | ({"loras": loras} if loras else {})

    def _report(self, phase: str, done: int) -> None:
        self.options.progress(phase, done, len(self.requests))

    def release(self) -> None:
        """Give the memory of models back that nothing refers to any more."""
        gc.collect()
        if self.options.device.type == "cuda":
            torch.cuda.empty_cache()
