"""Previews: colours of the latents, their files and events, and that they change no bit."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.contract.config import Prompt, load_config
from trainer.contract.variants import get_variant
from trainer.jobs.sample_preview import Previews, previews
from trainer.models import load_vae
from trainer.models.wan.tiny import write_tiny_vae
from trainer.nano.files import asset
from trainer.sampling.preview import PUBLISHED, fit_projection, write_strip
from trainer.sampling.requests import SampleRequest

CPU = torch.device("cpu")
T2V = get_variant("wan2.1-t2v-1.3b")


@pytest.mark.parametrize(("version", "channels"), [("2.1", 16), ("2.2", 48)])
def test_the_published_factors(version: str, channels: int) -> None:
    projection = PUBLISHED[version]
    assert projection.factors_3C.shape == (3, channels)
    grey = projection.frames(torch.zeros(channels, 2, 3, 5))
    assert grey.shape == (2, 3, 5, 3)
    expected = ((projection.bias_3 + 1) * 127.5).to(torch.uint8).numpy()
    assert (grey == expected).all()
    # One channel after the other, in float64, against the formula written out.
    latents = torch.randn(channels, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    sums = [
        sum(float(f) * float(z) for f, z in zip(row, latents.flatten(), strict=True)) + float(bias)
        for row, bias in zip(projection.factors_3C, projection.bias_3, strict=True)
    ]
    wanted = [min(max((value + 1) * 127.5, 0), 255) for value in sums]
    assert np.abs(projection.frames(latents)[0, 0, 0].astype(float) - wanted).max() <= 1


def test_brighter_latents_of_wan_are_those_of_channels_that_are_bright() -> None:
    """ComfyUI's table, spot-checked: channels 2 and 14 brighten, channel 6 darkens."""
    factors = PUBLISHED["2.1"].factors_3C
    assert factors[:, 2].tolist() == pytest.approx([0.3568, 0.2548, 0.1747])
    assert factors[:, 6].tolist() == pytest.approx([-0.3477, -0.4059, -0.2925])
    assert factors[:, 14].tolist() == pytest.approx([0.3477, 0.2275, 0.2950])
    assert PUBLISHED["2.2"].factors_3C[:, 39].tolist() == pytest.approx([-0.3441, -0.3543, -0.2008])


def test_a_vae_of_another_size_is_fitted() -> None:
    """The embedded VAE's colours of a picture it was not fitted on."""
    vae = load_vae(asset("vae"))
    projection = fit_projection(vae, vae.stride, CPU)
    y, x = torch.meshgrid(torch.linspace(0, 1, 96), torch.linspace(0, 1, 96), indexing="ij")
    disc = ((x - 0.4) ** 2 + (y - 0.5) ** 2 < 0.06).float()
    image = torch.stack([disc * 1.6 - 0.8, 0.6 - y, -disc])[None, :, None]
    with torch.no_grad():
        latents = vae.encode(image)[0]
    drawn = projection.frames(latents)[0].astype(float)
    pooled = torch.nn.functional.avg_pool2d(image[:, :, 0], 8)[0].permute(1, 2, 0)
    wanted = ((pooled + 1) * 127.5).numpy()
    assert np.corrcoef(drawn.flatten(), wanted.flatten())[0, 1] > 0.88
    published = PUBLISHED["2.1"].frames(latents)[0].astype(float)
    assert np.abs(drawn - wanted).mean() < 0.5 * np.abs(published - wanted).mean()


def test_a_strip_has_first_and_last_frame_and_is_large_enough_to_see(tmp_path: Path) -> None:
    latents = torch.zeros(16, 21, 60, 104)
    latents[14] = torch.linspace(0, 2, 21)[:, None, None]
    write_strip(tmp_path / "p.png", PUBLISHED["2.1"], latents)
    with Image.open(tmp_path / "p.png") as image:
        assert image.size == (4 * 104 + 3 * 2, 60)
        red = [image.getpixel((column, 30))[0] for column in (50, 156, 262, 368)]
    assert red == sorted(set(red))
    assert (tmp_path / "p.png").stat().st_size < 100_000
    write_strip(tmp_path / "p.png", PUBLISHED["2.1"], torch.zeros(16, 1, 4, 6))
    with Image.open(tmp_path / "p.png") as image:
        assert image.size == (72, 48)


def test_events_name_the_picture_from_the_first_step_on(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    drawn = Previews(
        PUBLISHED["2.1"],
        tmp_path,
        3,
        lambda kind, /, **fields: events.append({"type": kind, **fields}),
    )
    request = SampleRequest.of(Prompt(prompt="a cat", num_steps=7), T2V)
    on_estimate = drawn(1, request, step=40)
    for done in range(1, 8):
        on_estimate(done, torch.zeros(1, 16, 2, 4, 4))
    assert [event["done"] for event in events] == [1, 4]  # 7 is the sample itself
    path = str(tmp_path / "preview_01.png")
    assert events[0] == {
        "type": "preview", "path": path, "index": 1, "done": 1, "total": 7, "step": 40,
        "prompt": "a cat", "seed": 42,
    }  # fmt: skip
    assert [file.name for file in tmp_path.iterdir()] == ["preview_01.png"]


def test_none_are_made_unless_asked_for(tmp_path: Path) -> None:
    write_tiny_vae(tmp_path / "vae.safetensors")
    path = tmp_path / "c.toml"
    path.write_text(f'[model]\nvae = "{tmp_path}/vae.safetensors"\n', encoding="utf-8")
    made = [
        previews(load_config(path, settings), T2V, CPU, tmp_path, lambda *_, **__: None)
        for settings in ([], ["sampling.preview_every_steps=2"])
    ]
    assert made[0] is None
    assert made[1] is not None
    assert made[1].every_steps == 2
    assert made[1].projection is not PUBLISHED["2.1"]  # fitted: the VAE is of another size


def test_a_full_disk_ends_the_previews_and_not_the_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("tempfile.mkstemp", full)
    events: list[tuple[str, dict[str, Any]]] = []
    drawn = Previews(PUBLISHED["2.1"], tmp_path, 1, lambda kind, /, **f: events.append((kind, f)))
    on_estimate = drawn(3, SampleRequest.of(Prompt(prompt="x", num_steps=5), T2V))
    for done in range(1, 6):
        on_estimate(done, torch.zeros(1, 16, 2, 4, 4))
    assert [kind for kind, _ in events] == ["warning"]
    assert events[0][1]["message"].startswith("no more previews of sample 3: ")
