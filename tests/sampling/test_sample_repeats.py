"""The whole job again, and with other prompts around: the same latents and frames, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
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
    """What a run of the job made, in order.

    Frames are looked at before they are encoded: x264 itself does not always make the same file of
    the same frames.
    """

    latents: list[Tensor] = field(default_factory=list)
    frames: list[list[Tensor]] = field(default_factory=list)
    stills: list[bytes] = field(default_factory=list)
    """PNG files, whose encoder is exact."""


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
def seen(monkeypatch: pytest.MonkeyPatch) -> Made:
    """What the VAE is given and what it makes of it."""
    seen = Made()
    decode = WanVAE.decode_chunks

    def recording(self: WanVAE, latents_BCFHW: Tensor, **how: bool) -> Iterator[Tensor]:
        seen.latents.append(latents_BCFHW.clone())
        seen.frames.append([])
        for chunk in decode(self, latents_BCFHW, **how):
            seen.frames[-1].append(chunk.clone())
            yield chunk

    monkeypatch.setattr(WanVAE, "decode_chunks", recording)
    return seen


@pytest.mark.parametrize(
    ("variant", "lora"), [("wan2.1-t2v-1.3b", False), ("wan2.2-t2v-a14b", True)]
)
def test_a_sample_does_not_depend_on_the_others(
    models: Path, tmp_path: Path, seen: Made, variant: str, lora: bool
) -> None:
    config = tmp_path / "config.toml"
    high = ""
    if "2.2" in variant:
        high = f'expert = "low_noise"\ntransformer_high_noise = "{models}/high.safetensors"'
    config.write_text(CONFIG.format(folder=models, variant=variant, high=high), encoding="utf-8")
    loras = (SampleLoRA(path=models / "lora.safetensors"),) if lora else ()

    def made(*names: str) -> Made:
        seen.latents, seen.frames = [], []
        paths: list[Path] = []
        torch.manual_seed(len(names))  # the global state must not matter

        def emit(kind: str, /, **fields: Any) -> None:
            if kind == "sample":
                paths.append(Path(fields["path"]))

        prompts = tuple(Prompt.model_validate(PROMPTS[name]) for name in names)
        output = tmp_path / f"out {len(list(tmp_path.iterdir()))}"
        run(SampleJobRequest(config=config, prompts=prompts, loras=loras, output=output), emit)
        stills = [path.read_bytes() for path in paths if path.suffix == ".png"]
        return Made(seen.latents, seen.frames, stills)

    every = list(PROMPTS)
    first = made(*every)
    assert len(first.latents) == len(first.frames) == len(every)
    assert len(first.stills) == 1
    assert all(values.std() > 0.1 for values in first.latents)
    for names in (every, every[::-1], every[2:3]):
        again = made(*names)
        for place, name in enumerate(names):
            before = every.index(name)
            assert torch.equal(again.latents[place], first.latents[before])
            assert equal(again.frames[place], first.frames[before])
        assert again.stills == (first.stills if "still" in names else [])


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
