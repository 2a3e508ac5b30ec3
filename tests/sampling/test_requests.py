"""Requests: where each value comes from, and what a model refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from trainer.contract.config import Prompt, SamplingSection
from trainer.contract.errors import ConfigError
from trainer.contract.variants import VARIANTS, get_variant
from trainer.sampling.requests import SampleRequest, requests_of

T2V = get_variant("wan2.1-t2v-1.3b")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (32, 32)).save(path)
    return path


def complete(variant_name: str, picture: Path) -> SampleRequest:
    """A request that the variant accepts, with as few files as it needs."""
    variant = get_variant(variant_name)
    request = SampleRequest.of("a cat", variant)
    match variant.conditioning:
        case "first_frame":
            return replace(request, image=picture)
        case "first_last_frame":
            return replace(request, image=picture, last_image=picture)
        case "control":
            return replace(request, control=picture)
        case _:
            return request


@pytest.mark.parametrize("name", VARIANTS)
def test_the_variants_defaults_are_accepted(name: str, picture: Path) -> None:
    variant = get_variant(name)
    request = complete(name, picture)
    request.check(variant)
    assert request.guidance_scale == variant.guidance_scale
    assert request.negative_prompt == variant.negative_prompt
    shift = 3.0 if name == "wan2.1-i2v-14b" else variant.flow_shift  # its authors' at 480p
    assert (request.num_steps, request.flow_shift) == (variant.num_steps, shift)
    assert (request.width, request.height) == (variant.width, variant.height)


PUBLISHED = {
    # steps, shift at 832x480 and 1280x720, guidance (low, high), frames, fps, size
    "wan2.1-t2v-1.3b": (50, 5, 5, (5, 5), 81, 16, (832, 480)),
    "wan2.1-t2v-14b": (50, 5, 5, (5, 5), 81, 16, (832, 480)),
    "wan2.1-i2v-14b": (40, 3, 5, (5, 5), 81, 16, (832, 480)),
    "wan2.1-flf2v-14b": (50, 16, 16, (5, 5), 81, 16, (832, 480)),
    "wan2.2-t2v-a14b": (40, 12, 12, (3, 4), 81, 16, (832, 480)),
    "wan2.2-i2v-a14b": (40, 5, 5, (3.5, 3.5), 81, 16, (832, 480)),
    "wan2.2-ti2v-5b": (50, 5, 5, (5, 5), 121, 24, (1280, 704)),
}
"""The configs of the Wan repositories, and generate.py's own shift for I2V at 480p."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_defaults_are_the_authors(name: str) -> None:
    variant = get_variant(name)
    small, large = (
        SampleRequest.of(Prompt(prompt="a", width=width, height=height), variant)
        for width, height in ((480, 832), (1280, 704))
    )
    own = SampleRequest.of("a", variant)
    assert PUBLISHED[name] == (
        own.num_steps, small.flow_shift, large.flow_shift, own.guidance_scale, own.num_frames,
        own.fps, (own.width, own.height),
    )  # fmt: skip
    shifted = SampleRequest.of("a", variant, SamplingSection(flow_shift=7.0))
    assert shifted.flow_shift == 7
    assert variant.negative_prompt.startswith(
        {"first_frame": "镜头晃动，", "first_last_frame": "镜头切换，镜头晃动，"}.get(
            variant.conditioning if name.startswith("wan2.1") else "", "色调艳丽"
        )
    )


def test_prompt_wins_over_section_wins_over_variant() -> None:
    section = SamplingSection(width=640, num_steps=10, guidance_scale=2.0, seed=100, fps=8)
    prompt = Prompt(prompt="a", width=320, seed=5)
    request = SampleRequest.of(prompt, T2V, section, index=3)
    assert (request.width, request.height) == (320, T2V.height)
    assert (request.num_steps, request.seed, request.fps) == (10, 5, 8)
    assert request.guidance_scale == (2.0, 2.0)
    assert SampleRequest.of("a", T2V, section, index=3).seed == 103


