"""Encoded prompts of earlier runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.sampling.test_sample_memory import frames_of
from tests.sampling.test_sample_run import CONFIG, write_models
from trainer.jobs import components
from trainer.jobs.text_recall import RecallingEncoder
from trainer.jobs.window_encoder import LazyModel

CPU = torch.device("cpu")


class Encoder:
    """Counts how often it is loaded and what it encodes."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
        self.loads, self.texts, self.seed, self.dtype = 0, [], seed, dtype

    def load(self) -> Any:
        self.loads += 1
        return self.encode

    def encode(self, texts: list[str]) -> list[Tensor]:
        self.texts += texts
        generator = torch.Generator().manual_seed(self.seed + sum(map(len, texts)))
        return [torch.randn(len(t), 8, generator=generator).to(self.dtype) for t in texts]

    def recalling(self, folder: Path, device: torch.device = CPU) -> RecallingEncoder:
        lazy: Any = LazyModel(f"weights {self.seed}", self.load)
        return RecallingEncoder(lazy, folder, self.dtype, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_text_is_encoded_once_and_comes_back_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    encoder = Encoder(dtype=dtype)
    first = encoder.recalling(tmp_path / "texts")(["a cat", "a dog in the fog", "a cat"])
    assert (encoder.loads, encoder.texts) == (1, ["a cat", "a dog in the fog"])
    again = encoder.recalling(tmp_path / "texts")(["a dog in the fog", "a cat"])
    assert encoder.loads == 1, "nothing is loaded for texts that are there"
    assert again[0].dtype == dtype
    assert torch.equal(again[0], first[1])
    assert torch.equal(again[1], first[0])
    assert b"a cat" not in b"".join(path.read_bytes() for path in (tmp_path / "texts").iterdir())


def test_other_weights_precision_and_devices_have_entries_of_their_own(tmp_path: Path) -> None:
    for encoder, device in (
        (Encoder(), CPU),
        (Encoder(seed=1), CPU),
        (Encoder(dtype=torch.float32), CPU),
        (Encoder(), torch.device("cuda")),
    ):
        encoder.recalling(tmp_path, device)(["a cat"])
        assert encoder.texts == ["a cat"]
    assert len(list(tmp_path.iterdir())) == 4


def test_a_damaged_entry_is_encoded_anew(tmp_path: Path) -> None:
    encoder = Encoder()
    (whole,) = encoder.recalling(tmp_path)(["a cat"])
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:40])
    assert torch.equal(encoder.recalling(tmp_path)(["a cat"])[0], whole)
    assert encoder.loads == 2
    encoder.recalling(tmp_path)(["a cat"])
    assert encoder.loads == 2, "and is whole again"


def test_a_second_run_loads_no_text_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.format(folder=write_models(tmp_path)), encoding="utf-8")
    setting = f"sampling.text_cache='{tmp_path / 'texts'}'"
    plain, first = frames_of(config), frames_of(config, setting)
    assert len(list((tmp_path / "texts").iterdir())) == 2  # the prompt, and the negative one

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the text encoder was loaded")

    monkeypatch.setattr(components, "load_text_encoder", refuse)
    second = frames_of(config, setting)
    assert (first == plain).all()
    assert (second == plain).all()
