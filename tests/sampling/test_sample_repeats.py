"""The whole job again, and with other prompts around: the same latents and frames, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from tests.e2e.project import tiny_transformer
from trainer.contract.config import Prompt
from trainer.contract.jobs import SampleJobRequest
from trainer.contract.lora_use import SampleLoRA
from trainer.jobs.sample_run import run
from trainer.models.wan.loading import save_transformer
from trainer.models.wan.tiny import write_tiny_text_encoder, write_tiny_vae
from trainer.models.wan.vae import WanVAE
from trainer.sampling.video_io import read_video

CONFIG = """
name = "cats"
[model]
variant = "{variant}"
transformer = "{folder}/low.safetensors"
{high}
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
num_steps = 4
"""
PROMPTS = {
    "cat": {"prompt": "a cat", "seed": 1},
    "still": {"prompt": "a dog", "seed": 2, "num_frames": 1, "negative_prompt": "a cat"},
    "euler": {"prompt": "a cat", "seed": 3, "solver": "euler", "guidance_scale": 1.0},
    "longer": {"prompt": "a dog on a mat", "seed": 4, "num_frames": 9, "num_steps": 5},
}


@dataclass
class Made:
    """What a run of the job made, in order."""

    files: list[bytes] = field(default_factory=list)
    frames: list[np.ndarray[Any, Any]] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)


def frames_of(path: Path) -> np.ndarray[Any, Any]:
    if path.suffix == ".png":
        with Image.open(path) as image:
            return np.asarray(image)
    return read_video(path).frames


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_vae(folder / "vae.safetensors", base_dim=2)
    write_tiny_text_encoder(folder / "text.safetensors", ["a cat", "a dog on a mat"], text_dim=32)
    for seed, name in enumerate(("low", "high")):
        torch.manual_seed(seed)
        save_transformer(tiny_transformer(seed), folder / f"{name}.safetensors")
    random = torch.Generator().manual_seed(5)
    names = [f"diffusion_model.blocks.{i}.cross_attn.{part}" for i in range(2) for part in "kv"]
    factors = {
        f"{name}.{factor}.weight": torch.randn(shape, generator=random) / 2
        for name in names
        for factor, shape in (("lora_A", (2, 24)), ("lora_B", (24, 2)))
    }
    save_file(factors, folder / "lora.safetensors")
    return folder


@pytest.fixture
def latents(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The latents of each sample, as the VAE is given them."""
    seen: list[Tensor] = []
    decode = WanVAE.decode_chunks

    def recording(self: WanVAE, latents_BCFHW: Tensor, **how: bool) -> Iterator[Tensor]:
        seen.append(latents_BCFHW.clone())
        return decode(self, latents_BCFHW, **how)

    monkeypatch.setattr(WanVAE, "decode_chunks", recording)
    return seen


@pytest.mark.parametrize(
    ("variant", "lora"), [("wan2.1-t2v-1.3b", False), ("wan2.2-t2v-a14b", True)]
)
def test_a_sample_does_not_depend_on_the_others(
    models: Path, tmp_path: Path, latents: list[Tensor], variant: str, lora: bool
) -> None:
    config = tmp_path / "config.toml"
    high = ""
    if "2.2" in variant:
        high = f'expert = "low_noise"\ntransformer_high_noise = "{models}/high.safetensors"'
    config.write_text(CONFIG.format(folder=models, variant=variant, high=high), encoding="utf-8")
    loras = (SampleLoRA(path=models / "lora.safetensors"),) if lora else ()

    def made(*names: str) -> Made:
        latents.clear()
        paths: list[Path] = []
        torch.manual_seed(len(names))  # the global state must not matter

        def emit(kind: str, /, **fields: Any) -> None:
            if kind == "sample":
                paths.append(Path(fields["path"]))

        prompts = tuple(Prompt.model_validate(PROMPTS[name]) for name in names)
        output = tmp_path / f"out {len(list(tmp_path.iterdir()))}"
        run(SampleJobRequest(config=config, prompts=prompts, loras=loras, output=output), emit)
        return Made([p.read_bytes() for p in paths], [frames_of(p) for p in paths], list(latents))

    every = list(PROMPTS)
    first = made(*every)
    assert len(first.latents) == len(first.files) == len(every)
    assert all(values.std() > 0.1 for values in first.latents)
    assert made(*every).files == first.files
    for names in (every[::-1], every[2:3]):
        again = made(*names)
        for place, name in enumerate(names):
            before = every.index(name)
            assert torch.equal(again.latents[place], first.latents[before])
            assert np.array_equal(again.frames[place], first.frames[before])
