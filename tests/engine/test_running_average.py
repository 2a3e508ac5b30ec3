"""The average of the weights, and the switch to the weights that are for use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.optimizer_runs import equal, factory_of, local_engine, train
from tests.engine.test_optimizers import deepspeed  # noqa: F401 - a fixture
from tests.engine.toy import FullStep, LoraStep, batches_of_step
from trainer.engine.alternating import AlternatingEngine, Turn
from trainer.engine.running_average import AverageSettings, RunningAverage

LR = 1e-2


def average_of(engine: Any) -> dict[str, Tensor]:
    with engine.inference_weights(averaged=True):
        return engine.full_parameters()


def by_hand(seen: list[dict[str, Tensor]], settings: AverageSettings) -> dict[str, Tensor]:
    """Return the average of the weights after each step, in float64."""
    average: dict[str, Tensor] = {}
    updates = 0
    for step, weights in enumerate(seen, 1):
        if step < settings.start_step or (step - settings.start_step) % settings.every_steps:
            continue
        decay = settings.decay
        if settings.warmup:
            decay = min(decay, (1 + updates) / (10 + updates))
        if not updates:
            decay = 0.0
        for name, value in weights.items():
            old = average.get(name, torch.zeros_like(value, dtype=torch.float64))
            average[name] = decay * old + (1 - decay) * value.double()
        updates += 1
    return average


SETTINGS = {
    "plain": AverageSettings(decay=0.8, warmup=False),
    "warmup": AverageSettings(decay=0.8),
    "sometimes": AverageSettings(decay=0.8, every_steps=3),
    "late": AverageSettings(decay=0.8, start_step=5, warmup=False),
    "cpu": AverageSettings(decay=0.8, device="cpu"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_it_is_the_formula_in_float64(name):
    settings = SETTINGS[name]
    engine = local_engine(factory_of("adamw"), average=settings)
    seen = []
    for step in range(10):
        train(engine, [step], LR)
        seen.append(engine.full_parameters())
    expected = by_hand(seen, settings)
    for key, value in average_of(engine).items():
        torch.testing.assert_close(value.double(), expected[key], atol=1e-6, rtol=1e-6)
    assert not equal(average_of(engine), seen[-1])
    assert equal(engine.full_parameters(), seen[-1])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_averages_like_the_local_engine(stage, deepspeed, tmp_path):  # noqa: F811
    settings = SETTINGS["warmup"]
    local = local_engine(factory_of("adamw"), average=settings)
    engine = deepspeed(factory_of("adamw"), stage, average=settings)
    for each in (local, engine):
        train(each, range(6), LR)
    for key, value in average_of(local).items():
        torch.testing.assert_close(average_of(engine)[key], value, atol=1e-6, rtol=1e-5)
    engine.save_state(tmp_path)
    local.load_state(tmp_path)  # cut anew
    assert equal(average_of(local), average_of(engine))


def test_masters_of_bf16_weights_are_averaged():
    module = FullStep(torch.bfloat16)
    engine = local_engine(factory_of("adamw"), module, average=SETTINGS["plain"])
    train(engine, range(5), LR)
    before = module.layers[0].weight.clone()
    with engine.inference_weights(averaged=True):
        whole = engine.full_parameters()["layers.0.weight"]
        assert torch.equal(module.layers[0].weight, whole.bfloat16())
        assert not torch.equal(whole, whole.bfloat16().float())
    assert torch.equal(module.layers[0].weight, before)


def test_bf16_weights_without_masters_are_averaged_and_put_back():
    module = FullStep(torch.bfloat16)
    engine = local_engine(factory_of("adamw_bf16"), module, average=SETTINGS["plain"])
    train(engine, range(3), LR)
    before = engine.full_parameters()
    assert not equal(average_of(engine), before)
    assert equal(engine.full_parameters(), before)


@pytest.mark.parametrize("stage", [None, 0, 2, 3])
@pytest.mark.parametrize("kind", ["adamw", "schedulefree"])
def test_looking_at_the_weights_for_use_changes_no_bit(kind, stage, deepspeed):  # noqa: F811
    options: dict[str, Any] = {"average": SETTINGS["plain"]} if kind == "adamw" else {}

    def make() -> Any:
        factory = factory_of(kind)
        if stage is None:
            return local_engine(factory, **options)
        return deepspeed(factory, stage, **options)

    alone, watched = make(), make()
    with watched.inference_weights(averaged=True):  # before the first step: the weights
        assert equal(watched.full_parameters(), alone.full_parameters())
    for step in range(5):
        assert train(alone, [step], LR) == train(watched, [step], LR)
        before = watched.full_parameters()
        with watched.inference_weights(averaged=True):
            assert step == 0 or not equal(watched.full_parameters(), before)
        assert equal(watched.full_parameters(), before)
    assert equal(alone.full_parameters(), watched.full_parameters())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_schedulefree_switches_under_deepspeed(stage, deepspeed):  # noqa: F811
    local, engine = local_engine(factory_of("schedulefree")), deepspeed(
        factory_of("schedulefree"), stage
    )  # fmt: skip
    for each in (local, engine):
        train(each, range(6), LR)
    with local.inference_weights(averaged=False), engine.inference_weights(averaged=False):
        expected, found = local.full_parameters(), engine.full_parameters()
        inside = dict(engine._engine.module.named_parameters())
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, atol=1e-6, rtol=1e-5)
            if stage < 3:
                assert torch.equal(inside[key], found[key]), "samples are made with the module"


def test_weights_come_back_when_the_block_fails():
    engine = local_engine(factory_of("adamw"), average=SETTINGS["plain"])
    train(engine, range(3), LR)
    before = engine.full_parameters()
    with pytest.raises(RuntimeError, match="sample"), engine.inference_weights(averaged=True):
        raise RuntimeError("sample")
    assert equal(engine.full_parameters(), before)


def test_an_average_begins_where_a_checkpoint_has_none(tmp_path):
    first = local_engine(factory_of("adamw"))
    train(first, range(4), LR)
    first.save_state(tmp_path)
    engine = local_engine(factory_of("adamw"), average=SETTINGS["plain"])
    train(engine, range(20, 23), LR)
    engine.load_state(tmp_path)
    assert equal(average_of(engine), first.full_parameters())
    train(engine, range(4, 5), LR)
    assert equal(average_of(engine), engine.full_parameters())  # the first update takes them


def test_the_average_of_cpu_is_on_the_cpu():
    for device in ("train", "cpu"):
        flats = [torch.zeros(2, device="meta")]
        average = RunningAverage(AverageSettings(decay=0.9, device=device), flats)  # type: ignore[arg-type]
        assert average.tensors[0].device.type == ("meta" if device == "train" else "cpu")


def test_experts_that_take_turns_have_an_average_each():
    engines = {
        part: local_engine(factory_of("adamw"), LoraStep(blocks=1), average=SETTINGS["plain"])
        for part in ("a", "b")
    }
    both = AlternatingEngine(
        engines, lambda step: Turn(part="ab"[step % 2], model="m"), lambda model: None
    )
    assert both.has_average
    for step in range(6):
        both.forward_backward(batches_of_step(step, 0, 1, 1))
        both.update(LR)
    averaged = average_of(both)
    for part, engine in engines.items():
        alone = average_of(engine)
        assert all(torch.equal(averaged[f"{part}.{name}"], alone[name]) for name in alone)
