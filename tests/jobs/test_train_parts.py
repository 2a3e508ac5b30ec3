"""The parts of a run, put together as the job does it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.adapters.lora import LoRA
from trainer.attention.sequence import SequenceGroup
from trainer.contract.catalog import ADAPTERS
from trainer.contract.config import RunConfig
from trainer.contract.config_rules import check_rules
from trainer.contract.errors import ConfigError
from trainer.contract.variants import VARIANTS, TransformerConfig
from trainer.core.seams import BuildContext, Technique
from trainer.core.types import Batch, LossTerm
from trainer.data import loader
from trainer.data.buckets import Bucket
from trainer.data.items import CachedDataset, TrainingItem
from trainer.data.loader import TrainingSteps
from trainer.data.order import BatchOrder
from trainer.engine.local import LocalEngine
from trainer.engine.process_group import World
from trainer.jobs import train_parts
from trainer.jobs.build import build_plugin
from trainer.jobs.run_items import RunItems
from trainer.jobs.train_experts import share_parameters
from trainer.jobs.train_parts import (
    Session,
    TrainedModel,
    TrainingData,
    open_data,
    output_metadata,
)
from trainer.losses.mse import MSE
from trainer.models.wan.transformer import WanTransformer
from trainer.optimizers.adamw import AdamW
from trainer.timesteps.uniform import Uniform
from trainer.training.step import Objective, SigmaRange, TrainStep
from trainer.weightings.none import Unweighted

BUILD = BuildContext(
    variant=VARIANTS["wan2.1-t2v-1.3b"], seed=0, device=torch.device("cpu"), total_steps=3
)
SHAPE = {"dim": 24, "ffn_dim": 48, "num_heads": 2, "num_layers": 1, "text_dim": 8, "freq_dim": 16}


class Judge(Technique):
    """Trains a layer of its own on what the transformer predicts."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.layer = nn.Linear(16, 1)
        self.fixed = nn.Linear(16, 1).requires_grad_(False)

    def modules(self) -> Mapping[str, nn.Module]:
        return {"layer": self.layer, "fixed": self.fixed}

    def loss_terms(self, batch: Any, noisy: Any, prediction: Tensor, predict: Any) -> list[Any]:
        judged = self.layer(prediction.flatten(2).mean(-1)) + self.fixed.weight.sum()
        return [LossTerm(name="judge", value=(judged - 1).square().mean())]


@pytest.fixture
def model() -> TrainedModel:
    transformer = WanTransformer(TransformerConfig(**SHAPE))
    adapter = LoRA(LoRA.Config(rank=2), BUILD)
    adapter.inject(transformer, 0)
    techniques = (Technique(), Judge())
    objective = Objective(
        sampler=Uniform(Uniform.Config(), BUILD),
        loss=MSE(MSE.Config(), BUILD),
        weighting=Unweighted(Unweighted.Config(), BUILD),
        sigmas=SigmaRange(),
    )
    step = TrainStep(transformer, objective, techniques, 0, nullcontext)
    return TrainedModel(transformer, adapter, techniques, step.train())


def test_layers_of_a_technique_are_trained_and_kept_and_stay_out_of_the_adapter(
    model: TrainedModel, tmp_path: Any
) -> None:
    extra = {"extra.1_layer.weight", "extra.1_layer.bias"}
    assert set(model.trainable) == set(model.adapter.trainable()) | extra
    engine = LocalEngine(
        model.step,
        model.trainable,
        AdamW(AdamW.Config(), BUILD),
        device="cpu",
        max_grad_norm=0,
        gradient_accumulation_steps=1,
    )
    before = engine.full_parameters()
    random = torch.Generator().manual_seed(2)
    batch = Batch(
        latents_BCFHW=torch.randn(1, 16, 1, 2, 2, generator=random),
        context=(torch.randn(3, 8, generator=random),),
        names=("clip",),
        item_seeds=(1,),
    )
    assert set(engine.forward_backward([batch])) == {"loss", "judge"}
    engine.update(1e-2)
    after = engine.full_parameters()
    assert all(not torch.equal(before[name], after[name]) for name in extra)
    engine.save_state(tmp_path)
    engine.update(1.0)
    engine.load_state(tmp_path)
    back = engine.full_parameters()
    assert all(torch.equal(back[name], after[name]) for name in after)


def make_items(num: int, **changes: Any) -> list[TrainingItem]:
    return [
        TrainingItem(
            key=f"0/clip{number}",
            name=f"clip{number}",
            source=0,
            clip=str(number),
            start=0,
            bucket=Bucket(32, 32, 5),
            latents=Path("x"),
            latents_key="k",
            context=Path("y"),
            context_key="c",
            **({"num_repeats": 1, "batch_size": 1} | changes),
        )
        for number in range(num)
    ]


