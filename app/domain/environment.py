"""What is installed and what the machine has: for `menma doctor` and bug reports."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

GIB = 2**30
PACKAGES = (
    "torch",
    "deepspeed",
    "safetensors",
    "transformers",
    "tokenizers",
    "av",
    "numpy",
    "pydantic",
    "typer",
    "rich",
    "textual",
    "tomlkit",
    "bitsandbytes",
    "tensorboard",
)
NEEDED = ("torch", "safetensors", "transformers", "av", "numpy", "pydantic")
OPTIONAL = {
    "bitsandbytes": "optimizer.kind = 'adamw8bit'",
    "tensorboard": "logging.tensorboard = true",
}
LITTLE_RAM_GIB = 32
LITTLE_DISK_GIB = 20
IMPORT_TIMEOUT_S = 180
SMI_TIMEOUT_S = 20


def menma_version() -> str:
    """Return Menma's version; `unknown` when it runs from a folder that was not installed."""
    try:
        return metadata.version("menma")
    except metadata.PackageNotFoundError:
        return "unknown (not installed; see install.sh)"


def package_versions() -> dict[str, str | None]:
    """Return package -> version, None where it is not installed."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def nvidia_smi(fields: Sequence[str]) -> tuple[list[list[str]], str]:
    """Ask NVIDIA's driver; return a row of cells a GPU, and why there is no answer.

    Args:
        fields: as `nvidia-smi --help-query-gpu` names them; memory is in MiB, without units.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return [], "no NVIDIA driver was found (nvidia-smi)"
    try:
        answer = subprocess.run(
            [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SMI_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [], f"nvidia-smi gives no answer in {SMI_TIMEOUT_S} s"
    except OSError as error:
        return [], f"nvidia-smi cannot be started: {error.strerror}"
    if answer.returncode != 0:
        words = (answer.stdout + answer.stderr).strip().splitlines()
        return [], f"nvidia-smi fails: {words[0] if words else answer.returncode}"
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines()]
    return [row for row in rows if len(row) == len(fields)], ""


def gpus() -> list[dict[str, Any]]:
    """Return NVIDIA GPUs as `nvidia-smi` lists them; none when there is no driver."""
    rows, _ = nvidia_smi(
        ("index", "name", "memory.total", "memory.free", "driver_version", "compute_cap")
    )
    return [gpu for row in rows if (gpu := _gpu(row)) is not None]


def ram_bytes() -> int:
    """Return the RAM of this machine."""
    import psutil

    return int(psutil.virtual_memory().total)


def report(folder: Path) -> dict[str, Any]:
    """Return everything `menma doctor` shows, plain values.

    Args:
        folder: where runs would be written; its file system is looked at.
    """
    import psutil

    memory = psutil.virtual_memory()
    disk = shutil.disk_usage(folder)
    found: dict[str, Any] = {
        "menma": menma_version(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": psutil.cpu_count() or 0,
        "ram_gib": round(memory.total / GIB, 1),
        "ram_free_gib": round(memory.available / GIB, 1),
        "disk_free_gib": round(disk.free / GIB, 1),
        "disk_folder": str(folder.absolute()),
        "gpus": gpus(),
        "packages": package_versions(),
        "imports": {name: import_check(name) for name in ("torch", "deepspeed")},
    }
    found["problems"] = list(_problems(found))
    found["warnings"] = list(_warnings(found))
    return found


def import_check(name: str) -> str:
    """Import a package in a process of its own; return what went wrong, empty when nothing did."""
    try:
        answer = subprocess.run(
            [sys.executable, "-c", f"import {name}"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=IMPORT_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"takes longer than {IMPORT_TIMEOUT_S} s"
    if answer.returncode == 0:
        return ""
    lines = answer.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {answer.returncode}"


def _gpu(parts: Sequence[str]) -> dict[str, Any] | None:
    try:
        return {
            "index": int(parts[0]),
            "name": parts[1],
            "vram_gib": round(float(parts[2]) / 1024, 1),
            "vram_free_gib": round(float(parts[3]) / 1024, 1),
            "driver": parts[4],
            "compute_capability": parts[5],
        }
    except (IndexError, ValueError):
        return None


def _problems(found: dict[str, Any]) -> Iterator[str]:
    for name in NEEDED:
        if found["packages"][name] is None:
            yield f"{name} is not installed: run `bash install.sh`"
    if found["packages"]["torch"] and (broken := found["imports"]["torch"]):
        yield f"torch cannot be imported: {broken}"


def _warnings(found: dict[str, Any]) -> Iterator[str]:
    if not found["gpus"]:
        yield "no NVIDIA GPU was found: training a released model takes one; the demo does not"
    elif "+cpu" in (found["packages"]["torch"] or ""):
        yield "there is a GPU, but torch is the CPU build: run `bash install.sh` without --cpu"
    if found["packages"]["deepspeed"] is None:
        yield "DeepSpeed is not installed: training uses the local engine, one process"
    elif broken := found["imports"]["deepspeed"]:
        yield f"DeepSpeed cannot be imported, set distributed.engine = 'local': {broken}"
    for name, use in OPTIONAL.items():
        if found["packages"][name] is None:
            yield f"{name} is not installed; only {use} needs it"
    if found["ram_gib"] < LITTLE_RAM_GIB:
        yield (
            f"{found['ram_gib']} GiB of RAM: loading a 14B model and the text encoder takes about "
            f"{LITTLE_RAM_GIB} GiB"
        )
    if found["disk_free_gib"] < LITTLE_DISK_GIB:
        yield f"only {found['disk_free_gib']} GiB free in {found['disk_folder']}"
