"""What to sample, complete and checked: a prompt with every empty field filled in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from trainer.contract.config import Prompt, SamplingSection
from trainer.contract.denoising_options import DenoisingOptions, denoising_of
from trainer.contract.denoising_rules import denoising_problems
from trainer.contract.errors import ConfigError, Problem
from trainer.contract.one_frame import OneFrame
from trainer.contract.variants import Variant
from trainer.contract.walk import DEFAULT_STRENGTH, steps_walked, walk_problems
from trainer.contract.wildcards import Wildcards
from trainer.sampling.guidance import needs_negative

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """One video or image to make. Nothing is left open; `of` fills in the variant's defaults."""

    prompt: str
    negative_prompt: str
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    num_frames: int
    """Pixel frames, 4N + 1; 1 makes an image."""
    num_steps: int
    guidance_scale: tuple[float, float]
    """(low noise, high noise); models with one transformer use the first."""
    flow_shift: float
    seed: int
    """Seeds a CPU generator: the same seed gives the same noise on every device."""
    solver: str
    fps: int
    image: Path | None = None
    """First frame."""
    last_image: Path | None = None
    """Last frame."""
    control: Path | None = None
    """Control video, image, or folder of frames."""
    name: str | None = None
    """Short name of the prompt."""
    prompt_template: str | None = None
    """What `prompt` was before its wildcards were expanded; None: it had none."""
    negative_prompt_template: str | None = None
    """As `prompt_template`, of `negative_prompt`."""
    lora_strengths: tuple[float, ...] | None = None
    """Strength of each of the run's LoRAs (`jobs.sample.SampleOptions.loras`, in that order) in
    this sample, on both experts; 0 leaves one out, so that one of several files may be in use at
    a time. None: as each LoRA says itself."""
    schedule: str = ""
    """Empty: the solver's own."""
    video: Path | None = None
    """Video, image, or folder of frames that the walk starts from; None: from noise alone."""
    strength: float | None = None
    """Share of the steps that is walked from `video`; None without one."""
    denoising: DenoisingOptions = field(default_factory=DenoisingOptions)
    """How the velocities are found: methods of guidance, step cache."""
    one_frame: str | None = None
    """One-frame mode: the moment to make, and those of `control_images`; see `OneFrame.parse`."""
    control_images: tuple[Path, ...] | None = None
    """One-frame mode: the pictures that are given."""

    @classmethod
    def of(
        cls,
        prompt: Prompt | str,
        variant: Variant,
        defaults: SamplingSection | None = None,
        *,
        index: int = 0,
    ) -> SampleRequest:
        """Fill the empty fields of `prompt`: from `defaults`, then from the variant.

        Args:
            prompt: a text, or a prompt with settings.
            variant: gives the defaults its authors recommend.
            defaults: the config's `[sampling]`.
            index: place in the list of prompts; a prompt without a seed gets the default's + index.

        Raises:
            ConfigError: its wildcards cannot be expanded.
        """
        if isinstance(prompt, str):
            prompt = Prompt.model_validate({"prompt": prompt})
        section = defaults or SamplingSection.model_validate({})

        seed = section.seed + index if prompt.seed is None else prompt.seed

        def pick(field: str, last: T) -> T:
            for source in (prompt, section):
                value: T | None = getattr(source, field)
                if value is not None:
                    return value
            return last

        text = prompt.prompt
        negative = pick("negative_prompt", variant.negative_prompt)
        words, negative_words = _expanded(text, negative, section, seed)
        return cls(
            prompt=words,
            negative_prompt=negative_words,
            prompt_template=text if words != text else None,
            negative_prompt_template=negative if negative_words != negative else None,
            name=prompt.name,
            width=pick("width", variant.width),
            height=pick("height", variant.height),
            num_frames=pick("num_frames", variant.num_frames)
            if prompt.num_frames or not prompt.one_frame
            else 1,
            num_steps=pick("num_steps", variant.num_steps),
            guidance_scale=_guidance(prompt, section, variant),
            flow_shift=pick(
                "flow_shift",
                variant.flow_shift_at(pick("width", variant.width), pick("height", variant.height)),
            ),
            seed=seed,
            solver=pick("solver", section.solver),
            fps=pick("fps", variant.fps),
            image=prompt.image,
            last_image=prompt.last_image,
            control=prompt.control,
            schedule=pick("schedule", section.schedule),
            video=prompt.video,
            strength=prompt.strength or (DEFAULT_STRENGTH if prompt.video else None),
            denoising=denoising_of(section, prompt),
            one_frame=prompt.one_frame,
            control_images=prompt.control_images,
        )

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, pixels."""
        return self.width, self.height

    @property
    def files(self) -> dict[str, Path]:
        """What has to be encoded, by key: images and videos."""
        named = {key: getattr(self, key) for key in _INPUT_NAMES}
        images = enumerate(self.control_images or ())
        return {key: path for key, path in named.items() if path is not None} | {
            f"control_images[{index}]": path for index, path in images
        }

    @property
    def moments(self) -> OneFrame | None:
        """What `one_frame` says.

        Raises:
            ConfigError: it is of another form.
        """
        return None if self.one_frame is None else OneFrame.parse(self.one_frame)

    @property
    def num_walked_frames(self) -> int:
        """Pixel frames of the latents that are walked: more than are kept in one-frame mode."""
        return self.num_frames + 4 * len(self.control_images or ())

    @property
    def texts(self) -> tuple[str, ...]:
        """Texts that have to be encoded: the prompt, and the negative prompt if it is used."""
        used = any(needs_negative(scale) for scale in self.guidance_scale)
        return (self.prompt, self.negative_prompt) if used else (self.prompt,)

    def check(self, variant: Variant, *, pixel_multiple: int | None = None) -> None:
        """Refuse what the model cannot make.

        Args:
            variant: the model.
            pixel_multiple: what width and height must be multiples of, when the model at hand is
                not of the variant's own size.

        Raises:
            ConfigError: everything that is wrong with this request, at once.
        """
        problems = [
            *_size_problems(self, variant, pixel_multiple or variant.pixel_multiple),
            *_number_problems(self),
            *_walk_problems(self),
            *denoising_problems(
                self.denoising,
                variant.transformer.num_layers,
                guided=any(map(needs_negative, self.guidance_scale)),
            ),
            *(_file_problems if self.one_frame is None else _one_frame_problems)(self, variant),
        ]
        if problems:
            raise ConfigError(problems=problems)


def requests_of(
    prompts: Sequence[Prompt], variant: Variant, defaults: SamplingSection | None = None
) -> tuple[SampleRequest, ...]:
    """Return complete, checked requests.

    Raises:
        ConfigError: everything that is wrong with any of them, at once.
    """
    requests: list[SampleRequest] = []
    problems: list[Problem] = []
    for index, prompt in enumerate(prompts):
        try:
            requests.append(SampleRequest.of(prompt, variant, defaults, index=index))
            requests[-1].check(variant)
        except ConfigError as error:
            problems += [
                Problem(p.message, key=f"prompts[{index}].{p.key}".rstrip("."), hint=p.hint)
                for p in error.problems
            ]
    if problems:
        raise ConfigError(problems=problems)
    return tuple(requests)


def _expanded(
    prompt: str, negative_prompt: str, section: SamplingSection, seed: int
) -> tuple[str, str]:
    """Return prompt and negative prompt, without their wildcards where these are switched on."""
    if not section.wildcards:
        return prompt, negative_prompt
    wildcards = Wildcards(section.wildcards_folder)
    return wildcards.expand(prompt, seed), wildcards.expand(negative_prompt, seed, "negative")


def _guidance(prompt: Prompt, section: SamplingSection, variant: Variant) -> tuple[float, float]:
    low, high = variant.guidance_scale
    for source in (section, prompt):
        if source.guidance_scale is not None:
            low = high = source.guidance_scale
        if source.guidance_scale_high_noise is not None:
            high = source.guidance_scale_high_noise
    return low, high


def _size_problems(request: SampleRequest, variant: Variant, multiple: int) -> Iterator[Problem]:
    stride = variant.vae_stride[0]
    if request.num_frames < 1 or request.num_frames % stride != 1:
        near = max(1, (request.num_frames - 1 + stride // 2) // stride * stride + 1)
        yield Problem(
            f"num_frames is {request.num_frames}, but the VAE needs {stride}n + 1",
            key="num_frames",
            hint=f"nearest: {near}",
        )
    for key, value in (("width", request.width), ("height", request.height)):
        if value < multiple or value % multiple:
            near = max(multiple, round(value / multiple) * multiple)
            yield Problem(
                f"{key} is {value}, but {variant.name} needs a multiple of {multiple}",
                key=key,
                hint=f"nearest: {near}",
            )


def _number_problems(request: SampleRequest) -> Iterator[Problem]:
    if request.num_steps < 1:
        yield Problem(f"num_steps is {request.num_steps}", key="num_steps", hint="1 or more")
    if not request.flow_shift > 0:
        yield Problem(f"flow_shift is {request.flow_shift}", key="flow_shift", hint="above 0")
    if request.fps < 1:
        yield Problem(f"fps is {request.fps}", key="fps", hint="1 or more")


def _walk_problems(request: SampleRequest) -> Iterator[Problem]:
    strength = 1.0 if request.strength is None else request.strength
    yield from walk_problems(
        request.solver, request.schedule, num_steps=request.num_steps, strength=strength
    )
    if request.video is None:
        if request.strength is not None:
            yield Problem(
                "strength says how far to go from a video, and there is none",
                key="strength",
                hint="set video, or remove strength",
            )
    elif not 0 < strength <= 1:
        yield Problem(f"strength is {strength}", key="strength", hint="above 0, at most 1")
    elif request.num_steps >= 1 and not steps_walked(request.num_steps, strength):
        yield Problem(
            f"strength {strength:g} of {request.num_steps} steps is less than one step",
            key="strength",
            hint=f"{1 / request.num_steps:.2g} or more, or more steps",
        )


def _one_frame_problems(request: SampleRequest, variant: Variant) -> Iterator[Problem]:
    """Yield what is wrong with a request in one-frame mode."""
    if variant.conditioning not in {"first_frame", "first_last_frame"}:
        yield Problem(
            f"{variant.name} is not given pictures by latent frame",
            key="one_frame",
            hint="choose an image-to-video or first-last-frame model",
        )
    if request.num_frames != 1:
        yield Problem("one-frame mode makes one frame", key="num_frames", hint="1")
    for key in request.files.keys() & _INPUT_NAMES.keys():
        yield Problem(f"{_INPUT_NAMES[key]} in one-frame mode", key=key, hint="use control_images")
    for key, path in request.files.items():
        if not path.exists():
            yield Problem(f"{path} does not exist", key=key)
    try:
        moments = request.moments
    except ConfigError as error:
        yield from error.problems
        return
    given, needed = (
        len(request.control_images or ()),
        len(moments.control_indices) if moments else 0,
    )
    if given != needed:
        yield Problem(
            f"{given} control images for {needed} control indices",
            key="control_images",
            hint="one for each, in the same order",
        )
    if variant.conditioning == "first_last_frame" and needed < 2:
        yield Problem(
            f"{variant.name} needs two control images", key="one_frame", hint="control_index=0;2"
        )


def _file_problems(request: SampleRequest, variant: Variant) -> Iterator[Problem]:
    required, allowed = _inputs(variant)
    given = request.files
    for key in sorted(required - given.keys()):
        yield Problem(f"{variant.name} needs {_INPUT_NAMES[key]}", key=key, hint=f"set {key}")
    for key, path in given.items():
        if key not in _INPUT_NAMES:
            yield Problem("control images without one_frame", key=key, hint="set one_frame")
        elif key not in allowed:
            yield Problem(
                f"{variant.name} cannot use {_INPUT_NAMES[key]}",
                key=key,
                hint="remove it or choose another model",
            )
        elif not path.exists():
            yield Problem(f"{path} does not exist", key=key)
    if "last_image" in given and request.num_frames == 1:
        yield Problem(
            "an image cannot have a last frame of its own",
            key="last_image",
            hint="num_frames 5 or more",
        )
    if "last_image" in given and "image" not in given and "image" not in required:
        yield Problem("a last frame needs a first frame, too", key="image", hint="set image")


_INPUT_NAMES = {
    "image": "a first frame",
    "last_image": "a last frame",
    "control": "a control video",
    "video": "a video to start from",
}


def _inputs(variant: Variant) -> tuple[frozenset[str], frozenset[str]]:
    """Return the files that the variant must have and may have."""
    match variant.conditioning:
        case "first_frame":
            return frozenset({"image"}), frozenset({"image", "last_image", "video"})
        case "first_last_frame":
            return frozenset({"image", "last_image"}), frozenset({"image", "last_image", "video"})
        case "control":
            return frozenset({"control"}), frozenset({"control", "image", "video"})
        case "none":
            allowed = {"image", "video"} if variant.per_token_timestep else {"video"}
            return frozenset(), frozenset(allowed)