def test_guidance_of_the_two_experts() -> None:
    variant = get_variant("wan2.2-t2v-a14b")
    section = SamplingSection(guidance_scale=2.0)

    def guidance(**fields: float) -> tuple[float, float]:
        return SampleRequest.of(Prompt(prompt="a", **fields), variant, section).guidance_scale

    assert guidance() == (2.0, 2.0)
    assert guidance(guidance_scale=3.0) == (3.0, 3.0)
    assert guidance(guidance_scale_high_noise=6.0) == (2.0, 6.0)
    assert SampleRequest.of("a", variant).guidance_scale == (3.0, 4.0)


def test_no_guidance_needs_no_negative_text() -> None:
    request = SampleRequest.of(Prompt(prompt="a", guidance_scale=1), T2V)
    assert request.texts == ("a",)
    assert SampleRequest.of("a", T2V).texts == ("a", T2V.negative_prompt)


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"num_frames": 80}, "num_frames", "nearest: 81"),
        ({"num_frames": 82}, "num_frames", "nearest: 81"),
        ({"num_frames": 0}, "num_frames", "nearest: 1"),
        ({"width": 830}, "width", "nearest: 832"),
        ({"height": 8}, "height", "nearest: 16"),
        ({"num_steps": 0}, "num_steps", "1 or more"),
        ({"flow_shift": 0.0}, "flow_shift", "above 0"),
        ({"flow_shift": float("nan")}, "flow_shift", "above 0"),
        ({"fps": 0}, "fps", "1 or more"),
        ({"solver": "eular"}, "solver", "euler"),
        ({"solver": "ddim"}, "solver", "known: dpm++, euler, heun, lcm, unipc"),
        ({"schedule": "betta"}, "schedule", "beta"),
        ({"schedule": "beta"}, "schedule", "unipc cannot start at sigma 1"),
        ({"strength": 0.5}, "strength", "set video"),
        ({"video": Path("none.mp4")}, "video", "none.mp4 does not exist"),
        ({"video": Path(), "strength": 1.5}, "strength", "at most 1"),
        ({"video": Path(), "strength": 0.001}, "strength", "0.02 or more"),
        ({"image": Path("picture.png")}, "image", "cannot use a first frame"),
        ({"control": Path("picture.png")}, "control", "cannot use a control video"),
    ],
)
def test_refusals_name_the_key_and_what_to_do(
    changes: dict[str, object], key: str, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        replace(SampleRequest.of("a", T2V), **changes).check(T2V)
    (problem,) = caught.value.problems
    assert problem.key == key
    assert words in str(problem)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("wan2.1-i2v-14b", ["image"]),
        ("wan2.2-i2v-a14b", ["image"]),
        ("wan2.1-flf2v-14b", ["image", "last_image"]),
        ("wan2.1-fun-control-14b", ["control"]),
    ],
)
def test_models_that_need_files_say_so(name: str, missing: list[str]) -> None:
    variant = get_variant(name)
    with pytest.raises(ConfigError) as caught:
        SampleRequest.of("a", variant).check(variant)
    assert [problem.key for problem in caught.value.problems] == missing


def test_files_must_exist_and_fit_each_other(picture: Path) -> None:
    variant = get_variant("wan2.2-i2v-a14b")
    request = SampleRequest.of("a", variant)
    with pytest.raises(ConfigError, match="does not exist"):
        replace(request, image=Path("gone.png")).check(variant)
    with pytest.raises(ConfigError, match="last frame of its own"):
        replace(request, image=picture, last_image=picture, num_frames=1).check(variant)


def test_5b_takes_an_image_but_does_not_need_one(picture: Path) -> None:
    variant = get_variant("wan2.2-ti2v-5b")
    replace(SampleRequest.of("a", variant), image=picture).check(variant)
    with pytest.raises(ConfigError, match="multiple of 32"):
        replace(SampleRequest.of("a", variant), height=720).check(variant)


def test_a_list_of_prompts_reports_every_mistake_with_its_place() -> None:
    prompts = [Prompt(prompt="a"), Prompt(prompt="b", num_frames=6, width=100)]
    with pytest.raises(ConfigError) as caught:
        requests_of(prompts, T2V)
    assert [p.key for p in caught.value.problems] == ["prompts[1].num_frames", "prompts[1].width"]
    seeds = [r.seed for r in requests_of([Prompt(prompt="a"), Prompt(prompt="b")], T2V)]
    assert seeds == [42, 43]
