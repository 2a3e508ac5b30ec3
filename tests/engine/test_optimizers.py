"""Every optimizer: it trains, resumes with the same bits in any engine, and obeys its options."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from tests.engine.optimizer_runs import (
    IN_FLOAT32,
    OPTIONS,
    QUICK,
    equal,
    factory_of,
    local_engine,
    rate_of,
    train,
)
from tests.engine.toy import FullStep, LoraStep, batches_of_step
from trainer.contract.catalog import OPTIMIZERS
from trainer.contract.errors import ConfigError
from trainer.contract.optimizer_traits import OPTIMIZERS as TRAITS
from trainer.contract.optimizer_traits import traits_of
from trainer.engine.deepspeed import DeepSpeedEngine
from trainer.engine.running_average import AverageSettings

CELLS = [
    (kind, stage)
    for kind in QUICK
    for stage in (0, *((1, 2) if traits_of(kind).elementwise else ()))
] + [("schedulefree", 3), ("lion", 3)]


@pytest.fixture
def deepspeed(world: Any) -> Any:
    """Return a maker of DeepSpeed engines and close them afterwards."""
    made = []

    def make(factory: Any, stage: int, **options: Any) -> DeepSpeedEngine:
        module = LoraStep(blocks=1)
        options = {"max_grad_norm": 0.0, "gradient_accumulation_steps": 1} | options
        engine = DeepSpeedEngine(
            module,
            module.trainable(),
            factory,
            world=world,
            zero_stage=stage,
            persistence_threshold=0,
            **options,
        )
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()


def test_the_table_says_what_the_plug_ins_are():
    assert set(TRAITS) == set(OPTIMIZERS.names)
    for kind in OPTIMIZERS.names:
        traits, plugin = traits_of(kind), OPTIMIZERS.load(kind)
        assert plugin.elementwise == traits.elementwise, kind
        assert bool(plugin.state_names) == traits.cuttable, kind
        assert plugin.keeps_low_precision == traits.bf16_only, kind
        assert traits.lowest <= traits.learning_rate <= traits.highest, kind
        assert bool(traits.why_whole) != traits.elementwise, kind


@pytest.mark.parametrize("kind", QUICK)
def test_the_loss_falls(kind):
    engine = local_engine(factory_of(kind))
    losses = train(engine, range(50), rate_of(kind))
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10]), losses


@pytest.mark.parametrize("kind", QUICK)
def test_ten_steps_and_ten_more_are_twenty(kind, tmp_path):
    options = {"max_grad_norm": 0.5, "average": AverageSettings(decay=0.9)}
    lr = rate_of(kind)
    first = local_engine(factory_of(kind), **options)
    train(first, range(10), lr)
    first.save_state(tmp_path)
    straight = train(first, range(10, 20), lr)
    fresh, used = (local_engine(factory_of(kind), **options) for _ in range(2))
    train(used, range(50, 53), lr)  # what is loaded must replace all of this
    for second in (fresh, used):
        second.load_state(tmp_path)
        assert train(second, range(10, 20), lr) == straight
        assert equal(second.full_parameters(), first.full_parameters())
        with second.inference_weights(averaged=True), first.inference_weights(averaged=True):
            assert equal(second.full_parameters(), first.full_parameters())


@pytest.mark.parametrize(("kind", "stage"), CELLS)
def test_deepspeed_is_the_local_engine_and_resumes(kind, stage, deepspeed, tmp_path):
    lr = rate_of(kind)
    local = local_engine(factory_of(kind))
    expected = train(local, range(12), lr)
    first = deepspeed(factory_of(kind), stage)
    begun = train(first, range(6), lr)
    first.save_state(tmp_path)
    straight = train(first, range(6, 12), lr)
    # 8-bit blocks of flat pieces reach over the borders of weights; stage 3 sums in another order
    close = 5e-2 if stage and not traits_of(kind).cuttable else 1e-5
    assert begun + straight == pytest.approx(expected, rel=close)
    second = deepspeed(factory_of(kind), stage)
    second.load_state(tmp_path)
    assert train(second, range(6, 12), lr) == straight
    assert equal(second.full_parameters(), first.full_parameters())


@pytest.mark.parametrize("kind", [k for k in QUICK if traits_of(k).cuttable])
def test_state_of_one_value_an_element_goes_to_another_engine(kind, deepspeed, tmp_path):
    lr, stage = rate_of(kind), 2 if traits_of(kind).elementwise else 0
    first, second = local_engine(factory_of(kind)), deepspeed(factory_of(kind), stage)
    train(first, range(6), lr)
    first.save_state(tmp_path)
    second.load_state(tmp_path)
    assert train(second, range(6, 12), lr) == pytest.approx(train(first, range(6, 12), lr), 1e-5)


@pytest.mark.parametrize("kind", [k for k in QUICK if not traits_of(k).elementwise])
def test_what_looks_at_whole_matrices_is_refused_by_zero(kind, deepspeed):
    with pytest.raises(ConfigError, match="flat shards"):
        deepspeed(factory_of(kind), 1)


@pytest.mark.parametrize("kind", [k for k in QUICK if not traits_of(k).one_rate])
def test_layers_may_have_rates_of_their_own(kind):
    """What learns a millionth as fast hardly moves, and the rest does."""
    slow = [name for name in LoraStep(blocks=1).trainable() if name.endswith("up")]
    engine = local_engine(factory_of(kind), lr_scales=dict.fromkeys(slow, 1e-6))
    before = engine.full_parameters()
    train(engine, range(5), rate_of(kind))
    moved = {n: float((v - before[n]).abs().max()) for n, v in engine.full_parameters().items()}
    fast = min(value for name, value in moved.items() if name not in slow)
    assert fast > 1e-3
    assert all(moved[name] < 1e-2 * fast for name in slow), moved


def test_prodigy_refuses_rates_of_layers():
    with pytest.raises(ConfigError, match="one step size for all layers"):
        local_engine(factory_of("prodigy"), lr_scales={"blocks.0.first.up": 2.0})


@pytest.mark.parametrize("stage", [None, 0, 2, 3])
def test_gradients_are_cut_by_value(stage, deepspeed):
    """Against a loop in plain torch, with SGD, whose steps show the gradients."""
    largest = 0.002
    factory = factory_of("custom", **{"class": "torch.optim.SGD", "arguments": {}})
    factory.elementwise = True  # type: ignore[misc]  # it is, though Menma cannot know
    options = {"max_grad_value": largest, "max_grad_norm": 0.05}
    engine = local_engine(factory, **options) if stage is None else deepspeed(
        factory, stage, **options
    )  # fmt: skip
    module = LoraStep(blocks=1)
    weights = list(module.trainable().values())
    cut = False
    for step in range(4):
        engine.forward_backward(batches_of_step(step, 0, 1, 1))
        engine.update(0.5)
        sum(module(next(iter(batches_of_step(step, 0, 1, 1)))).values()).backward()
        torch.nn.utils.clip_grad_norm_(weights, 0.05)
        cut = cut or any(bool((weight.grad.abs() > largest).any()) for weight in weights)
        with torch.no_grad():
            for weight in weights:
                weight.sub_(weight.grad.clamp(-largest, largest), alpha=0.5)
                weight.grad = None
    assert cut
    for name, weight in module.trainable().items():
        torch.testing.assert_close(engine.full_parameters()[name], weight.detach())


CHANGES: dict[str, dict[str, Any]] = {
    "adamw": {"betas": (0.5, 0.6), "eps": 1e-1, "weight_decay": 0.9},
    "adamw8bit": {"betas": (0.5, 0.6), "eps": 1e-1, "weight_decay": 0.9},
    "adamw_bf16": {
        "betas": (0.5, 0.6),
        "eps": 1e-1,
        "weight_decay": 0.9,
        "rounding": "stochastic",
    },
    "lion": {"betas": (0.5, 0.6), "weight_decay": 0.9},
    "lion8bit": {"betas": (0.5, 0.6), "weight_decay": 0.9},
    "adafactor": {
        "eps": (1e-2, 1e-3),
        "clip_threshold": 0.1,
        "decay_rate": -0.3,
        "beta1": None,
        "weight_decay": 0.9,
        "scale_parameter": True,
        "step_size": "relative",
    },
    "came": {
        "betas": (0.5, 0.6, 0.7),
        "eps": (1e-2, 1e-2),
        "clip_threshold": 0.1,
        "weight_decay": 0.9,
    },
    "prodigy": {
        "betas": (0.5, 0.6),
        "eps": 1e-1,
        "weight_decay": 0.9,
        "beta3": 0.1,
        "d0": 1e-4,
        "d_coef": 3.0,
        "growth_rate": 1.01,
        "bias_correction": True,
        "safeguard_warmup": True,
    },
    "schedulefree": {
        "betas": (0.5, 0.6),
        "eps": 1e-1,
        "weight_decay": 0.9,
        "r": 2.0,
        "weight_lr_power": 0.0,
    },
    "muon": {
        "momentum": 0.1,
        "nesterov": False,
        "ns_steps": 1,
        "lr_adjust": "original",
        "weight_decay": 0.9,
        "adamw_lr_ratio": 9.0,
        "adamw_betas": (0.5, 0.6),
        "adamw_eps": 1e-1,
    },
    "soap": {
        "betas": (0.5, 0.6),
        "shampoo_beta": 0.1,
        "eps": 1e-1,
        "weight_decay": 0.9,
        "precondition_frequency": 1,
        "max_precondition_dim": 1,
    },
    "sophia": {
        "betas": (0.5, 0.6),
        "rho": 0.9,
        "hessian_scale": 1.0,
        "update_every_steps": 1,
        "weight_decay": 0.9,
    },
    "scion": {"momentum": 0.9, "scale": 2.0, "weight_decay": 0.9},
    "automagic": {
        "beta2": 0.1,
        "eps": 1e-1,
        "lr_bump": 0.9,
        "min_lr_ratio": 0.9,
        "max_lr_ratio": 1.0,
        "clip": 0.1,
        "weight_decay": 0.9,
    },
    "custom": {"path": "torch.optim.RAdam", "arguments": {"betas": [0.1, 0.2]}},
}
ELSEWHERE = {
    ("adamw", "fused"),
    *((kind, key) for kind in ("adamw8bit", "lion8bit") for key in ("paged", "min_8bit_size")),
}
"""Options that change where and how, not what."""


class WithVector(LoraStep):
    """A toy that trains a vector, too, and whose rates are felt."""

    def __init__(self) -> None:
        super().__init__(blocks=1)
        self.offset = torch.nn.Parameter(torch.full((6, 16), 0.1)[0])

    def forward(self, batch: Any) -> dict[str, torch.Tensor]:
        return {**super().forward(batch), "offset": (self.offset - 1).square().mean()}


def after_steps(kind: str, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    lr = rate_of(kind)
    names = {"class": options.pop("path")} if "path" in options else {}
    module = FullStep(torch.bfloat16) if kind == "adamw_bf16" else WithVector()
    engine = local_engine(factory_of(kind, **options, **names), module)
    for step in range(7):  # the rate rises, as in a warm-up
        train(engine, [step], lr * (step + 1) / 7)
    with engine.inference_weights(averaged=False):
        return engine.full_parameters()


def test_every_option_is_tried():
    for kind in OPTIMIZERS.names:
        if kind == "deepspeed_cpu_adam":
            continue  # AdamW's
        known = set(OPTIMIZERS.load(kind).Config.model_fields)
        tried = set(CHANGES[kind]) | {key for name, key in ELSEWHERE if name == kind}
        assert known == tried, kind


@pytest.mark.parametrize("kind", CHANGES)
def test_every_option_changes_what_is_trained(kind):
    plain = after_steps(kind, {})
    for key, value in CHANGES[kind].items():
        assert not equal(after_steps(kind, {key: value}), plain), key


def test_fused_and_paged_are_passed_on():
    weight = torch.nn.Parameter(torch.ones(2, 3))
    for fused in (True, False):
        optimizer = factory_of("adamw", fused=fused).build([{"params": [weight]}], lr=0.0)
        assert optimizer.defaults["fused"] is fused
    for kind in ("adamw8bit", "lion8bit"):
        for paged in (True, False):
            optimizer = factory_of(kind, paged=paged).build([{"params": [weight]}], lr=0.0)
            assert optimizer.is_paged is paged  # type: ignore[attr-defined]  # bitsandbytes'


@pytest.mark.parametrize("kind", ["adamw8bit", "lion8bit"])
@pytest.mark.parametrize(("least", "dtype"), [(16, torch.uint8), (10**6, torch.float32)])
def test_small_tensors_keep_32_bit_states(kind, least, dtype):
    engine = local_engine(factory_of(kind, min_8bit_size=least))
    train(engine, range(2), 1e-3)
    assert {held["state1"].dtype for held in engine._optimizer.state.values()} == {dtype}


def test_the_options_of_deepspeeds_adamw_reach_it(monkeypatch):
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        "trainer.engine.deepspeed.cpu_adam", lambda groups, device, **given: seen.update(given)
    )
    factory_of("deepspeed_cpu_adam", betas=(0.5, 0.6), eps=0.1, weight_decay=0.3).build([], lr=0.5)
    assert seen == {"lr": 0.5, "betas": (0.5, 0.6), "eps": 0.1, "weight_decay": 0.3}


def test_every_kind_of_the_toy_is_one_of_the_catalog():
    assert set(OPTIONS) <= set(IN_FLOAT32)
    assert inspect.signature(factory_of).parameters["kind"]
