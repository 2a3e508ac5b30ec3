"""Models that make one sample after another: loaded once, with one large one on the device."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from trainer.contract.denoising_options import DenoisingOptions
from trainer.contract.errors import DataError
from trainer.contract.lora_use import LoRAUse
from trainer.contract.variants import Expert, Variant
from trainer.data.fingerprint import stat_of
from trainer.jobs.sample import SampleLoaders
from trainer.jobs.sample_failures import in_phase
from trainer.jobs.sample_loras import LoRASwitch, OnMerge
from trainer.jobs.sample_write import Decode, decode_with
from trainer.sampling.conditions import Conditions, encode_files, encode_texts
from trainer.sampling.experts import ExpertSwitch
from trainer.sampling.pipeline import Evaluations, OnStep, SamplingModels, generate
from trainer.sampling.requests import SampleRequest
from trainer.sampling.step_cache.values import StepCacheValues

M = TypeVar("M")


@dataclass(frozen=True, slots=True, kw_only=True)
class StudioOptions:
    """How a studio works."""

    loras: tuple[LoRAUse, ...] = ()
    """`SampleRequest.lora_strengths` counts by them."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    text_device: torch.device | None = None
    """Where the text encoder works; None: on `device`."""
    merge_loras: bool = False
    """Add the LoRAs to the weights instead of attaching them."""
    on_merge: OnMerge = lambda _expert, _rounding: None
    tile: tuple[int, int] | None = None
    """(height, width) in pixels: decode in overlapping tiles."""
    keep: bool = False
    """Encoders and VAE wait in RAM between uses; else they are loaded anew each time."""
    warn: Callable[[str], None] = lambda _words: None
    """Told of what works, but not as well as it might."""


class Studio:
    """Encodes, draws and decodes single samples; what was encoded once is not encoded again.

    Attributes:
        evaluations: how often the transformer worked for the sample that was drawn last.
    """

    def __init__(self, variant: Variant, loaders: SampleLoaders, options: StudioOptions) -> None:
        """Prepare; nothing is loaded yet."""
        self._variant = variant
        self._loaders = loaders
        self._options = options
        self.evaluations = Evaluations(0, 0)
        self._texts: dict[str, Tensor] = {}
        self._conditions: dict[SampleRequest, tuple[list[str], Conditions]] = {}
        self._text_encoder = _Waiting(loaders.text_encoder, options, options.text_device)
        self._vae = _Waiting(loaders.vae, options)
        self._image_encoder = _Waiting(self._load_image_encoder, options)
        self._loras = self._new_loras()
        self._switch = ExpertSwitch(loaders.transformer, options.device)

    def encode_texts(self, requests: Sequence[SampleRequest]) -> None:
        """Encode all texts of the requests that are not known yet."""
        missing = [
            request
            for request in requests
            if any(text not in self._texts for text in request.texts)
        ]
        if missing:
            with in_phase("texts"), self._text_encoder.in_use(on_cpu_if_full=True) as encoder:
                self._texts |= encode_texts(encoder, missing)

    def encode_files(self, request: SampleRequest) -> None:
        """Encode images and videos of a request, unless a request with the same is known.

        A file that was changed since is encoded anew.

        Raises:
            DataError: one cannot be read.
        """
        key = _seen(request)
        stats = [stat_of(path) for path in request.files.values()]
        if "" in stats:
            gone = list(request.files.values())[stats.index("")]
            raise DataError(f"{gone} cannot be read")
        if key in self._conditions and self._conditions[key][0] == stats:
            return
        if not request.files:
            self._conditions[key] = stats, Conditions()
            return
        with (
            in_phase("inputs"),
            self._vae.in_use() as vae,
            self._image_encoder.in_use() as image_encoder,
        ):
            device = self._options.device
            found = encode_files(request, self._variant, vae, image_encoder, device)
        self._conditions[key] = stats, found.to("cpu")

    def change_base(self, load: Callable[[Expert], nn.Module] | None) -> None:
        """Let the transformers go; the next sample loads `load`'s, or the first ones again."""
        self._switch = ExpertSwitch(load or self._loaders.transformer, self._options.device)
        self._loras = self._new_loras()
        release(self._options.device)

    def draw(self, request: SampleRequest, on_step: OnStep, step_cache: StepCacheValues) -> Tensor:
        """Return the latents of a request that is encoded, (1, C, F, H, W), float32 on the CPU.

        Args:
            request: what to draw.
            on_step: told of each evaluation; may raise to stop.
            step_cache: what step caches know of the transformers.

        Raises:
            NonFiniteError: they became NaN or infinite.
            ModelFileError: a LoRA is for another model.
        """
        models = SamplingModels(
            variant=self._variant,
            transformer=lambda expert: self._loras.ready(self._switch(expert), expert),
            contexts=self._texts,
            device=self._options.device,
            step_cache=step_cache,
        )

        def step_done(done: int, steps: int) -> None:
            self._loras.on_step(done, steps)
            on_step(done, steps)

        self._loras.begin(request)
        _, conditions = self._conditions[_seen(request)]
        with in_phase("steps"):
            latents = generate(
                models,
                request,
                conditions=conditions,
                on_step=step_done,
                on_end=self._note_evaluations,
            )
            return latents.cpu()

    @contextmanager
    def decoding(self) -> Iterator[Decode]:
        """Give a function from latents to frames, which come as they are made."""
        with self._vae.in_use() as vae:
            yield decode_with(vae, self._options.device, self._options.tile)

    def _note_evaluations(self, evaluations: Evaluations) -> None:
        self.evaluations = evaluations

    def _new_loras(self) -> LoRASwitch:
        return LoRASwitch(
            self._options.loras,
            has_experts=self._variant.experts,
            merges=self._options.merge_loras,
            on_merge=self._options.on_merge,
        )

    def _load_image_encoder(self) -> Any:
        if self._variant.transformer.image_dim is None or self._loaders.image_encoder is None:
            return None
        return self._loaders.image_encoder()


