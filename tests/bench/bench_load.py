"""Peak host memory and time of loading a transformer, against the size of its file.

    python -m tests.bench.bench_load [--variant V] [--folder DIR] [--container safetensors|pth]

One JSON line. The file has the variant's names and shapes and random bf16 weights; it is written
tensor by tensor, so that the machine needs memory for the model once and disk for the file once.
The model is loaded in a process of its own, whose peak resident memory counts everything: the
interpreter, torch, the weights and the pages of the file that are mapped at that moment.
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from trainer.contract.variants import VARIANTS
from trainer.models.wan.transformer import WanTransformer

LIMIT = 1.15

CHILD = """
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
bytes_ = sum(p.nbytes for p in model.parameters())
print(json.dumps({"before": before, "peak": peak(), "seconds": seconds, "weights": bytes_}))
"""


def write_random_model(path: Path, variant: str) -> int:
    """Write a safetensors file of the variant's shapes in bf16; return its size in bytes."""
    with torch.device("meta"):
        state = WanTransformer(VARIANTS[variant].transformer, seed=None).state_dict()
    header, position = {}, 0
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
    return path.stat().st_size


def write_torch_file(source: Path, path: Path) -> int:
    """Rewrite a safetensors file as .pth; needs memory for the whole model."""
    from safetensors.torch import load_file

    torch.save(load_file(source), path)
    source.unlink()
    return path.stat().st_size


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--variant", choices=VARIANTS, default="wan2.1-t2v-1.3b")
    parser.add_argument("--folder", type=Path, help="where the file is made; default: temporary")
    parser.add_argument("--container", choices=("safetensors", "pth"), default="safetensors")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "model.safetensors"
        size = write_random_model(path, arguments.variant)
        if arguments.container == "pth":
            size = write_torch_file(path, path.with_suffix(".pth"))
            path = path.with_suffix(".pth")
        command = [sys.executable, "-c", CHILD, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(
        json.dumps(
            {
                "metric": "load_peak_ram_vs_file_size",
                "ratio": round(found["peak"] / size, 4),
                "limit": LIMIT,
                "ratio_without_interpreter": round((found["peak"] - found["before"]) / size, 4),
                "file_gib": round(size / 2**30, 3),
                "peak_gib": round(found["peak"] / 2**30, 3),
                "seconds": round(found["seconds"], 2),
                "gib_per_s": round(size / 2**30 / found["seconds"], 3),
                "container": arguments.container,
                "variant": arguments.variant,
            }
        )
    )


if __name__ == "__main__":
    main()
