"""A config that has everything a job needs; found out before torch is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.contract.config import RunConfig
from trainer.contract.config_io import load_config_with_sources, place_problems
from trainer.contract.config_rules import JobName, check_files
from trainer.contract.errors import ConfigError


def complete_config(path: Path, overrides: Sequence[str], job: JobName) -> RunConfig:
    """Return the config at `path` if it is right and its files are there for `job`.

    Raises:
        ConfigError: everything that is wrong or missing, at once, with file, line and key.
    """
    loaded = load_config_with_sources(path, overrides, jobs=[job])
    if problems := check_files(loaded.config, job):
        raise ConfigError(problems=place_problems(problems, loaded.sources))
    return loaded.config
