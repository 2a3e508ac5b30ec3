"""What is wrong with what a config trains, told by the headers of its files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from trainer.contract.adapter_start import start_layers, start_problems
from trainer.contract.config import RunConfig
from trainer.contract.errors import ConfigError, MenmaError, Problem
from trainer.contract.experts import trained_experts
from trainer.contract.memory_model.trained import Targets, adapter_options, find_targets
from trainer.contract.optimizer_traits import traits_of
from trainer.contract.safetensors_header import metadata_of, read_header
from trainer.contract.variants import Expert, TransformerConfig
from trainer.io.mapped_load import open_weights
from trainer.jobs.build import trained_transformer_files
from trainer.jobs.companions import companion_problems, other_expert
from trainer.models.wan.detect import recognise


def require_sound_adapter(config: RunConfig) -> None:
    """Refuse what `adapter_problems` tells, before anything large is read.

    Raises:
        ConfigError: with every problem.
    """
    problems = list(adapter_problems(config))
    if problems:
        raise ConfigError(problems=problems)


def adapter_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield patterns that match nothing, and files that do not fit what is trained.

    Files that do not exist, and those that are no models, are told elsewhere.
    """
    shapes = _trained_shapes(config)
    if not shapes:
        return
    shape = next(iter(shapes.values()))
    start = config.adapter.options("kind").get("init_from")
    if start is None or start.exists():
        try:
            targets = find_targets(config, shape)
            yield from _rate_problems(config, targets)
        except ConfigError as error:
            yield from error.problems
        except MenmaError as error:
            yield Problem(error.message, "adapter.init_from", hint=error.hint)
    if start is not None and start.exists():
        yield from _start_problems(config, start, shapes)
    told = [
        problem
        for expert, own in shapes.items()
        for problem in companion_problems(config, own, expert)
    ]
    yield from dict.fromkeys(told)


def _rate_problems(config: RunConfig, targets: Targets) -> Iterator[Problem]:
    """Yield that layers have rates of their own, and the optimizer cannot give them any."""
    kind = config.optimizer.kind
    if traits_of(kind).one_rate and len({part.lr_factor for part in targets.parts}) > 1:
        yield Problem(
            f"{kind} has one step size for all layers, and the patterns of [adapter] give some a "
            "learning rate of their own",
            "optimizer.kind",
            hint="leave out learning rates of layers, or use adamw",
        )


def _start_problems(
    config: RunConfig, start: Path, experts: Iterable[Expert | None]
) -> Iterator[Problem]:
    """Yield why what a file says of itself forbids that training starts from it."""
    kind, metadata = config.adapter.kind, metadata_of(read_header(start))
    try:
        layers = start_layers(start, kind)
    except MenmaError:  # told already
        return
    yield from start_problems(kind, adapter_options(config), metadata, layers)
    for expert in experts:
        trained = other_expert(metadata, expert)
        if trained is not None:
            yield Problem(
                f"{start} was trained for the {trained} expert, and the {expert} expert would "
                "start from it",
                "adapter.init_from",
                hint=f'name a file of the {expert} expert, or set model.expert = "{trained}"; '
                "where each has a file to start from, train one after the other",
            )


def _trained_shapes(config: RunConfig) -> dict[Expert | None, TransformerConfig]:
    """Return the shape of each transformer that is trained, by its expert."""
    try:
        files = trained_transformer_files(config)
        shapes = [
            recognise(open_weights(path), "auto", dict(config.model.shape)).config for path in files
        ]
    except MenmaError:
        return {}
    return dict(zip(trained_experts(config) or (None,), shapes, strict=True))
