"""What a config's `[distributed]` section needs of this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from trainer.contract.config import RunConfig
from trainer.contract.errors import ConfigError, Problem
from trainer.contract.offload_rules import PATH_KEY, nvme_key, offload_key
from trainer.engine.deepspeed import async_io_obstacle
from trainer.jobs.build import engine_kind, pick_device


def distributed_problems(config: RunConfig) -> list[Problem]:
    """Return what cannot be offloaded here, and why."""
    key = offload_key(config.distributed)
    if key is None or config.distributed.engine == "local":
        return []  # told by the config's rules
    if engine_kind(config) == "local" or sys.platform == "win32":
        return [_no_deepspeed(key)]
    return [*_nvme_folder(config), *_async_io(config)]


def _no_deepspeed(key: str) -> Problem:
    if sys.platform == "win32":
        reason, hint = "there is no DeepSpeed for Windows", "train in WSL2, or leave it out"
    else:
        reason, hint = "DeepSpeed is not installed", "install it (Linux), or leave it out"
    return Problem(f"DeepSpeed does the offloading, and {reason}", key, hint=hint)


def _nvme_folder(config: RunConfig) -> Iterator[Problem]:
    path: Path | None = config.distributed.nvme_path
    if path is None or nvme_key(config.distributed) is None:
        return
    if not path.is_dir():
        fault = "is not a folder" if path.exists() else "does not exist"
        yield Problem(f"{path} {fault}", PATH_KEY, hint="name an existing folder on a local SSD")
    elif not os.access(path, os.W_OK | os.X_OK):
        yield Problem(f"{path} cannot be written to", PATH_KEY, hint="choose another folder")


def _async_io(config: RunConfig) -> Iterator[Problem]:
    key = nvme_key(config.distributed)
    if key is None:
        return
    try:
        obstacle = async_io_obstacle(pick_device(config))
    except ConfigError:
        return  # told with the key of the device, or of the engine
    if obstacle is not None:
        yield Problem(
            f"DeepSpeed's module async_io, which moves tensors to an SSD, cannot be built: "
            f"{obstacle}",
            key,
            hint=f'install what is missing (Debian, Ubuntu: libaio-dev, g++), or set {key} = "cpu"',
        )
