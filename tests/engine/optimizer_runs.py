"""Optimizers of the catalog on a toy, in any engine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tests.engine.toy import LoraStep, batches_of_step
from trainer.contract.catalog import OPTIMIZERS
from trainer.contract.optimizer_traits import traits_of
from trainer.contract.variants import VARIANTS
from trainer.core.seams import BuildContext, OptimizerFactory
from trainer.engine.local import LocalEngine

BUILD = BuildContext(
    variant=VARIANTS["wan2.1-t2v-1.3b"], seed=3, device=torch.device("cpu"), total_steps=20
)
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw8bit": {"min_8bit_size": 16},
    "lion8bit": {"min_8bit_size": 16},
    "adafactor": {"beta1": 0.9},
    "prodigy": {"d0": 1e-2},
    "soap": {"precondition_frequency": 3},
    "sophia": {"update_every_steps": 3},
    "custom": {"class": "torch.optim.NAdam", "arguments": {"betas": [0.8, 0.9]}},
}
"""What a kind needs to do something in a few steps, or at all."""
RATES = {"prodigy": 1.0, "soap": 1e-2, "lion8bit": 3e-3, "lion": 3e-3, "muon": 2e-2, "scion": 2e-2,
         "sophia": 1e-2, "automagic": 3e-3}  # fmt: skip
IN_FLOAT32 = [name for name in OPTIMIZERS.names if not traits_of(name).bf16_only]
QUICK = [name for name in IN_FLOAT32 if name != "deepspeed_cpu_adam"]
"""Without the one that has to be compiled."""

RANK_CELLS = [
    (kind, stage) for kind in QUICK for stage in ((0, 2) if traits_of(kind).elementwise else (0,))
]
"""Kind and ZeRO stage of what several processes may train with."""


def factory_of(kind: str, **options: Any) -> OptimizerFactory:
    """Return the plug-in with the options that the toy needs, and these."""
    implementation: Any = OPTIMIZERS.load(kind)
    return implementation(implementation.Config(**(OPTIONS.get(kind, {}) | options)), BUILD)


def local_engine(factory: OptimizerFactory, module: Any = None, **options: Any) -> LocalEngine:
    """Return a local engine over a small toy."""
    module = LoraStep(blocks=1) if module is None else module
    options = {"max_grad_norm": 0.0, "gradient_accumulation_steps": 1} | options
    return LocalEngine(module, module.trainable(), factory, device="cpu", **options)


def train(engine: Any, steps: Iterable[int], lr: float) -> list[float]:
    """Return the loss of each step."""
    losses = []
    for step in steps:
        losses.append(engine.forward_backward(batches_of_step(step, 0, 1, 1))["loss"])
        engine.update(lr)
    return losses


def rate_of(kind: str) -> float:
    """Return a learning rate that suits the toy."""
    return RATES.get(kind, 1e-2)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Tell whether two sets of weights have the same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
