"""The job `bench_grid`: time and memory of a fixed grid of configs, for docs/benchmarks.md.

Each row is a job `bench_config`, or `bench_sampling`, in a process of its own: one that crashes or
runs out of memory is a row with a reason, and the next one starts with an empty GPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import tomlkit
import torch

from trainer.bench.config_job import card_of, device_name
from trainer.bench.grid_rows import Row, cpu_rows, gpu_rows, sampling_rows, tiny_sampling_rows
from trainer.bench.sampling_job import working_set
from trainer.contract.config_io import load_config
from trainer.contract.errors import ConfigError, RunError
from trainer.contract.files import write_text
from trainer.contract.jobs import BenchConfigRequest, BenchGridRequest
from trainer.contract.memory_model import Gpu, estimate
from trainer.contract.memory_model.estimating import estimate_inference
from trainer.contract.memory_model.workload import workload_of
from trainer.jobs.base import Emit
from trainer.jobs.child import run_job

GIB = 2**30


def run(request: BenchGridRequest, emit: Emit) -> None:
    """Job `bench_grid`; one `output` event a row, and an `end` event that names the device.

    A row's `status` is `measured` (figures in `result`, as `bench_config` gives them), `skipped`
    (by the estimate it does not fit) or `failed`, both with a `reason`.

    Raises:
        ConfigError: no row has one of the words.
        RunError: rows failed; the others are measured.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card = card_of(device)
    rows = chosen(_rows(request, card), request.only)
    failed = []
    resident: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="menma-bench-") as folder:
        for number, row in enumerate(rows, 1):
            emit("phase", name=f"row {number} of {len(rows)}", detail=row.name)
            found = measure_row(row, card, request, Path(folder), emit)
            if request.sampling:
                found["slower_percent"] = slower_than_resident(row, found["result"], resident)
            emit("output", model=row.model, clip=row.clip, settings=row.settings, **found)
            if found["status"] == "failed":
                failed.append(row.name)
    emit("end", reason="done", device=device_name(device), torch=torch.__version__)
    if failed:
        raise RunError(f"{len(failed)} of {len(rows)} rows failed: {'; '.join(failed)}")


def _rows(request: BenchGridRequest, card: Gpu | None) -> tuple[Row, ...]:
    if request.sampling:
        return tiny_sampling_rows() if card is None else sampling_rows()
    return cpu_rows() if card is None else gpu_rows()


def slower_than_resident(
    row: Row, result: dict[str, Any] | None, resident: dict[str, float]
) -> float | None:
    """Return by how many per cent a row's steps are slower than with all blocks on the GPU.

    Args:
        row: what was measured.
        result: its figures; None: there are none.
        resident: seconds of a step by name of the rows that swap nothing; this one's is added.

    Returns:
        None for a row that swaps nothing, or whose counterpart was not measured.
    """
    if result is None:
        return None
    step_s: float = result["step_s"]["median"]
    memory = dict(row.memory)
    if not memory.pop("blocks_to_swap", 0):
        resident[row.name] = step_s
        return None
    counterpart = resident.get(replace(row, memory=memory).name)
    return None if counterpart is None else round(100 * (step_s / counterpart - 1), 2)


def chosen(rows: Sequence[Row], words: Sequence[str]) -> list[Row]:
    """Return the rows that have one of the words in their name; all where there are no words.

    Raises:
        ConfigError: none has.
    """
    found = [row for row in rows if not words or any(word in row.name for word in words)]
    if not found:
        names = "\n".join(row.name for row in rows)
        raise ConfigError(f"no row of the grid has {' or '.join(words)}", hint=f"rows:\n{names}")
    return found


def measure_row(
    row: Row, card: Gpu | None, request: BenchGridRequest, folder: Path, emit: Emit
) -> dict[str, Any]:
    """Return status, reason and result of one row.

    Args:
        row: what to measure.
        card: the GPU; None: a CPU, on which nothing is skipped.
        request: steps.
        folder: for the config and the request.
        emit: takes the events of the row's job.
    """
    config = folder / "config.toml"
    write_text(config, tomlkit.dumps(row.config()))
    reason = None if card is None else too_large(config, card, sampling=request.sampling)
    if reason is not None:
        return {"status": "skipped", "reason": reason, "result": None}
    told: list[str] = []

    def pass_on(kind: str, /, **fields: Any) -> None:
        if kind == "error":
            told.append(str(fields["message"]))
        elif kind != "end":
            emit(kind, **fields)

    job = BenchConfigRequest(config=config, steps=request.steps, warmup_steps=request.warmup_steps)
    name = "bench_sampling" if request.sampling else "bench_config"
    try:
        result = run_job(name, job, folder / "request.json", pass_on)
    except RunError as error:
        reason = (told[0] if told else error.message).splitlines()[0][:300]
        return {"status": "failed", "reason": reason, "result": None}
    result.pop("reason", None)
    return {"status": "measured", "reason": "", "result": result}


def too_large(config: Path, card: Gpu, *, sampling: bool = False) -> str | None:
    """Return why a config cannot run on this machine, by the estimate; None where it can."""
    loaded = load_config(config)
    if sampling:
        work = workload_of(loaded)
        guess = estimate_inference(work, [working_set(work)], card)
    else:
        guess = estimate(loaded, card)
    phase = guess.phase("sampling" if sampling else "training")
    gpu, ram = phase.peak_bytes, psutil.virtual_memory().total
    if gpu > card.memory_bytes:
        return f"takes {gpu / GIB:.1f} GiB, the GPU has {card.memory_gib:.1f}"
    if guess.host_bytes > ram:
        return f"takes {guess.host_bytes / GIB:.1f} GiB of RAM, there are {ram / GIB:.1f}"
    return None
