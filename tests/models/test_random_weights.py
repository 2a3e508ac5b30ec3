"""Random transformers are held exactly as those that are read from a file."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from trainer.contract.errors import ConfigError
from trainer.contract.variants import VARIANTS
from trainer.models.wan import random_weights
from trainer.models.wan.loading import load_transformer, save_transformer
from trainer.models.wan.quantised import is_block_linear
from trainer.models.wan.random_weights import random_transformer
from trainer.models.wan.transformer import WanTransformer
from trainer.quant.fp8 import Fp8Spec

FP8 = {
    "none": None,
    "fp8": Fp8Spec(scaled=False),
    "fp8_scaled": Fp8Spec(scaled=True),
    "e5m2": Fp8Spec(scaled=True, dtype=torch.float8_e5m2),
    "fp8_matmul": Fp8Spec(scaled=True, matmul=True),
}


def small(variant, **changes):
    sizes = {"dim": 128, "ffn_dim": 256, "num_heads": 2, "num_layers": 2, "text_dim": 16}
    return replace(VARIANTS[variant].transformer, **sizes | changes)


def held(model):
    return {name: (value.dtype, value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("spec", FP8.values(), ids=FP8)
def test_everything_has_the_type_and_shape_of_a_loaded_model(tmp_path, variant, spec):
    shape = small(variant)
    path = tmp_path / "model.safetensors"
    save_transformer(WanTransformer(shape), path, dtype=torch.bfloat16)
    loaded = load_transformer(path, dtype=torch.bfloat16, fp8=spec)
    made = random_transformer(shape, dtype=torch.bfloat16, device="cpu", fp8=spec)
    assert held(made) == held(loaded)
    for name, parameter in made.named_parameters():
        assert parameter.requires_grad == loaded.get_parameter(name).requires_grad
    assert not any(value.is_meta for value in (*made.parameters(), *made.buffers()))


def test_fp8_is_made_layer_by_layer(monkeypatch):
    """Whatever is rounded, no other linear layer of the blocks exists in bf16 by then."""
    quantise, seen = random_weights.quantise, []

    def noting(weight, spec):
        seen.append((weight.dtype, weight.numel()))
        return quantise(weight, spec)

    monkeypatch.setattr(random_weights, "quantise", noting)
    shape = small("wan2.1-t2v-1.3b", num_layers=5)
    model = random_transformer(shape, dtype=torch.bfloat16, device="cpu", fp8=Fp8Spec(scaled=True))
    assert len(seen) == 10  # the layers of one block; the others are copies
    linears = [n for n, p in model.named_parameters() if is_block_linear(n, p.shape)]
    assert len(linears) == 50
    assert {model.get_parameter(name).dtype for name in linears} == {torch.float8_e4m3fn}
    storages = {model.get_parameter(name).untyped_storage().data_ptr() for name in linears}
    assert len(storages) == 50  # copies of their own, as of a file


def test_a_seed_fixes_the_weights_and_the_velocity_is_of_unit_size():
    shape = small("wan2.1-t2v-1.3b")

    def make(seed):
        return random_transformer(shape, dtype=torch.float32, device="cpu", seed=seed)

    one, same, other = make(1), make(1), make(2)
    inputs = torch.randn(1, 16, 1, 4, 4), torch.tensor([500.0]), torch.randn(1, 3, 16)
    velocity = one(*inputs)
    assert torch.equal(velocity, same(*inputs))
    assert not torch.equal(velocity, other(*inputs))
    assert 0.1 < velocity.std() < 10


def test_widths_that_fp8_products_cannot_take_are_refused():
    shape = small("wan2.1-t2v-1.3b", ffn_dim=264)
    with pytest.raises(ConfigError, match="multiples of 16"):
        random_transformer(
            shape, dtype=torch.bfloat16, device="cpu", fp8=Fp8Spec(scaled=True, matmul=True)
        )


@pytest.mark.parametrize("fp8", FP8.values(), ids=FP8)
def test_blocks_that_another_process_holds_take_no_memory(fp8):
    model = random_transformer(
        small("wan2.1-t2v-1.3b"),
        dtype=torch.bfloat16,
        device="cpu",
        fp8=fp8,
        held_elsewhere=lambda num: range(1, num),
    )
    for index, block in enumerate(model.blocks):
        tensors = [*block.parameters(), *block.buffers()]
        assert {tensor.device.type for tensor in tensors} == {"meta" if index else "cpu"}
    assert model.head.head.weight.device.type == "cpu"
