"""Peak host memory and time of loading a transformer into fp8, against the size of the fp8 model.

From a ready-made fp8_scaled file, or from a bf16 file that is rounded on the way. A block is taken
off the peak: loading may hold one besides the model. So is the interpreter with torch, which is
small beside a real model and large beside that of a quick measurement. Linux only.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

from trainer.bench.load import load_in_a_process, write_random_model
from trainer.bench.result import Measurement

LIMIT = 1.1


def measure(
    *,
    name: str = "load_fp8",
    variant: str = "wan2.1-t2v-1.3b",
    folder: Path | None = None,
    stored: Literal["fp8_scaled", "bf16"] = "fp8_scaled",
) -> Measurement:
    """Return (peak of a loading process - interpreter - one block) / the fp8 model's size.

    Args:
        name: of the benchmark.
        variant: whose shapes the file has.
        folder: where the file is made; None: a temporary folder.
        stored: precision of the file.

    Raises:
        RunError: the system is not Linux, or loading failed.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = Path(temporary) / "model.safetensors"
        write_random_model(path, variant, fp8=stored == "fp8_scaled")
        found = load_in_a_process(path, fp8=True)
    used, size = found["peak"] - found["before"], found["model"]
    return Measurement(
        name=name,
        what="peak RAM of loading into fp8 / fp8 model",
        value=(used - found["block"]) / size,
        unit="ratio",
        limit=LIMIT,
        figures={
            "ratio_with_block": round(used / size, 4),
            "model_gib": round(size / 2**30, 3),
            "peak_gib": round(found["peak"] / 2**30, 3),
            "seconds": round(found["seconds"], 2),
            "stored": stored,
            "variant": variant,
        },
    )
