"""The pipeline with stand-ins: who is called with what, and that nothing is left behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from sampling_fakes import FakeImageEncoder, FakeTransformer, FakeVae

from trainer.contract.config import Prompt
from trainer.contract.errors import ConfigError
from trainer.contract.variants import get_variant
from trainer.sampling.conditions import encode_texts
from trainer.sampling.pipeline import (
    Expert,
    SamplingModels,
    decode_frames,
    expert_at,
    generate,
    initial_noise,
)
from trainer.sampling.requests import SampleRequest

T2V = get_variant("wan2.1-t2v-1.3b")
SMALL = {"width": 32, "height": 32, "num_frames": 5, "num_steps": 3}


def small_request(variant_name: str = T2V.name, **changes: object) -> SampleRequest:
    variant = get_variant(variant_name)
    request = SampleRequest.of(Prompt(prompt="a cat", **SMALL), variant)
    return replace(request, **changes)


def models_for(variant_name: str = T2V.name, **changes: object) -> SamplingModels:
    variant = get_variant(variant_name)
    transformer = changes.pop("transformer", FakeTransformer())
    fields = {
        "variant": variant,
        "transformer": transformer if not hasattr(transformer, "weight") else lambda _: transformer,
        "contexts": {"a cat": torch.ones(3, 8), variant.negative_prompt: torch.zeros(2, 8)},
        "vae": FakeVae(variant.vae_stride, variant.latent_channels),
        "image_encoder": FakeImageEncoder(),
    }
    return SamplingModels(**(fields | changes))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return save_picture(tmp_path / "first.png", 60)


def save_picture(path: Path, value: int) -> Path:
    Image.fromarray(np.full((32, 32, 3), value, dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_the_same_seed_gives_the_same_latents(solver: str) -> None:
    request = small_request(solver=solver)
    first = generate(models_for(), request)
    torch.manual_seed(99)
    assert torch.equal(generate(models_for(), request), first)
    assert first.shape == (1, 16, 2, 4, 4)
    assert first.dtype == torch.float32
    assert not torch.equal(generate(models_for(), replace(request, seed=1)), first)


def test_the_noise_is_what_diffusers_draws() -> None:
    request = small_request(seed=123)
    theirs = randn_tensor(
        (1, 16, 2, 4, 4), generator=torch.Generator("cpu").manual_seed(123), dtype=torch.float32
    )
    assert torch.equal(initial_noise(request, T2V), theirs)


def test_nothing_is_left_behind() -> None:
    transformer = FakeTransformer()
    transformer.train()
    transformer.frozen_part.eval()
    before = transformer.weight.detach().clone()
    state = torch.get_rng_state()
    result = generate(models_for(transformer=transformer), small_request())
    assert torch.equal(torch.get_rng_state(), state)
    assert transformer.training
    assert transformer.part.training
    assert not transformer.frozen_part.training
    assert transformer.weight.grad is None
    assert torch.equal(transformer.weight.detach(), before)
    assert not result.requires_grad
    # Inference tensors would poison a training step that meets them.
    assert not result.is_inference()
    assert torch.is_grad_enabled()
    transformer(result, torch.zeros(1), [torch.zeros(1, 8)]).sum().backward()
    assert transformer.weight.grad is not None


def test_the_mode_is_restored_after_a_failure() -> None:
    class Broken(FakeTransformer):
        def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
            assert not self.training
            raise RuntimeError("broke")

    transformer = Broken()
    with pytest.raises(RuntimeError, match="broke"):
        generate(models_for(transformer=transformer), small_request())
    assert transformer.training
    assert torch.is_grad_enabled()


def test_guidance_makes_two_passes_and_none_makes_one() -> None:
    transformer = FakeTransformer()
    generate(models_for(transformer=transformer), small_request())
    assert len(transformer.calls) == 6
    assert [float(call["context"].mean()) for call in transformer.calls] == [1, 0] * 3
    transformer = FakeTransformer()
    models = models_for(transformer=transformer, contexts={"a cat": torch.ones(3, 8)})
    generate(models, small_request(guidance_scale=(1.0, 1.0)))
    assert len(transformer.calls) == 3


def test_guidance_moves_away_from_the_negative() -> None:
    # Velocity is f(latents) + mean(context): 1 for the prompt, 0 for the negative. One Euler step
    # from sigma 1 to 0 subtracts f + guidance.
    def result(scale: float) -> torch.Tensor:
        request = small_request(num_steps=1, solver="euler", guidance_scale=(scale, scale))
        return generate(models_for(), request)

    torch.testing.assert_close(result(1.0) - result(4.0), torch.full((1, 16, 2, 4, 4), 3.0))
    torch.testing.assert_close(result(0.0) - result(1.0), torch.full((1, 16, 2, 4, 4), 1.0))


def test_experts_take_turns_at_the_boundary_with_their_own_guidance() -> None:
    asked: list[Expert] = []
    experts = {"high_noise": FakeTransformer(1.0), "low_noise": FakeTransformer(2.0)}

    def source(expert: Expert) -> FakeTransformer:
        asked.append(expert)
        return experts[expert]

    name = "wan2.2-t2v-a14b"
    request = small_request(name, num_steps=40, guidance_scale=(1.0, 4.0))
    generate(models_for(name, transformer=source), request)
    assert asked == ["high_noise"] * 26 + ["low_noise"] * 14  # models.md: 26 | 14
    assert len(experts["high_noise"].calls) == 52
    assert len(experts["low_noise"].calls) == 14
    assert min(float(c["timestep"]) for c in experts["high_noise"].calls) == 877
    assert max(float(c["timestep"]) for c in experts["low_noise"].calls) == 865


def test_the_boundary_belongs_to_the_high_noise_expert() -> None:
    variant = get_variant("wan2.2-t2v-a14b")
    assert expert_at(875.0, variant) == "high_noise"
    assert expert_at(874.99, variant) == "low_noise"
    assert expert_at(1000.0, T2V) == "low_noise"


def test_image_to_video_with_clip(picture: Path) -> None:
    name = "wan2.1-i2v-14b"
    transformer = FakeTransformer()
    generate(models_for(name, transformer=transformer), small_request(name, image=picture))
    call = transformer.calls[0]
    assert call["extra_channels"].shape == (1, 20, 2, 4, 4)
    mask = call["extra_channels"][0, :4, :, 0, 0]
    assert mask.tolist() == [[1.0, 0.0]] * 4
    assert call["image_context"].shape == (1, 2, 4)


def test_first_and_last_frame(picture: Path, tmp_path: Path) -> None:
    last = save_picture(tmp_path / "last.png", 200)
    name = "wan2.1-flf2v-14b"
    transformer = FakeTransformer()
    request = small_request(name, image=picture, last_image=last)
    generate(models_for(name, transformer=transformer), request)
    call = transformer.calls[0]
    assert call["extra_channels"][0, :4, :, 0, 0].T.tolist() == [[1, 1, 1, 1], [0, 0, 0, 1]]
    # First image's tokens, then the last one's.
    torch.testing.assert_close(
        call["image_context"][0, :, 0], torch.tensor([60, 60, 200, 200]) / 127.5 - 1
    )


def test_the_last_frame_of_a_model_without_clip_is_in_the_channels(picture: Path) -> None:
    name = "wan2.2-i2v-a14b"
    transformer = FakeTransformer()
    request = small_request(name, image=picture, last_image=picture)
    generate(models_for(name, transformer=transformer), request)
    call = transformer.calls[0]
    assert call["image_context"] is None
    assert call["extra_channels"][0, :4, -1, 0, 0].tolist() == [0, 0, 0, 1]


def test_control_video_with_and_without_an_image(picture: Path) -> None:
    name = "wan2.1-fun-control-1.3b"
    for image, middle in ((None, 0.0), (picture, 60 / 127.5 - 1 + 0.1)):
        transformer = FakeTransformer()
        request = small_request(name, control=picture, image=image)
        generate(models_for(name, transformer=transformer), request)
        extra = transformer.calls[0]["extra_channels"]
        assert extra.shape == (1, 32, 2, 4, 4)
        torch.testing.assert_close(extra[0, 16, :, 0, 0], torch.tensor([middle, 0.0]))
        tokens = transformer.calls[0]["image_context"]
        assert (tokens == 0).all() == (image is None)


def test_5b_image_mode_holds_the_first_frame_at_timestep_zero(picture: Path) -> None:
    name = "wan2.2-ti2v-5b"
    transformer = FakeTransformer()
    request = small_request(name, image=picture, width=64, height=64)
    models = models_for(name, transformer=transformer)
    result = generate(models, request)
    first = torch.full((1, 48, 4, 4), 60 / 127.5 - 1 + 0.1)
    torch.testing.assert_close(result[:, :, 0], first)
    for call in transformer.calls:
        torch.testing.assert_close(call["latents"][:, :, 0], first)
        assert call["timestep"].shape == (1, 2 * 2 * 2)
        assert call["timestep"][0, :4].tolist() == [0.0] * 4
        assert len(call["timestep"][0, 4:].unique()) == 1
    assert float(transformer.calls[0]["timestep"].max()) > 900


def test_5b_text_mode_has_one_timestep() -> None:
    name = "wan2.2-ti2v-5b"
    transformer = FakeTransformer()
    request = small_request(name, width=64, height=64)
    generate(models_for(name, transformer=transformer), request)
    assert transformer.calls[0]["timestep"].shape == (1,)
    assert transformer.calls[0]["extra_channels"] is None


def test_missing_encoders_are_named(picture: Path) -> None:
    name = "wan2.1-i2v-14b"
    request = small_request(name, image=picture)
    with pytest.raises(ConfigError, match="VAE"):
        generate(models_for(name, vae=None), request)
    with pytest.raises(ConfigError, match="CLIP"):
        generate(models_for(name, image_encoder=None), request)


def test_requests_are_checked_before_any_work() -> None:
    transformer = FakeTransformer()
    with pytest.raises(ConfigError, match="num_frames"):
        generate(models_for(transformer=transformer), small_request(num_frames=6))
    assert transformer.calls == []


def test_progress_and_stopping() -> None:
    seen: list[tuple[int, int]] = []
    generate(models_for(), small_request(), on_step=lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]

    def stop(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    transformer = FakeTransformer()
    with pytest.raises(KeyboardInterrupt):
        generate(models_for(transformer=transformer), small_request(), on_step=stop)
    assert len(transformer.calls) == 2
    assert transformer.training


def test_the_estimate_is_what_the_velocity_points_at_and_changes_no_bit() -> None:
    request = small_request(solver="euler")
    seen: list[tuple[int, torch.Tensor]] = []
    latents = generate(models_for(), request, on_estimate=lambda *step: seen.append(step))
    assert torch.equal(latents, generate(models_for(), request))
    assert [done for done, _ in seen] == [1, 2, 3]
    # Euler's last step goes all the way to sigma = 0 along the velocity.
    torch.testing.assert_close(seen[-1][1], latents, rtol=0, atol=1e-5)
    assert not torch.equal(seen[0][1], seen[1][1])


def test_the_estimate_holds_the_first_frame(picture: Path) -> None:
    name = "wan2.2-ti2v-5b"
    seen: list[torch.Tensor] = []
    request = small_request(name, image=picture)
    latents = generate(models_for(name), request, on_estimate=lambda _, it: seen.append(it))
    assert torch.equal(seen[0][:, :, :1], latents[:, :, :1])


def test_sixteen_bits_are_decoded_as_finely() -> None:
    latents = torch.linspace(-1.5, 1.5, 5).view(1, 1, 5, 1, 1).expand(1, 16, 5, 2, 2)
    fine = np.stack(list(decode_frames(FakeVae(), latents, bits=16)))
    coarse = np.stack(list(decode_frames(FakeVae(), latents)))
    assert fine.dtype == np.uint16
    assert (fine.min(), fine.max()) == (0, 65535)
    assert np.abs(fine / 257 - coarse).max() <= 0.5


def test_one_frame_makes_an_image() -> None:
    assert generate(models_for(), small_request(num_frames=1)).shape == (1, 16, 1, 4, 4)


def test_decoding_is_lazy_and_rounds_to_bytes() -> None:
    vae = FakeVae()
    latents = torch.linspace(-1.5, 1.5, 5).view(1, 1, 5, 1, 1).expand(1, 16, 5, 2, 2)
    frames = decode_frames(vae, latents)
    first = next(frames)
    assert vae.decoded == 1
    assert torch.is_grad_enabled()
    assert first.shape == (16, 16, 3)
    assert first.dtype == np.uint8
    assert first.max() == 0
    rest = list(frames)
    assert len(rest) == 16
    assert rest[7][0, 0, 0] == 128  # zero is mid grey: round(127.5)
    assert rest[-1].min() == 255


def test_each_text_is_encoded_once_without_gradients() -> None:
    asked: list[str] = []

    def encoder(texts: list[str]) -> list[torch.Tensor]:
        assert not torch.is_grad_enabled()
        asked.extend(texts)
        return [torch.zeros(len(text), 4) for text in texts]

    requests = [small_request(), small_request(seed=2), small_request(guidance_scale=(1.0, 1.0))]
    table = encode_texts(encoder, requests)
    assert asked == ["a cat", T2V.negative_prompt]
    assert table["a cat"].shape == (5, 4)
