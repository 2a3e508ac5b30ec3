"""No probe: nothing is measured on generated videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.contract.options import Options
from trainer.core.seams import BuildContext, ProbeShot


class NoProbe:
    """Asks for no video and has no figures."""

    class Config(Options):
        """Options of `probe.kind = "none"`: none."""

    def __init__(self, config: NoProbe.Config, build: BuildContext) -> None:
        self.config = config

    def shots(self) -> Sequence[ProbeShot]:
        """Return no shots."""
        return ()

    def judge(self, videos: Sequence[NDArray[np.uint8]]) -> Mapping[str, float]:
        """Return no figures."""
        return {}
