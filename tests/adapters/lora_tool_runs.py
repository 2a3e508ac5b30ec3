"""What the tests of the LoRA tools share: files to work on, a job in this process, its effect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from trainer.adapters import load_adapter
from trainer.adapters.apply import attach
from trainer.adapters.base import AdapterFile
from trainer.adapters.formats.writer import save_adapter
from trainer.contract.events import encode
from trainer.contract.jobs import JOBS, REQUESTS
from trainer.jobs.base import main

from .tiny_models import make_factors, make_transformer, model_inputs, run

_INNER = [f"{attention}.{n}" for attention in ("self_attn", "cross_attn") for n in "qkvo"]
HALVES = {
    "attention": [f"blocks.{block}.{inner}" for block in range(3) for inner in _INNER],
    "ffn": [f"blocks.{block}.ffn.{number}" for block in range(3) for number in (0, 2)],
}


def tool(job: str, **request: Any) -> list[dict[str, Any]]:
    """Run a job in this process; return its `output` events, and its notes under `said`."""
    events: list[tuple[str, dict[str, Any]]] = []

    def emit(kind: str, /, **fields: Any) -> None:
        encode(kind, **fields)
        events.append((kind, fields))

    model = REQUESTS[job].model_validate(json.loads(json.dumps(request, default=str)))
    JOBS.load(job)(model, emit)
    counted = [fields for kind, fields in events if kind == "phase" and "done" in fields]
    assert not counted or counted[-1]["done"] == counted[-1]["total"]
    said = [fields["message"] for kind, fields in events if kind in {"log", "warning"}]
    return [{**fields, "said": said} for kind, fields in events if kind == "output"]


def refusal(job: str, folder: Path, capfd, **request: Any) -> str:
    """Run a job as its process would; return the words, if it refused and wrote nothing."""
    before = sorted(folder.rglob("*"))
    file = folder / "request.json"
    file.write_text(json.dumps(request, default=str))
    code = main([job, str(file)])
    file.unlink()
    words = capfd.readouterr().err
    assert code == 2, words
    assert "Traceback" not in words
    assert sorted(folder.rglob("*")) == before, "something was written"
    return words


def lora(path: Path, *, layout: str = "kohya", dtype=torch.float32, metadata=None, **shape: Any):
    """Write a LoRA of the tiny model and return its factors."""
    factors = make_factors(make_transformer(), **shape)
    save_adapter(factors, path, layout=layout, dtype=dtype, metadata=metadata)
    return factors


@torch.no_grad()
def effect(*files: tuple[Path | AdapterFile, float]) -> torch.Tensor:
    """Return what the tiny model gives with these LoRAs attached."""
    model = make_transformer()
    for file, strength in files:
        adapter = load_adapter(file) if isinstance(file, Path) else file
        attach(model, adapter, strength)
    return run(model, model_inputs(model))


def deltas(file: Path) -> dict[str, torch.Tensor]:
    """Return scale · up @ down of each module in float64, by the definition."""
    return {
        name: update.scale * update.up_OR.double() @ update.down_RI.double()
        for name, update in load_adapter(file).items()
    }


def header(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def content(file: Path) -> tuple[dict[str, str], bytes]:
    """Return header and tensors; the header's own order differs from file to file."""
    raw = file.read_bytes()
    return header(file), raw[8 + int.from_bytes(raw[:8], "little") :]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether two tensors are equal in dtype and every bit."""
    raw = (value.contiguous().reshape(-1).view(torch.uint8) for value in (one, other))
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*raw)


def best_approximation(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """Eckart and Young: the closest matrix of a rank, from the whole decomposition."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]
