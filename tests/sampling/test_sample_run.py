"""The job `sample` from a config to events."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from trainer.contract.config import Prompt
from trainer.contract.errors import ConfigError
from trainer.contract.jobs import SampleJobRequest
from trainer.contract.lora_use import LoRAUse
from trainer.contract.variants import TransformerConfig
from trainer.jobs.sample_run import run
from trainer.models.wan.loading import save_transformer
from trainer.models.wan.tiny import write_tiny_text_encoder, write_tiny_vae
from trainer.models.wan.transformer import WanTransformer
from trainer.sampling.results import describe_file
from trainer.sampling.video_io import read_metadata, read_video

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
num_frames = 5
num_steps = 2
[[sampling.prompts]]
prompt = "a cat"
[[sampling.prompts]]
prompt = "a dog"
seed = 5
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


def write_models(folder: Path) -> Path:
    write_tiny_vae(folder / "vae.safetensors")
    write_tiny_text_encoder(folder / "text.safetensors", ["a cat", "a dog on a mat"], text_dim=32)
    shape = TransformerConfig(
        dim=24, ffn_dim=48, num_heads=2, num_layers=2, text_dim=32, freq_dim=16
    )
    transformer = WanTransformer(shape)
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(transformer.head.head.weight, std=0.2, generator=generator)
    transformer.variant_name = "wan2.1-t2v-1.3b"
    save_transformer(transformer, folder / "transformer.safetensors")
    return folder


@pytest.fixture
def config(models: Path, tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG.format(folder=models), encoding="utf-8")
    return path


def events_of(request: SampleJobRequest) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    run(request, lambda kind, /, **fields: events.append({"type": kind, **fields}))
    return events


def write_lora(path: Path, value: float) -> Path:
    name = "diffusion_model.blocks.0.self_attn.q"
    path.parent.mkdir(parents=True, exist_ok=True)
    down, up = torch.full((4, 24), value), torch.full((24, 4), value)
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, path)
    return path


def test_prompts_of_the_config(config: Path, tmp_path: Path) -> None:
    events = events_of(SampleJobRequest(config=config, output=tmp_path / "out"))
    samples = [event for event in events if event["type"] == "sample"]
    assert [(s["prompt"], s["seed"]) for s in samples] == [("a cat", 42), ("a dog", 5)]
    for sample in samples:
        assert read_video(Path(sample["path"])).frames.shape == (5, 32, 32, 3)
    assert events[-1]["type"] == "end"
    assert {event["type"] for event in events} == {"phase", "sample", "end"}


def test_prompts_of_the_request_and_the_newest_output_of_a_run(
    config: Path, tmp_path: Path
) -> None:
    older = write_lora(tmp_path / "run/output/cats-step00000002.safetensors", 0.1)
    newer = write_lora(tmp_path / "run/output/cats.safetensors", 0.2)
    os.utime(older, (1, 1))
    extra = write_lora(tmp_path / "extra.safetensors", 0.3)
    request = SampleJobRequest(
        config=config,
        prompts=(Prompt(prompt="a bird", seed=9, num_frames=1),),
        loras=(LoRAUse(path=extra, strength=0.5),),
        run_dir=tmp_path / "run",
        output=tmp_path / "out",
    )
    (sample,) = [event for event in events_of(request) if event["type"] == "sample"]
    metadata = read_metadata(Path(sample["path"]))
    assert metadata["loras"] == [
        {**describe_file(extra), "strength": 0.5},
        {**describe_file(newer), "strength": 1.0},
    ]
    assert metadata["loras"][0]["sha256"] == hashlib.sha256(extra.read_bytes()).hexdigest()


def test_a_prompt_file_wins_over_the_config(config: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a bird --d 3 --f 1\n", encoding="utf-8")
    request = SampleJobRequest(
        config=config, prompts_file=tmp_path / "p.txt", output=tmp_path / "out"
    )
    (sample,) = [event for event in events_of(request) if event["type"] == "sample"]
    assert (sample["prompt"], sample["seed"]) == ("a bird", 3)


def test_a_run_without_an_output_says_so(config: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match="no output"):
        events_of(SampleJobRequest(config=config, run_dir=tmp_path / "run"))
