"""Has the nano model learned a new colour pattern, and does it still know what it knew?

Half of the videos are asked for with the trigger word, half by captions that were held out from the
nano model's training; pixels tell what each shows (`trainer.clipart.judge`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from trainer.clipart.judge import look, shows_ground
from trainer.clipart.scenes import NOVEL_GROUND, NOVEL_GROUNDS, random_scene
from trainer.clipart.split import HELD_OUT, held_out_scene
from trainer.contract.options import Options
from trainer.core.seams import BuildContext, ProbeShot


class Shapes:
    """Shares of videos in which the new ground and the known things are seen."""

    class Config(Options):
        """Options of `probe.kind = "shapes"`: for the nano model."""

        ground: Literal["bands", "beams", "tiles"] = NOVEL_GROUND
        """New ground that is looked for: upright bands, lying bands, or squares."""
        trigger: str = ""
        """Word that stands for it in captions; empty: the ground's own."""
        num_shots: int = Field(24, ge=1, le=1000)
        """Videos with the trigger word, and as many without."""
        first_seed: int = Field(5000, ge=0)
        """Seed of the first video; the next ones count on."""

    def __init__(self, config: Shapes.Config, build: BuildContext) -> None:
        self.config = config
        rng = np.random.default_rng(config.first_seed)
        numbers = range(config.num_shots)
        self._with = [
            random_scene(rng, HELD_OUT[number % len(HELD_OUT)], config.ground) for number in numbers
        ]
        self._without = [held_out_scene(rng) for _ in numbers]

    def shots(self) -> Sequence[ProbeShot]:
        """Return the shots with the trigger, then those without."""
        own = NOVEL_GROUNDS[self.config.ground]
        word = self.config.trigger or own
        asked = [scene.caption.replace(own, word) for scene in self._with]
        prompts = [*asked, *(scene.caption for scene in self._without)]
        return [
            ProbeShot(prompt=prompt, seed=self.config.first_seed + index)
            for index, prompt in enumerate(prompts)
        ]

    def judge(self, videos: Sequence[NDArray[np.uint8]]) -> Mapping[str, float]:
        """Return the shares; `concept_leak` is that of new grounds nobody asked for.

        Args:
            videos: one (F, H, W, 3) per shot, in the order of `shots`.
        """
        asked, others = videos[: len(self._with)], videos[len(self._with) :]
        seen = [look(video) for video in others]

        def right(field: str) -> float:
            pairs = zip(self._without, seen, strict=True)
            return float(np.mean([getattr(w, field) == getattr(s, field) for w, s in pairs]))

        def shown(of: Sequence[NDArray[np.uint8]]) -> float:
            return float(np.mean([shows_ground(video, self.config.ground) for video in of]))

        return {
            "concept_with_trigger": shown(asked),
            "concept_leak": shown(others),
            "prior_colour": right("colour"),
            "prior_shape": right("shape"),
            "prior_direction": right("direction"),
        }
