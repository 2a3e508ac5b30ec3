"""What jobs on a config do first: read it, and check the files that they need."""

from __future__ import annotations

import sys
from pathlib import Path

from trainer.contract.config import RunConfig
from trainer.contract.config_io import load_config_with_sources, place_problems
from trainer.contract.config_rules import JobName, check_files
from trainer.contract.errors import ConfigError
from trainer.contract.hub import HubFile, download, with_local_files
from trainer.contract.jobs import ConfigRequest
from trainer.jobs.config_checks import variant_problem, weight_problems
from trainer.jobs.distributed_checks import distributed_problems
from trainer.jobs.memory_checks import memory_problems
from trainer.jobs.optimizer_checks import optimizer_problems
from trainer.jobs.start import machine_problems


def read_config(request: ConfigRequest, job: JobName) -> RunConfig:
    """Return the config of a request, complete for `job`.

    Raises:
        ConfigError: everything that is wrong with it, or missing for this job, at once.
    """
    loaded = load_config_with_sources(request.config, request.set, jobs=[job])
    loaded.config = with_local_files(loaded.config, _download)
    problems = [*check_files(loaded.config, job), *weight_problems(loaded.config)]
    if not problems and (problem := variant_problem(loaded.config)) is not None:
        problems.append(problem)
    if job != "cache":
        problems += memory_problems(loaded.config, trains=job == "train")
    if job == "train":
        problems += machine_problems(loaded.config)
        problems += distributed_problems(loaded.config)
        problems += optimizer_problems(loaded.config)
    if problems:
        raise ConfigError(problems=place_problems(problems, loaded.sources))
    return loaded.config


def _download(file: HubFile) -> Path:
    sys.stderr.write(f"downloading {file}\n")
    return download(file)
