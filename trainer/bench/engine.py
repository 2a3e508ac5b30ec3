"""Time of a training step through an engine against a plain loop over the same model.

Both sides train the tiny Wan LoRA of the benchmark `step` in one process, a step of each in turn.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from trainer.adapters.lora import LoRA
from trainer.bench.result import Measurement, timed_in_turns
from trainer.bench.step import CONFIG, GRID, RANK
from trainer.contract.variants import get_variant
from trainer.core.seams import BuildContext, Engine
from trainer.core.types import Batch
from trainer.engine.deepspeed import DeepSpeedEngine, is_installed
from trainer.engine.local import LocalEngine
from trainer.engine.process_group import World, joined
from trainer.models.wan.transformer import WanTransformer
from trainer.optimizers.adamw import AdamW

LIMIT = 1.05
LR = 1e-4
MAX_GRAD_NORM = 1.0
BUILD = BuildContext(
    variant=get_variant("wan2.1-t2v-1.3b"), seed=0, device=torch.device("cpu"), total_steps=1
)
EngineName = Literal["deepspeed", "local"]


class Step(nn.Module):
    """The least a training step can be: predict, compare."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = WanTransformer(CONFIG)
        self.adapter = LoRA(LoRA.Config.model_validate({"rank": RANK}), BUILD)
        self.adapter.inject(self.transformer, seed=0)
        self.transformer.gradient_checkpointing = True
        self.train()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the one loss term."""
        velocity = self.transformer(batch.latents_BCFHW, torch.tensor([500.0]), batch.context)
        return {"loss": (velocity.float() - batch.latents_BCFHW).square().mean()}


def measure(
    *, pairs: int = 15, engine: EngineName | None = None, zero_stage: int = 0
) -> Measurement:
    """Return the median over pairs of (engine / plain loop), in processor time.

    Args:
        pairs: steps of each side.
        engine: which one; None: DeepSpeed where it is installed.
        zero_stage: of DeepSpeed.
    """
    torch.set_num_threads(1)
    chosen = engine or ("deepspeed" if is_installed() else "local")
    random = torch.Generator().manual_seed(1)
    batch = Batch(
        latents_BCFHW=torch.randn((1, 16, *GRID), generator=random),
        context=(torch.randn(80, CONFIG.text_dim, generator=random),),
    )
    with joined("cpu", timeout_s=60) as world:
        plain = _plain_loop(Step(), batch)
        used = _make_engine(Step(), chosen, zero_stage, world)
        through = _engine_loop(used, batch)
        losses = [(plain(), through()) for _ in range(2)]
        times = timed_in_turns(through, plain, pairs)
        used.close()
    return Measurement(
        name="engine",
        what=f"{chosen} engine / plain loop",
        value=statistics.median(e[0] / p[0] for e, p in times),
        unit="ratio",
        limit=LIMIT,
        figures={
            "engine": chosen,
            "zero_stage": zero_stage,
            "wall_ratio": round(statistics.median(e[1] / p[1] for e, p in times), 4),
            "engine_ms": round(1000 * statistics.median(e[0] for e, _ in times), 2),
            "plain_ms": round(1000 * statistics.median(p[0] for _, p in times), 2),
            "max_loss_difference": max(abs(a - b) for a, b in losses),
        },
    )


def _plain_loop(module: Step, batch: Batch) -> Callable[[], float]:
    """Return a step as one would write it by hand."""
    parameters = list(module.adapter.trainable().values())
    factory = AdamW(AdamW.Config.model_validate({}), BUILD)
    optimizer = factory.build([{"params": parameters}], LR)

    def step() -> float:
        loss = module(batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def _engine_loop(engine: Engine, batch: Batch) -> Callable[[], float]:
    """Return the same step through an engine."""

    def step() -> float:
        loss = engine.forward_backward([batch])["loss"]
        engine.update(LR)
        return loss

    return step


def _make_engine(module: Step, name: EngineName, zero_stage: int, world: World) -> Engine:
    factory = AdamW(AdamW.Config.model_validate({}), BUILD)
    trainable = module.adapter.trainable()
    if name == "local":
        return LocalEngine(
            module,
            trainable,
            factory,
            device="cpu",
            max_grad_norm=MAX_GRAD_NORM,
            gradient_accumulation_steps=1,
        )
    return DeepSpeedEngine(
        module,
        trainable,
        factory,
        world=world,
        zero_stage=zero_stage,
        max_grad_norm=MAX_GRAD_NORM,
        gradient_accumulation_steps=1,
    )
