"""Every layout a Wan VAE comes in, and files that are something else."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers_vae import reference_of
from safetensors.torch import load_file, save_file

from trainer.contract.errors import ConfigError, ModelFileError
from trainer.models.wan.tiny import tiny_vae_config, write_tiny_vae
from trainer.models.wan.vae import VAEConfig, WanVAE, load_vae, save_vae, vae_metadata

VERSIONS = ("2.1", "2.2")


@pytest.fixture(params=VERSIONS)
def vae(request) -> WanVAE:
    return WanVAE.random(tiny_vae_config(request.param), seed=7)


def assert_same(loaded: WanVAE, vae: WanVAE) -> None:
    assert loaded.config == vae.config
    expected = vae.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_own_file(vae, tmp_path):
    save_vae(vae, tmp_path / "vae.safetensors")
    assert_same(load_vae(tmp_path / "vae.safetensors"), vae)


def test_official_file_needs_no_metadata(vae, tmp_path):
    torch.save(vae.state_dict(), tmp_path / "vae.pth")
    # The official folder's config.json is the transformer's.
    (tmp_path / "config.json").write_text(json.dumps({"dim": 1536, "num_heads": 12}))
    assert_same(load_vae(tmp_path / "vae.pth"), vae)


def test_prefixed_file(vae, tmp_path):
    state = {f"first_stage_model.{name}": t for name, t in vae.state_dict().items()}
    save_file(state, tmp_path / "vae.safetensors")
    assert_same(load_vae(tmp_path / "vae.safetensors"), vae)


@pytest.mark.parametrize("version", VERSIONS)
def test_diffusers_folder(version, tmp_path):
    config = VAEConfig(
        version=version,
        base_dim=2,
        decoder_base_dim=2,
        z_dim=4,
        latents_mean=(0.5, -1.0, 0.0, 2.0),
        latents_std=(1.0, 2.0, 0.5, 3.0),
    )
    torch.manual_seed(0)
    reference = reference_of(config)
    reference.save_pretrained(tmp_path / "vae")
    loaded = load_vae(tmp_path / "vae")
    assert loaded.config == config
    video = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    with torch.no_grad():
        mean = reference.encode(video).latent_dist.mean
        torch.testing.assert_close(loaded.encode_moments(video)[0], mean, atol=2e-5, rtol=0)


def test_dtype_and_layout_of_memory(vae, tmp_path):
    save_vae(vae, tmp_path / "vae.safetensors")
    loaded = load_vae(tmp_path / "vae.safetensors", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.dtype == torch.bfloat16
    # Not mapped: replacing or deleting the file does not touch the loaded model.
    before = loaded.conv1.weight.clone()
    (tmp_path / "vae.safetensors").unlink()
    assert torch.equal(loaded.conv1.weight, before)


def test_a_saved_nano_vae_keeps_its_own_statistics(tmp_path):
    config = VAEConfig(
        base_dim=1, decoder_base_dim=2, z_dim=2, latents_mean=(0.25, -1.0), latents_std=(2.0, 0.5)
    )
    vae = WanVAE.random(config)
    save_vae(vae, tmp_path / "nano.safetensors")
    loaded = load_vae(tmp_path / "nano.safetensors")
    assert loaded.config == config
    mean = torch.randn(1, 2, 1, 2, 2)
    torch.testing.assert_close(loaded.denormalise(loaded.normalise(mean)), mean)
    expected = (mean - torch.tensor([0.25, -1.0]).view(1, 2, 1, 1, 1)) / torch.tensor(
        [2.0, 0.5]
    ).view(1, 2, 1, 1, 1)
    torch.testing.assert_close(loaded.normalise(mean), expected)


def test_statistics_of_an_unknown_size_are_not_guessed(tmp_path):
    with pytest.raises(ConfigError, match="5 latent channels"):
        VAEConfig(z_dim=5)
    sizes = {"z_dim": 5, "base_dim": 1, "decoder_base_dim": 1}
    config = VAEConfig(**sizes, latents_mean=(0.0,) * 5, latents_std=(1.0,) * 5)
    save_file(WanVAE.random(config).state_dict(), tmp_path / "bare.safetensors")
    with pytest.raises(ModelFileError, match="5 latent channels"):
        load_vae(tmp_path / "bare.safetensors")


def test_a_missing_tensor_is_named(vae, tmp_path):
    state = vae.state_dict()
    del state["decoder.head.2.bias"]
    save_file(state, tmp_path / "vae.safetensors")
    with pytest.raises(ModelFileError, match=r"decoder\.head\.2\.bias"):
        load_vae(tmp_path / "vae.safetensors")


def test_an_unknown_tensor_is_refused(vae, tmp_path):
    state = vae.state_dict() | {"decoder.extra.weight": torch.zeros(2)}
    save_file(state, tmp_path / "vae.safetensors")
    with pytest.raises(ModelFileError, match=r"decoder\.extra\.weight"):
        load_vae(tmp_path / "vae.safetensors")


def test_a_wrong_shape_is_named(vae, tmp_path):
    state = vae.state_dict()
    state["decoder.conv1.bias"] = torch.zeros(3)
    save_file(state, tmp_path / "vae.safetensors")
    with pytest.raises(ModelFileError, match=r"decoder\.conv1\.bias .* shape \(3,\)"):
        load_vae(tmp_path / "vae.safetensors")


def test_metadata_that_contradicts_the_tensors_is_refused(vae, tmp_path):
    other = VAEConfig(version=vae.version, base_dim=8, decoder_base_dim=8, z_dim=vae.config.z_dim)
    save_file(vae.state_dict(), tmp_path / "vae.safetensors", vae_metadata(other))
    with pytest.raises(ModelFileError, match="base_dim = 8, its tensors 4"):
        load_vae(tmp_path / "vae.safetensors")


@pytest.mark.parametrize("text", ["{", "[]", '{"z_dim": "many"}', '{"latents_std": [0]}'])
def test_broken_metadata_is_an_error_for_people(text, tmp_path):
    vae = WanVAE.random(tiny_vae_config())
    save_file(vae.state_dict(), tmp_path / "vae.safetensors", {"menma.config": text})
    with pytest.raises(ModelFileError):
        load_vae(tmp_path / "vae.safetensors")


def test_a_transformer_is_recognised_as_such(tmp_path):
    save_file({"blocks.0.self_attn.q.weight": torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelFileError, match="not a Wan VAE") as caught:
        load_vae(tmp_path / "x.safetensors")
    assert "transformer" in caught.value.hint


def test_integer_weights_are_refused(vae, tmp_path):
    state = vae.state_dict()
    state["conv1.weight"] = state["conv1.weight"].to(torch.int8)
    save_file(state, tmp_path / "vae.safetensors")
    with pytest.raises(ModelFileError, match=r"conv1\.weight .*int8"):
        load_vae(tmp_path / "vae.safetensors")


def test_tiny_vae_is_the_same_every_time(tmp_path):
    write_tiny_vae(tmp_path / "a.safetensors", "2.2")
    write_tiny_vae(tmp_path / "b.safetensors", "2.2")
    write_tiny_vae(tmp_path / "c.safetensors", "2.2", seed=1)
    a, b, c = (load_file(tmp_path / f"{name}.safetensors") for name in "abc")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a)
