"""`menma sample --calibrate` and where a later job finds what it measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.contract.config import Prompt
from trainer.contract.config_io import load_config
from trainer.contract.errors import ConfigError
from trainer.contract.jobs import SampleJobRequest
from trainer.contract.variants import VARIANTS, TransformerConfig, get_variant
from trainer.jobs.sample_run import run
from trainer.jobs.step_cache_values import step_cache_values
from trainer.models.wan.loading import save_transformer
from trainer.models.wan.tiny import write_tiny_text_encoder, write_tiny_vae
from trainer.models.wan.transformer import WanTransformer
from trainer.nano.files import EXPERT_VARIANT, T2V_VARIANT, asset
from trainer.sampling.requests import SampleRequest
from trainer.sampling.step_cache.values import read_calibration
from trainer.sampling.video_io import read_metadata

CONFIG = """
name = "cats"
[model]
transformer = "{folder}/transformer.safetensors"
vae = "{folder}/vae.safetensors"
text_encoder = "{folder}/text.safetensors"
[distributed]
device = "cpu"
[memory]
weight_format = "fp32"
vae_dtype = "fp32"
[sampling]
width = 32
height = 32
num_frames = 1
num_steps = 8
cfg_skip_mode = "late"
[[sampling.prompts]]
prompt = "a cat"
[[sampling.prompts]]
prompt = "a dog"
"""
CACHED = ("sampling.step_cache='magcache'", "sampling.step_cache_threshold=9")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_vae(folder / "vae.safetensors")
    write_tiny_text_encoder(folder / "text.safetensors", ["a cat", "a dog"], text_dim=32)
    shape = TransformerConfig(
        dim=24, ffn_dim=48, num_heads=2, num_layers=2, text_dim=32, freq_dim=16
    )
    transformer = WanTransformer(shape)
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(transformer.head.head.weight, std=0.2, generator=generator)
    transformer.variant_name = T2V_VARIANT
    save_transformer(transformer, folder / "transformer.safetensors")
    return folder


@pytest.fixture
def config(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))
    path = tmp_path / "config.toml"
    path.write_text(CONFIG.format(folder=models.as_posix()), encoding="utf-8")
    return path


def events_of(config: Path, **fields: Any) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    request = SampleJobRequest(config=config, output=config.parent / "out", **fields)
    run(request, lambda kind, /, **values: events.append({"type": kind, **values}))
    return events


def test_a_model_is_measured_once_and_then_sampled_faster(config: Path) -> None:
    with pytest.raises(ConfigError, match="does not know") as caught:
        events_of(config, set=CACHED)
    assert "menma sample --calibrate" in caught.value.hint

    events = events_of(config, calibrate=True, set=("sampling.step_cache='teacache'",))
    (written,) = [Path(event["path"]) for event in events if event["type"] == "output"]
    assert written.is_relative_to(config.parent / "cache")
    # Methods and caches are off while measuring.
    assert (events[-1]["evaluations"], events[-1]["reused_evaluations"]) == (2 * 2 * 8, 0)
    calibration = read_calibration(written)
    assert (calibration.num_steps, calibration.num_prompts) == (8, 2)
    ratios = calibration.experts["low_noise"].magcache
    assert {name: len(values) for name, values in ratios.items()} == {"positive": 8, "negative": 8}

    events = events_of(config, set=CACHED)
    end = events[-1]
    assert end["reused_evaluations"] > 0
    (first, _) = [event for event in events if event["type"] == "sample"]
    metadata = read_metadata(Path(first["path"]))
    assert metadata["evaluations"] == first["evaluations"]
    assert metadata["step_cache"] == "magcache"
    assert metadata["cfg_skip_mode"] == "late"
    total = [event["evaluations"] for event in events if event["type"] == "sample"]
    assert sum(one["computed"] for one in total) == end["evaluations"]
    assert any(event["type"] == "log" and "spared" in event["message"] for event in events)


def test_a_file_may_be_named(config: Path, tmp_path: Path) -> None:
    named = f"sampling.step_cache_file='{(tmp_path / 'mine.json').as_posix()}'"
    events_of(config, calibrate=True, set=(named,))
    assert read_calibration(tmp_path / "mine.json").variant == T2V_VARIANT
    assert not (tmp_path / "cache").exists()
    assert events_of(config, set=(*CACHED, named))[-1]["reused_evaluations"] > 0
    spoilt = (tmp_path / "mine.json").read_text().replace(T2V_VARIANT, "wan2.1-t2v-14b")
    (tmp_path / "mine.json").write_text(spoilt)
    with pytest.raises(ConfigError, match=r"measured on wan2\.1-t2v-14b"):
        events_of(config, set=(*CACHED, named))


def test_prompts_that_walk_other_steps_cannot_be_measured_together(config: Path) -> None:
    prompts = (Prompt(prompt="a cat"), Prompt(prompt="a dog", num_steps=9))
    with pytest.raises(ConfigError, match="different steps"):
        events_of(config, calibrate=True, prompts=prompts)


def test_values_of_other_weights_are_not_taken(config: Path, models: Path) -> None:
    events_of(config, calibrate=True)
    loaded = load_config(config)
    variant = get_variant(T2V_VARIANT)
    request = SampleRequest.of(Prompt(prompt="a cat", step_cache="magcache"), variant)
    own = {"low_noise": models / "transformer.safetensors"}
    assert step_cache_values(loaded, variant, lambda: own, [request]).measured is not None
    other = models / "other.safetensors"
    save_transformer(WanTransformer(_shape(own["low_noise"]), seed=5), other)
    with pytest.raises(ConfigError, match="does not know"):
        step_cache_values(loaded, variant, lambda: {"low_noise": other}, [request])


def _shape(path: Path) -> TransformerConfig:
    from trainer.models import load_transformer

    return load_transformer(path).config


def test_small_models_do_not_take_the_published_values(config: Path, models: Path) -> None:
    variant = get_variant(T2V_VARIANT)
    request = SampleRequest.of(Prompt(prompt="a cat", step_cache="teacache"), variant)
    files = {"low_noise": models / "transformer.safetensors"}
    with pytest.raises(ConfigError, match="does not know"):
        step_cache_values(load_config(config), variant, lambda: files, [request])


def test_nothing_is_read_without_a_step_cache(config: Path) -> None:
    request = SampleRequest.of(Prompt(prompt="a cat"), get_variant(T2V_VARIANT))

    def files() -> Any:
        raise AssertionError("asked for")

    found = step_cache_values(load_config(config), VARIANTS[T2V_VARIANT], files, [request])
    assert found.measured is None


def test_the_shipped_models_are_known(config: Path) -> None:
    for name, files in (
        (T2V_VARIANT, {"low_noise": asset("t2v")}),
        (
            EXPERT_VARIANT,
            {"low_noise": asset("low_noise"), "high_noise": asset("high_noise")},
        ),
    ):
        variant = get_variant(name)
        requests = [
            SampleRequest.of(Prompt(prompt="a", step_cache=method), variant)
            for method in ("teacache", "magcache")
        ]
        found = step_cache_values(load_config(config), variant, lambda f=files: f, requests)
        assert found.measured is not None
        assert set(found.measured.experts) == set(files)
