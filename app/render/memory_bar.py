"""An estimate as a bar, with its parts and the verdict in words."""

from __future__ import annotations

from app.render.bar import BAR, bar
from app.render.estimates import GIB, gib
from trainer.contract.memory_model import Estimate

VERDICTS = {"fits": "OK", "tight": "TIGHT", "does not fit": "OVER", "unknown": ""}
_SMALLEST = GIB // 20


def bar_line(result: Estimate, width: int = BAR) -> str:
    """Return `VRAM ####....  19.1 / 24.0 GiB  OK`, of the phase that takes most."""
    if result.gpu is None:
        return f"VRAM {gib(result.peak_bytes)} GiB (± {gib(result.margin_bytes)})"
    share = result.peak_bytes / result.gpu.memory_bytes
    return (
        f"VRAM {bar(share, width)}  {gib(result.peak_bytes)} "
        f"(± {gib(result.margin_bytes)}) / {result.gpu.memory_gib:.1f} GiB  "
        f"{VERDICTS[result.verdict]}"
    )


def parts_line(result: Estimate) -> str:
    """Return what the peak is made of, the largest part first, and the time of an update."""
    parts = sorted(result.parts.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} {gib(size)}" for name, size in parts if size >= _SMALLEST)
    return f"{result.deciding.name}: {shown}"
