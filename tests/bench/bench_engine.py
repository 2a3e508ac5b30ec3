"""Time of a training step through an engine against a plain loop over the same model.

    python -m tests.bench.bench_engine [--pairs N] [--engine deepspeed|local] [--stage S]

One JSON line. Both sides train the same tiny Wan LoRA in one process, a step of each in turn, so
that load on the machine hits both alike: `ratio` is the median over pairs of engine / plain, in
seconds of processor time; `wall_ratio` the same in seconds of the clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from trainer.adapters.lora import LoRA
from trainer.contract.variants import VARIANTS, TransformerConfig
from trainer.core.seams import BuildContext
from trainer.core.types import Batch
from trainer.engine.deepspeed import DeepSpeedEngine
from trainer.engine.local import LocalEngine
from trainer.engine.process_group import World, joined
from trainer.models.wan.transformer import WanTransformer
from trainer.optimizers.adamw import AdamW

CONFIG = TransformerConfig(
    dim=128, ffn_dim=512, num_heads=2, num_layers=6, text_dim=64, freq_dim=64, text_len=64
)
GRID = (3, 16, 16)
LR = 1e-4
MAX_GRAD_NORM = 1.0
BUILD = BuildContext(
    variant=VARIANTS["wan2.1-t2v-1.3b"], seed=0, device=torch.device("cpu"), total_steps=1
)


class Step(nn.Module):
    """The least a training step can be: predict, compare."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = WanTransformer(CONFIG)
        self.adapter = LoRA(LoRA.Config(rank=8), BUILD)
        self.adapter.inject(self.transformer, seed=0)
        self.transformer.gradient_checkpointing = True
        self.train()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        velocity = self.transformer(batch.latents_BCFHW, torch.tensor([500.0]), batch.context)
        return {"loss": (velocity.float() - batch.latents_BCFHW).square().mean()}


def plain_loop(module: Step, batch: Batch) -> Callable[[], float]:
    """Return a step as one would write it by hand."""
    parameters = list(module.adapter.trainable().values())
    optimizer = AdamW(AdamW.Config(), BUILD).build([{"params": parameters}], LR)

    def step() -> float:
        loss = module(batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


def engine_loop(module: Step, batch: Batch, kind: str, stage: int, world: World):
    """Return the same step through an engine."""
    options = {"max_grad_norm": MAX_GRAD_NORM, "gradient_accumulation_steps": 1}
    factory = AdamW(AdamW.Config(), BUILD)
    trainable = module.adapter.trainable()
    if kind == "local":
        engine = LocalEngine(module, trainable, factory, device="cpu", **options)
    else:
        engine = DeepSpeedEngine(
            module, trainable, factory, world=world, zero_stage=stage, **options
        )

    def step() -> float:
        loss = engine.forward_backward([batch])["loss"]
        engine.update(LR)
        return loss

    return step


def timed(step: Callable[[], float]) -> tuple[float, float]:
    """Return seconds of processor time and of the clock."""
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    return time.process_time() - cpu, time.perf_counter() - wall


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--engine", choices=["deepspeed", "local"], default="deepspeed")
    parser.add_argument("--stage", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    latents, *_ = torch.randn((1, 1, 16, *GRID), generator=torch.Generator().manual_seed(1))
    batch = Batch(latents_BCFHW=latents, context=(torch.randn(20, 64),))
    with joined("cpu", timeout_s=60) as world:
        plain = plain_loop(Step(), batch)
        engine = engine_loop(Step(), batch, arguments.engine, arguments.stage, world)
        losses = [(plain(), engine()) for _ in range(5)]
        pairs = []
        for index in range(arguments.pairs):  # who goes first alternates
            order = (plain, engine) if index % 2 else (engine, plain)
            times = {step: timed(step) for step in order}
            pairs.append((times[engine], times[plain]))
    result = {
        "bench": "engine",
        "engine": arguments.engine,
        "stage": arguments.stage,
        "ratio": round(statistics.median(e[0] / p[0] for e, p in pairs), 4),
        "wall_ratio": round(statistics.median(e[1] / p[1] for e, p in pairs), 4),
        "plain_ms": round(1000 * statistics.median(p[0] for _, p in pairs), 2),
        "engine_ms": round(1000 * statistics.median(e[0] for e, _ in pairs), 2),
        "max_loss_difference": max(abs(a - b) for a, b in losses),
        "num_trained_tensors": len(list(Step().adapter.trainable())),
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
