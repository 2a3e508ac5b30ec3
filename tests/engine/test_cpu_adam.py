"""DeepSpeed's AdamW for weights in RAM: torch's formula, in an engine that offloads, and resumed.

It is compiled for minutes, so these tests run where that is done:
`python -c "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()"`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine.compiled_ops import is_built
from tests.engine.optimizer_runs import equal, factory_of, local_engine, train
from tests.engine.toy import LoraStep
from trainer.engine.deepspeed import DeepSpeedEngine
from trainer.engine.offload import Offload

pytestmark = pytest.mark.skipif(
    not is_built("cpu_adam"), reason="DeepSpeed's cpu_adam is not compiled on this machine"
)
OPTIONS = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


@pytest.fixture
def offloading(world: Any) -> Any:
    """Return a maker of engines whose optimizer waits in RAM, and close them afterwards."""
    made = []

    def make(stage: int) -> DeepSpeedEngine:
        module = LoraStep(blocks=1)
        engine = DeepSpeedEngine(
            module,
            module.trainable(),
            factory_of("deepspeed_cpu_adam", **OPTIONS),
            world=world,
            zero_stage=stage,
            persistence_threshold=0,
            max_grad_norm=0.0,
            gradient_accumulation_steps=1,
            offload=Offload(optimizer="cpu"),
        )
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()


def test_it_is_torchs_adamw() -> None:
    start = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizer = factory_of("deepspeed_cpu_adam", **OPTIONS).build([{"params": [ours]}], lr=0.0)
    reference = torch.optim.AdamW([theirs], **OPTIONS)
    for step in range(1, 8):
        gradient = torch.randn(40, 3, generator=torch.Generator().manual_seed(step))
        for weight, one in ((ours, optimizer), (theirs, reference)):
            one.param_groups[0]["lr"] = 0.01 * step  # the engine sets it before each step
            weight.grad = gradient.clone()
            one.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_it_trains_as_adamw_and_resumes(offloading, tmp_path, stage) -> None:
    plain = local_engine(factory_of("adamw", **OPTIONS))
    expected = train(plain, range(8), 1e-2)
    first = offloading(stage)
    begun = train(first, range(4), 1e-2)
    first.save_state(tmp_path)
    straight = train(first, range(4, 8), 1e-2)
    assert begun + straight == pytest.approx(expected, rel=1e-4)
    second = offloading(stage)
    train(second, range(20, 22), 1e-2)  # what is loaded must replace all of this
    second.load_state(tmp_path)
    assert train(second, range(4, 8), 1e-2) == straight
    assert equal(second.full_parameters(), first.full_parameters())
