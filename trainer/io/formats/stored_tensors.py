"""Finds the real tensors in a file of any known precision, and reads them as plain floats.

Beside each quantised weight a file holds its scale, and markers that name the format. ComfyUI's
forms are read (plain fp8, `scale_weight` with a `scaled_fp8` marker, `weight_scale` with a
`comfy_quant` table); a format that cannot be turned back into floats is refused by name, because
reading it anyway gives noise without an error.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.contract.errors import ModelFileError
from trainer.io.mapped_load import WeightFiles

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_SCALES = ("scale_weight", "weight_scale")
_INPUT_SCALES = ("scale_input", "input_scale")
_TABLE = "comfy_quant"
_SCALED_MARKER = "scaled_fp8"
_FP8_FORMATS = {"float8_e4m3fn", "float8_e5m2"}
_QUANTISATION_KEY = "_quantization_metadata"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor of a model lies in its file: its name there and its scale's name."""

    name: str
    scale: str | None = None


def find_tensors(
    weights: WeightFiles, prefix: str = "", ignore: Collection[str] = ()
) -> dict[str, StoredTensor]:
    """Return the model's tensors by name without `prefix`, in file order, markers sorted out.

    Args:
        ignore: names in the file that are no weights (a tokenizer, position ids, another model).

    Raises:
        ModelFileError: the file is quantised in a way that cannot be undone, or lacks scales.
    """
    names = {
        name.removeprefix(prefix): name
        for name in weights
        if name.startswith(prefix) and name not in ignore
    }
    _check_formats(weights, names)
    scales = {
        f"{module}.weight": full
        for name, full in names.items()
        for module, _, leaf in (name.rpartition("."),)
        if leaf in _SCALES
    }
    scaled = _SCALED_MARKER in names or bool(scales)
    found = {}
    for name, full in names.items():
        if _is_side_tensor(name):
            continue
        stored = StoredTensor(full, scales.pop(name, None))
        _check_tensor(weights, stored, scaled=scaled)
        found[name] = stored
    if scales:
        raise ModelFileError(
            f"{weights.path} has scales without weights: {_some(scales.values())}",
            hint="the file is incomplete; download it again",
        )
    return found


def read_tensor(
    weights: WeightFiles, stored: StoredTensor, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Return a tensor of its own memory in `dtype` on `device`, scale applied.

    Pages of the file are given back, so that reading a model needs its size once.
    """
    raw = weights.read(stored.name).to(device, copy=True)
    weights.release(stored.name)
    if stored.scale is None:
        return raw.to(dtype)
    scale = weights.read(stored.scale).to(device, torch.float32)
    if scale.numel() > 1:
        scale = scale.reshape(-1, *([1] * (raw.dim() - 1)))
    return raw.to(torch.float32).mul_(scale).to(dtype)


def read_fp8(
    weights: WeightFiles, stored: StoredTensor, device: torch.device | str
) -> tuple[Tensor, Tensor | None]:
    """Return an fp8 weight (O, I) as it is in the file, and its float32 scale, (1, 1) or (O, 1).

    Both have memory of their own on `device`; the file's pages are given back. The scale is None
    for plain fp8.
    """
    raw = weights.read(stored.name).to(device, copy=True)
    weights.release(stored.name)
    if stored.scale is None:
        return raw, None
    scale = weights.read(stored.scale).to(device, torch.float32, copy=True)
    return raw, scale.reshape(-1, 1)


def own_dtype(weights: WeightFiles, stored: Iterable[StoredTensor]) -> torch.dtype:
    """Return the dtype most of the bytes have; bfloat16 where there is fp8, never float64."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in stored:
        sizes[weights[tensor.name].dtype] += weights[tensor.name].nbytes
    if not sizes.keys().isdisjoint(FP8_DTYPES):
        return torch.bfloat16
    dtype = sizes.most_common(1)[0][0]
    return torch.float32 if dtype is torch.float64 else dtype


def _is_side_tensor(name: str) -> bool:
    leaf = name.rpartition(".")[2]
    # model_type.<name> is Kijai's marker: an empty tensor whose name is the information.
    return (
        leaf in (*_SCALES, *_INPUT_SCALES, _TABLE)
        or name == _SCALED_MARKER
        or name.startswith("model_type.")
    )


def _check_formats(weights: WeightFiles, names: dict[str, str]) -> None:
    formats: dict[str, str] = {}
    for name, full in names.items():
        module, _, leaf = name.rpartition(".")
        if leaf == _TABLE:
            formats[module] = _format(weights, full, bytes(weights.read(full).tolist()))
    header = weights.metadata.get(_QUANTISATION_KEY)
    if header is not None:
        layers = _json(weights, _QUANTISATION_KEY, header.encode()).get("layers", {})
        for module, table in layers.items() if isinstance(layers, dict) else ():
            formats[module] = str(table.get("format") if isinstance(table, dict) else table)
    unknown = sorted({format_ for format_ in formats.values() if format_ not in _FP8_FORMATS})
    if unknown:
        raise ModelFileError(
            f"{weights.path} is quantised as {', '.join(unknown)}, which Menma cannot read",
            hint="use the fp16, bf16, fp8 or fp8_scaled file of the model",
        )
    bare = [m for m in formats if not any(f"{m}.{leaf}" in names for leaf in _SCALES)]
    bare = [module for module in bare if f"{module}.weight" in names]
    if bare:
        raise _no_scales(weights, [f"{module}.weight" for module in bare])


def _format(weights: WeightFiles, name: str, content: bytes) -> str:
    return str(_json(weights, name, content).get("format"))


def _json(weights: WeightFiles, name: str, content: bytes) -> dict[str, object]:
    try:
        table = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{weights.path}: {name} is not valid JSON ({error})") from error
    if not isinstance(table, dict):
        raise ModelFileError(f"{weights.path}: {name} is not a JSON object")
    return table


def _check_tensor(weights: WeightFiles, stored: StoredTensor, *, scaled: bool) -> None:
    info = weights[stored.name]
    if info.dtype not in (*FP8_DTYPES, *FLOAT_DTYPES):
        kind = str(info.dtype).removeprefix("torch.")
        raise ModelFileError(
            f"{weights.path}: {stored.name} is stored as {kind}, which is no weight Menma can read",
            hint="use the fp16, bf16, fp8 or fp8_scaled file of the model",
        )
    if stored.scale is None:
        if scaled and info.dtype in FP8_DTYPES:
            raise _no_scales(weights, [stored.name])
        return
    scale = weights[stored.scale]
    count = 1
    for size in scale.shape:
        count *= size
    per_row = info.shape[:1] == (count,) and scale.shape in {(count,), (count, 1)}
    if scale.dtype not in FLOAT_DTYPES or not (count == 1 or per_row):
        raise ModelFileError(
            f"{weights.path}: {stored.scale} has the shape {scale.shape} and the type "
            f"{str(scale.dtype).removeprefix('torch.')}; one float per tensor or row can be read",
            hint="use the fp16, bf16, fp8 or fp8_scaled file of the model",
        )


def _no_scales(weights: WeightFiles, names: list[str]) -> ModelFileError:
    return ModelFileError(
        f"{weights.path} says it is scaled fp8 but has no scale for {_some(names)}",
        hint="without its scales the file is noise; download it again",
    )


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
