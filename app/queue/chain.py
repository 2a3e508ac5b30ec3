"""The jobs of a config, from its clips to the merged model, each after the one before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer.contract.config import RunConfig
from trainer.contract.errors import UserError
from trainer.contract.registry import nearest

STEPS = ("cache", "train", "train-high", "train-low", "sample", "merge")
_EXPERTS = {"train-high": "high_noise", "train-low": "low_noise"}


def chain(
    file: Path, config: RunConfig, steps: Sequence[str], overrides: Sequence[str] = ()
) -> list[tuple[str, ...]]:
    """Return the command lines of the steps, in their order.

    Args:
        file: the config file.
        config: what is in it.
        steps: names out of `STEPS`; `train-high` and `train-low` train one expert of Wan 2.2 each,
            as runs `NAME-high_noise` and `NAME-low_noise`.
        overrides: `--set` strings for each command.

    Raises:
        UserError: an unknown step, one twice, or steps that do not go together.
    """
    _check(steps)
    trained = [step for step in steps if step.startswith("train")]
    return [
        argv for step in steps for argv in _commands(step, file, config, trained, list(overrides))
    ]


def _check(steps: Sequence[str]) -> None:
    for step in steps:
        if step not in STEPS:
            raise UserError(f"unknown step {step!r}", hint=nearest(step, STEPS))
    if len(set(steps)) < len(steps):
        raise UserError("a step is there twice", hint=f"the steps are {', '.join(STEPS)}")
    if "train" in steps and set(steps) & set(_EXPERTS):
        raise UserError(
            "train and train-high or train-low at once",
            hint="train the config as it is, or its experts one by one",
        )
    if "merge" in steps and not any(step.startswith("train") for step in steps):
        raise UserError(
            "merge needs something that was trained",
            hint="add train, or queue it alone",
        )


def _commands(
    step: str, file: Path, config: RunConfig, trained: Sequence[str], overrides: list[str]
) -> Iterator[tuple[str, ...]]:
    source, sets = str(file), [part for text in overrides for part in ("--set", text)]
    experts = [_EXPERTS[name] for name in trained if name in _EXPERTS]
    if step == "cache":
        yield ("cache", source, *sets)
    elif step in _EXPERTS:
        yield ("train", source, *sets, *_expert(config, _EXPERTS[step]))
    elif step == "train":
        yield ("train", source, *sets)
    elif step == "sample" and experts:
        loras = [f"{_lora(config, expert)}@{expert}" for expert in experts]
        yield ("sample", source, *sets, *(part for lora in loras for part in ("--lora", lora)))
    elif step == "sample":
        yield ("sample", str(config.run_dir) if trained else source, *sets)
    elif experts:
        for expert in experts:
            high = expert == "high_noise"
            base = config.model.transformer_high_noise if high else config.model.transformer
            merged = config.run_dir.with_name(f"{config.name}-{expert}-merged.safetensors")
            lora = str(_lora(config, expert))
            yield ("merge", "--base", str(base), "--lora", lora, "-o", str(merged))
    else:
        merged = config.run_dir.with_name(f"{config.name}-merged.safetensors")
        yield ("merge", source, *sets, "-o", str(merged))


def _expert(config: RunConfig, expert: str) -> tuple[str, ...]:
    return ("--set", f"model.expert={expert}", "--set", f'name="{config.name}-{expert}"')


def _lora(config: RunConfig, expert: str) -> Path:
    name = f"{config.name}-{expert}"
    return config.run_dir.with_name(name) / "output" / f"{name}.safetensors"
