"""`bench_sampling` on tiny models: figures of the loop that `menma sample` runs."""

from __future__ import annotations

import pytest
import tomlkit

from trainer.bench import sampling_job
from trainer.bench.grid_rows import Row, tiny_sampling_rows
from trainer.contract.errors import ConfigError
from trainer.contract.jobs import BenchConfigRequest

IMAGES = Row(
    variant="wan2.1-i2v-14b",
    width=32,
    height=32,
    num_frames=5,
    shape={"dim": 24, "ffn_dim": 48, "num_heads": 2, "num_layers": 2, "text_dim": 32},
)


@pytest.mark.parametrize("row", [tiny_sampling_rows()[0], tiny_sampling_rows()[3]])
def test_a_config_is_sampled_and_told_of(tmp_path, row):
    path = tmp_path / "row.toml"
    path.write_text(tomlkit.dumps(row.config()), encoding="utf-8")
    events = []
    request = BenchConfigRequest(config=path, steps=3, warmup_steps=2)
    sampling_job.run(request, lambda kind, /, **fields: events.append((kind, fields)))
    kind, found = events[-1]
    assert (kind, found["variant"], found["clip"]) == ("end", row.variant, row.clip)
    step = found["step_s"]
    assert step["steps"] == 3
    assert len(found["warmup_s"]) == 2
    assert 0 < step["min"] <= step["median"] <= step["max"]
    assert found["video_s"] == pytest.approx(50 * step["median"], abs=0.01)
    assert found["tflop_per_s"] == pytest.approx(found["tflop"] / step["median"], rel=0.05)
    assert found["memory_gib"]["peak_reserved"] is None
    assert found["mfu"] is None
    assert found["estimate"]["peak_gib"] > 0


def test_a_model_that_needs_images_is_refused(tmp_path):
    path = tmp_path / "row.toml"
    path.write_text(tomlkit.dumps(IMAGES.config()), encoding="utf-8")
    with pytest.raises(ConfigError, match="needs a first frame"):
        sampling_job.run(BenchConfigRequest(config=path), lambda _kind, /, **_fields: None)
