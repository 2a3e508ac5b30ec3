"""What a config's prompts ask for: the size of each video, and who predicts how often."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trainer.contract.config import Prompt, SamplingSection
from trainer.contract.memory_model.clips import Clip
from trainer.contract.variants import Variant

Expert = Literal["low_noise", "high_noise"]

_FIRST_SIGMA = {"unipc": 0.999, "euler": 1.0}
"""Of a solver's schedule; `sampling.schedule` has them, and a test keeps the two equal."""
_CUT_TO_INTEGERS = {"unipc"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Video:
    """One video or image to make."""

    clip: Clip
    num_steps: int
    forwards: tuple[tuple[Expert, int], ...]
    """Experts in the order they work, each with its passes, those for guidance included; models
    with one transformer have `low_noise`."""
    texts: tuple[str, ...]
    """What is encoded for it."""
    images: int = 0
    """Pictures that it starts from."""
    control: bool = False
    """It follows another video."""

    @property
    def num_forwards(self) -> int:
        """Passes of a transformer."""
        return sum(passes for _, passes in self.forwards)


def planned_videos(sampling: SamplingSection, variant: Variant) -> tuple[Video, ...]:
    """Return what the prompts ask for, one video of `[sampling]`'s settings where there are none.

    Prompts in a file of their own are not read: they count as one.
    """
    return tuple(_video(prompt, sampling, variant) for prompt in sampling.prompts or (None,))


def turns(videos: Sequence[Video]) -> list[Expert]:
    """Return the experts in the order in which they have to be on the GPU; each is another."""
    order = [expert for video in videos for expert, passes in video.forwards if passes]
    return [expert for index, expert in enumerate(order) if order[index - 1 : index] != [expert]]


def high_noise_steps(num_steps: int, flow_shift: float, boundary: float, solver: str) -> int:
    """Return how many of a solver's steps are at the experts' boundary or above it.

    Args:
        num_steps: all steps.
        flow_shift: moves the schedule towards noise.
        boundary: sigma that parts the experts.
        solver: its name; an unknown one counts as `euler`.
    """
    first = _FIRST_SIGMA.get(solver, 1.0)
    count = 0
    for step in range(num_steps):
        part = first * (1 - step / num_steps)
        timestep = 1000 * flow_shift * part / (1 + (flow_shift - 1) * part)
        if solver in _CUT_TO_INTEGERS:
            timestep = math.floor(timestep + 1e-5)
        count += timestep >= 1000 * boundary
    return count


def _video(prompt: Prompt | None, sampling: SamplingSection, variant: Variant) -> Video:
    def pick(field: str, last: Any = None) -> Any:
        given = (getattr(place, field) for place in (prompt, sampling) if place is not None)
        return next((value for value in given if value is not None), last)

    clip = Clip(
        width=pick("width", variant.width),
        height=pick("height", variant.height),
        num_frames=pick("num_frames", variant.num_frames),
    )
    steps: int = pick("num_steps", variant.num_steps)
    high = 0
    if variant.experts:
        shift: float = pick("flow_shift", variant.flow_shift)
        high = high_noise_steps(steps, shift, variant.expert_boundary, pick("solver"))
    low_scale, high_scale = _guidance(prompt, sampling, variant)
    passes: list[tuple[Expert, int]] = [
        ("high_noise", high * (1 if high_scale == 1 else 2)),
        ("low_noise", (steps - high) * (1 if low_scale == 1 else 2)),
    ]
    texts = ["" if prompt is None else prompt.prompt]
    if low_scale != 1 or high_scale != 1:
        texts.append(pick("negative_prompt", variant.negative_prompt))
    given = () if prompt is None else (prompt.image, prompt.last_image)
    needed = {"first_frame": 1, "first_last_frame": 2}.get(variant.conditioning, 0)
    return Video(
        clip=clip,
        num_steps=steps,
        forwards=tuple(one for one in passes if one[1]),
        texts=tuple(dict.fromkeys(texts)),
        images=max(needed, sum(image is not None for image in given)),
        control=variant.conditioning == "control",
    )


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
