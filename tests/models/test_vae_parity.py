"""Both VAEs against diffusers' AutoencoderKLWan with the same weights, float32."""

from __future__ import annotations

import inspect

import pytest
import torch
from diffusers_vae import reference_of
from torch import Tensor
from torch.nn import functional as F

from trainer.models.wan.tiny import tiny_vae_config
from trainer.models.wan.vae import WanVAE
from trainer.models.wan.vae_blocks import RMSNorm, _conv
from trainer.models.wan.vae_config import VAE_21, VAE_22, VAEConfig
from trainer.models.wan.vae_keys import to_diffusers

LIMIT = 2e-5
# Index-weighted sums of the lists in Wan2.2's wan/modules/vae2_2.py.
CHECK_MEAN_22, CHECK_STD_22 = -7.6248, 790.8891
VERSIONS = ("2.1", "2.2")


@pytest.fixture(scope="module", params=VERSIONS)
def pair(request):
    config = tiny_vae_config(request.param)
    if request.param == "2.2":
        config = VAEConfig(version="2.2", base_dim=4, decoder_base_dim=6, z_dim=48)
    vae = WanVAE.random(config, seed=3)
    reference = reference_of(config)
    reference.load_state_dict(
        {to_diffusers(name, config.version): value for name, value in vae.state_dict().items()}
    )
    return vae, reference


def random_video(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@pytest.mark.parametrize("frames", [1, 5, 13])
@torch.no_grad()
def test_encode_equals_diffusers(pair, frames):
    vae, reference = pair
    video = random_video(2, 3, frames, 32, 48)
    posterior = reference.encode(video).latent_dist
    mean, log_variance = vae.encode_moments(video)
    assert posterior.mean.abs().max() > 0.5
    assert distance(mean, posterior.mean) < LIMIT
    assert distance(log_variance.clamp(-30, 20), posterior.logvar) < LIMIT
    centre, spread = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (reference.config.latents_mean, reference.config.latents_std)
    )
    assert distance(vae.encode(video), (posterior.mean - centre) / spread) < LIMIT


@pytest.mark.parametrize("frames", [1, 2, 4])
@torch.no_grad()
def test_decode_equals_diffusers(pair, frames):
    vae, reference = pair
    latents = torch.randn(
        2, vae.latent_channels, frames, 2, 3, generator=torch.Generator().manual_seed(1)
    )
    centre, spread = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (reference.config.latents_mean, reference.config.latents_std)
    )
    expected = reference.decode(latents * spread + centre).sample
    decoded = vae.decode(latents)
    assert (decoded.abs() < 1).float().mean() > 0.3, "all clamped: the comparison would be empty"
    assert distance(decoded, expected) < LIMIT


def test_gradients_equal_diffusers(pair):
    vae, reference = pair
    video = random_video(1, 3, 5, 32, 32)
    ours, theirs = video.clone().requires_grad_(), video.clone().requires_grad_()
    vae.zero_grad()
    reference.zero_grad()
    vae.decode(vae.normalise(vae.encode_moments(ours)[0])).square().mean().backward()
    reference.decode(reference.encode(theirs).latent_dist.mean).sample.square().mean().backward()
    assert ours.grad.abs().max() > 0
    assert distance(ours.grad, theirs.grad) < LIMIT * theirs.grad.abs().max()
    expected = {name: p.grad for name, p in reference.named_parameters()}
    touched = 0
    for name, parameter in vae.named_parameters():
        other = expected[to_diffusers(name, vae.version)]
        scale = max(other.abs().max().item(), 1e-3)
        assert distance(parameter.grad, other) < 1e-4 * scale, name
        touched += int(parameter.grad.abs().max() > 0)
    assert touched == len(expected)


@pytest.mark.parametrize(
    ("config", "parameters", "tensors"),
    [(VAE_21, 126_892_531, 194), (VAE_22, 704_688_668, 196)],
    ids=VERSIONS,
)
def test_full_size_has_the_released_tensors(config, parameters, tensors):
    with torch.device("meta"):
        vae, reference = WanVAE(config), reference_of(config)
    ours = {to_diffusers(n, config.version): t.shape for n, t in vae.state_dict().items()}
    assert len(ours) == tensors
    assert sum(t.numel() for t in vae.parameters()) == parameters
    assert ours == {name: tensor.shape for name, tensor in reference.state_dict().items()}


