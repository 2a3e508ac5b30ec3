"""What a run stood on: versions, devices, source, dataset. Written to `environment.json`."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from trainer.contract.config import RunConfig
from trainer.contract.config_io import dump_config
from trainer.data.fingerprint import digest
from trainer.jobs.build import base_identity

_PACKAGES = (
    "menma",
    "torch",
    "deepspeed",
    "safetensors",
    "transformers",
    "bitsandbytes",
    "pytorch-optimizer",
    "av",
    "pydantic",
)


def menma_version() -> str:
    """Return the installed version, "" when Menma runs without being installed."""
    return _version("menma") or ""


def describe_environment(
    *, world_size: int, dataset_fingerprint: str, memory: Mapping[str, bool | int]
) -> dict[str, Any]:
    """Return versions, GPUs, memory, git commit and the dataset's fingerprint.

    `memory` has what the run uses of the keys of `[memory]` that its config may have as `auto`.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "cuda": torch.version.cuda,
        "gpus": [
            {
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 2),
                "capability": f"{properties.major}.{properties.minor}",
            }
            for properties in map(
                torch.cuda.get_device_properties, range(torch.cuda.device_count())
            )
        ],
        "host_memory_gib": round(psutil.virtual_memory().total / 2**30, 2),
        "cpu_cores": psutil.cpu_count(logical=False),
        "world_size": world_size,
        "memory": dict(memory),
        "git": _git_commit(),
        "dataset": dataset_fingerprint,
    }


def ground(config: RunConfig) -> dict[str, str]:
    """Return what all processes of a run must have alike: versions, settings, weights.

    Raises:
        ModelFileError: the weights cannot be read.
    """
    versions = {name: _version(name) or "" for name in ("menma", "torch", "deepspeed")}
    return {
        **versions,
        "the config": digest(dump_config(config, base=Path.cwd())),
        "the weights": base_identity(config),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    return found.stdout.strip() or None
