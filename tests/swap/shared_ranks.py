"""Two processes that stream the same blocks: `python -m tests.swap.shared_ranks FOLDER`.

Each case is a group of its own. What a rank saw goes to `rankN.json`; the last case kills rank 1.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.engine.toy import AdamWFactory, make_batch
from tests.swap.swapped_models import T2V
from tests.swap.test_engines import Step
from trainer.adapters.lora import LoRA
from trainer.contract.config import RunConfig
from trainer.contract.errors import MenmaError
from trainer.contract.variants import VARIANTS
from trainer.core.seams import BuildContext
from trainer.engine.deepspeed import DeepSpeedEngine
from trainer.engine.failures import failing_together
from trainer.engine.launch import RENDEZVOUS_VARIABLE, run_workers
from trainer.engine.process_group import World, joined
from trainer.jobs.base import explain
from trainer.jobs.build import load_base
from trainer.jobs.neighbours import neighbours
from trainer.memory.host_share import NAME
from trainer.models.wan.transformer import WanTransformer

SWAPPED = 4
FORMATS = ("fp32", "fp8_scaled")


def load(world: World, folder: Path, weight_format: str, *, share: bool) -> WanTransformer:
    memory = {"blocks_to_swap": SWAPPED, "weight_format": weight_format}
    config = RunConfig.model_validate({"memory": memory, "model": {"variant": T2V}})
    file = folder / "model.safetensors"
    share_with = neighbours(world) if share else None
    return load_base(config, file, expert=None, device=world.device, share=share_with)


def train(model: WanTransformer, world: World) -> list[Any]:
    """Return losses, gradient norms and a digest of what was trained."""
    context = BuildContext(variant=VARIANTS[T2V], seed=0, device=world.device, total_steps=1)
    adapter = LoRA(LoRA.Config(rank=4), context)
    adapter.inject(model, seed=0)
    random = torch.Generator().manual_seed(0)
    for value in adapter.trainable().values():
        torch.nn.init.normal_(value, std=0.2, generator=random)
    engine = DeepSpeedEngine(
        Step(model),
        adapter.trainable(),
        AdamWFactory(),
        world=world,
        zero_stage=0,
        max_grad_norm=1.0,
        gradient_accumulation_steps=1,
    )
    found: list[Any] = []
    for step in range(2):
        found.append(engine.forward_backward([make_batch(2 * step + world.rank + 1)])["loss"])
        found.append(engine.update(1e-2).grad_norm)
    parameters = engine.full_parameters()
    whole = b"".join(value.numpy().tobytes() for value in parameters.values())
    engine.close()
    return [*found, hashlib.sha256(whole).hexdigest()]


def mappings(but: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """Return device:inode, Rss and Pss in KiB of the shared memory that this process maps."""
    others = {mapped["file"] for mapped in but}
    found: list[dict[str, Any]] = []
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and len(words) >= 5 and not words[0].endswith(":"):
            inside = f"memfd:{NAME}" in line
            if inside:
                found.append({"file": f"{words[3]}:{words[4]}"})
        elif inside and words[0] in {"Rss:", "Pss:"}:
            found[-1][words[0][:-1]] = int(words[1])
    return [mapped for mapped in found if mapped["file"] not in others]


def host_digest(model: WanTransformer) -> str:
    swap = model.blocks.swap
    assert swap is not None
    return hashlib.sha256(b"".join(f.host.numpy().tobytes() for f in swap._flats)).hexdigest()


def may_write() -> bool:
    """Try to get at the memory for writing once more, through what the mapping holds open."""
    for entry in Path("/proc/self/fd").iterdir():
        try:
            ours = NAME in str(entry.readlink())
        except FileNotFoundError:  # the listing's own
            continue
        if ours:
            file = os.open(entry, os.O_RDWR)
            try:
                os.pwrite(file, b"x", 0)
            except PermissionError:
                return False
            finally:
                os.close(file)
    return True


def seen_with(world: World, folder: Path, weight_format: str) -> dict[str, Any]:
    plain = train(load(world, folder, weight_format, share=False), world)
    earlier = mappings()  # a model of an earlier case may not be collected yet
    model = load(world, folder, weight_format, share=True)
    before = host_digest(model)
    world.barrier()  # both have read all of it
    seen: dict[str, Any] = {"mapped": mappings(earlier), "may_write": may_write(), "digest": before}
    world.barrier()
    if model.quantisation is not None:
        seen["rounded"] = len(model.quantisation.errors)
    seen |= {"plain": plain, "shared": train(model, world), "kept": host_digest(model) == before}
    return seen


def failing(world: World, folder: Path, case: str) -> None:
    if case == "other weights":
        load(world, folder, FORMATS[world.rank], share=True)
    else:
        load(world, folder if world.rank else folder / "nowhere", "fp32", share=True)


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    seen: dict[str, Any] = {}
    for case in FORMATS:
        os.environ[RENDEZVOUS_VARIABLE] = f"file://{folder / case}"
        with joined("cpu", 60) as world:
            seen[case] = seen_with(world, folder, case)
    for case in ("other weights", "leader fails"):
        os.environ[RENDEZVOUS_VARIABLE] = f"file://{folder / case.replace(' ', '')}"
        try:
            with joined("cpu", 60) as world, failing_together(world, explain):
                failing(world, folder, case)
        except MenmaError as error:
            seen[case] = str(error)
    os.environ[RENDEZVOUS_VARIABLE] = f"file://{folder / 'killed'}"
    with joined("cpu", 60) as world:
        earlier = mappings()
        model = load(world, folder, "fp32", share=True)
        seen["before the end"] = mappings(earlier)
        (folder / f"rank{rank}.json").write_text(json.dumps(seen))
        world.barrier()
        assert model.blocks.swap is not None
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        world.barrier()


if __name__ == "__main__":
    where = Path(sys.argv[1])
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "tests.swap.shared_ranks", str(where)]
        sys.exit(run_workers(command, 2, failure_grace_s=10))
    main(where)