def test_official_names_of_21_are_those_diffusers_converts():
    # An independent map in the opposite direction; diffusers has none for the 2.2 VAE.
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    with torch.device("meta"):
        names = list(WanVAE(VAE_21).state_dict())
    converted = convert_wan_vae_to_diffusers(dict(zip(names, names, strict=True)))
    assert converted == {to_diffusers(name, "2.1"): name for name in names}


def test_official_names_of_22():
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in WanVAE(VAE_22).state_dict().items()}
    assert shapes["encoder.conv1.weight"] == (160, 12, 3, 3, 3)
    assert shapes["encoder.downsamples.1.downsamples.0.shortcut.weight"] == (320, 160, 1, 1, 1)
    assert shapes["encoder.downsamples.2.downsamples.2.time_conv.weight"] == (640, 640, 3, 1, 1)
    assert shapes["encoder.middle.1.norm.gamma"] == (640, 1, 1)
    assert shapes["decoder.upsamples.0.upsamples.3.time_conv.bias"] == (2048,)
    assert shapes["decoder.upsamples.2.upsamples.3.resample.1.weight"] == (512, 512, 3, 3)
    assert shapes["decoder.upsamples.3.upsamples.0.residual.0.gamma"] == (512, 1, 1, 1)
    assert shapes["decoder.head.2.weight"] == (12, 256, 3, 3, 3)


def test_statistics_of_21_are_diffusers_defaults():
    from diffusers import AutoencoderKLWan

    defaults = inspect.signature(AutoencoderKLWan.__init__).parameters
    assert list(VAE_21.latents_mean) == defaults["latents_mean"].default
    assert list(VAE_21.latents_std) == defaults["latents_std"].default


def test_statistics_of_22():
    # Check sums of the released constants; one wrong digit changes them.
    assert len(VAE_22.latents_mean) == len(VAE_22.latents_std) == 48
    weights = range(1, 49)
    assert sum(w * m for w, m in zip(weights, VAE_22.latents_mean, strict=True)) == pytest.approx(
        CHECK_MEAN_22, abs=1e-9
    )
    assert sum(w * s for w, s in zip(weights, VAE_22.latents_std, strict=True)) == pytest.approx(
        CHECK_STD_22, abs=1e-9
    )


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [
        ((3, 3, 3), (1, 1, 1), (1, 1)),
        ((3, 1, 1), (2, 1, 1), (0, 0)),
        ((1, 3, 3), (1, 2, 2), (0, 0)),
    ],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_convolution_on_the_cpu_equals_conv3d(batch, kernel, stride, padding):
    x = random_video(batch, 3, 7, 6, 5).double().requires_grad_()
    weight, bias = random_video(4, 3, *kernel).double(), random_video(4).double()
    ours = _conv(x, weight, bias, stride, padding)
    theirs = F.conv3d(x, weight, bias, stride=stride, padding=(0, *padding))
    assert distance(ours, theirs) < 1e-12
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, theirs)]
    assert distance(*gradients) < 1e-11


def test_norm_of_black_pixels_has_a_gradient():
    x = torch.zeros(1, 4, 1, 2, 2)
    x[..., 0] = 1
    x.requires_grad_()
    RMSNorm(4)(x).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_a_gpu_gives_the_same(pair):
    vae, _ = pair
    copy = WanVAE(vae.config)
    copy.load_state_dict(vae.state_dict())
    copy.to("cuda")
    video = random_video(1, 3, 5, 32, 48)
    with torch.backends.cudnn.flags(allow_tf32=False):
        latents = copy.encode(video)
        decoded = copy.decode(latents)
    assert latents.device.type == decoded.device.type == "cuda"
    assert distance(latents.cpu(), vae.encode(video)) < 1e-4
    assert distance(decoded.cpu(), vae.decode(latents)) < 1e-3
