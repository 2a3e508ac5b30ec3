"""What presets say about memory is what the estimate says."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.domain.presets import PRESETS_DIR, read_preset
from trainer.contract.config_io import load_config
from trainer.contract.memory_model import estimate

PRESETS = sorted(path.stem for path in PRESETS_DIR.glob("*.toml"))


@pytest.mark.parametrize("name", PRESETS)
def test_the_preset_s_peak_is_the_estimate_s(name: str, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f'preset = "{name}"\n', encoding="utf-8")
    peak = estimate(load_config(file, environ={})).peak_bytes / 2**30
    assert read_preset(name).peak_vram_gib == pytest.approx(peak, rel=0.02)
