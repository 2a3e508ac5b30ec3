"""The text encoder on a device and in a precision of its own: sampling, sessions, caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_sample_matrix import CONFIG
from torch import Tensor

from tests.sampling.test_sample_run import write_models
from trainer.contract.config_io import load_config
from trainer.contract.variants import get_variant
from trainer.data.cache_settings import CacheSettings
from trainer.data.text_cache import text_key
from trainer.jobs.components import lazy_text_encoder
from trainer.jobs.run_items import cache_settings
from trainer.jobs.sample import SampleLoaders
from trainer.jobs.sample_studio import Studio, StudioOptions
from trainer.jobs.text_recall import prompt_encoder
from trainer.quant.linear import Fp8Linear
from trainer.sampling.requests import SampleRequest

ELSEWHERE = torch.device("meta")
"""Stands for a GPU: what is there cannot be computed with on the CPU."""
VARIANT = get_variant("wan2.1-t2v-1.3b")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_models(tmp_path_factory.mktemp("models"))
    path = folder / "config.toml"
    path.write_text(CONFIG.format(folder=folder), encoding="utf-8")
    return path


def test_it_is_loaded_where_the_config_says(config: Path) -> None:
    there = prompt_encoder(load_config(config), ELSEWHERE)
    here = prompt_encoder(load_config(config, ["memory.text_encoder_device='cpu'"]), ELSEWHERE)
    assert (there.device, here.device) == (ELSEWHERE, torch.device("cpu"))
    assert here(["a cat"])[0].device.type == "cpu"


@pytest.mark.parametrize("place", ["same", "cpu"])
def test_its_precision_is_the_configs(config: Path, place: str) -> None:
    settings = ["memory.text_encoder_dtype='fp8_scaled'", f"memory.text_encoder_device='{place}'"]
    encoder = lazy_text_encoder(load_config(config, settings), torch.device("cpu")).load()
    assert sum(isinstance(layer, Fp8Linear) for layer in encoder.model.modules()) == 14
    assert encoder.dtype == torch.bfloat16


def test_what_is_cached_is_told_apart_by_precision_alone(config: Path) -> None:
    def settings(**memory: str) -> CacheSettings:
        changes = [f"memory.{key}='{value}'" for key, value in memory.items()]
        return cache_settings(load_config(config, changes), VARIANT)

    plain = settings()
    names = {
        precision: settings(text_encoder_dtype=precision)
        for precision in ("bf16", "fp32", "fp8_scaled")
    }
    assert names["bf16"] == plain == settings(text_encoder_device="cpu")
    keys = {text_key("a cat", one) for one in names.values()}
    assert len(keys) == 3
    made_by = lazy_text_encoder(
        load_config(config, ["memory.text_encoder_dtype='fp8_scaled'"]), ELSEWHERE
    ).identity
    assert made_by == names["fp8_scaled"].text_encoder, "menma cache and the run agree"


def test_kept_prompts_are_told_apart_by_precision(config: Path, tmp_path: Path) -> None:
    folder = f"sampling.text_cache='{tmp_path}'"
    for count, precision in enumerate(("bf16", "fp8_scaled", "bf16", "fp32"), 1):
        run = load_config(config, [folder, f"memory.text_encoder_dtype='{precision}'"])
        prompt_encoder(run, torch.device("cpu"))(["a cat"])
        assert len(list(tmp_path.iterdir())) == {1: 1, 2: 2, 3: 2, 4: 3}[count]


class Encoder:
    """Notes where it is sent."""

    def __init__(self) -> None:
        self.places: list[str] = []

    def to(self, device: torch.device) -> None:
        self.places.append(device.type)

    def __call__(self, texts: list[str]) -> list[Tensor]:
        return [torch.ones(3, 4) for _ in texts]


@pytest.mark.parametrize(("own", "places"), [
    (None, ["cpu", "meta", "cpu"]),
    (torch.device("cpu"), ["cpu", "cpu", "cpu"]),
])  # fmt: skip
def test_a_session_brings_it_to_its_own_device(own: torch.device | None, places: list[str]) -> None:
    encoder: Any = Encoder()
    loaders: Any = SampleLoaders(text_encoder=lambda: encoder, transformer=None, vae=None)
    options = StudioOptions(device=ELSEWHERE, text_device=own, keep=True)
    studio = Studio(VARIANT, loaders, options)
    for prompt in ("a cat", "a dog"):
        studio.encode_texts([SampleRequest.of(prompt, VARIANT)])
    assert encoder.places == places


def test_a_session_keeps_an_encoder_that_recalls(config: Path, tmp_path: Path) -> None:
    run = load_config(config, [f"sampling.text_cache='{tmp_path}'"])
    cpu = torch.device("cpu")
    loaders: Any = SampleLoaders(
        text_encoder=lambda: prompt_encoder(run, cpu), transformer=None, vae=None
    )
    studio = Studio(VARIANT, loaders, StudioOptions(device=cpu, keep=True))
    for number, prompt in enumerate(("a cat", "a dog"), 2):
        studio.encode_texts([SampleRequest.of(prompt, VARIANT)])
        assert len(list(tmp_path.iterdir())) == number  # with the negative prompt
