"""What a config's prompts ask for: the size of each video, and who predicts how often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.contract.config import Prompt, SamplingSection
from trainer.contract.denoising_options import DenoisingOptions, PromptDenoising, denoising_of
from trainer.contract.memory_model.clips import Clip
from trainer.contract.memory_model.denoising import Expert, Passes, WorkingSet, plan_passes
from trainer.contract.memory_model.workload import Workload
from trainer.contract.variants import Variant
from trainer.contract.walk import DEFAULT_STRENGTH, planned_timesteps


@dataclass(frozen=True, slots=True, kw_only=True)
class Video:
    """One video or image to make."""

    clip: Clip
    num_steps: int
    """Evaluations of the velocity."""
    passes: Passes
    """Of the experts; models with one transformer have `low_noise`."""
    texts: tuple[str, ...]
    """What is encoded for it."""
    images: int = 0
    """Pictures that it starts from."""
    control: bool = False
    """It follows another video."""
    starts_from_video: bool = False
    """It starts from another video, not from noise alone."""
    step_cache: bool = False
    """Some of the passes may be spared."""

    @property
    def num_forwards(self) -> int:
        """Passes of a transformer, at most."""
        return sum(many for _, many in self.passes.by_expert)

    def working_set(self, ranks: int = 1) -> WorkingSet:
        """Return what a transformer works on at a time.

        Args:
            ranks: processes that share the tokens.
        """
        clip = replace(self.clip, batch=self.passes.largest_batch)
        return WorkingSet(clip=clip, keeps=self.passes.keeps, ranks=ranks)


def planned_videos(sampling: SamplingSection, variant: Variant) -> tuple[Video, ...]:
    """Return what the prompts ask for, one video of `[sampling]`'s settings where there are none.

    Prompts in a file of their own are not read: they count as one.
    """
    return tuple(_video(prompt, sampling, variant) for prompt in sampling.prompts or (None,))


def sampling_processes(work: Workload, num_videos: int) -> int:
    """Return how many processes `menma sample` has: a group for each video at most."""
    if work.config.distributed.engine == "local":
        return 1
    shared = work.sequence_ranks
    return shared * min(max(work.processes_here // shared, 1), num_videos)


def turns(videos: Sequence[Video]) -> list[Expert]:
    """Return the experts in the order in which they have to be on the GPU; each is another."""
    order = [expert for video in videos for expert, _ in video.passes.by_expert]
    return [expert for index, expert in enumerate(order) if order[index - 1 : index] != [expert]]


def _video(prompt: Prompt | None, sampling: SamplingSection, variant: Variant) -> Video:
    def pick(field: str, last: Any = None) -> Any:
        given = (getattr(place, field) for place in (prompt, sampling) if place is not None)
        return next((value for value in given if value is not None), last)

    clip = Clip(
        width=pick("width", variant.width),
        height=pick("height", variant.height),
        num_frames=_walked_frames(prompt, pick("num_frames", variant.num_frames)),
    )
    timesteps = planned_timesteps(
        pick("num_steps", variant.num_steps),
        pick("flow_shift", variant.flow_shift_at(clip.width, clip.height)),
        pick("solver"),
        schedule=pick("schedule"),
        strength=_strength(prompt),
    )
    scales, options = _guidance(prompt, sampling, variant), _denoising(prompt, sampling)
    texts = ["" if prompt is None else prompt.prompt]
    if any(scale != 1 for scale in scales):
        texts.append(pick("negative_prompt", variant.negative_prompt))
    passes = plan_passes(
        options,
        scales,
        timesteps,
        variant,
        texts_alike=len(set(texts)) == 1,
        one_frame=prompt is not None and prompt.one_frame is not None,
    )
    given: tuple[Path | None, ...] = ()
    if prompt is not None:
        given = (prompt.image, prompt.last_image, *(prompt.control_images or ()))
    needed = {"first_frame": 1, "first_last_frame": 2}.get(variant.conditioning, 0)
    return Video(
        clip=clip,
        num_steps=len(timesteps),
        passes=passes,
        texts=tuple(dict.fromkeys(texts)),
        images=max(needed, sum(image is not None for image in given)),
        control=variant.conditioning == "control",
        starts_from_video=prompt is not None and prompt.video is not None,
        step_cache=options.step_cache != "none",
    )


def _denoising(prompt: Prompt | None, sampling: SamplingSection) -> DenoisingOptions:
    return denoising_of(sampling, prompt or PromptDenoising())


def _walked_frames(prompt: Prompt | None, num_frames: int) -> int:
    """Return the frames of the latents that are walked."""
    if prompt is None or prompt.one_frame is None:
        return num_frames
    return (prompt.num_frames or 1) + 4 * len(prompt.control_images or ())


def _strength(prompt: Prompt | None) -> float:
    if prompt is None or prompt.video is None:
        return 1.0
    return prompt.strength or DEFAULT_STRENGTH


def _guidance(
    prompt: Prompt | None, sampling: SamplingSection, variant: Variant
) -> tuple[float, float]:
    """Return the scales of the low-noise and the high-noise expert."""
    low, high = variant.guidance_scale
    for place in (sampling, prompt):
        if place is not None and place.guidance_scale is not None:
            low = high = place.guidance_scale
        if place is not None and place.guidance_scale_high_noise is not None:
            high = place.guidance_scale_high_noise
    return low, high
