"""The table of presets in docs/presets.md; run it to write the table anew."""

from __future__ import annotations

import re
from pathlib import Path

from app.domain.presets import Preset, read_preset
from trainer.contract.preset_folders import PRESETS_DIR

PAGE = Path(__file__).parents[2] / "docs" / "presets.md"
_HEAD = "| preset | GPUs | GiB on each | RAM, GB | data | steps |\n|---|---|---|---|---|---|\n"
_TABLE = re.compile(re.escape(_HEAD) + r"(?:\|.*\n)*")


def with_table(page: str) -> str:
    """Return the page with the table as the presets are now."""
    presets = [read_preset(path.stem) for path in sorted(PRESETS_DIR.glob("*.toml"))]
    table = _HEAD + "".join(_row(preset) for preset in presets)
    found, count = _TABLE.subn(lambda _: table, page)
    assert count == 1, "the page has no table of presets"
    return found


def _row(preset: Preset) -> str:
    head = preset.head
    data = head.data
    assert data is not None
    size = "x".join(map(str, preset.source["resolution"]))
    if preset.medium == "clips":
        size += f"x{preset.source['target_frames'][0]}"
    cells = (
        f"`{preset.name}`",
        f"{head.num_gpus} x {head.card_gb} GB" if head.num_gpus > 1 else f"{head.card_gb} GB",
        f"{head.peak_vram_gib:g}",
        f"{head.ram_gb}",
        f"{data.num_items:,} {preset.medium} of {size}, {data.views} times",
        f"{preset.max_steps:,}",
    )
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
