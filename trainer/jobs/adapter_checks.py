"""What is wrong with what a config trains, told by the headers of its files."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.contract.config import RunConfig
from trainer.contract.errors import ConfigError, MenmaError, Problem
from trainer.contract.memory_model.trained import find_targets
from trainer.contract.variants import TransformerConfig
from trainer.io.mapped_load import open_weights
from trainer.jobs.build import trained_transformer_file
from trainer.jobs.companions import companion_problems
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
    shape = _trained_shape(config)
    if shape is None:
        return
    start = config.adapter.options("kind").get("init_from")
    if start is None or start.exists():
        try:
            find_targets(config, shape)
        except ConfigError as error:
            yield from error.problems
        except MenmaError as error:
            yield Problem(error.message, "adapter.init_from", hint=error.hint)
    yield from companion_problems(config, shape, config.model.expert)


def _trained_shape(config: RunConfig) -> TransformerConfig | None:
    try:
        path, _ = trained_transformer_file(config)
        return recognise(open_weights(path), "auto", dict(config.model.shape)).config
    except MenmaError:
        return None
