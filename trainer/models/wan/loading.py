"""Wan transformers from and to files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.contract.errors import ConfigError, ModelFileError
from trainer.io.atomic_save import save_safetensors
from trainer.io.formats.stored_tensors import FLOAT_DTYPES, StoredTensor, own_dtype, read_tensor
from trainer.io.mapped_load import WeightFiles, open_weights
from trainer.models.wan.detect import TransformerFile, recognise, transformer_metadata
from trainer.models.wan.quantised import plan_quantisation, put_fp8_layer
from trainer.models.wan.transformer import FLOAT32_MODULES, WanTransformer
from trainer.quant.fp8 import Fp8Spec

__all__ = ["load_transformer", "save_transformer", "transformer_metadata"]


def load_transformer(
    path: Path | str,
    variant: str = "auto",
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    config: Mapping[str, Any] | None = None,
    fp8: Fp8Spec | None = None,
    held_elsewhere: Callable[[int], Collection[int]] | None = None,
) -> WanTransformer:
    """Read a Wan transformer from any known layout, straight to `dtype` and `device`.

    Tensor by tensor: the host never holds a second copy. fp8 weights are turned into `dtype`,
    unless `fp8` asks to keep the blocks' layers in fp8; then `model.quantisation` tells more.

    Args:
        path: a safetensors or .pth file, a folder of shards, or a diffusers folder.
        variant: name of a variant to insist on, or "auto" (see `detect.recognise` for the rule).
        dtype: of the weights; None: as in the file, bfloat16 for fp8. The time embedding is
            float32 always (`FLOAT32_MODULES`).
        device: where the model shall be.
        config: fields of `TransformerConfig` that the file does not tell, for models that are not
            of a released size and not written by Menma, e.g. {"num_heads": 4}.
        fp8: hold the linear layers of the blocks in fp8: those of an fp8 file as they are, those
            of other files rounded one by one. Such layers are frozen.
        held_elsewhere: given the number of blocks, says which of them another process of this
            machine reads: their tensors are not read here and are left on the meta device.

    Raises:
        ModelFileError: missing, damaged, unsafe, not a Wan transformer, or not `variant`.
        ConfigError: an unknown variant, dtype or field, or a file in another fp8 format than `fp8`.
    """
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise ConfigError(f"a transformer cannot be computed in {dtype}")
    weights = open_weights(_weights_folder(Path(path)))
    file = recognise(weights, variant, config)
    with torch.device("meta"):
        model = WanTransformer(file.config, seed=None)
    model.variant_name = file.variant_name
    model.stored = partial(_read_own, weights, file.tensors)
    _check_tensors(weights, file, model)
    chosen = dtype or own_dtype(weights, file.tensors.values())
    if fp8 is not None:
        model.quantisation = plan_quantisation(weights, file.tensors, fp8)
    elsewhere = () if held_elsewhere is None else held_elsewhere(len(model.blocks))
    absent = tuple(f"blocks.{index}." for index in elsewhere)
    for name, stored in file.tensors.items():
        place = "meta" if name.startswith(absent) else device
        if model.quantisation is not None and put_fp8_layer(
            model, name, weights, stored, place, model.quantisation
        ):
            continue
        target = torch.float32 if name.startswith(FLOAT32_MODULES) else chosen
        _assign(model, name, read_tensor(weights, stored, target, place))
    return model


def save_transformer(
    model: WanTransformer,
    path: Path | str,
    *,
    state: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a transformer as one safetensors file of official names.

    ComfyUI and diffusers read it; `load_transformer` knows shape and variant from its metadata.

    Args:
        model: gives shape, variant and, unless `state` does, the weights.
        path: the file; replaced in one step.
        state: full tensors by official name, where the model itself does not hold them whole.
        dtype: of the file; None: as they are.
        metadata: further strings for the file's header.

    Raises:
        ModelFileError: `dtype` is given and a value does not fit it; nothing was written.
        DiskError: it could not be written; a file that was there before is intact.
        ValueError: `state` is not a state of this model.
    """
    tensors = dict(model.state_dict() if state is None else state)
    with torch.device("meta"):
        expected = WanTransformer(model.config, seed=None).state_dict()
    wrong = tensors.keys() ^ expected.keys()
    wrong |= {
        name for name in tensors.keys() - wrong if tensors[name].shape != expected[name].shape
    }
    if wrong:
        raise ValueError(f"not a state of this model: {sorted(wrong)[:5]}")
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        _check_finite(tensors, path)
    header = transformer_metadata(model.config, model.variant_name)
    save_safetensors(tensors, path, {**(metadata or {}), **header})


def _read_own(weights: WeightFiles, tensors: Mapping[str, StoredTensor], name: str) -> Tensor:
    """Return a tensor in the file's own dtype, fp8 as bfloat16, on the CPU."""
    stored = tensors[name]
    return read_tensor(weights, stored, own_dtype(weights, [stored]), "cpu")


def _check_finite(tensors: Mapping[str, Tensor], path: Path | str) -> None:
    spoilt = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if spoilt:
        raise ModelFileError(
            f"{path} was not written: {len(spoilt)} tensors have values that "
            f"{tensors[spoilt[0]].dtype} cannot hold, or NaN, e.g. {spoilt[0]}",
            hint="write bf16 or fp32; if that fails too, the training had diverged",
        )


def _weights_folder(path: Path) -> Path:
    """The folder itself, or the only transformer of a diffusers pipeline."""
    if not (path / "model_index.json").is_file():
        return path
    if (path / "transformer_2").is_dir():
        raise ModelFileError(
            f"{path} holds two transformers",
            hint="give one of its folders: transformer (high noise) or transformer_2 (low noise)",
        )
    return path / "transformer"


def _check_tensors(weights: WeightFiles, file: TransformerFile, model: WanTransformer) -> None:
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: weights[stored.name].shape for name, stored in file.tensors.items()}
    problems = []
    for kind, names in (
        ("lacks", expected.keys() - found.keys()),
        ("has unknown", found.keys() - expected.keys()),
    ):
        if names:
            problems.append(f"{kind} {len(names)} tensors: {_some(names)}")
    wrong = [n for n in expected.keys() & found.keys() if expected[n] != found[n]]
    if wrong:
        shapes = ", ".join(f"{n} {found[n]}, not {expected[n]}" for n in sorted(wrong)[:3])
        problems.append(f"has {len(wrong)} tensors of another shape: {shapes}")
    if problems:
        raise ModelFileError(
            f"{weights.path} does not fit {file.variant_name}: {'; '.join(problems)}",
            hint="the file is incomplete or of a model that Menma does not know",
        )


def _some(names: set[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    module_name, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module_name), leaf, nn.Parameter(value))
