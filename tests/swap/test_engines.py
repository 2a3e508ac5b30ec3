"""Block swap under the engines: DeepSpeed neither sees nor moves the frozen weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.engine.toy import AdamWFactory, make_batch
from tests.swap.swapped_models import assert_equal, loss_of, make_model
from trainer.core.types import Batch
from trainer.engine.deepspeed import DeepSpeedEngine
from trainer.engine.local import LocalEngine
from trainer.memory.streams import HostStreams


class Step(nn.Module):
    """Batch -> loss of the tiny Wan; the batch only says which inputs."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        seed = int(batch.names[0].removeprefix("clip").removesuffix(".mp4"))
        return {"loss": loss_of(self.transformer, seed)}


def results(stage: int | None, swap: int, world) -> tuple[list[Tensor], HostStreams]:
    streams = HostStreams()
    model, trainable = make_model(swap, streams=streams)
    options = {"max_grad_norm": 1.0, "gradient_accumulation_steps": 2}
    arguments = (Step(model), trainable, AdamWFactory())
    if stage is None:
        engine = LocalEngine(*arguments, device="cpu", **options)
    else:
        engine = DeepSpeedEngine(*arguments, world=world, zero_stage=stage, **options)
    found = []
    for step in range(3):
        terms = engine.forward_backward([make_batch(2 * step + 1), make_batch(2 * step + 2)])
        found += [torch.tensor(terms["loss"]), torch.tensor(engine.update(1e-2).grad_norm)]
    found += list(engine.full_parameters().values())
    engine.close()
    return found, streams


@pytest.mark.parametrize("stage", [None, 0, 1, 2])
def test_swapped_blocks_train_the_same_under_every_engine(stage, world) -> None:
    expected, _ = results(stage, 0, world)
    found, streams = results(stage, 6, world)
    assert_equal(found, expected)
    # 6 microbatches, ring of 2: the first fills it, later ones find two blocks there.
    assert streams.copies == 6 * 2 * (6 - 2) + 2
