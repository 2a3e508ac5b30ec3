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
from trainer.models.wan.transformer import WanTransformer

LIMIT = 1.15
Container = Literal["safetensors", "pth"]

_CHILD = """
import json, re, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from trainer.models.wan.loading import load_transformer
def peak():
    # Not ru_maxrss: that one also remembers the process that started this one.
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
start = time.perf_counter()
model = load_transformer(sys.argv[1], dtype=torch.bfloat16)
seconds = time.perf_counter() - start
print(json.dumps({"before": before, "peak": peak(), "seconds": seconds}))
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
    if not Path("/proc/self/status").is_file():
        raise RunError("the peak of a process can be read on Linux only")
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = Path(temporary) / "model.safetensors"
        write_random_model(path, variant)
        if container == "pth":
            path = _as_torch_file(path)
        size = path.stat().st_size
        found = _load(path)
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


def write_random_model(path: Path, variant: str) -> None:
    """Write a safetensors file of the variant's shapes in bf16."""
    with torch.device("meta"):
        state = WanTransformer(get_variant(variant).transformer, seed=None).state_dict()
    header: dict[str, Any] = {}
    position = 0
    for name, value in state.items():
        end = position + 2 * value.numel()
        header[name] = {
            "dtype": "BF16",
            "shape": list(value.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for value in state.values():
            noise = torch.randn(value.shape, generator=random).mul_(0.02).bfloat16()
            file.write(noise.reshape(-1).view(torch.uint8).numpy().data)


def _as_torch_file(source: Path) -> Path:
    """Rewrite a safetensors file as .pth; needs memory for the whole model."""
    from safetensors.torch import load_file

    path = source.with_suffix(".pth")
    torch.save(load_file(source), path)
    source.unlink()
    return path


def _load(path: Path) -> dict[str, float]:
    command = [sys.executable, "-c", _CHILD, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"loading failed: {done.stderr.strip()[-500:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found
