"""One-frame mode: one picture at a moment of a clip, given pictures of other moments."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sampling_fakes import FakeImageEncoder, FakeVae

from trainer.contract.config import Prompt
from trainer.contract.errors import ConfigError, DataError
from trainer.contract.one_frame import OneFrame
from trainer.contract.prompts import parse_prompt_line
from trainer.contract.variants import TransformerConfig, get_variant
from trainer.models.wan.conditioning import image_conditioning, one_frame_conditioning
from trainer.models.wan.fan_in import init_fan_in
from trainer.models.wan.rope import axis_sizes, rope_table
from trainer.models.wan.transformer import WanTransformer
from trainer.sampling.conditions import encode_files
from trainer.sampling.pipeline import SamplingModels, generate, initial_noise
from trainer.sampling.requests import SampleRequest, requests_of

I2V = get_variant("wan2.1-i2v-14b")
FLF2V = get_variant("wan2.1-flf2v-14b")
CPU = torch.device("cpu")
USUAL = "target_index=1,control_index=0"


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = []
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def prompt(indices: str, images: list[Path], **fields: object) -> Prompt:
    size = {"width": 32, "height": 32, "num_steps": 2}
    return Prompt(prompt="a", one_frame=indices, control_images=tuple(images), **(size | fields))


def transformer(channels: int = 36) -> WanTransformer:
    shape = TransformerConfig(
        dim=24, ffn_dim=48, num_heads=2, num_layers=2, in_channels=channels, text_dim=8, freq_dim=16
    )
    model = WanTransformer(shape, seed=None)
    init_fan_in(model, 3)
    return model.eval()


def inputs(frames: int) -> dict[str, object]:
    random = torch.Generator().manual_seed(0)
    return {
        "latents_BCFHW": torch.randn(1, 16, frames, 4, 4, generator=random),
        "timestep": torch.tensor([700.0]),
        "context": [torch.randn(3, 8, generator=random)],
        "extra_channels": torch.randn(1, 20, frames, 4, 4, generator=random),
    }


# Positions


def test_frames_turn_by_their_positions() -> None:
    places, head_dim, theta = (0, 2, 7, 1000), 24, 10000.0
    table = rope_table((4, 2, 3), head_dim, theta, CPU, places).view(4, 2, 3, head_dim // 2, 2)
    size = axis_sizes(head_dim)[0]
    for frame, place in enumerate(places):
        for pair in range(size // 2):
            angle = place / np.float64(theta) ** (2 * pair / size)
            expected = torch.tensor([np.cos(angle), np.sin(angle)], dtype=torch.float32)
            assert torch.equal(table[frame, 1, 2, pair], expected)
    usual = rope_table((4, 2, 3), head_dim, theta, CPU).view(4, 2, 3, head_dim // 2, 2)
    assert torch.equal(table[..., size // 2 :, :], usual[..., size // 2 :, :])


def test_the_usual_positions_change_nothing_and_others_do() -> None:
    model, given = transformer(), inputs(3)
    with torch.no_grad():
        usual = model(**given)
        assert torch.equal(model(**given, frame_positions=(0, 1, 2)), usual)
        other = model(**given, frame_positions=(0, 1, 9))
        # Only differences of positions count.
        moved = model(**given, frame_positions=(5, 6, 14))
    assert (other - usual).abs().max() > 1e-3
    torch.testing.assert_close(moved, other, atol=1e-4, rtol=1e-4)
    with pytest.raises(DataError, match="2 frame positions for 3 frames"):
        model(**given, frame_positions=(0, 1))


# Conditioning and the walk


def test_pictures_are_frames_of_their_own() -> None:
    images = [torch.full((1, 3, 16, 24), value) for value in (0.5, -0.5)]
    with torch.no_grad():
        channels = one_frame_conditioning(FakeVae(), images, (2, 0))
    assert channels.shape == (1, 20, 3, 2, 3)
    assert channels[0, :4, :, 0, 0].tolist() == [[1, 0, 1]] * 4
    torch.testing.assert_close(channels[0, 4, :, 0, 0], torch.tensor([-0.4, 0.1, 0.6]))


def test_a_first_picture_is_what_image_to_video_is_given() -> None:
    """With a VAE that encodes grey as grey whatever came before, the two are one construction."""
    image = torch.rand(1, 3, 16, 24)
    with torch.no_grad():
        expected = image_conditioning(FakeVae(), image, 5)
        assert torch.equal(one_frame_conditioning(FakeVae(), [image], (0,)), expected)


def sampled(request: SampleRequest, model: torch.nn.Module) -> torch.Tensor:
    models = SamplingModels(
        variant=get_variant("wan2.2-i2v-a14b"),
        transformer=lambda _: model,
        contexts={"a": torch.ones(3, 8), request.negative_prompt: torch.zeros(2, 8)},
        vae=FakeVae(),
    )
    return generate(models, request)


def test_the_usual_indices_equal_a_frame_of_a_usual_sample(pictures: list[Path]) -> None:
    variant, model = get_variant("wan2.2-i2v-a14b"), transformer()
    first = pictures[:1]
    usual = SampleRequest.of(
        Prompt(prompt="a", image=first[0], width=32, height=32, num_steps=2, num_frames=5), variant
    )
    one = SampleRequest.of(prompt("target_index=1,control_index=0", first), variant)
    video, picture = sampled(usual, model), sampled(one, model)
    assert picture.shape == (1, 16, 1, 4, 4)
    assert torch.equal(picture, video[:, :, 1:])
    later = replace(one, one_frame="target_index=8,control_index=0")
    assert not torch.allclose(sampled(later, model), picture, atol=1e-3)


def test_pictures_keep_their_indices_in_any_order(pictures: list[Path]) -> None:
    def conditions(indices: str, images: list[Path]):
        request = SampleRequest.of(prompt(indices, images), FLF2V)
        request.check(FLF2V)
        assert initial_noise(request, FLF2V).shape[2] == 3
        return encode_files(request, FLF2V, FakeVae(), FakeImageEncoder())

    given = conditions("target_index=1,control_index=0;2", pictures)
    turned = conditions("control_index=2;0,target_index=1", pictures[::-1])
    assert given.frame_positions == turned.frame_positions == (0, 1, 2)
    assert torch.equal(given.extra_channels_BCFHW, turned.extra_channels_BCFHW)
    assert given.image_context_BTD.shape[1] == 4  # two tokens of each


# What is refused


def test_musubi_s_form_is_read(pictures: list[Path]) -> None:
    assert OneFrame.parse("target_index=1,control_index=0;10") == OneFrame(1, (0, 10))
    assert OneFrame.parse("control_index=3, target_index=0").positions == (0, 3)
    line = parse_prompt_line("a --of target_index=1,control_index=0;2 --ci a.png --ci b.png")
    assert line.one_frame == "target_index=1,control_index=0;2"
    assert line.control_images == (Path("a.png"), Path("b.png"))
    with pytest.raises(ConfigError, match="given twice"):
        parse_prompt_line("a --of target_index=1 --of target_index=2")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("target_index=1", "at least one control_index"),
        ("control_index=0", "one target_index"),
        ("target_index=1;2,control_index=0", "one target_index"),
        ("target_index=x,control_index=0", "no whole numbers"),
        ("target_index=1,control_index=0,no_2x=1", "'no_2x' is unknown"),
        ("target_index=0,control_index=0", "must differ"),
        ("target_index=1024,control_index=0", "from 0 to 1023"),
        ("", "no whole numbers"),
    ],
)
def test_other_forms_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        OneFrame.parse(text)
    assert caught.value.problems[0].key == "one_frame"


@pytest.mark.parametrize(
    ("variant", "indices", "count", "fields", "key", "words"),
    [
        ("wan2.1-t2v-14b", USUAL, 1, {}, "one_frame", "not given"),
        ("wan2.1-i2v-14b", f"{USUAL};2", 1, {}, "control_images", "1 control images for 2"),
        ("wan2.1-flf2v-14b", USUAL, 1, {}, "one_frame", "two control images"),
        ("wan2.1-i2v-14b", USUAL, 1, {"num_frames": 5}, "num_frames", "one frame"),
        ("wan2.1-i2v-14b", "target_index=1", 1, {}, "one_frame", "control_index"),
        ("wan2.1-i2v-14b", USUAL, 1, {"video": Path()}, "video", "use control_images"),
    ],
)
def test_what_cannot_be_made_is_refused(
    pictures: list[Path], variant: str, indices: str, count: int, fields: dict, key: str, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        requests_of([prompt(indices, pictures[:count], **fields)], get_variant(variant))
    (problem,) = caught.value.problems
    assert problem.key == f"prompts[0].{key}"
    assert words in str(problem)


def test_control_images_alone_mean_nothing(pictures: list[Path]) -> None:
    given = Prompt(prompt="a", image=pictures[0], control_images=tuple(pictures))
    with pytest.raises(ConfigError, match="without one_frame"):
        requests_of([given], I2V)
