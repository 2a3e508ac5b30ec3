"""Shipped transformers: rounded to bfloat16, or fp8_scaled as ComfyUI's files are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from trainer.contract.variants import TransformerConfig
from trainer.models import load_transformer
from trainer.models.wan.transformer import WanTransformer
from trainer.nano.files import ASSETS, FILES, asset, save_bf16, save_fp8_scaled

VARIANT = "wan2.2-t2v-a14b"
BLOCK_LINEARS = {
    *(f"{kind}_attn.{part}" for kind in ("self", "cross") for part in "qkvo"),
    "ffn.0",
    "ffn.2",
}


@pytest.fixture(scope="module")
def model() -> WanTransformer:
    config = TransformerConfig(
        dim=48, ffn_dim=96, num_heads=2, num_layers=2, text_dim=16, freq_dim=16, text_len=8
    )
    transformer = WanTransformer(config, seed=1)
    transformer.variant_name = VARIANT
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) / 20)
        # Rows that need scales of their own, and one that has no scale.
        weight = transformer.blocks[0].self_attn.q.weight
        weight[0] *= 1000
        weight[1] *= 1e-4
        weight[2] = 0
    return transformer


@pytest.fixture(scope="module")
def stored(model: WanTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "scaled.safetensors"
    save_fp8_scaled(model, path)
    return path


def test_names_and_types_are_those_of_fp8_scaled_files(model, stored):
    tensors = load_file(stored)
    scaled = {f"blocks.{index}.{name}" for index in range(2) for name in BLOCK_LINEARS}
    scaled |= {"text_embedding.0", "text_embedding.2", "time_projection.1"}
    scales = {f"{name}.scale_weight" for name in scaled}
    assert set(tensors) == set(model.state_dict()) | scales | {"scaled_fp8"}
    assert tensors["scaled_fp8"].dtype == torch.float8_e4m3fn
    for name, tensor in tensors.items():
        module = name.rpartition(".")[0]
        if name in scales:
            assert tensor.dtype == torch.float32
            assert tensor.shape == tensors[f"{module}.weight"].shape[:1]
        elif name.endswith(".weight") and module in scaled:
            assert tensor.dtype == torch.float8_e4m3fn
        elif name != "scaled_fp8":
            assert tensor.dtype == torch.bfloat16, name


def test_the_error_of_fp8_is_that_of_three_bits(model, stored):
    """Half a unit of the last place: 2^-4 of a normal number, 2^-10 of the row's scale below."""
    loaded = load_transformer(stored, dtype=torch.float32).state_dict()
    suffix = "scale_weight"
    quantised = [name.removesuffix(suffix) for name in load_file(stored) if name.endswith(suffix)]
    for module in quantised:
        name = f"{module}weight"
        given = model.state_dict()[name].double().numpy()
        error = np.abs(loaded[name].double().numpy() - given)
        largest = np.abs(given).max(axis=1, keepdims=True)
        assert (error <= np.maximum(np.abs(given) / 16, largest / 448 / 1024) * 1.001).all()
        assert (error <= largest / 28 * 1.001).all()
        # Each row's largest value is held as it is.
        kept = np.abs(loaded[name].double().numpy()).max(axis=1, keepdims=True)
        np.testing.assert_allclose(kept, largest, rtol=1e-5, atol=1e-12)


def test_everything_else_is_rounded_to_bfloat16(model, stored):
    loaded, tensors = load_transformer(stored, dtype=torch.float32), load_file(stored)
    for name, value in model.state_dict().items():
        if f"{name.rpartition('.')[0]}.scale_weight" not in tensors or name.endswith("bias"):
            assert torch.equal(loaded.state_dict()[name], value.bfloat16().float()), name


def test_shape_and_variant_survive(model, stored):
    loaded = load_transformer(stored)
    assert loaded.config == model.config
    assert loaded.variant_name == VARIANT


def test_the_model_predicts_nearly_the_same(model, stored):
    random = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, 1, 4, 4, generator=random)
    context = torch.randn(1, 4, 16, generator=random)
    with torch.no_grad():
        expected = model(latents, torch.tensor([500.0]), context)
        found = load_transformer(stored)(latents, torch.tensor([500.0]), context)
    difference = (found - expected).norm() / expected.norm()
    assert 0 < difference < 0.1


def test_fp8_halves_the_file(model, stored, tmp_path):
    save_bf16(model, tmp_path / "bf16.safetensors")
    loaded = load_transformer(tmp_path / "bf16.safetensors", dtype=torch.float32)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.bfloat16().float())

    def content(path: Path) -> int:
        return sum(tensor.nbytes for tensor in load_file(path).values())

    linears = sum(
        value.numel()
        for name, value in model.state_dict().items()
        if name.startswith(("blocks.", "text_embedding.", "time_projection.")) and value.dim() == 2
    )
    saved = content(tmp_path / "bf16.safetensors") - content(stored)
    assert 0.9 * linears < saved < linears


def test_assets_lie_in_the_package():
    assert len(set(FILES.values())) == len(FILES)
    assert all(asset(name).parent == ASSETS for name in FILES)
    assert ASSETS.parts[-3:] == ("trainer", "assets", "nano")
