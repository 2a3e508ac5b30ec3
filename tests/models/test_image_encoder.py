"""CLIP's vision tower from every layout against transformers, and its preprocessing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.contract.errors import DataError, ModelFileError
from trainer.models.wan.image_encoder import (
    ImageEncoderConfig,
    build_clip_vision,
    load_image_encoder,
    original_source,
    preprocess,
)
from trainer.models.wan.tiny import write_tiny_image_encoder

LAYOUTS = {"comfy": "clip_vision_h.safetensors", "official": "clip.pth", "diffusers": "clip"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("clip")
    for layout, name in LAYOUTS.items():
        write_tiny_image_encoder(home / layout / name, layout=layout)
    return home


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 60, 90, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_transformers(folder, images, layout):
    from transformers import CLIPVisionModel

    model = CLIPVisionModel.from_pretrained(folder / "diffusers/clip").eval()
    with torch.no_grad():
        expected = model(preprocess(images), output_hidden_states=True).hidden_states[-2]
    features = load_image_encoder(folder / layout / LAYOUTS[layout])(images)
    assert features.shape == (2, 257, 80)
    assert expected.std() > 0.1
    assert (features - expected).abs().max() < 2e-5


def test_last_layer_and_final_norm_do_not_count(folder, images, tmp_path):
    state = load_file(folder / "comfy" / LAYOUTS["comfy"])
    expected = load_image_encoder(folder / "comfy" / LAYOUTS["comfy"])(images)
    changed = {
        name: torch.zeros_like(t) if ".layers.1." in name or "post_layernorm" in name else t
        for name, t in state.items()
    }
    save_file(changed, tmp_path / "x.safetensors")
    assert torch.equal(load_image_encoder(tmp_path / "x.safetensors")(images), expected)
    changed = {n: torch.zeros_like(t) if ".layers.0." in n else t for n, t in state.items()}
    save_file(changed, tmp_path / "y.safetensors")
    assert not torch.equal(load_image_encoder(tmp_path / "y.safetensors")(images), expected)


def test_full_size_names_and_counts():
    with torch.device("meta"):
        model = build_clip_vision(ImageEncoderConfig())
    parameters = dict(model.named_parameters())
    assert sum(p.numel() for p in parameters.values()) == 630_766_080
    sources = [original_source(name).name for name in parameters]
    # Query, key and value share one tensor in the open-clip file.
    assert len(set(sources)) == len(parameters) - 2 * 2 * 32 == 391
    assert sources.count("visual.transformer.31.attn.to_qkv.weight") == 3
    assert "visual.pos_embedding" in sources


def test_thirds_of_the_fused_projection_are_query_key_value(folder):
    state = torch.load(folder / "official/clip.pth", weights_only=True)
    layer = load_image_encoder(folder / "official/clip.pth").model.encoder.layers[0].self_attn
    fused = state["visual.transformer.0.attn.to_qkv.weight"]
    for part, name in zip(fused.split(80), ("q_proj", "k_proj", "v_proj"), strict=True):
        assert torch.equal(getattr(layer, name).weight, part)
    # A part must not keep the fused tensor in memory.
    assert layer.q_proj.weight.untyped_storage().nbytes() == 80 * 80 * 4


def test_text_tower_is_ignored(folder, images, tmp_path):
    state = torch.load(folder / "official/clip.pth", weights_only=True)
    extra = {"textual.head.0.weight": torch.zeros(3), "log_scale": torch.zeros(())}
    torch.save(state | extra | {"visual.head": torch.zeros(80, 64)}, tmp_path / "full.pth")
    expected = load_image_encoder(folder / "official/clip.pth")(images)
    assert torch.equal(load_image_encoder(tmp_path / "full.pth")(images), expected)


def test_projection_of_comfy_files_is_ignored(folder, tmp_path):
    state = load_file(folder / "comfy" / LAYOUTS["comfy"])
    extra = {
        "visual_projection.weight": torch.zeros(64, 80),
        "vision_model.embeddings.position_ids": torch.arange(257)[None],
    }
    save_file(state | extra, tmp_path / "x.safetensors")
    assert load_image_encoder(tmp_path / "x.safetensors").config.num_layers == 2


def bicubic_without_antialias(image: np.ndarray, size: int) -> np.ndarray:
    """Cubic convolution with a = -0.75 at pixel centres, borders repeated; in float64."""

    def kernel(x: float) -> float:
        x, a = abs(x), -0.75
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    def matrix(length: int) -> np.ndarray:
        result = np.zeros((size, length))
        for i in range(size):
            centre = (i + 0.5) * length / size - 0.5
            for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
                result[i, min(max(tap, 0), length - 1)] += kernel(centre - tap)
        return result

    return matrix(image.shape[0]) @ image @ matrix(image.shape[1]).T


@pytest.mark.parametrize(("height", "width"), [(480, 832), (60, 90)])
def test_preprocessing_squashes_the_whole_picture(height, width):
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1
    pixels = preprocess(image)
    assert pixels.shape == (1, 3, 224, 224)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    for channel in range(3):
        squashed = bicubic_without_antialias(image[0, channel].double().numpy(), 224)
        expected = (squashed * 0.5 + 0.5 - mean[channel]) / std[channel]
        # Positions are float32 in torch; antialiasing or a crop would differ by more than 1.
        assert np.abs(pixels[0, channel].numpy() - expected).max() < 1e-3


def test_wrong_shapes_are_refused(folder):
    encoder = load_image_encoder(folder / "comfy" / LAYOUTS["comfy"])
    with pytest.raises(DataError, match="batch, 3, height, width"):
        encoder(torch.zeros(3, 8, 8))


def test_other_files_are_refused(folder, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelFileError, match="not a CLIP vision tower"):
        load_image_encoder(tmp_path / "x.safetensors")
    state = load_file(folder / "comfy" / LAYOUTS["comfy"])
    save_file(state | {"vision_model.extra": torch.zeros(1)}, tmp_path / "y.safetensors")
    with pytest.raises(ModelFileError, match=r"vision_model\.extra"):
        load_image_encoder(tmp_path / "y.safetensors")
    del state["vision_model.encoder.layers.1.mlp.fc2.bias"]
    save_file(state, tmp_path / "z.safetensors")
    with pytest.raises(ModelFileError, match=r"layers\.1\.mlp\.fc2\.bias"):
        load_image_encoder(tmp_path / "z.safetensors")


def test_another_clip_is_refused(tmp_path):
    # ViT-L is 1024 wide: its head count cannot be told, and Wan does not use it.
    model = build_clip_vision(ImageEncoderConfig(dim=64, num_layers=1, num_heads=1, ffn_dim=8))
    save_file(model.state_dict(), tmp_path / "vit-l.safetensors")
    with pytest.raises(ModelFileError, match="64 wide"):
        load_image_encoder(tmp_path / "vit-l.safetensors")


def test_dtype(folder, images):
    encoder = load_image_encoder(folder / "comfy" / LAYOUTS["comfy"], dtype=torch.bfloat16)
    exact = load_image_encoder(folder / "comfy" / LAYOUTS["comfy"])(images)
    features = encoder.to("cpu")(images)
    assert features.dtype == encoder.dtype == torch.bfloat16
    assert (features - exact).norm() / exact.norm() < 0.03
