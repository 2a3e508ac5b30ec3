"""Keeps one of Wan 2.2's experts on the device while the other waits in RAM."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from trainer.contract.variants import Expert


class ExpertSwitch:
    """A `SamplingModels.transformer`: loads an expert when it is first asked for.

    Only the expert asked for last is on the device.
    """

    def __init__(self, load: Callable[[Expert], nn.Module], device: torch.device) -> None:
        """Prepare; nothing is loaded yet.

        Args:
            load: returns an expert on `device`, ready to work.
            device: where the working expert shall be.
        """
        self._load = load
        self._device = device
        self._loaded: dict[Expert, nn.Module] = {}
        self._working: Expert | None = None

    def __call__(self, expert: Expert) -> nn.Module:
        """Return `expert` on the device; the other one is moved to RAM first."""
        if expert == self._working:
            return self._loaded[expert]
        if self._working is not None:
            # Where the other one does not fit, neither is on the device, and either may be next.
            leaving, self._working = self._loaded[self._working], None
            leaving.to("cpu")
        if expert in self._loaded:
            self._bring(self._loaded[expert])
        else:
            self._loaded[expert] = self._load(expert)
        self._working = expert
        return self._loaded[expert]

    def _bring(self, module: nn.Module) -> None:
        try:
            module.to(self._device)
        except torch.OutOfMemoryError:
            module.to("cpu")  # what has moved already
            raise
