"""Has the nano model learned a new shape, and does it still know the old ones?

Half of the videos are asked for by the trigger word, half by captions of known shapes that were
held out from the nano model's training; pixels tell what each shows (`trainer.clipart.judge`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from trainer.clipart.judge import look
from trainer.clipart.scenes import COLOURS, DIRECTIONS, NOVEL_SHAPE, TRIGGER, Scene, random_scene
from trainer.clipart.split import held_out_scene
from trainer.contract.options import Options
from trainer.core.seams import BuildContext, ProbeShot


class Shapes:
    """Shares of videos in which a new shape and the known ones are seen."""

    class Config(Options):
        """Options of `probe.kind = "shapes"`: for the nano model."""

        trigger: str = TRIGGER
        """Word that stands for the new shape in captions."""
        num_shots: int = Field(24, ge=1, le=1000)
        """Videos with the trigger word, and as many without."""
        first_seed: int = Field(5000, ge=0)
        """Seed of the first video; the next ones count on."""

    def __init__(self, config: Shapes.Config, build: BuildContext) -> None:
        self.config = config
        self._with, self._without = self._scenes()

    def shots(self) -> Sequence[ProbeShot]:
        """Return the shots with the trigger, then those without."""
        return [
            ProbeShot(prompt=scene.caption, seed=self.config.first_seed + index)
            for index, scene in enumerate([*self._with, *self._without])
        ]

    def judge(self, videos: Sequence[NDArray[np.uint8]]) -> Mapping[str, float]:
        """Return the shares; `concept_leak` is that of new shapes nobody asked for.

        Args:
            videos: one (F, H, W, 3) per shot, in the order of `shots`.
        """
        seen = [look(video) for video in videos]
        number = len(self._with)
        asked, other = seen[:number], seen[number:]

        def share(field: str, wanted: Sequence[Scene], found: Sequence[object]) -> float:
            pairs = zip(wanted, found, strict=True)
            return float(np.mean([getattr(w, field) == getattr(f, field) for w, f in pairs]))

        return {
            "concept_with_trigger": share("shape", self._with, asked),
            "concept_leak": float(np.mean([s.shape == NOVEL_SHAPE for s in other])),
            "colour_with_trigger": share("colour", self._with, asked),
            "direction_with_trigger": share("direction", self._with, asked),
            "prior_colour": share("colour", self._without, other),
            "prior_shape": share("shape", self._without, other),
            "prior_direction": share("direction", self._without, other),
        }

    def _scenes(self) -> tuple[list[Scene], list[Scene]]:
        rng = np.random.default_rng(self.config.first_seed)
        colours, directions = tuple(COLOURS), tuple(DIRECTIONS)
        asked = [
            random_scene(
                rng,
                (colours[index % len(colours)], NOVEL_SHAPE, directions[index % len(directions)]),
                name=self.config.trigger,
            )
            for index in range(self.config.num_shots)
        ]
        return asked, [held_out_scene(rng) for _ in range(self.config.num_shots)]
