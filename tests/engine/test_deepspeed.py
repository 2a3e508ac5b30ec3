"""DeepSpeed at every ZeRO stage on one process against the local engine."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.engine.toy import (
    AdamWFactory,
    FullStep,
    LoraStep,
    RawAdamWFactory,
    ShapedFactory,
    batches_of_step,
    make_batch,
)
from trainer.contract.errors import ConfigError, ModelFileError, NonFiniteError, RunError
from trainer.core.seams import Engine
from trainer.engine.deepspeed import DeepSpeedEngine
from trainer.engine.local import LocalEngine
from trainer.engine.process_group import join, leave

LR = 1e-2
LINEAR = torch.nn.functional.linear
SPECIES = {
    "lora": (LoraStep, False),
    "lora_on_bf16": (lambda: LoraStep(torch.bfloat16), False),
    "full": (FullStep, False),
    "full_bf16": (lambda: FullStep(torch.bfloat16), True),
}


@pytest.fixture
def make(world):
    """Return a maker of engines (stage None: local) and close them afterwards."""
    made = []

    def make_engine(species, stage, factory=None, **options):
        build, bf16 = SPECIES[species]
        module = build()
        options = {"max_grad_norm": 0.0, "gradient_accumulation_steps": 2} | options
        arguments = (module, module.trainable(), factory or AdamWFactory())
        if stage is None:
            engine = LocalEngine(*arguments, device="cpu", **options)
        else:
            options = {"persistence_threshold": 0} | options
            engine = DeepSpeedEngine(
                *arguments, world=world, zero_stage=stage, full_finetune_bf16=bf16, **options
            )
        made.append(engine)
        return engine

    yield make_engine
    for engine in made:
        engine.close()


def train(engine, steps, accumulation=2):
    seen = []
    for step in steps:
        terms = engine.forward_backward(batches_of_step(step, 0, 1, accumulation))
        seen.append((terms["loss"], engine.update(LR).grad_norm))
    return seen


def difference(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


CELLS = [
    *[("lora", stage) for stage in (0, 1, 2)],
    *[("lora_on_bf16", stage) for stage in (0, 1, 2)],
    *[("full", stage) for stage in (0, 1, 2)],
    ("full_bf16", 2),
    ("full", 3),
    ("full_bf16", 3),
]


@pytest.mark.parametrize(("species", "stage"), CELLS)
def test_equals_the_local_engine_bit_for_bit(make, species, stage):
    local, engine = make(species, None), make(species, stage)
    expected, seen = train(local, range(8)), train(engine, range(8))
    assert [loss for loss, _ in seen] == [loss for loss, _ in expected]
    assert [norm for _, norm in seen] == pytest.approx([norm for _, norm in expected], rel=1e-6)
    assert difference(engine.full_parameters(), local.full_parameters()) == 0
    assert isinstance(engine, Engine)


def test_bf16_weights_at_stage_1_equal_the_local_engine(make):
    local = make("full_bf16", None, gradient_accumulation_steps=1)
    engine = make("full_bf16", 1, gradient_accumulation_steps=1)
    assert [x for x, _ in train(engine, range(8), 1)] == [x for x, _ in train(local, range(8), 1)]
    assert difference(engine.full_parameters(), local.full_parameters()) == 0


def test_lora_at_stage_3_differs_by_the_order_of_a_sum(make):
    """Its hooks add up the three gradients that meet at a block's input in another order."""
    local, engine = make("lora", None), make("lora", 3)
    expected, seen = train(local, range(8)), train(engine, range(8))
    assert seen[0][0] == expected[0][0]
    assert difference(engine.full_parameters(), local.full_parameters()) < 1e-6


@pytest.mark.parametrize("stage", range(4))
def test_clipping_and_its_norm_are_the_same(make, stage):
    local, engine = make("full", None, max_grad_norm=0.05), make("full", stage, max_grad_norm=0.05)
    expected, seen = train(local, range(6)), train(engine, range(6))
    assert min(norm for _, norm in expected) > 0.05  # clipping was at work
    assert [norm for _, norm in seen] == pytest.approx([norm for _, norm in expected], rel=1e-6)
    assert difference(engine.full_parameters(), local.full_parameters()) < 1e-6


@pytest.mark.parametrize("stage", range(4))
def test_learning_rates_may_differ_by_parameter(make, stage):
    scales = {name: 8.0 for name in LoraStep().trainable() if name.endswith("up")}
    local, engine = make("lora", None, lr_scales=scales), make("lora", stage, lr_scales=scales)
    unscaled = make("lora", None)
    for each in (local, engine, unscaled):
        train(each, range(3))
    assert difference(engine.full_parameters(), local.full_parameters()) < 1e-6
    assert difference(engine.full_parameters(), unscaled.full_parameters()) > 1e-2


RESUME = [
    *[("lora", stage, AdamWFactory) for stage in (None, 0, 1, 2)],
    *[("lora", stage, RawAdamWFactory) for stage in (None, 0, 1, 2)],
    ("full_bf16", None, AdamWFactory),
    ("full_bf16", 2, AdamWFactory),
    *[
        (species, 3, factory)
        for species in ("lora", "full_bf16")
        for factory in (AdamWFactory, RawAdamWFactory)
    ],
]


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize(("species", "stage", "factory"), RESUME)
def test_ten_steps_and_ten_more_are_twenty(make, tmp_path, species, stage, factory, used):
    options = {"max_grad_norm": 0.05}
    if stage == 3:
        options["persistence_threshold"] = 70  # some parameters stay whole, others are sharded
    first = make(species, stage, factory(), **options)
    train(first, range(10))
    first.save_state(tmp_path)
    straight = train(first, range(10, 20))

    second = make(species, stage, factory(), **options)
    if used:
        train(second, range(50, 52))  # what is loaded must replace all of this
    second.load_state(tmp_path)
    assert train(second, range(10, 20)) == straight
    assert difference(second.full_parameters(), first.full_parameters()) == 0


