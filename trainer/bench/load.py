"""Peak host memory and time of loading a transformer, against the size of its file.

The file has the variant's names and shapes and random bf16 weights; it is written tensor by tensor,
so that the machine needs memory for the model once and disk for the file once. The model is loaded
in a process of its own, whose peak resident memory counts everything: the interpreter, torch, the
weights and the pages of the file that are mapped at that moment. Linux only.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch

from trainer.bench.result import Measurement
from trainer.contract.errors import RunError
from trainer.contract.variants import get_variant
from trainer.models.wan.quantised import is_block_linear
from trainer.models.wan.transformer import WanTransformer

LIMIT = 1.15
Container = Literal["safetensors", "pth"]
_NAMES = {torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32"}

_CHILD = """
import json, re, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from trainer.models.wan.loading import load_transformer
from trainer.quant.fp8 import Fp8Spec
def peak():
    # Not ru_maxrss: that one also remembers the process that started this one.
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
fp8 = Fp8Spec(scaled=True) if sys.argv[2] == "fp8" else None
before = peak()
start = time.perf_counter()
model = load_transformer(sys.argv[1], dtype=torch.bfloat16, fp8=fp8)
seconds = time.perf_counter() - start
size = sum(value.nbytes for value in model.parameters())
block = sum(value.nbytes for value in model.blocks[0].parameters())
print(json.dumps({"before": before, "peak": peak(), "seconds": seconds,
                  "model": size, "block": block}))
"""


def measure(
    *,
    variant: str = "wan2.1-t2v-1.3b",
    folder: Path | None = None,
    container: Container = "safetensors",
) -> Measurement:
    """Return the peak resident memory of a loading process / the size of the file.

    Args:
        variant: whose shapes the file has.
        folder: where the file is made; None: a temporary folder.
        container: of the file.

    Raises:
        RunError: the system is not Linux, or loading failed.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = Path(temporary) / "model.safetensors"
        write_random_model(path, variant)
        if container == "pth":
            path = _as_torch_file(path)
        size = path.stat().st_size
        found = load_in_a_process(path)
    return Measurement(
        name="load",
        what="peak RAM of loading a model / file size",
        value=found["peak"] / size,
        unit="ratio",
        limit=LIMIT,
        figures={
            "ratio_without_interpreter": round((found["peak"] - found["before"]) / size, 4),
            "file_gib": round(size / 2**30, 3),
            "peak_gib": round(found["peak"] / 2**30, 3),
            "seconds": round(found["seconds"], 2),
            "gib_per_s": round(size / 2**30 / found["seconds"], 3),
            "container": container,
            "variant": variant,
        },
    )


def write_random_model(path: Path, variant: str, *, fp8: bool = False) -> None:
    """Write a safetensors file of the variant's shapes in bf16.

    With `fp8` the linear layers of the blocks are e4m3 with a scale a row, as in ComfyUI's
    fp8_scaled files.
    """
    with torch.device("meta"):
        state = WanTransformer(get_variant(variant).transformer, seed=None).state_dict()
    tensors: dict[str, tuple[torch.Size, torch.dtype]] = {}
    for name, value in state.items():
        coarse = fp8 and is_block_linear(name, value.shape)
        tensors[name] = value.shape, torch.float8_e4m3fn if coarse else torch.bfloat16
        if coarse:
            scale = f"{name.removesuffix('weight')}scale_weight"
            tensors[scale] = value.shape[:1], torch.float32
    if fp8:
        tensors["scaled_fp8"] = torch.Size([2]), torch.float8_e4m3fn
    header: dict[str, Any] = {}
    position = 0
    for name, (shape, dtype) in tensors.items():
        end = position + shape.numel() * dtype.itemsize
        offsets = [position, end]
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape, dtype in tensors.values():
            noise = torch.randn(shape, generator=random).mul_(0.02).to(dtype)
            file.write(noise.reshape(-1).view(torch.uint8).numpy().data)


def _as_torch_file(source: Path) -> Path:
    """Rewrite a safetensors file as .pth; needs memory for the whole model."""
    from safetensors.torch import load_file

    path = source.with_suffix(".pth")
    torch.save(load_file(source), path)
    source.unlink()
    return path


def load_in_a_process(path: Path, *, fp8: bool = False) -> dict[str, float]:
    """Load a transformer in a process of its own, blocks in scaled fp8 where asked for.

    Returns:
        Bytes: `before` and `peak`, the peak resident memory before and after; `model` and `block`,
        what the loaded model and one of its blocks take. `seconds` that loading took.

    Raises:
        RunError: the system is not Linux, or loading failed.
    """
    if not Path("/proc/self/status").is_file():
        raise RunError("the peak of a process can be read on Linux only")
    command = [sys.executable, "-c", _CHILD, str(path), "fp8" if fp8 else "bf16"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"loading failed: {done.stderr.strip()[-500:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found