def test_processes_that_share_clips_get_the_same_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    items = make_items(6)
    empty = (Path("z"), "e")
    cached = CachedDataset(items=tuple(items), texts={"": empty}, problems=(), fingerprint="")
    monkeypatch.setattr(train_parts, "load_run_items", lambda *_: RunItems(cached, (), 0))
    monkeypatch.setattr(loader, "load_batch", lambda draws, **_: [draw.item.name for draw in draws])
    config = RunConfig.model_validate({"training": {"gradient_accumulation_steps": 2, "epochs": 1}})
    seen = []
    for rank in range(4):
        group = SequenceGroup(rank % 2, 2, None)
        world = World(rank, 4, rank, torch.device("cpu"), group)
        data = open_data(config, BUILD.variant, world, "x.toml")
        assert data.total_steps == 2, "four microbatches a step, of six"
        with closing(data.steps.starting_at(0)) as steps:
            seen.append(next(steps))
        said = output_metadata(config, BUILD.variant, data, Session(), 1, 2)
        assert said["menma.world_size"] == "2"
    assert seen[0] == seen[1]
    assert seen[2] == seen[3]
    names = [name for micro in (*seen[0], *seen[2]) for name in micro]
    assert len(set(names)) == 4


@pytest.mark.parametrize(("step", "epoch"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3)])
def test_outputs_say_how_far_they_were_trained(step: int, epoch: int) -> None:
    items = make_items(6, num_repeats=4, batch_size=2)
    order = BatchOrder(items, seed=0)  # 24 items, 12 batches, of which a step takes 6
    steps = TrainingSteps(order, rank=1, world_size=2, gradient_accumulation_steps=3)
    data = TrainingData(None, order, steps, total_steps=7)  # type: ignore[arg-type]
    config = RunConfig.model_validate({"training": {"gradient_accumulation_steps": 3}})
    said = output_metadata(config, BUILD.variant, data, Session(), step, 7)
    assert {
        "ss_steps": str(step),
        "ss_epoch": str(epoch),
        "ss_max_train_steps": "7",
        "ss_num_train_items": "24",
        "ss_num_batches_per_epoch": "12",
        "menma.world_size": "2",
    }.items() <= said.items()


class Starting(LoRA):
    """Starts from the weights that it is added to."""

    def inject(self, transformer: Any, seed: int) -> None:
        super().inject(transformer, seed)
        with torch.no_grad():
            for name, layer in self._layers.items():
                layer.down.add_(transformer.get_submodule(name).weight.sum())


class Busy(LoRA):
    """Has something to do after a step."""

    def techniques(self) -> tuple[Technique, ...]:
        return (Technique(),)


@pytest.mark.parametrize(
    ("kind", "key"), [(LoRA, None), (Starting, "model.expert"), (Busy, "adapter.kind")]
)
def test_one_adapter_stands_for_two_models_where_it_can(kind: type[LoRA], key: str | None) -> None:
    models = []
    for seed in range(2):
        transformer = WanTransformer(TransformerConfig(**SHAPE), seed=seed)
        adapter = kind(LoRA.Config(rank=2), BUILD)
        adapter.inject(transformer, 0)
        models.append(TrainedModel(transformer, adapter, (), None))  # type: ignore[arg-type]
    if key is not None:
        with pytest.raises(ConfigError, match="cannot be shared") as found:
            share_parameters(*models)
        assert [problem.key for problem in found.value.problems] == [key]
        return
    share_parameters(*models)
    one, other = (model.adapter.trainable() for model in models)
    assert one.keys() == other.keys()
    assert all(one[name] is other[name] for name in one)
    named = dict(models[1].transformer.named_parameters())
    assert all(any(value is there for there in named.values()) for value in one.values())


@pytest.mark.parametrize(
    "options",
    [
        *({"kind": kind} for kind in ADAPTERS.names if kind != "none"),
        {"init": "pissa"},
        {"rank_dropout": 0.1},
        {"module_dropout": 0.1},
        {"scale_weight_norms": 1.0},
    ],
    ids=str,
)
def test_what_cannot_be_shared_is_told_by_the_config_alone(options: dict[str, Any]) -> None:
    model = {"variant": "wan2.2-t2v-a14b", "expert": "shared"}
    config = RunConfig.model_validate({"model": model, "adapter": {"rank": 2, **options}})
    models = []
    for seed in range(2):
        transformer = WanTransformer(TransformerConfig(**SHAPE), seed=seed)
        adapter = build_plugin(config.adapter, "kind", BUILD, where="adapter")
        adapter.inject(transformer, 0)
        models.append(TrainedModel(transformer, adapter, (), None))  # type: ignore[arg-type]
    told = [problem for problem in check_rules(config) if "shared" in problem.message]
    assert {problem.key for problem in told} <= {f"adapter.{key}" for key in ("kind", *options)}
    if told:
        with pytest.raises(ConfigError, match="cannot be shared"):
            share_parameters(*models)
    else:
        share_parameters(*models)
