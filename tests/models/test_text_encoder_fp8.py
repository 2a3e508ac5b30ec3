"""umT5 with linear layers in scaled fp8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from trainer.models.wan.text_encoder import TextEncoder, load_text_encoder
from trainer.models.wan.tiny import write_tiny_text_encoder
from trainer.nano.files import asset
from trainer.quant.fp8 import Fp8Spec
from trainer.quant.linear import Fp8Linear

PROMPTS = ["a red ball rolls to the left", "a blue square moves up and up", ""]
SCALED = Fp8Spec(scaled=True)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a umT5 of two layers, random as transformers draws it, one block of 64 inputs wide."""
    path = tmp_path_factory.mktemp("umt5") / "text.safetensors"
    write_tiny_text_encoder(path, PROMPTS, text_dim=64)
    encoder = load_text_encoder(path)
    torch.manual_seed(0)
    model = type(encoder.model)(encoder.model.config)
    drawn = {
        name: value for name, value in model.state_dict().items() if "embed_tokens" not in name
    }
    tokenizer = load_file(path)["spiece_model"]
    save_file(drawn | {"spiece_model": tokenizer}, path)
    return path


def size_of(encoder: TextEncoder) -> int:
    return sum(parameter.nbytes for parameter in encoder.model.parameters())


def similarity(first: Tensor, second: Tensor) -> float:
    return float(cosine_similarity(first.double().flatten(), second.double().flatten(), 0))


def rounded(weight_OI: Tensor) -> Tensor:
    """Return a weight as e4m3 holds it: one scale for each 64 inputs, in bf16 where there are more
    than one a row; one for all where a row is shorter."""
    width = weight_OI.shape[1]
    blocks = weight_OI.double()
    blocks = blocks.view(len(blocks), -1, 64) if width >= 64 else blocks.view(1, 1, -1)
    scale = blocks.float().abs().amax(-1, keepdim=True) / 448
    scale = (scale.bfloat16() if width > 64 else scale).double()
    values = (blocks / scale).clamp(-448, 448).float().to(torch.float8_e4m3fn).double()
    return (values * scale).view_as(weight_OI).float()


def test_it_computes_with_the_rounded_weights(file: Path) -> None:
    encoder = load_text_encoder(file, dtype=torch.float32, fp8=SCALED)
    expected = load_text_encoder(file, dtype=torch.float32)
    before = expected(PROMPTS)
    for layer in expected.model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(rounded(layer.weight.detach()), requires_grad=False)
    for ours, theirs, exact in zip(encoder(PROMPTS), expected(PROMPTS), before, strict=True):
        assert (ours - theirs).abs().max() < 1e-4
        assert (ours - exact).abs().max() > 1e-2


def test_embeddings_are_those_of_bf16_and_take_less(file: Path) -> None:
    plain = load_text_encoder(file, dtype=torch.bfloat16)
    encoder = load_text_encoder(file, dtype=torch.bfloat16, fp8=SCALED)
    for ours, theirs in zip(encoder(PROMPTS), plain(PROMPTS), strict=True):
        assert ours.dtype == torch.bfloat16
        assert ours.shape == theirs.shape
        assert similarity(ours, theirs) > 0.998  # e4m3 rounds each weight by 2.6 % on average
    layers = [one for one in encoder.model.modules() if isinstance(one, Fp8Linear)]
    assert len(layers) == 2 * 7
    assert not any(isinstance(one, nn.Linear) for one in encoder.model.modules())
    saved = sum(one.weight.numel() - one.weight_scale.nbytes for one in layers)
    assert size_of(plain) - size_of(encoder) == saved > 0
    kept = (p for p in encoder.model.parameters() if p.dtype == torch.bfloat16)
    assert sum(p.numel() for p in kept) >= encoder.model.shared.weight.numel()


def test_the_nano_encoder_keeps_its_direction() -> None:
    plain = load_text_encoder(asset("text_encoder"), dtype=torch.bfloat16)
    encoder = load_text_encoder(asset("text_encoder"), dtype=torch.bfloat16, fp8=SCALED)
    assert size_of(encoder) < 0.65 * size_of(plain)
    for ours, theirs in zip(encoder(PROMPTS), plain(PROMPTS), strict=True):
        assert similarity(ours, theirs) > 0.99


@pytest.mark.parametrize("scaled", [True, False])
def test_fp8_of_a_file_is_used_as_it_is(file: Path, tmp_path: Path, scaled: bool) -> None:
    tensors: dict[str, Any] = {}
    for name, value in load_file(file).items():
        if value.dim() == 2 and not any(word in name for word in ("shared", "bias")):
            scale = value.abs().max() / 448 if scaled else torch.tensor(1.0)
            tensors[name] = (value / scale).to(torch.float8_e4m3fn)
            if scaled:
                tensors[name.replace(".weight", ".scale_weight")] = scale.reshape(1)
        else:
            tensors[name] = value if value.dtype == torch.uint8 else value.bfloat16()
    if scaled:
        tensors["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    path = tmp_path / "fp8.safetensors"
    save_file(tensors, path)
    encoder = load_text_encoder(path, dtype=torch.float32, fp8=SCALED)
    plain = load_text_encoder(path, dtype=torch.float32)
    for ours, theirs in zip(encoder(PROMPTS), plain(PROMPTS), strict=True):
        assert (ours - theirs).abs().max() < 1e-4
    query = encoder.model.encoder.block[0].layer[0].SelfAttention.q
    stored = tensors["encoder.block.0.layer.0.SelfAttention.q.weight"]
    assert torch.equal(query.weight.float(), stored.float())


def test_it_moves_as_a_whole(file: Path) -> None:
    encoder = load_text_encoder(file, dtype=torch.bfloat16, fp8=SCALED).to("meta")
    assert {parameter.device.type for parameter in encoder.model.parameters()} == {"meta"}
    assert encoder.model.encoder.embed_tokens.weight is encoder.model.shared.weight