class _Waiting(Generic[M]):
    """A model that is on the device while it is in use; None: on that of the options."""

    def __init__(
        self, load: Callable[[], M], options: StudioOptions, device: torch.device | None = None
    ) -> None:
        self._load = load
        self._options = options
        self._device = options.device if device is None else device
        self._model: M | None = None

    @contextmanager
    def in_use(self, *, on_cpu_if_full: bool = False) -> Iterator[M]:
        model: M = self._load() if self._model is None else self._model
        if self._model is not None:
            self._bring(model, on_cpu_if_full=on_cpu_if_full)
        try:
            yield model
        finally:
            if self._options.keep:
                self._model = model
                _move(model, torch.device("cpu"))
            del model
            release(self._options.device)

    def _bring(self, model: M, *, on_cpu_if_full: bool) -> None:
        try:
            _move(model, self._device)
        except torch.OutOfMemoryError:
            _move(model, torch.device("cpu"))
            release(self._options.device)
            if not on_cpu_if_full:
                raise
            self._options.warn("the text encoder works on the CPU: the device is full")


def release(device: torch.device) -> None:
    """Give the memory of models back that nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _move(model: Any, device: torch.device) -> None:
    if model is not None:
        model.to(device)


def _seen(request: SampleRequest) -> SampleRequest:
    """Return what two requests have in common whose files are encoded alike."""
    return replace(
        request,
        prompt="",
        negative_prompt="",
        prompt_template=None,
        negative_prompt_template=None,
        name=None,
        seed=0,
        num_steps=1,
        guidance_scale=(1.0, 1.0),
        flow_shift=1.0,
        solver="",
        schedule="",
        strength=None,
        denoising=DenoisingOptions(),
        fps=1,
        lora_strengths=None,
    )
