"""Every option of `[memory]` that counts in sampling gives the sample that it gives without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.sampling.test_sample_loras import write_lora
from tests.sampling.test_sample_run import CONFIG, write_models
from trainer.contract.config import Prompt
from trainer.contract.errors import ConfigError
from trainer.contract.jobs import SampleJobRequest
from trainer.contract.lora_use import LoRAUse, SampleLoRA
from trainer.jobs import sample_write
from trainer.jobs.sample_run import run


@contextmanager
def kept_frames() -> Iterator[list[np.ndarray]]:
    """Keep the frames of each sample instead of writing them: a codec would blur what differs."""
    kept: list[np.ndarray] = []
    with pytest.MonkeyPatch.context() as patch:

        def keep(path: Path, frames: Any, **_: Any) -> Path:
            kept.append(np.stack(list(frames)).astype(int))
            return path

        patch.setattr(sample_write, "write_files", keep)
        yield kept


def frames_of(config: Path, *settings: str, **fields: Any) -> np.ndarray:
    request = SampleJobRequest(
        config=config, set=settings, prompts=(Prompt(prompt="a bird", seed=9),), **fields
    )
    with kept_frames() as kept:
        run(request, lambda _kind, /, **_fields: None)
    (frames,) = kept
    return frames


MEMORY: list[tuple[str, str, int]] = [
    # An option of [memory], and how far frames may be from those without it, of 255.
    ("blocks_to_swap", "1", 0),
    ("blocks_to_swap", "2", 0),
    ("blocks_to_swap", "'auto'", 0),
    ("gradient_checkpointing", "false", 0),
    ("feed_forward_chunks", "3", 1),
    ("attention_chunks", "3", 1),
    ("vae_tile", "128", 0),
    ("vae_dtype", "'bf16'", 20),
    ("text_encoder_dtype", "'fp32'", 20),
    ("text_encoder_dtype", "'fp8_scaled'", 40),
    ("text_encoder_device", "'cpu'", 0),
    ("weight_format", "'bf16'", 25),
    ("weight_format", "'fp8_scaled'", 60),
    ("weight_format", "'fp8'", 60),
]


@pytest.fixture(scope="module")
def plain_frames(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what one prompt gives with a LoRA attached, merged, and without it."""
    folder = write_models(tmp_path_factory.mktemp("plain"))
    config = folder / "config.toml"
    config.write_text(CONFIG.format(folder=folder), encoding="utf-8")
    lora = (LoRAUse(path=write_lora(folder / "lora.safetensors", 3)),)
    return {
        "config": config,
        "lora": lora,
        "without": frames_of(config),
        "attached": frames_of(config, loras=lora),
        "merged": frames_of(config, loras=lora, merge_loras=True),
    }


def test_a_merged_lora_is_the_attached_one(plain_frames: dict[str, Any]) -> None:
    assert np.abs(plain_frames["attached"] - plain_frames["without"]).mean() > 3
    assert np.abs(plain_frames["attached"] - plain_frames["merged"]).max() <= 1


@pytest.mark.parametrize(("option", "value", "far"), MEMORY)
def test_each_memory_option_gives_the_same_sample(
    plain_frames: dict[str, Any], option: str, value: str, far: int
) -> None:
    setting = f"memory.{option}={value}"
    found = frames_of(plain_frames["config"], setting, loras=plain_frames["lora"])
    assert np.abs(found - plain_frames["attached"]).max() <= far


def test_swapped_blocks_take_merged_loras(plain_frames: dict[str, Any]) -> None:
    found = frames_of(
        plain_frames["config"],
        "memory.blocks_to_swap=2",
        loras=plain_frames["lora"],
        merge_loras=True,
    )
    assert np.array_equal(found, plain_frames["merged"])


def test_fp8_weights_take_no_merged_loras(plain_frames: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"cannot be merged: memory.weight_format is fp8"):
        frames_of(
            plain_frames["config"],
            "memory.weight_format='fp8_scaled'",
            loras=plain_frames["lora"],
            merge_loras=True,
        )


def test_strengths_change_from_step_to_step(plain_frames: dict[str, Any]) -> None:
    def with_points(*points: tuple[float, float]) -> np.ndarray:
        use = SampleLoRA(path=plain_frames["lora"][0].path, schedule=points)
        return frames_of(plain_frames["config"], loras=(use,))

    assert np.array_equal(with_points((0.0, 1.0), (1.0, 1.0)), plain_frames["attached"])
    assert np.array_equal(with_points((0.0, 0.0)), plain_frames["without"])
    first, second = with_points((0.5, 1.0), (0.5, 0.0)), with_points((0.5, 0.0), (0.5, 1.0))
    for one in (first, second):
        assert np.abs(one - plain_frames["without"]).mean() > 1
        assert np.abs(one - plain_frames["attached"]).mean() > 1
    assert np.abs(first - second).mean() > 1