@pytest.mark.parametrize(("written", "read"), list(itertools.permutations([None, 0, 1, 2, 3], 2)))
def test_any_engine_reads_the_state_of_any_other(make, tmp_path, written, read):
    first = make("lora", written)
    train(first, range(10))
    first.save_state(tmp_path)
    second = make("lora", read)
    second.load_state(tmp_path)
    assert difference(second.full_parameters(), first.full_parameters()) == 0
    train(first, range(10, 20))
    train(second, range(10, 20))
    assert difference(second.full_parameters(), first.full_parameters()) < 1e-6


@pytest.mark.parametrize("stage", [None, *range(4)])
@pytest.mark.parametrize("factory", [AdamWFactory, RawAdamWFactory])
def test_a_state_from_before_the_first_step_can_be_loaded(make, tmp_path, stage, factory):
    fresh = make("lora", stage, factory())
    fresh.save_state(tmp_path)
    used = make("lora", stage, factory())
    train(used, range(3))
    used.load_state(tmp_path)
    assert train(used, range(5)) == train(fresh, range(5))
    assert difference(used.full_parameters(), fresh.full_parameters()) == 0


def test_state_that_cannot_be_cut_is_refused_elsewhere(make, tmp_path):
    first = make("lora", 1, RawAdamWFactory())
    train(first, range(2))
    first.save_state(tmp_path)
    other = make("lora", 2, RawAdamWFactory())
    before = other.full_parameters()
    with pytest.raises(ModelFileError, match="zero_stage 1 -> 2"):
        other.load_state(tmp_path)
    assert difference(other.full_parameters(), before) == 0


@pytest.mark.parametrize("stage", range(4))
def test_nan_stops_before_the_backward(make, stage):
    engine = make("lora", stage, gradient_accumulation_steps=1)
    train(engine, range(2), 1)
    before = engine.full_parameters()
    with pytest.raises(NonFiniteError, match=r"clip-9\.mp4"):
        engine.forward_backward([make_batch(-9)])
    assert difference(engine.full_parameters(), before) == 0


@pytest.mark.parametrize(
    ("species", "stage"), [*[("lora", stage) for stage in range(4)], ("full_bf16", 2)]
)
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(make, species, stage):
    engine = make(species, stage)
    train(engine, range(2))
    before = engine.full_parameters()
    victim = next(iter(engine._trainable.values()))
    hook = victim.register_hook(lambda gradient: gradient * torch.inf)
    engine.forward_backward(batches_of_step(2, 0, 1, 2))
    with pytest.raises(NonFiniteError, match="gradient norm"):
        engine.update(LR)
    hook.remove()
    assert difference(engine.full_parameters(), before) == 0


class Idle(LoraStep):
    """A second expert that no batch reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.other = torch.nn.Linear(3, 3)


def idle_engine(world, stage):
    module = Idle()
    return module, DeepSpeedEngine(
        module,
        module.trainable(),
        AdamWFactory(),
        world=world,
        zero_stage=stage,
        max_grad_norm=0.0,
        gradient_accumulation_steps=1,
        persistence_threshold=0,
    )


def test_stage_3_refuses_parameters_that_took_no_part(world):
    _, engine = idle_engine(world, 3)
    with pytest.raises(RunError, match=r"other\.weight"):
        engine.forward_backward([make_batch(1)])
    engine.close()


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_below_stage_3_parameters_that_took_no_part_decay(world, stage):
    module, engine = idle_engine(world, stage)
    before = module.other.weight.detach().clone()
    train(engine, range(1), 1)
    expected = before * (1 - LR * 0.1)
    assert torch.allclose(engine.full_parameters()["other.weight"], expected, atol=1e-8)
    engine.close()


def test_an_optimizer_that_looks_at_whole_tensors_needs_stage_0(make):
    make("lora", 0, ShapedFactory())
    with pytest.raises(ConfigError, match="flat shards"):
        make("lora", 1, ShapedFactory())


def test_low_precision_weights_without_masters_are_a_bug(world):
    module = FullStep(torch.bfloat16)
    with pytest.raises(ValueError, match="not float32"):
        DeepSpeedEngine(
            module,
            module.trainable(),
            AdamWFactory(),
            world=world,
            max_grad_norm=0,
            gradient_accumulation_steps=1,
        )


@pytest.mark.parametrize("stage", range(4))
def test_closing_leaves_torch_as_it_was(world, make, stage):
    engine = make("lora", stage, gradient_accumulation_steps=1)
    train(engine, range(1), 1)
    module = engine._engine.module
    assert LINEAR is torch.nn.functional.linear
    engine.close()
    assert LINEAR is torch.nn.functional.linear
    if stage < 3:
        module.zero_grad()
        terms = module(make_batch(1))
        sum(terms.values()).backward()
        assert all(p.grad is not None for p in module.trainable().values())


@pytest.mark.parametrize("stage", range(4))
def test_an_engine_works_in_a_group_after_another_one(world, make, stage):
    for _ in range(2):
        leave()
        join("cpu", timeout_s=60)
        engine = make("lora", stage, gradient_accumulation_steps=1)
        loss, _ = train(engine, range(1), 1)[0]
        assert math.isfinite(loss)
