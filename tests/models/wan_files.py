"""Writes a tiny transformer in every layout that other programs use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor
from wan_pairs import build_pair

from trainer.contract.variants import TransformerConfig
from trainer.models.wan.transformer import WanTransformer

State = dict[str, Tensor]
Writer = Callable[[WanTransformer, Path], tuple[Path, State]]
"""Writes a model into a folder; returns what to load and the weights that loading must give."""

COMFY = "model.diffusion_model."


def state_of(model: WanTransformer) -> State:
    """Return copies of the weights."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def official_config(config: TransformerConfig) -> dict[str, Any]:
    """Return the content of an official `config.json`."""
    return {
        "_class_name": "WanModel",
        "dim": config.dim,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.in_channels,
        "model_type": "t2v",
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_dim": config.out_channels,
        "text_len": config.text_len,
    }


def is_block_linear(name: str, value: Tensor) -> bool:
    """Tell whether quantised files store this tensor as fp8."""
    return name.startswith("blocks.") and name.endswith(".weight") and value.dim() == 2


def official_folder(model: WanTransformer, folder: Path) -> tuple[Path, State]:
    """Three shards, an index, a config."""
    state = state_of(model)
    names = sorted(state)
    weight_map = {}
    for index in range(3):
        file = f"diffusion_pytorch_model-0000{index + 1}-of-00003.safetensors"
        part = {name: state[name] for name in names[index::3]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index_file = folder / "diffusion_pytorch_model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(official_config(model.config)))
    return folder, state


def torch_file(model: WanTransformer, folder: Path) -> tuple[Path, State]:
    """One .pth."""
    torch.save(state_of(model), folder / "model.pth")
    return folder / "model.pth", state_of(model)


def single(prefix: str, dtype: torch.dtype) -> Writer:
    """One safetensors file, all tensors of one dtype, every name with `prefix`."""

    def write(model: WanTransformer, folder: Path) -> tuple[Path, State]:
        state = {name: value.to(dtype) for name, value in state_of(model).items()}
        save_file({prefix + name: value for name, value in state.items()}, folder / "m.safetensors")
        return folder / "m.safetensors", {n: value.float() for n, value in state.items()}

    return write


def fp8_cast(kind: torch.dtype) -> Writer:
    """Block linears as plain fp8, the rest bf16."""

    def write(model: WanTransformer, folder: Path) -> tuple[Path, State]:
        state = {
            name: value.to(kind if is_block_linear(name, value) else torch.bfloat16)
            for name, value in state_of(model).items()
        }
        save_file(state, folder / "m.safetensors")
        return folder / "m.safetensors", {n: value.float() for n, value in state.items()}

    return write


def fp8_scaled(scale_name: str, *, per_row: bool = False, prefix: str = "") -> Writer:
    """Block linears as fp8 with scales, in ComfyUI's two generations."""

    def write(model: WanTransformer, folder: Path) -> tuple[Path, State]:
        file: State = {}
        expected: State = {}
        for name, value in state_of(model).items():
            if not is_block_linear(name, value):
                file[name], expected[name] = value.half(), value.half().float()
                continue
            largest = value.abs().amax(1) if per_row else value.abs().amax()
            scale = (largest / 448).float()
            rows = scale[:, None] if per_row else scale
            quantised = (value / rows).to(torch.float8_e4m3fn)
            module = name.removesuffix(".weight")
            file[name], file[f"{module}.{scale_name}"] = quantised, scale
            file[f"{module}.{scale_name.replace('weight', 'input')}"] = torch.tensor(1.0)
            expected[name] = (quantised.double() * rows.double()).float()
            if scale_name == "weight_scale":
                text = json.dumps({"format": "float8_e4m3fn"}).encode()
                file[f"{module}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
        if scale_name == "scale_weight":
            file["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
            file["model_type.t2v"] = torch.zeros(0)
        save_file({prefix + name: value for name, value in file.items()}, folder / "m.safetensors")
        return folder / "m.safetensors", expected

    return write


def diffusers_folder(*, pipeline: bool) -> Writer:
    """What diffusers' own `save_pretrained` writes, in shards; with `pipeline`, one level up."""

    def write(model: WanTransformer, folder: Path) -> tuple[Path, State]:
        _, theirs = build_pair(model.config)
        assert isinstance(theirs, WanTransformer3DModel)
        theirs.save_pretrained(folder / "transformer", max_shard_size="40KB")
        if not pipeline:
            return folder / "transformer", state_of(model)
        (folder / "model_index.json").write_text("{}")
        return folder, state_of(model)

    return write


LAYOUTS: dict[str, Writer] = {
    "official-folder": official_folder,
    "pth": torch_file,
    "bare-fp32": single("", torch.float32),
    "comfy-fp16": single(COMFY, torch.float16),
    "comfy-bf16": single("diffusion_model.", torch.bfloat16),
    "module-fp64": single("module.", torch.float64),
    "fp8-e4m3": fp8_cast(torch.float8_e4m3fn),
    "fp8-e5m2": fp8_cast(torch.float8_e5m2),
    "fp8-scaled": fp8_scaled("scale_weight"),
    "fp8-scaled-rows-prefixed": fp8_scaled("scale_weight", per_row=True, prefix=COMFY),
    "fp8-comfy-quant": fp8_scaled("weight_scale"),
    "fp8-comfy-quant-rows": fp8_scaled("weight_scale", per_row=True, prefix="model."),
    "diffusers-folder": diffusers_folder(pipeline=False),
    "diffusers-pipeline": diffusers_folder(pipeline=True),
}
