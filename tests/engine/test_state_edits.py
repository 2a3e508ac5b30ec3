"""Weights and optimizer state changed between two steps, against a loop in plain torch."""

from __future__ import annotations

import json

import pytest
import torch

from tests.engine.test_ranks import run_ranks
from tests.engine.toy import AdamWFactory, LoraStep, RawAdamWFactory, batches_of_step
from trainer.engine.deepspeed import DeepSpeedEngine
from trainer.engine.local import LocalEngine

LR = 1e-2
NAME = "blocks.1.first.down"


def edits(shape) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """New weights, and factors of the state, of one parameter."""
    random = torch.Generator().manual_seed(7)
    kept = (torch.rand(shape, generator=random) < 0.4).float()
    return {NAME: torch.randn(shape, generator=random)}, {NAME: kept}


def make(world, stage, factory=None):
    module = LoraStep()
    options = {"max_grad_norm": 0.05, "gradient_accumulation_steps": 2}
    arguments = (module, module.trainable(), factory or AdamWFactory())
    if stage is None:
        return LocalEngine(*arguments, device="cpu", **options)
    return DeepSpeedEngine(
        *arguments, world=world, zero_stage=stage, persistence_threshold=0, **options
    )


def by_hand(early: bool) -> dict[str, torch.Tensor]:
    module = LoraStep()
    named = module.trainable()
    optimizer = torch.optim.AdamW(named.values(), lr=LR, weight_decay=0.1)
    for step in range(6):
        if step == (0 if early else 3):
            weights, kept = edits(named[NAME].shape)
            named[NAME].data.copy_(weights[NAME])
            for key, value in optimizer.state[named[NAME]].items():
                if key != "step":
                    value.mul_(kept[NAME])
        for batch in batches_of_step(step, 0, 1, 2):
            (sum(module(batch).values()) / 2).backward()
        torch.nn.utils.clip_grad_norm_(list(named.values()), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach() for name, value in named.items()}


@pytest.mark.parametrize(
    ("stage", "early"),
    [(None, False), (0, False), (1, False), (2, False), (3, False), (None, True), (1, True)],
)
def test_training_goes_on_from_what_was_written(world, stage, early):
    engine = make(world, stage)
    assert engine.has_elementwise_state
    for step in range(6):
        if step == (0 if early else 3):
            weights, kept = edits(engine.full_parameters()[NAME].shape)
            engine.overwrite(weights)
            assert torch.equal(engine.full_parameters()[NAME], weights[NAME])
            engine.scale_state(kept)
        engine.forward_backward(batches_of_step(step, 0, 1, 2))
        engine.update(LR)
    for name, value in by_hand(early).items():
        torch.testing.assert_close(engine.full_parameters()[name], value, rtol=1e-4, atol=1e-6)
    assert torch.equal(engine.mean_over_ranks(torch.ones(2, 3)), torch.ones(2, 3))
    engine.close()


def test_what_is_not_there_cannot_be_changed(world):
    engine = make(world, 1)
    with pytest.raises(ValueError, match="no such name"):
        engine.overwrite({"blocks.9.down": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"\(2,\)"):
        engine.scale_state({NAME: torch.zeros(2)})
    engine.close()
    raw = make(world, None, RawAdamWFactory())
    assert not raw.has_elementwise_state
    with pytest.raises(ValueError, match="not one value an element"):
        raw.scale_state({})


@pytest.mark.slow
def test_two_processes_change_the_same(tmp_path):
    """Stages 0 to 2 cut parameters differently; each is what one process makes of the samples."""
    done = run_ranks("edits", tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    seen = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert seen[0]["means"] == seen[1]["means"] == [0.5, 2.5]
    wanted = by_hand(early=False)
    for stage in range(3):
        weights = torch.load(tmp_path / f"edits{stage}.pt", weights_only=True)
        assert seen[0][f"on_rank{stage}"] == seen[1][f"on_rank{stage}"]
        for name, value in wanted.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)
