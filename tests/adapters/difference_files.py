"""LoRA files as few-step distillations of Wan are published: whole differences beside factors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from trainer.models.wan.transformer import WanTransformer

from .tiny_models import make_factors

NORMS = ("norm_q", "norm_k", "norm3")


def key_of(parameter: str) -> str:
    """Return ComfyUI's key of a whole difference, by hand."""
    for ending, role in ((".weight", ".diff"), (".bias", ".diff_b")):
        if parameter.endswith(ending):
            return f"diffusion_model.{parameter.removesuffix(ending)}{role}"
    return f"diffusion_model.{parameter}.diff"


def draw(model: WanTransformer, names: Iterable[str], *, seed: int = 3) -> dict[str, Tensor]:
    """Return a difference for each of these parameters."""
    generator = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    return {name: torch.randn(state[name].shape, generator=generator) * 0.1 for name in names}


def distilled(model: WanTransformer, *, rank: int = 4, seed: int = 3) -> dict[str, Tensor]:
    """Return the tensors of such a file: factors of the blocks, differences of all small things.

    The head's weight and the patch embedding are whole, the linear layers of the blocks low-rank.
    """
    tensors: dict[str, Tensor] = {}
    for module, pair in make_factors(model, rank=rank, alpha=float(rank), seed=seed).items():
        tensors[f"diffusion_model.{module}.lora_down.weight"] = pair.down_RI
        tensors[f"diffusion_model.{module}.lora_up.weight"] = pair.up_OR
    matrices = {f"{module}.weight" for module in make_factors(model)}
    outer = ("text_embedding", "time_embedding", "time_projection", "img_emb")
    small = [
        name
        for name in model.state_dict()
        if name not in matrices and not (name.startswith(outer) and name.endswith(".weight"))
    ]
    drawn = draw(model, small, seed=seed)
    return tensors | {key_of(name): tensor for name, tensor in drawn.items()}


def write(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a file of these tensors."""
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=metadata)
    return path


def by_formula(
    model: WanTransformer, tensors: Mapping[str, Tensor], strength: float = 1.0
) -> dict[str, Tensor]:
    """W + strength · diff, and + strength · up @ down, in float64: independent of the code."""
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        state[name] = value.double()
        if (difference := tensors.get(key_of(name))) is not None:
            state[name] = state[name] + strength * difference.double()
        stem = f"diffusion_model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_up.weight" in tensors and name.endswith(".weight"):
            up, down = (tensors[f"{stem}.lora_{part}.weight"].double() for part in ("up", "down"))
            state[name] = state[name] + strength * up @ down
    return state


def exact_model(model: WanTransformer, state: Mapping[str, Tensor]) -> WanTransformer:
    """Return a model of the same shape with these weights."""
    made = WanTransformer(model.config, seed=None)
    made.load_state_dict({name: value.float() for name, value in state.items()})
    return made
