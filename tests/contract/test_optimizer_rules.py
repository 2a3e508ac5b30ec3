"""What `[optimizer]`, `[lr_schedule]` and `[ema]` refuse, warn of, and take by default."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.contract.config import RunConfig
from trainer.contract.config_rules import check_rules
from trainer.contract.optimizer_rules import optimizer_notes
from trainer.contract.optimizer_traits import OPTIMIZERS
from trainer.jobs.optimizer_checks import optimizer_problems

FULL = {"adapter": {"kind": "none"}}
LOCAL = {"distributed": {"engine": "local"}}
NVME = {"zero_stage": 3, "offload_optimizer": "nvme", "nvme_path": "ssd"}
WHOLE = [kind for kind, traits in OPTIMIZERS.items() if not traits.elementwise]


def config_of(kind: str = "adamw", **sections: Any) -> RunConfig:
    optimizer = {"kind": kind, **sections.pop("optimizer", {})}
    if kind == "custom":
        optimizer |= {"class": "torch.optim.SGD"}
    return RunConfig.model_validate({"optimizer": optimizer, **sections})


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("kind", [kind for kind in WHOLE if kind != "adamw_bf16"])
def test_what_looks_at_whole_matrices_is_refused_at_zero(kind: str, stage: int) -> None:
    (problem,) = check_rules(config_of(kind, distributed={"zero_stage": stage}))
    assert problem.key == "optimizer.kind"
    assert f"ZeRO-{stage}" in problem.message
    assert "zero_stage = 0" in problem.hint
    assert check_rules(config_of(kind)) == []


@pytest.mark.parametrize(
    ("config", "key", "words"),
    [
        (config_of("adamw8bit", distributed={"zero_stage": 3}), "optimizer.kind", "8-bit states"),
        (config_of("lion8bit", distributed={"zero_stage": 3}), "optimizer.kind", "8-bit states"),
        (
            config_of("lion8bit", distributed={"zero_stage": 2, "offload_optimizer": "cpu"}),
            "optimizer.kind",
            "made for the GPU",
        ),
        (config_of("lion", distributed=NVME), "optimizer.kind", "to an SSD"),
        (config_of("deepspeed_cpu_adam"), "optimizer.kind", "nothing is offloaded"),
        (config_of("adamw_bf16", **LOCAL), "optimizer.kind", "an adapter is not in bf16"),
        (
            config_of("adamw_bf16", **FULL, **LOCAL, memory={"weight_format": "fp32"}),
            "optimizer.kind",
            "these weights are not in bf16",
        ),
        (config_of("adamw_bf16", **FULL), "optimizer.kind", "float32 copies"),
        (
            config_of(
                "adamw_bf16", **FULL, **LOCAL, training={"gradient_accumulation_steps": 2}
            ),
            "training.gradient_accumulation_steps",
            "added up in bf16",
        ),
        (config_of("muon", **FULL), "optimizer.kind", "master copies"),
        (
            config_of("prodigy", adapter={"kind": "lora", "loraplus_lr_ratio": 4.0}),
            "adapter.loraplus_lr_ratio",
            "one step size",
        ),
        (
            config_of("schedulefree", adapter={"kind": "lora", "scale_weight_norms": 1.0}),
            "adapter.scale_weight_norms",
            "one copy only",
        ),
        (
            config_of("schedulefree", adapter={"kind": "relora", "optimizer_reset_ratio": 0.0}),
            "optimizer.kind",
            "averages them",
        ),
        (config_of("automagic", adapter={"kind": "relora"}), "optimizer.kind", "taken apart"),
        (
            config_of(lr_schedule={"warmup_steps": 3, "warmup_ratio": 0.1}),
            "lr_schedule.warmup_ratio",
            "at once",
        ),
        (config_of(ema={"every_steps": 4}), "ema.every_steps", "only where weights are averaged"),
        (config_of("schedulefree", ema={"decay": 0.9}), "ema.decay", "averages the weights itself"),
        (config_of(ema={"decay": 0.9}, adapter={"kind": "relora"}), "ema.decay", "ReLoRA"),
        (config_of(ema={"decay": 0.9}, distributed=NVME), "ema.decay", "SSD"),
    ],
)  # fmt: skip
def test_what_excludes_one_another_is_told(config: RunConfig, key: str, words: str) -> None:
    problems = check_rules(config)
    assert [problem.key for problem in problems if words in problem.message] == [key], problems
    assert all(problem.hint for problem in problems)


@pytest.mark.parametrize(
    "config",
    [
        config_of("adamw_bf16", **FULL, **LOCAL),
        config_of("muon", **FULL, **LOCAL),
        config_of("lion", distributed={"zero_stage": 3}),
        config_of("schedulefree", distributed={"zero_stage": 2, "offload_optimizer": "cpu"}),
        config_of("deepspeed_cpu_adam", distributed={"zero_stage": 2, "offload_optimizer": "cpu"}),
        config_of("lion", adapter={"kind": "relora"}),
        config_of("prodigy", adapter={"kind": "relora", "optimizer_reset_ratio": 0.0}),
        config_of(ema={"decay": 0.99}, distributed={"zero_stage": 3}),
    ],
)
def test_what_goes_together_is_not_refused(config: RunConfig) -> None:
    assert check_rules(config) == []


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_rate_that_is_not_given_is_the_optimizers_own(kind: str) -> None:
    assert config_of(kind).optimizer.learning_rate == OPTIMIZERS[kind].learning_rate
    assert config_of(kind, optimizer={"learning_rate": 0.5}).optimizer.learning_rate == 0.5
    assert list(optimizer_notes(config_of(kind))) == []


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (config_of("prodigy", optimizer={"learning_rate": 1e-4}), "0.0001 is small for prodigy"),
        (config_of("adamw", optimizer={"learning_rate": 1.0}), "1 is large for adamw"),
        (config_of("muon", optimizer={"lr_adjust": "original"}), "usually takes 0.02"),
        (config_of("lion", high_noise={"learning_rate": 0.1}), "high_noise.learning_rate = 0.1"),
        (config_of("schedulefree", lr_schedule={"kind": "cosine"}), "in place of a schedule"),
    ],
)
def test_what_is_likely_not_meant_is_said(config: RunConfig, words: str) -> None:
    (note,) = optimizer_notes(config)
    assert words in note


def test_muon_with_its_own_scale_takes_its_own_rate() -> None:
    optimizer = {"lr_adjust": "original", "learning_rate": 0.02}
    assert list(optimizer_notes(config_of("muon", optimizer=optimizer))) == []


def test_a_missing_package_is_told_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (problem,) = optimizer_problems(config_of("came"))
    assert problem.key == "optimizer.kind"
    assert "pip install 'menma[optimizers]'" in problem.hint


def test_a_missing_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    (problem,) = optimizer_problems(config_of("deepspeed_cpu_adam"))
    assert "no-such-compiler" in problem.message


@pytest.mark.parametrize(
    ("optimizer", "key", "words"),
    [
        ({"class": "torch.optim.NAdamm"}, "optimizer.class", "has no NAdamm"),
        (
            {"class": "torch.optim.NAdam", "arguments": {"beta": 1}},
            "optimizer.arguments.beta",
            "takes no argument",
        ),
        (
            {"class": "torch.optim.NAdam", "arguments": {"lr": 1}},
            "optimizer.arguments.lr",
            "is set by Menma",
        ),
        (
            {"class": "torch.optim.NAdam", "arguments": {"betas": [2.0, 2.0]}},
            "optimizer.arguments",
            "refuses its arguments",
        ),
        ({"class": "torch.nn.Linear"}, "optimizer.class", "something else"),
    ],
)
def test_a_class_that_does_not_do_is_told_before_the_start(
    optimizer: dict[str, Any], key: str, words: str
) -> None:
    config = RunConfig.model_validate({"optimizer": {"kind": "custom", **optimizer}})
    (problem,) = optimizer_problems(config)
    assert problem.key == key
    assert words in problem.message


def test_a_class_that_does_is_not_told() -> None:
    assert list(optimizer_problems(config_of("custom"))) == []
