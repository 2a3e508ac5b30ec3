"""Cases for two processes: `python -m tests.engine.ranks CASE FOLDER` starts two of itself.

Each rank writes what it saw into `FOLDER/rankR.json`; the tests compare.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.engine.compiled_ops import is_built
from tests.engine.toy import (
    AdamWFactory,
    FullStep,
    LoraStep,
    RawAdamWFactory,
    WideStep,
    batches_of_step,
    make_batch,
)
from trainer.contract.errors import DiskError, MenmaError, NonFiniteError, RunError
from trainer.engine.deepspeed import DeepSpeedEngine
from trainer.engine.launch import run_workers
from trainer.engine.offload import Offload
from trainer.engine.process_group import World, join, joined
from trainer.training.checkpoints import CheckpointStore

LR = 1e-2


def build(
    world: World, stage: int, module: Any = None, factory: Any = None, **options: Any
) -> DeepSpeedEngine:
    module = module or LoraStep()
    options = {"max_grad_norm": 0.05, "gradient_accumulation_steps": 1} | options
    return DeepSpeedEngine(
        module,
        module.trainable(),
        factory or AdamWFactory(),
        world=world,
        zero_stage=stage,
        persistence_threshold=0,
        **options,
    )


def train(engine: Any, steps: range, accumulation: int = 1, lr: float = LR) -> list[float]:
    losses = []
    for step in steps:
        batches = batches_of_step(step, engine.rank, engine.world_size, accumulation)
        losses.append(engine.forward_backward(batches)["loss"])
        engine.update(lr)
    return losses


def digest(tensors: dict[str, torch.Tensor]) -> str:
    state = hashlib.blake2b()
    for name in sorted(tensors):
        state.update(tensors[name].detach().float().contiguous().numpy().tobytes())
    return state.hexdigest()


def case_train(world: World, folder: Path) -> dict[str, Any]:
    """20 steps, and 10 + 10 with a checkpoint between, at every stage."""
    seen: dict[str, Any] = {}
    for name, stage, module, bf16 in [
        *((f"lora{stage}", stage, LoraStep, False) for stage in range(4)),
        ("full2", 2, lambda: FullStep(torch.bfloat16), True),
        ("full3", 3, lambda: FullStep(torch.bfloat16), True),
    ]:
        engine = build(world, stage, module(), full_finetune_bf16=bf16)
        losses = train(engine, range(10))
        store = CheckpointStore(folder / name, keep_last=2)
        store.save(10, lambda _: None, {"step": 10}, engine)
        losses += train(engine, range(10, 20))
        straight = engine.full_parameters()
        lower = digest(engine._trainable) if stage < 3 else ""
        engine.close()

        engine = build(world, stage, module(), full_finetune_bf16=bf16)
        checkpoint = store.resolve("auto")
        engine.load_state(checkpoint.path)
        resumed_losses = train(engine, range(10, 20))
        resumed = engine.full_parameters()
        engine.close()
        if world.rank == 0:
            torch.save(straight, folder / f"{name}.pt")
        seen[name] = {
            "losses": losses,
            "resumed_losses": resumed_losses,
            "straight": digest(straight),
            "resumed": digest(resumed),
            "on_rank": lower,
        }
    return seen


def case_foreign(world: World, folder: Path) -> dict[str, Any]:
    """Load what another engine and number of processes wrote into `folder/foreign`."""
    seen: dict[str, Any] = {}
    for stage in range(4):
        engine = build(world, stage)
        engine.load_state(folder / "foreign")
        loaded = digest(engine.full_parameters())
        train(engine, range(10, 20))
        weights = engine.full_parameters()
        if world.rank == 0:
            torch.save(weights, folder / f"foreign{stage}.pt")
        seen[str(stage)] = loaded
        engine.close()
    raw = build(world, 1, factory=RawAdamWFactory())
    train(raw, range(2))
    (folder / "raw").mkdir(exist_ok=True)
    raw.save_state(folder / "raw")
    train(raw, range(2, 4))
    straight = digest(raw.full_parameters())
    raw.close()
    world.barrier()
    raw = build(world, 1, factory=RawAdamWFactory())
    raw.load_state(folder / "raw")
    train(raw, range(2, 4))
    seen["raw"] = [straight, digest(raw.full_parameters())]
    raw.close()
    other = build(world, 2, factory=RawAdamWFactory())
    seen["raw_elsewhere"] = error_of(lambda: other.load_state(folder / "raw"))
    other.close()
    return seen


def case_offload(world: World, folder: Path) -> dict[str, Any]:
    """Train with and without offload, and go on from what the one with offload saved."""
    both = Offload(optimizer="cpu", parameters="cpu")
    files = Offload(optimizer="nvme", parameters="nvme", nvme_path=folder / "swap")
    seen: dict[str, Any] = {}
    for name, stage, module, bf16, offload in [
        ("lora1", 1, LoraStep, False, Offload(optimizer="cpu")),
        ("lora2", 2, LoraStep, False, Offload(optimizer="cpu")),
        ("full2", 2, lambda: FullStep(torch.bfloat16), True, Offload(optimizer="cpu")),
        ("full3", 3, lambda: FullStep(torch.bfloat16), True, both),
        *(
            [("files3", 3, lambda: WideStep(torch.bfloat16, 3, 1536), True, files)]
            if is_built("async_io")
            else []
        ),
    ]:
        options = {"full_finetune_bf16": bf16, "max_grad_norm": 0.0}
        plain = build(world, stage, module(), **options)
        engine = build(world, stage, module(), offload=offload, **options)
        saved = folder / name
        saved.mkdir(exist_ok=True)
        losses = [train(each, range(3)) for each in (plain, engine)]
        engine.save_state(saved)
        world.barrier()
        losses[0] += train(plain, range(3, 5))
        losses[1] += train(engine, range(3, 5))
        resumed = build(world, stage, module(), **options)
        resumed.load_state(saved)
        losses.append([*losses[1][:3], *train(resumed, range(3, 5))])
        engines = (plain, engine, resumed)
        seen[name] = [losses, [digest(each.full_parameters()) for each in engines]]
        for each in engines:
            each.close()
    return seen


def case_faults(world: World, folder: Path) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for stage in range(4):
        engine = build(world, stage)
        train(engine, range(2))
        before = digest(engine.full_parameters())
        numbers = [-7 if world.rank == 1 else 7]
        batches = (make_batch(number) for number in numbers)
        message = error_of(lambda e=engine, b=batches: e.forward_backward(b), NonFiniteError)
        seen[f"nan{stage}"] = [message, before == digest(engine.full_parameters())]
        engine.close()
    for stage in (1, 2):
        engine = build(world, stage, Diverging())
        seen[f"diverging{stage}"] = error_of(lambda e=engine: train(e, range(1)), RunError)
        engine.close()

    engine = build(world, 1)
    store = CheckpointStore(folder / "faults", keep_last=2)
    store.save(1, lambda _: None, {}, engine)

    def write(path: Path) -> None:
        if world.rank == 1:
            raise DiskError("the disk of rank 1 is full")

    seen["disk"] = error_of(lambda: store.save(2, write, {}, engine), DiskError)
    world.barrier()  # rank 0 has removed what was left
    seen["left"] = sorted(path.name for path in (folder / "faults").iterdir())
    seen["any"] = [engine.any_rank(world.rank == 1), engine.any_rank(False)]
    seen["texts"] = [world.gather_texts(f"é{world.rank}"), world.text_of_rank_0(str(world.rank))]
    engine.close()
    return seen


class Diverging(LoraStep):
    """Each rank leaves out another block, which ZeRO 1 and 2 would not notice."""

    def forward(self, batch: Any) -> dict[str, torch.Tensor]:
        blocks = self.blocks
        try:
            self.blocks = torch.nn.ModuleList([blocks[int(os.environ["RANK"])]])
            return super().forward(batch)
        finally:
            self.blocks = blocks


def error_of(action: Callable[[], Any], kind: type[MenmaError] = MenmaError) -> str:
    try:
        action()
    except kind as error:
        return str(error)
    return ""


def case_edits(world: World, folder: Path) -> dict[str, Any]:
    """Change weights and optimizer state after three steps, and train three more."""
    from tests.engine.test_state_edits import NAME, edits

    own = torch.tensor([0.0, 2.0]) + world.rank
    seen: dict[str, Any] = {"means": engine_means(world, own)}
    for stage in range(3):
        engine = build(world, stage)
        train(engine, range(3))
        weights, kept = edits(engine._trainable[NAME].shape)
        engine.overwrite(weights)
        engine.scale_state(kept)
        train(engine, range(3, 6))
        if world.rank == 0:
            torch.save(engine.full_parameters(), folder / f"edits{stage}.pt")
        else:
            engine.full_parameters()
        seen[f"on_rank{stage}"] = digest(engine._trainable)
        engine.close()
    return seen


def engine_means(world: World, own: torch.Tensor) -> list[float]:
    engine = build(world, 0)
    means: list[float] = engine.mean_over_ranks(own).tolist()
    engine.close()
    return means


def case_optimizers(world: World, folder: Path) -> dict[str, Any]:
    """6 steps, and 3 + 3 with a state between, of each optimizer where ZeRO allows it."""
    from tests.engine.optimizer_runs import RANK_CELLS, factory_of, rate_of

    seen: dict[str, Any] = {}
    for kind, stage in RANK_CELLS:
        saved = folder / f"{kind}{stage}"
        saved.mkdir(exist_ok=True)
        lr = rate_of(kind)
        first, second = (build(world, stage, factory=factory_of(kind)) for _ in range(2))
        losses = train(first, range(3), lr=lr)
        first.save_state(saved)
        losses += train(first, range(3, 6), lr=lr)
        world.barrier()
        second.load_state(saved)
        resumed = train(second, range(3, 6), lr=lr)
        weights = [engine.full_parameters() for engine in (first, second)]
        if world.rank == 0:
            torch.save(weights[0], folder / f"{kind}{stage}.pt")
        seen[f"{kind}{stage}"] = {
            "losses": losses,
            "resumed_losses": resumed,
            "weights": [digest(held) for held in weights],
            "on_rank": [digest(engine._trainable) for engine in (first, second)],
        }
        first.close()
        second.close()
    return seen


CASES = {
    "optimizers": case_optimizers,
    "train": case_train,
    "foreign": case_foreign,
    "offload": case_offload,
    "faults": case_faults,
    "edits": case_edits,
}


def main(case: str, folder: Path) -> None:
    rank = int(os.environ["RANK"])
    if case == "death":  # rank 1 is killed in the middle of a run
        with joined("cpu", timeout_s=600) as world:
            engine = build(world, 2)
            train(engine, range(2))
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            train(engine, range(2, 10_000))
    if case == "absent":  # rank 1 never joins
        if rank == 1:
            sys.exit(7)
        join("cpu", timeout_s=5)
    with joined("cpu", timeout_s=90) as world:
        torch.set_num_threads(1)
        seen = CASES[case](world, folder)
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    case, folder = sys.argv[1], Path(sys.argv[2])
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "tests.engine.ranks", case, str(folder)]
        sys.exit(run_workers(command, 2, failure_grace_s=60))
    try:
        main(case, folder)
    except MenmaError:
        traceback.print_exc()
        sys.exit(1)
