"""The switch of Wan 2.2's experts, where one does not fit on the device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from trainer.contract.variants import Expert
from trainer.sampling.experts import ExpertSwitch

CPU, DEVICE = torch.device("cpu"), torch.device("meta")


class Module(nn.Module):
    """Notes where it is; may be too large for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.place = DEVICE
        self.fits = True

    def to(self, device: torch.device | str) -> Module:  # type: ignore[override]
        self.place = torch.device(device)
        if self.place == DEVICE and not self.fits:
            raise torch.OutOfMemoryError("full")
        return self


def test_one_expert_is_on_the_device() -> None:
    made: dict[Expert, Module] = {}
    switch = ExpertSwitch(_loading(made), DEVICE)
    high = switch("high_noise")
    assert switch("low_noise") is made["low_noise"]
    assert made["high_noise"].place == CPU
    assert switch("high_noise") is high
    assert (made["high_noise"].place, made["low_noise"].place) == (DEVICE, CPU)
    assert switch("high_noise") is high


def test_the_next_sample_finds_its_expert_on_the_device_after_one_that_did_not_fit() -> None:
    made: dict[Expert, Module] = {}
    load = _loading(made)

    def full(expert: Expert) -> nn.Module:
        if expert == "low_noise" and len(made) == 1 and not tries:
            tries.append(1)
            raise torch.OutOfMemoryError("full")
        return load(expert)

    tries: list[int] = []
    switch = ExpertSwitch(full, DEVICE)
    switch("high_noise")
    with pytest.raises(torch.OutOfMemoryError):
        switch("low_noise")
    switch("high_noise")
    assert made["high_noise"].place == DEVICE
    switch("low_noise")

    made["high_noise"].fits = False
    with pytest.raises(torch.OutOfMemoryError):
        switch("high_noise")
    assert made["high_noise"].place == CPU
    switch("low_noise")
    assert made["low_noise"].place == DEVICE


def _loading(made: dict[Expert, Module]) -> Callable[[Expert], nn.Module]:
    def load(expert: Expert) -> nn.Module:
        made[expert] = Module()
        return made[expert]

    return load
