"""Measuring one model: its validation loss without and with what was trained, and its videos.

One large model is on the device at a time: texts are encoded and the text encoder is let go; the
transformer measures the loss and draws the videos of the probe, and is let go; then they are
decoded and judged.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.contract.config import Prompt, SamplingSection
from trainer.contract.errors import ConfigError
from trainer.contract.lora_use import LoRAUse
from trainer.contract.variants import Expert, Variant
from trainer.core.seams import ProbeShot
from trainer.data.fingerprint import digest
from trainer.data.items import TrainingItem
from trainer.engine.process_group import World
from trainer.jobs.sample import Progress, SampleLoaders
from trainer.jobs.sample_loras import attach_loras
from trainer.sampling.conditions import Conditions, encode_texts
from trainer.sampling.experts import ExpertSwitch
from trainer.sampling.pipeline import SamplingModels, decode_frames, expert_at, generate
from trainer.sampling.requests import SampleRequest
from trainer.sampling.results import describe, write_sample
from trainer.sampling.step_cache.values import StepCacheValues
from trainer.training.validation import (
    ValidationResult,
    ValidationSettings,
    Validator,
    choose_items,
    together,
)

Video = NDArray[np.uint8]
"""Frames of one video, (F, H, W, 3), RGB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a run trained: a LoRA, or the transformer itself."""

    path: Path
    expert: Expert
    """The transformer it belongs to; `low_noise` for models that have one."""
    is_model: bool
    """The file is the whole transformer (a full fine-tune)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationSet:
    """What the loss is measured on."""

    items: Sequence[TrainingItem]
    settings: ValidationSettings

    @property
    def fingerprint(self) -> str:
        """Hash of all that changes the figure besides the model: items, timesteps and noise."""
        chosen = choose_items(self.items, self.settings)
        settings = self.settings
        return digest(
            [
                sorted([item.identity, item.latents_key, item.context_key] for item in chosen),
                sorted(settings.timesteps),
                settings.noises_per_timestep,
                settings.seed,
                *(["masks"] if settings.use_masks else []),
            ]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalParts:
    """What one evaluation works with."""

    variant: Variant
    trained: tuple[Trained, ...]
    """One a transformer at most; empty: the base alone."""
    experts: tuple[Expert, ...]
    """The transformers whose loss is measured; `low_noise` for models that have one."""
    loaders: SampleLoaders
    """`transformer` gives base models."""
    load_trained: Callable[[Path], nn.Module]
    """Loads the transformer that a full fine-tune wrote."""
    validation: ValidationSet | None
    shots: Sequence[SampleRequest]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tile: tuple[int, int] | None = None
    """(height, width) in pixels: decode in overlapping tiles."""
    progress: Progress = lambda _phase, _done, _total: None
    step_cache: StepCacheValues = field(default_factory=StepCacheValues)
    """What step caches know of the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What came out; what was not asked for is None or empty."""

    base: ValidationResult | None
    trained: ValidationResult | None
    videos: tuple[Video, ...]
    """One a shot, by what was trained, or by the base where there is nothing else."""


def shot_requests(
    shots: Sequence[ProbeShot], variant: Variant, sampling: SamplingSection, *, probe: str
) -> tuple[SampleRequest, ...]:
    """Return the probe's shots as requests with the settings of `[sampling]`.

    Raises:
        ConfigError: the model starts from a picture, and probes give none; or the settings do not
            fit the model.
    """
    if not shots:
        return ()
    if variant.conditioning != "none":
        raise ConfigError(
            f"probe {probe!r} gives texts alone, and {variant.name} starts from a picture or a "
            "control video",
            hint="--set probe.kind=none measures the validation loss, which works for this model",
        )
    requests = tuple(
        SampleRequest.of(
            Prompt.model_validate({"prompt": shot.prompt, "seed": shot.seed}), variant, sampling
        )
        for shot in shots
    )
    for request in requests:
        request.check(variant)
    return requests


def shots_fingerprint(shots: Sequence[SampleRequest]) -> str:
    """Return a hash of all that decides the videos besides the model."""
    return digest([describe(request) for request in shots])


def measure(parts: EvalParts) -> Measured:
    """Measure the losses, then make the videos.

    Raises:
        DataError: an entry of the cache is missing or damaged.
        ModelFileError: a file cannot be used, or the LoRA is for another model.
        NonFiniteError: a loss or a video became NaN or infinite.
    """
    return _Evaluation(parts).run()


def write_videos(folder: Path, shots: Sequence[SampleRequest], videos: Sequence[Video]) -> None:
    """Write the videos as `<number>_<seed>` into `folder`; nothing is overwritten.

    Raises:
        DiskError: disk full or read-only.
    """
    for index, (request, video) in enumerate(zip(shots, videos, strict=True)):
        write_sample(folder, f"{index:03d}", request, list(video))


@dataclass(frozen=True, slots=True)
class _Evaluation:
    parts: EvalParts

    def run(self) -> Measured:
        contexts = self._encode_texts()
        measured = {expert: self._losses(expert) for expert in self.parts.experts}
        transformers = {
            expert: transformer
            for expert, (_, _, transformer) in measured.items()
            if transformer is not None
        }
        base = _together([base for base, _, _ in measured.values()])
        trained = _together([trained for _, trained, _ in measured.values()])
        del measured
        latents = self._sample(contexts, transformers)
        transformers.clear()
        self._release()
        return Measured(base=base, trained=trained, videos=self._decode(latents))

    def _encode_texts(self) -> dict[str, Tensor]:
        if not self.parts.shots:
            return {}
        self.parts.progress("texts", 0, 1)
        contexts = encode_texts(self.parts.loaders.text_encoder(), self.parts.shots)
        self._release()
        return contexts

    def _losses(
        self, expert: Expert
    ) -> tuple[ValidationResult | None, ValidationResult | None, nn.Module | None]:
        """Return the loss of the base, that with what was trained, and the latter's transformer.

        Loads nothing that neither a loss nor a video needs. Of a model with experts the
        transformer is in RAM then: the other one may come first.
        """
        parts = self.parts
        trained = next((one for one in parts.trained if one.expert == expert), None)
        if self._settings(expert) is None and not parts.shots:
            return None, None, None
        is_model = trained is not None and trained.is_model
        transformer: nn.Module | None = None
        base = result = None
        if self._settings(expert) is not None or not is_model:
            transformer = parts.loaders.transformer(expert)
            base = self._loss(transformer, expert)
        if trained is not None and trained.is_model:
            transformer = None
            self._release()
            transformer = parts.load_trained(trained.path)
        elif trained is not None and transformer is not None:
            use = LoRAUse(path=trained.path, expert=expert if self._experts else None)
            attach_loras(transformer, [use], expert if self._experts else None)
        if trained is not None and transformer is not None:
            result = self._loss(transformer, expert)
        if not parts.shots:
            transformer = None
        elif transformer is not None and self._experts:
            transformer.to("cpu")
        self._release()
        return base, result, transformer

    def _settings(self, expert: Expert) -> ValidationSettings | None:
        """Return what is measured with `expert`; None where it works at no timestep of it."""
        validation = self.parts.validation
        if validation is None:
            return None
        variant = self.parts.variant
        timesteps = tuple(
            timestep
            for timestep in validation.settings.timesteps
            if not variant.experts or expert_at(timestep, variant) == expert
        )
        return replace(validation.settings, timesteps=timesteps) if timesteps else None

    def _loss(self, transformer: nn.Module, expert: Expert) -> ValidationResult | None:
        validation, settings = self.parts.validation, self._settings(expert)
        if validation is None or settings is None:
            return None
        world = World.alone(self.parts.device)
        return Validator(transformer, validation.items, settings, world).measure()

    def _sample(
        self, contexts: dict[str, Tensor], transformers: Mapping[Expert, nn.Module]
    ) -> list[Tensor]:
        parts = self.parts
        if not parts.shots or not transformers:
            return []

        def load(expert: Expert) -> nn.Module:
            own = transformers.get(expert)
            return parts.loaders.transformer(expert) if own is None else own.to(parts.device)

        models = SamplingModels(
            variant=parts.variant,
            transformer=ExpertSwitch(load, parts.device),
            contexts=contexts,
            device=parts.device,
            step_cache=parts.step_cache,
        )
        latents = []
        for request in parts.shots:
            latents.append(generate(models, request, conditions=Conditions()).cpu())
            parts.progress("videos", len(latents), len(parts.shots))
        return latents

    def _decode(self, latents: Sequence[Tensor]) -> tuple[Video, ...]:
        parts = self.parts
        if not latents:
            return ()
        vae = parts.loaders.vae()
        videos = []
        for result in latents:
            frames = decode_frames(vae, result.to(parts.device), tile=parts.tile)
            videos.append(np.stack(list(frames)))
            parts.progress("decode", len(videos), len(latents))
        return tuple(videos)

    @property
    def _experts(self) -> bool:
        return bool(self.parts.variant.experts)

    def _release(self) -> None:
        gc.collect()
        if self.parts.device.type == "cuda":
            torch.cuda.empty_cache()


def _together(results: Sequence[ValidationResult | None]) -> ValidationResult | None:
    """Return the measurements of all experts as one; None where there is none."""
    found = [result for result in results if result is not None]
    return together(found) if len(found) > 1 else next(iter(found), None)
