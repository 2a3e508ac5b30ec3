"""What is known of GPUs: memory, peak arithmetic, bandwidths.

Peak figures are the makers' for dense products with float32 accumulation. Shares of them that are
reached in practice: products and attention on an H200 788 of 989, 620 and 480 TFLOP/s, on an RTX
4090 150, 145 and 115 of 165, on an RTX 3090 62, 58 and 48 of 71; others are taken to behave as the
nearest of these. `memory_gib` is what the driver reports as total, which is less than on the box.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from trainer.contract.errors import UserError
from trainer.contract.registry import nearest

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU; without arithmetic figures (0) there is no step time."""

    name: str
    memory_gib: float
    bf16_tflops: float = 0.0
    fp8_tflops: float = 0.0
    """0: it multiplies no fp8."""
    memory_gb_s: float = 0.0
    host_gb_s: float = 0.0
    """Host to device from pinned memory, as measured, not as named."""
    link_gb_s: float = 0.0
    """To the other GPUs of the machine, one way: NVLink where it has it, else as `host_gb_s`."""
    host_memory_gb_s: float = 0.0
    """RAM of the machine that it is mostly found in: a guess, 200 for servers, 60 for desktops."""
    matmul: float = 0.80
    """Share of the peak that large products reach; attention forward and backward follow."""
    attention_forward: float = 0.63
    attention_backward: float = 0.48

    @property
    def memory_bytes(self) -> int:
        """Memory of the card."""
        return round(self.memory_gib * GIB)


def _server(  # a row of the table below, in the order of its columns
    name: str, memory: float, bf16: float, fp8: float, memory_gb_s: float, link: float = 0.0
) -> Gpu:
    host = 50.0 if fp8 else 25.0
    return Gpu(
        name=name,
        memory_gib=memory,
        bf16_tflops=bf16,
        fp8_tflops=fp8,
        memory_gb_s=memory_gb_s,
        host_gb_s=host,
        link_gb_s=link or host,
        host_memory_gb_s=200.0,
    )


def _desktop(  # a row of the table below, in the order of its columns
    name: str, memory: float, bf16: float, fp8: float, memory_gb_s: float, host: float = 25.0
) -> Gpu:
    return Gpu(
        name=name,
        memory_gib=memory,
        bf16_tflops=bf16,
        fp8_tflops=fp8,
        memory_gb_s=memory_gb_s,
        host_gb_s=host,
        link_gb_s=host,
        host_memory_gb_s=60.0,
        matmul=0.90,
        attention_forward=0.85,
        attention_backward=0.69,
    )


_TABLE = (
    # Memory in GiB; bf16 and fp8 in TFLOP/s; bandwidths in GB/s: memory, then for servers NVLink
    # (nine tenths of what the maker names one way), for others from the host.
    _server("A100 40GB", 39.4, 312, 0, 1555, 270),
    _server("A100 80GB", 79.2, 312, 0, 2039, 270),
    _server("H100 PCIe", 79.6, 756, 1513, 2039),
    _server("H100 80GB", 79.6, 989, 1979, 3350, 410),
    _server("H200", 139.8, 989, 1979, 4800, 410),
    _server("B200", 178.4, 2250, 4500, 8000, 810),
    _desktop("A10G", 22.1, 70, 0, 600),
    _desktop("A10", 22.1, 125, 0, 600),
    _desktop("L4", 22.2, 121, 242, 300),
    _desktop("L40S", 44.7, 362, 733, 864),
    _desktop("RTX A6000", 47.5, 155, 0, 768),
    _desktop("RTX 6000 Ada", 47.5, 364, 728, 960),
    _desktop("RTX PRO 6000", 95.0, 504, 1007, 1792, 50.0),
    _desktop("RTX 3060", 11.8, 25, 0, 360),
    _desktop("RTX 3080", 9.8, 59, 0, 760),
    _desktop("RTX 3090", 23.6, 71, 0, 936),
    _desktop("RTX 3090 Ti", 23.6, 80, 0, 1008),
    _desktop("RTX 4060 Ti 16GB", 15.6, 44, 88, 288, 12.0),
    _desktop("RTX 4070 Ti SUPER", 15.6, 88, 176, 672),
    _desktop("RTX 4080", 15.6, 97, 195, 717),
    _desktop("RTX 4080 SUPER", 15.6, 104, 209, 736),
    _desktop("RTX 4090", 23.6, 165, 330, 1008),
    _desktop("RTX 5060 Ti 16GB", 15.5, 47, 95, 448),
    _desktop("RTX 5070 Ti", 15.5, 88, 176, 896, 50.0),
    _desktop("RTX 5080", 15.5, 113, 225, 960, 50.0),
    _desktop("RTX 5090", 31.4, 210, 419, 1792, 50.0),
)
GPUS: dict[str, Gpu] = {gpu.name: gpu for gpu in _TABLE}


def find_gpu(name: str) -> Gpu:
    """Return the GPU of that name, however it is written: `4090`, `NVIDIA GeForce RTX 4090`.

    Raises:
        UserError: none or several have that name.
    """
    wanted = _words(name)
    found = [gpu for gpu in _TABLE if _words(gpu.name) == wanted]
    if not found:
        found = [gpu for gpu in _TABLE if _words(gpu.name) <= wanted]
        found = _longest(found)
    if not found:
        found = [gpu for gpu in _TABLE if wanted and wanted <= _words(gpu.name)]
        found = _shortest(found)
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(gpu.name for gpu in found)
        raise UserError(f"several GPUs are called {name!r}", hint=f"give one of: {names}")
    raise UserError(
        f"no GPU called {name!r} is known",
        hint=f"{nearest(name, GPUS)}\nor give its memory: --vram 24",
    )


def gpu_of_memory(memory_gib: float, name: str = "") -> Gpu:
    """Return a GPU that is known by its memory; with the figures of `name` where that is known."""
    label = name or f"{memory_gib:g} GiB card"
    try:
        known = find_gpu(name) if name else None
    except UserError:
        known = None
    if known is None:
        return Gpu(name=label, memory_gib=memory_gib)
    return replace(known, name=label, memory_gib=memory_gib)


def _words(name: str) -> frozenset[str]:
    text = re.sub(r"(\d+)\s*(?:gb|gib)\b", r"\1gb", name.lower())
    words = re.findall(r"[a-z0-9]+", text)
    return frozenset(words) - {"nvidia", "geforce", "sxm", "sxm4", "sxm5", "hbm3", "generation"}


def _longest(gpus: list[Gpu]) -> list[Gpu]:
    most = max((len(_words(gpu.name)) for gpu in gpus), default=0)
    return [gpu for gpu in gpus if len(_words(gpu.name)) == most]


def _shortest(gpus: list[Gpu]) -> list[Gpu]:
    least = min((len(_words(gpu.name)) for gpu in gpus), default=0)
    return [gpu for gpu in gpus if len(_words(gpu.name)) == least]
