"""From a config to the engine's keywords for DeepSpeed."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch

from trainer.contract.config import RunConfig
from trainer.contract.offload_rules import nvme_key
from trainer.engine.offload import Offload


def deepspeed_settings(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """Return what `DeepSpeedEngine` and `build_deepspeed_config` take of a config.

    Args:
        config: the run's config.
        device: that the run trains on.
    """
    return {
        "max_grad_norm": config.optimizer.max_grad_norm,
        "gradient_accumulation_steps": config.training.gradient_accumulation_steps,
        "zero_stage": config.distributed.zero_stage,
        "full_finetune_bf16": config.adapter.kind == "none"
        and config.memory.weight_format == "bf16",
        "offload": _offload(config, device),
    }


def _offload(config: RunConfig, device: torch.device) -> Offload:
    distributed = config.distributed
    return Offload(
        optimizer=distributed.offload_optimizer,
        parameters=distributed.offload_parameters,
        nvme_path=_swap_folder(config) if nvme_key(distributed) is not None else None,
        pin_memory=device.type == "cuda",
    )


def _swap_folder(config: RunConfig) -> Path | None:
    """Return a folder of the run's own, so that two runs may share `nvme_path`."""
    if config.distributed.nvme_path is None:
        return None
    mark = zlib.crc32(str(config.run_dir.absolute()).encode())
    return config.distributed.nvme_path.absolute() / f"{config.name}-{mark:08x}"
