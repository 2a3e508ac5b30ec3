"""Two processes that train on fp8 weights: `python -m tests.engine.fp8_ranks FOLDER`.

Each rank writes what it saw into `FOLDER/rankR.json`.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.engine.sequence_ranks import BUILD, LR, microbatches, validate
from tests.engine.toy import AdamWFactory
from trainer.adapters.lora import LoRA
from trainer.contract.config import RunConfig
from trainer.contract.variants import TransformerConfig
from trainer.engine.deepspeed import DeepSpeedEngine
from trainer.engine.launch import run_workers
from trainer.engine.offload import NO_OFFLOAD, Offload
from trainer.engine.process_group import World, joined
from trainer.jobs.build import fp8_spec, make_base
from trainer.losses.mse import MSE
from trainer.models.wan.random_weights import random_transformer
from trainer.models.wan.transformer import WanTransformer
from trainer.sampling.pipeline import SamplingModels, generate
from trainer.sampling.requests import SampleRequest
from trainer.timesteps.uniform import Uniform
from trainer.training.step import Objective, SigmaRange, TrainStep
from trainer.weightings.none import Unweighted

SHAPE = TransformerConfig(
    dim=64, ffn_dim=128, num_heads=4, num_layers=2, text_dim=32, freq_dim=16, image_tokens=7
)
ROWS: dict[str, dict[str, Any]] = {
    "scaled": {"weight_format": "fp8_scaled"},
    "plain": {"weight_format": "fp8", "gradient_checkpointing": False},
    "products": {"weight_format": "fp8_scaled", "fp8_matmul": True},
}


def base_of(memory: dict[str, Any], stage: int) -> WanTransformer:
    """Return the frozen transformer as a job makes it."""
    given = {"memory": memory, "distributed": {"zero_stage": stage}}
    config = RunConfig.model_validate(given)

    def weights(device: torch.device, _held: Any) -> WanTransformer:
        return random_transformer(SHAPE, dtype=torch.float32, device=device, fp8=fp8_spec(config))

    return make_base(config, weights, device=torch.device("cpu"))


def make_engine(
    memory: dict[str, Any], stage: int, world: World, offload: Offload = NO_OFFLOAD
) -> tuple[DeepSpeedEngine, WanTransformer]:
    """Return an engine over a LoRA that keeps no parameter whole in stage 3."""
    model = base_of(memory, stage)
    adapter = LoRA(LoRA.Config(rank=4), BUILD)
    adapter.inject(model, seed=0)
    random = torch.Generator().manual_seed(5)
    for value in adapter.trainable().values():  # else half of them are zeros
        value.data.copy_(0.1 * torch.randn(value.shape, generator=random))
    objective = Objective(
        sampler=Uniform(Uniform.Config(), BUILD),
        loss=MSE(MSE.Config(), BUILD),
        weighting=Unweighted(Unweighted.Config(), BUILD),
        sigmas=SigmaRange(),
    )
    step = TrainStep(model, objective, (), 11, model.blocks.suspended).train()
    engine = DeepSpeedEngine(
        step,
        adapter.trainable(),
        AdamWFactory(),
        world=world,
        max_grad_norm=0.5,
        gradient_accumulation_steps=1,
        zero_stage=stage,
        persistence_threshold=0,
        offload=offload,
    )
    return engine, model


def steps(engine: DeepSpeedEngine, which: range, world: World) -> list[list[float]]:
    """Return loss and gradient norm of each step."""
    seen = []
    for step in which:
        engine.forward_backward(microbatches(step, world.rank, world.world_size, 1))
        result = engine.update(LR)
        seen.append([result.loss, result.grad_norm])
    return seen


def held_bytes(model: nn.Module) -> int:
    """Return the bytes of fp8 numbers that this process holds between two steps."""
    held = 0
    for value in model.parameters():
        if value.dtype in {torch.uint8, torch.float8_e4m3fn}:
            shard = getattr(value, "ds_tensor", None)
            held += value.untyped_storage().nbytes() + (0 if shard is None else shard.numel())
    return held


def sample(model: WanTransformer) -> Tensor:
    """Return the latents of a small video, which all ranks make together."""
    request = SampleRequest.of("a", BUILD.variant)
    request = replace(request, width=32, height=32, num_frames=5, num_steps=1)
    random = torch.Generator().manual_seed(1)
    contexts = {text: torch.randn(6, 32, generator=random) for text in request.texts}
    models = SamplingModels(
        variant=BUILD.variant, transformer=lambda _expert: model, contexts=contexts
    )
    return generate(models, request)


def case(name: str, stage: int, world: World, folder: Path) -> dict[str, Any]:
    """Three steps, and one + two with a checkpoint between where weights are sharded."""
    engine, model = make_engine(ROWS[name], stage, world)
    state = folder / f"{name}{stage}"
    state.mkdir(exist_ok=True)
    curve = steps(engine, range(1), world)
    engine.save_state(state)
    curve += steps(engine, range(1, 3), world)
    seen: dict[str, Any] = {"curve": curve, "held": held_bytes(model)}
    if name == "scaled":
        seen["validation"] = validate(model, world, folder).loss
        seen["sample"] = sample(model).flatten().tolist()
    weights = engine.full_parameters()
    engine.close()
    if world.rank == 0:
        torch.save(weights, folder / f"{name}{stage}.pt")
    if (name, stage) == ("scaled", 3):
        world.barrier()
        engine, _ = make_engine(ROWS[name], stage, world)
        engine.load_state(state)
        seen["resumed"] = steps(engine, range(1, 3), world)
        engine.close()
    return seen


def main(folder: Path) -> None:
    with joined("cpu", timeout_s=90) as world:
        torch.set_num_threads(1)
        seen = {
            f"{name}{stage}": case(name, stage, world, folder) for name in ROWS for stage in (1, 3)
        }
        engine, model = make_engine(ROWS["scaled"], 3, world, Offload(parameters="cpu"))
        seen["offloaded"] = {"curve": steps(engine, range(3), world), "held": held_bytes(model)}
        engine.close()
    (folder / f"rank{world.rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "tests.engine.fp8_ranks", *sys.argv[1:]]
        sys.exit(run_workers(command, 2, failure_grace_s=10))
    main(Path(sys.argv[1]))
