"""Figures that are told now and then: against sums by hand, and over several processes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.engine.toy import make_batch
from trainer.engine.process_group import World
from trainer.training.details import LossDetails, weight_norms
from trainer.training.loss_reduction import reduce_loss


def batch_of(*sources: int):
    return dataclasses.replace(make_batch(1), sources=sources)


def test_losses_are_means_by_source_and_by_timestep() -> None:
    details = LossDetails(["clips", "stills"], World.alone(), every_steps=2)
    details.observe(batch_of(0, 0), torch.tensor([0.05, 0.99]), torch.tensor([1.0, 2.0]))
    assert details(1) == {}
    details.observe(batch_of(1), torch.tensor([1.0]), torch.tensor([4.0]))
    assert details(2) == {
        "by_timestep": {"0-100": 1.0, "900-1000": 3.0},
        "by_source": {"clips": 1.5, "stills": 4.0},
    }
    details.observe(batch_of(1), torch.tensor([0.5]), torch.tensor([8.0]))
    assert details(4) == {"by_timestep": {"500-600": 8.0}, "by_source": {"stills": 8.0}}


def test_nothing_is_told_where_nobody_asks() -> None:
    details = LossDetails(["clips"], World.alone(), every_steps=0)
    details.observe(batch_of(0), torch.tensor([0.5]), torch.tensor([1.0]))
    assert details(2) == {}


def test_what_is_observed_is_the_loss_of_each_item_before_its_weights() -> None:
    pointwise = torch.rand(3, 2, 1, 2, 2)
    seen: list[torch.Tensor] = []
    weights, items = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 1.0, 1.0])
    arguments = {"sigma_weight_B": weights, "item_weight_B": items}
    observed = reduce_loss(pointwise, **arguments, observe=seen.append)
    assert torch.equal(observed, reduce_loss(pointwise, **arguments))
    assert torch.equal(seen[0], pointwise.flatten(1).mean(dim=1))


def test_norms_are_of_all_and_of_single_tensors() -> None:
    values = {"a": torch.tensor([3.0]), "b": torch.tensor([[0.0, 4.0]])}
    told = weight_norms(10, every_steps=5, parameters=lambda: values)
    assert told == {"weight_norm": {"total": pytest.approx(5.0), "mean": 3.5, "largest": 4.0}}
    assert weight_norms(9, every_steps=5, parameters=lambda: values) == {}
    assert weight_norms(9, every_steps=0, parameters=lambda: values) == {}
    assert weight_norms(10, every_steps=5, parameters=dict) == {}
