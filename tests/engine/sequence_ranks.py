"""Processes that share clips: `python -m tests.engine.sequence_ranks CASE NUM SIZE FOLDER`.

Starts NUM of itself in groups of SIZE. Each rank writes what it saw into `FOLDER/rankR.json`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.engine.sequence_sampling import sampled
from tests.engine.toy import AdamWFactory
from trainer.adapters.full import FullFineTune
from trainer.adapters.lora import LoRA
from trainer.adapters.tlora import TLoRA
from trainer.attention.base import AttentionBackend
from trainer.attention.sequence import SequenceGroup
from trainer.contract.errors import ConfigError
from trainer.contract.variants import VARIANTS, TransformerConfig
from trainer.core.seams import BuildContext, Technique
from trainer.core.types import Batch, LossTerm
from trainer.data.buckets import Bucket
from trainer.data.entries import write_entry
from trainer.data.items import TrainingItem
from trainer.engine.deepspeed import DeepSpeedEngine
from trainer.engine.launch import run_workers
from trainer.engine.process_group import World, joined
from trainer.engine.sequence import sharing_clips
from trainer.losses.mse import MSE
from trainer.memory.block_swap import BlockSwap
from trainer.memory.checkpoint_offload import CheckpointOffload
from trainer.memory.streams import HostStreams
from trainer.models.wan.fan_in import init_fan_in
from trainer.models.wan.quantised import is_block_linear
from trainer.models.wan.transformer import WanTransformer
from trainer.quant.fp8 import Fp8Spec, quantise
from trainer.quant.linear import Fp8Linear
from trainer.timesteps.uniform import Uniform
from trainer.training.step import Objective, SigmaRange, TrainStep
from trainer.training.validation import ValidationSettings, Validator
from trainer.weightings.none import Unweighted

SHAPE = TransformerConfig(
    dim=48, ffn_dim=96, num_heads=4, num_layers=3, text_dim=32, freq_dim=16, image_tokens=7
)
BUILD = BuildContext(
    variant=VARIANTS["wan2.1-t2v-1.3b"], seed=3, device=torch.device("cpu"), total_steps=4
)
LR = 1e-2
GRIDS = {"even": (2, 4, 4), "odd": (3, 6, 6), "one": (1, 2, 2), "seven": (7, 2, 2)}
"""Latent frames, height, width: 8, 27, 1 and 7 tokens."""


def untouched(model: WanTransformer) -> None:
    pass


@dataclass(frozen=True)
class Model:
    """A model and how it is called: a row of the table of single steps."""

    grid: str = "even"
    batch: int = 1
    shape: TransformerConfig = SHAPE
    per_token: bool = False
    lora: bool = False
    kind: Any = LoRA
    prepare: Callable[[WanTransformer], None] = untouched


def checkpointed(model: WanTransformer) -> None:
    model.gradient_checkpointing = True


def keeping(model: WanTransformer) -> None:
    model.gradient_checkpointing = True
    model.blocks.keep_attention = True


def in_parts(model: WanTransformer) -> None:
    model.gradient_checkpointing = True
    model.set_feed_forward_chunks(2)


def parked(model: WanTransformer) -> None:
    model.gradient_checkpointing = True
    model.blocks.offload = CheckpointOffload(HostStreams())


def streamed(model: WanTransformer) -> None:
    model.gradient_checkpointing = True
    model.blocks.swap = BlockSwap(model.blocks, SHAPE.num_layers, HostStreams())


def compiled(model: WanTransformer) -> None:
    """Compile one block, between two that are not: each takes seconds."""
    model.blocks[1].compile(backend="aot_eager")


def in_fp8(model: WanTransformer) -> None:
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and is_block_linear(f"{name}.weight", linear.weight.shape):
            parent, _, child = name.rpartition(".")
            weight = quantise(linear.weight.detach(), Fp8Spec(scaled=True), "cpu")
            setattr(model.get_submodule(parent), child, Fp8Linear(weight, linear.bias, None))


IMAGE = replace(SHAPE, in_channels=36, image_dim=20)
MODELS = {
    "even": Model(),
    "odd": Model(grid="odd", batch=2),
    "fewer tokens than processes": Model(grid="one", batch=2),
    "a time for every token": Model(grid="odd", batch=2, per_token=True),
    "image-to-video": Model(grid="seven", batch=2, shape=IMAGE),
    "two images": Model(shape=replace(IMAGE, image_position_embedding=True)),
    "reference": Model(grid="seven", shape=replace(SHAPE, reference_conv=True)),
    "checkpointed": Model(grid="odd", prepare=checkpointed),
    "attention kept": Model(grid="odd", prepare=keeping),
    "feed-forward in parts": Model(grid="odd", prepare=in_parts),
    "LoRA": Model(grid="odd", lora=True),
    "LoRA, parked": Model(grid="odd", lora=True, prepare=parked),
    "LoRA, streamed": Model(grid="odd", lora=True, prepare=streamed),
    "LoRA, compiled": Model(grid="odd", lora=True, prepare=compiled),
    "T-LoRA": Model(grid="odd", batch=2, per_token=True, lora=True, kind=TLoRA),
    "LoRA on fp8": Model(grid="odd", lora=True, prepare=in_fp8),
}


def rows(num_processes: int) -> dict[str, Model]:
    """Return the rows for so many processes: ways to save memory are tried with two only."""
    return {n: m for n, m in MODELS.items() if num_processes == 2 or m.prepare is untouched}


def build(shape: TransformerConfig = SHAPE) -> WanTransformer:
    """Return a model in which no parameter is zero."""
    model = WanTransformer(shape, seed=None)
    init_fan_in(model, 1)
    random = torch.Generator().manual_seed(1)
    for name, value in model.named_parameters():
        if name.endswith("modulation"):
            nn.init.normal_(value, std=0.3, generator=random)
    return model


def lora(model: WanTransformer, dropout: float = 0.0, kind: Any = LoRA) -> Any:
    """Put a LoRA on the model whose factors are not zero."""
    adapter = kind(kind.Config(rank=4, dropout=dropout), BUILD)
    adapter.inject(model, seed=0)
    random = torch.Generator().manual_seed(0)
    for value in adapter.trainable().values():
        nn.init.normal_(value, std=0.2, generator=random)
    return adapter


def make_pair(row: Model) -> list[WanTransformer]:
    """Return the model of a row twice; the first is never compiled."""
    pair = []
    for prepare in (untouched if row.prepare is compiled else row.prepare, row.prepare):
        model = build(row.shape)
        if prepare is in_fp8:
            in_fp8(model)
        if row.lora:
            model.requires_grad_(False)
            if prepare is streamed:
                streamed(model)
            lora(model, kind=row.kind)
        if prepare not in {in_fp8, streamed}:
            prepare(model)
        pair.append(model)
    return pair


def velocity(model: WanTransformer, row: Model, seed: int) -> Tensor:
    """Run the model of a row on random input."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    grid, config = GRIDS[row.grid], row.shape
    given: dict[str, Tensor] = {}
    if config.in_channels > 16:
        given["extra_channels"] = draw(row.batch, config.in_channels - 16, *grid)
    if config.image_dim is not None:
        images = 2 if config.image_position_embedding else 1
        given["image_context"] = draw(row.batch, 7 * images, config.image_dim)
    if config.reference_conv:
        given["reference"] = draw(row.batch, 16, *grid[1:])
    tokens = grid[0] * grid[1] * grid[2] // 4
    time = torch.tensor([873.25, 41.5][: row.batch])
    if row.per_token:
        time = time[:, None].repeat(1, tokens)
        time[:, : tokens // 3] = 0
    texts = [draw(5 + 4 * index, config.text_dim) for index in range(row.batch)]
    return model(draw(row.batch, 16, *grid), time, texts, **given)


def gradients(model: WanTransformer, output: Tensor, world: World) -> dict[str, Tensor]:
    """Return the mean over all ranks of every weight's gradient, as the engine takes it."""
    random = torch.Generator().manual_seed(5)
    probe = torch.randn(output.shape, generator=random) / output.numel() ** 0.5
    model.zero_grad()
    (output * probe).sum().backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            mean = parameter.grad.clone()
            dist.all_reduce(mean)
            found[name.replace("._orig_mod", "")] = mean / world.world_size
    return found


def far_apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the largest difference, each relative to the largest number of its tensor."""
    assert one.keys() == other.keys()
    scale = {name: max(float(value.abs().max()), 1e-3) for name, value in one.items()}
    return max(float((one[name] - other[name]).abs().max()) / scale[name] for name in one)


def case_single(world: World, folder: Path) -> dict[str, Any]:
    """One step of every row: output and gradients against the same model on its own."""
    seen = {}
    for name, row in rows(world.world_size).items():
        alone, shared = make_pair(row)
        shared.share_tokens(world.sequence)
        seed = 7 + world.data_rank
        wanted, found = velocity(alone, row, seed), velocity(shared, row, seed)
        seen[name] = {
            "output": float((wanted - found).detach().abs().max()),
            "size": float(wanted.detach().abs().max()),
            "gradients": far_apart(
                gradients(alone, wanted, world), gradients(shared, found, world)
            ),
        }
    return seen | {"wrong": _wrong(world), "grad modes": _without_gradients(world)}


def _wrong(world: World) -> dict[str, float]:
    """What must be noticed: tokens that see their own part only, gradients without the sum."""
    row = MODELS["odd"]
    alone, shared = make_pair(row)
    wanted = velocity(alone, row, 7)

    class Deaf(SequenceGroup):
        def attention(self, attend: AttentionBackend, num_tokens: int) -> AttentionBackend:
            return attend

    class Apart(SequenceGroup):
        def gather(self, part_BME: Tensor, num_tokens: int) -> Tensor:
            whole = super().gather(part_BME, num_tokens)
            return whole.detach() + (whole - whole.detach()) / self.size

    group = world.sequence
    shared.share_tokens(Deaf(group.rank, group.size, group.process_group))
    deaf = float((velocity(shared, row, 7) - wanted).detach().abs().max())
    shared.share_tokens(Apart(group.rank, group.size, group.process_group))
    lessened = gradients(shared, velocity(shared, row, 7), world)
    return {"deaf": deaf, "apart": far_apart(gradients(alone, wanted, world), lessened)}


def _without_gradients(world: World) -> dict[str, float]:
    row = MODELS["odd"]
    alone, shared = make_pair(row)
    shared.share_tokens(world.sequence)
    with torch.no_grad():
        plain = velocity(shared, row, 7) - velocity(alone, row, 7)
    with torch.inference_mode():
        inference = velocity(shared, row, 7) - velocity(alone, row, 7)
    shared.attend = alone.attend = explicit_attention
    with torch.no_grad():
        flex = velocity(shared, row, 7) - velocity(alone, row, 7)
    found = {"no_grad": plain, "inference": inference, "another backend": flex}
    return {name: float(difference.abs().max()) for name, difference in found.items()}


def explicit_attention(
    q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, bias_BS: Tensor | None = None
) -> Tensor:
    """Compute attention by its formula."""
    scores = torch.einsum("blnk,bsnk->bnls", q_BLNK, k_BSNK) / q_BLNK.shape[-1] ** 0.5
    if bias_BS is not None:
        scores = scores + bias_BS[:, None, None, :]
    return torch.einsum("bnls,bsnk->blnk", scores.softmax(-1), v_BSNK)


explicit_attention.takes_bias = True  # type: ignore[attr-defined]


class Judge(Technique):
    """Trains a layer of its own on what the transformer predicts, which every process has whole."""

    def __init__(self) -> None:
        self.layer = nn.Linear(16, 1)
        nn.init.constant_(self.layer.weight, 0.1)
        nn.init.zeros_(self.layer.bias)

    def modules(self) -> dict[str, nn.Module]:
        return {"judge": self.layer}

    def loss_terms(self, batch: Any, noisy: Any, prediction: Tensor, predict: Any) -> list[Any]:
        judged = self.layer(prediction.flatten(2).mean(-1))
        return [LossTerm(name="judge", value=(judged - 1).square().mean())]


def make_step(
    kind: str, world: World | None, dropout: float = 0.0
) -> tuple[TrainStep, dict[str, nn.Parameter]]:
    """Return the step that an engine trains, and what of it is trained."""
    model = build()
    model.gradient_checkpointing = True
    adapter: Any = FullFineTune(FullFineTune.Config(), BUILD)
    if kind == "lora":
        adapter = lora(model, dropout)
    else:
        adapter.inject(model, seed=0)
    group = None if world is None else world.sequence
    if group is not None:
        model.share_tokens(group)
    objective = Objective(
        sampler=Uniform(Uniform.Config(), BUILD),
        loss=MSE(MSE.Config(), BUILD),
        weighting=Unweighted(Unweighted.Config(), BUILD),
        sigmas=SigmaRange(),
    )
    part = 0 if group is None else group.rank
    step = TrainStep(model, objective, (Judge(),), 11, model.blocks.suspended, part=part)
    extra = {f"extra.{name}": value for name, value in step.extra.named_parameters()}
    return step.train(), {**adapter.trainable(), **extra}


def microbatch(number: int) -> Batch:
    """Return a clip of 27 tokens or a picture, by its number."""
    random = torch.Generator().manual_seed(number)
    grid = GRIDS["odd"] if number % 3 else (1, 6, 6)
    return Batch(
        latents_BCFHW=torch.randn(1, 16, *grid, generator=random),
        context=(torch.randn(6, 32, generator=random),),
        names=(f"clip{number}",),
        item_seeds=(number,),
    )


def microbatches(step: int, rank: int, size: int, accumulation: int) -> Iterator[Batch]:
    """Yield one share of a step's microbatches."""
    for micro in range(accumulation):
        yield microbatch(1 + (step * accumulation + micro) * size + rank)


def make_engine(
    kind: str, stage: int, world: World, **options: Any
) -> tuple[DeepSpeedEngine, TrainStep]:
    """Return an engine that keeps no parameter whole in stage 3."""
    step, trainable = make_step(kind, world, **options)
    engine = DeepSpeedEngine(
        step,
        trainable,
        AdamWFactory(),
        world=world,
        max_grad_norm=0.5,
        gradient_accumulation_steps=2,
        zero_stage=stage,
        persistence_threshold=0,
    )
    return engine, step


def train(engine: Any, steps: range, rank: int, size: int, accumulation: int = 2) -> list[list]:
    """Return loss and gradient norm of each step."""
    seen = []
    for step in steps:
        engine.forward_backward(microbatches(step, rank, size, accumulation))
        result = engine.update(LR)
        seen.append([result.loss, result.grad_norm])
    return seen


def case_train(world: World, folder: Path) -> dict[str, Any]:
    """Four steps, and two + two with a checkpoint between, at every stage."""
    seen: dict[str, Any] = {}
    place = (world.data_rank, world.data_size)
    stages = range(4) if world.data_size == 1 else range(2, 3)
    for kind, stage in [(kind, stage) for kind in ("lora", "full") for stage in stages]:
        engine, step = make_engine(kind, stage, world)
        state = folder / f"{kind}{stage}"
        state.mkdir(exist_ok=True)
        curve = train(engine, range(2), *place)
        engine.save_state(state)
        curve += train(engine, range(2, 4), *place)
        straight = engine.full_parameters()
        measured = validate(step.transformer, world, folder).loss
        engine.close()
        world.barrier()
        engine, _ = make_engine(kind, stage, world)
        engine.load_state(state)
        resumed = train(engine, range(2, 4), *place)
        after = engine.full_parameters()
        engine.close()
        if world.rank == 0:
            torch.save(straight, folder / f"{kind}{stage}.pt")
            assert all(torch.equal(straight[name], after[name]) for name in straight)
        seen[f"{kind}{stage}"] = {"curve": curve, "resumed": resumed, "validation": measured}
    return seen | {"dropout": _dropout(world)}


def _dropout(world: World) -> list[float]:
    """The loss with dropout, and where this rank's random stream has come to by then."""
    engine, step = make_engine("lora", 0, world, dropout=0.5)
    curve = train(engine, range(1), world.data_rank, world.data_size)
    step(microbatch(1))
    drawn = float(torch.rand(()))
    engine.close()
    return [curve[0][0], drawn]


def items(folder: Path) -> list[TrainingItem]:
    """Return three items of two sizes in a cache."""
    found = []
    for number, grid in enumerate([(3, 6, 6), (1, 6, 6), (3, 6, 6)]):
        random = torch.Generator().manual_seed(number)
        latents, context = folder / f"{number}.latents", folder / f"{number}.text"
        drawn = {"latents": torch.randn(16, *grid, generator=random)}
        text = {"context": torch.randn(4, 32, generator=random)}
        if not context.exists():
            write_entry(latents, f"l{number}", drawn, {})
            write_entry(context, f"c{number}", text, {})
        item = TrainingItem(
            key=f"clips/{number}",
            name=f"clip{number}",
            source=0,
            clip=f"hash{number}",
            start=0,
            bucket=Bucket(48, 48, 4 * grid[0] - 3),
            latents=latents,
            latents_key=f"l{number}",
            context=context,
            context_key=f"c{number}",
            num_repeats=1,
            batch_size=1,
        )
        found.append(item)
    return found


def validate(model: WanTransformer, world: World, folder: Path) -> Any:
    """Measure the model on the three items."""
    settings = ValidationSettings(timesteps=(100.0, 900.0), batch_size=1)
    folder = folder / "items"
    if world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        items(folder)
    world.barrier()
    return Validator(model, items(folder), settings, world).measure()


def case_refused(world: World, folder: Path) -> dict[str, Any]:
    seen = {}
    model = WanTransformer(replace(SHAPE, num_heads=3))
    for name, action in {
        "processes": lambda: sharing_clips(replace(world, sequence=None), 3, 60),
        "heads": lambda: model.share_tokens(world.sequence),
    }.items():
        try:
            action()
        except ConfigError as error:
            seen[name] = str(error)
    return seen


def case_sample(world: World, folder: Path) -> dict[str, Any]:
    """Sample with a step cache: each process keeps what the blocks added to its own tokens."""
    seen = {}
    for method in ("teacache", "magcache"):
        alone, shared = make_pair(MODELS["even"])
        expected, passes = sampled(alone, method)
        shared.share_tokens(world.sequence)
        latents, own = sampled(shared, method)
        seen[method] = {
            "distance": float((latents - expected).abs().max()),
            "alone": passes.reused,
            "shared": own.reused,
        }
    return seen


CASES = {
    "single": case_single,
    "train": case_train,
    "refused": case_refused,
    "sample": case_sample,
}


def main(case: str, size: int, folder: Path) -> None:
    with joined("cpu", timeout_s=90) as world:
        torch.set_num_threads(1)
        seen = CASES[case](sharing_clips(world, size, 90), folder)
    (folder / f"rank{world.rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    case, num, size, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "tests.engine.sequence_ranks", *sys.argv[1:]]
        sys.exit(run_workers(command, num, failure_grace_s=10))
    main(case, size, folder)
