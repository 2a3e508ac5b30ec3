"""What we write has the same effect in diffusers and, by its own rule, in ComfyUI."""

from __future__ import annotations

import hashlib
import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from trainer.adapters import load_adapter
from trainer.adapters.base import LoRAFactors
from trainer.adapters.formats import writer
from trainer.adapters.formats.writer import LAYOUTS, save_adapter
from trainer.contract.errors import ConfigError, DiskError, ModelFileError

from .tiny_models import (
    expected_weights,
    make_factors,
    make_transformer,
    make_twin,
    model_inputs,
    run_twin,
)

OUTSIDE = ["head.head", "text_embedding.0", "text_embedding.2", "time_embedding.0"]
OUTSIDE += ["time_embedding.2", "time_projection.1"]
ATTENTION = [f"blocks.{i}.self_attn.{n}" for i in range(3) for n in "qv"]
LATE = ["blocks.1.ffn.0", "blocks.2.cross_attn.o"]


def written_in_diffusers(model, path, strength):
    """Output of the model with the file loaded by diffusers' own pipeline code."""
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    twin = make_twin(model)
    state, metadata = WanLoraLoaderMixin.lora_state_dict(str(path), return_lora_metadata=True)
    WanLoraLoaderMixin.load_lora_into_transformer(
        state, twin, adapter_name="style", metadata=metadata
    )
    twin.set_adapters("style", weights=strength)
    return run_twin(twin, model_inputs(model))


def reference(model, factors, strength):
    merged = make_transformer(image=model.config.image_dim is not None)
    merged.load_state_dict(
        {n: v.float() for n, v in expected_weights(model, factors, strength).items()}
    )
    return run_twin(make_twin(merged), model_inputs(model))


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        ("comfy", None),
        ("comfy", ATTENTION),
        ("comfy", LATE),
        ("comfy", [*LATE, *OUTSIDE]),
        ("peft", None),
        ("peft", ATTENTION),
        ("peft", [*LATE, *OUTSIDE]),
        ("kohya", None),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value or []) or 'all'}",
)
@pytest.mark.parametrize("alpha", [1.0, 6.0])
def test_diffusers_loads_it_with_the_right_effect(tmp_path, layout, names, alpha):
    model = make_transformer()
    factors = make_factors(model, rank=3, alpha=alpha, names=names)
    path = tmp_path / "lora.safetensors"
    save_adapter(factors, path, layout=layout, dtype=torch.float32)
    with torch.no_grad():
        found = written_in_diffusers(model, path, 0.7)
        wanted = reference(model, factors, 0.7)
        plain = run_twin(make_twin(model), model_inputs(model))
    assert (wanted - plain).abs().max() > 1e-2
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_diffusers_loads_different_ranks_and_alphas(tmp_path):
    model = make_transformer()
    factors = make_factors(model, rank=2, alpha=5.0) | make_factors(
        model, rank=4, alpha=1.0, names=["head.head", *LATE]
    )
    for layout in ("comfy", "peft"):
        save_adapter(factors, tmp_path / layout, layout=layout, dtype=torch.float32)
        with torch.no_grad():
            found = written_in_diffusers(model, tmp_path / layout, 1.0)
            wanted = reference(model, factors, 1.0)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def comfy_patches(path, model_keys):
    """ComfyUI's rule, from its behaviour (models.md §4.2): weights by key, else nothing."""
    tensors = load_file(path)
    patches = {}
    for key in model_keys:
        if not key.endswith(".weight"):
            continue
        stem = key.removesuffix(".weight")
        for name in (f"diffusion_model.{stem}", f"lora_unet_{stem.replace('.', '_')}"):
            for down, up in (("lora_down", "lora_up"), ("lora_A", "lora_B")):
                if f"{name}.{down}.weight" not in tensors:
                    continue
                d, u = (tensors.pop(f"{name}.{part}.weight").double() for part in (down, up))
                alpha = tensors.pop(f"{name}.alpha", None)
                scale = 1.0 if alpha is None else alpha.item() / d.shape[0]
                patches[key] = scale * u @ d
    return patches, tensors


@pytest.mark.parametrize("layout", ["comfy", "kohya"])
def test_comfyui_patches_every_module(tmp_path, layout):
    model = make_transformer(image=True)
    state = model.state_dict()
    factors = make_factors(model, rank=3, alpha=2.0) | make_factors(
        model, rank=2, alpha=3.0, names=[*OUTSIDE, "img_emb.proj.1"]
    )
    save_adapter(factors, tmp_path / "lora", layout=layout, dtype=torch.float32)
    patches, left_over = comfy_patches(tmp_path / "lora", state)
    assert not left_over
    assert set(patches) == {f"{name}.weight" for name in factors}
    for key, wanted in expected_weights(model, factors).items():
        if key in patches:
            torch.testing.assert_close(
                state[key].double() + patches[key], wanted, rtol=0, atol=1e-6
            )


def test_default_layout_needs_no_alpha(tmp_path):
    save_adapter(make_factors(make_transformer(), alpha=3.0), tmp_path / "lora")
    assert all(key.startswith("diffusion_model.blocks.") for key in load_file(tmp_path / "lora"))
    assert not any("alpha" in key for key in load_file(tmp_path / "lora"))


NAMES = st.sampled_from(
    [
        *(
            f"blocks.{i}.{n}"
            for i in (0, 1, 10, 39)
            for n in ("self_attn.q", "cross_attn.k_img", "ffn.0")
        ),
        "head.head",
        "time_projection.1",
        "img_emb.proj.3",
    ]
)
PAIRS = st.tuples(
    st.integers(1, 5),
    st.integers(1, 7),
    st.integers(1, 7),
    st.floats(0.01, 100),
    st.integers(0, 99),
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.dictionaries(NAMES, PAIRS, min_size=1, max_size=6),
    st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=4),
)
def test_any_chain_of_layouts_keeps_the_update(tmp_path, modules, layouts):
    factors = {}
    for name, (rank, inputs, outputs, alpha, seed) in modules.items():
        generator = torch.Generator().manual_seed(seed)
        down = torch.randn(rank, inputs, generator=generator)
        factors[name] = LoRAFactors(down, torch.randn(outputs, rank, generator=generator), alpha)
    path, current = tmp_path / "lora.safetensors", factors
    for layout in layouts:
        save_adapter(current, path, layout=layout, dtype=torch.float32)
        current = load_adapter(path)
        assert current.layout == layout
        assert current.notes == () or layout == "comfy"
    assert set(current) == set(factors)
    for name, pair in factors.items():
        up, down = pair.up_OR.double() * pair.alpha / pair.rank, pair.down_RI.double()
        error = (current[name].delta() - up @ down).abs()
        assert (error <= 1e-6 * (up.abs() @ down.abs())).all()


def test_bfloat16_rounds_once_and_a_scale_of_a_power_of_two_costs_nothing(tmp_path):
    factors = make_factors(make_transformer(), rank=4, alpha=2.0, dtype=torch.bfloat16)
    save_adapter(factors, tmp_path / "comfy", layout="comfy", dtype=torch.bfloat16)
    read = load_adapter(tmp_path / "comfy")
    for name, pair in factors.items():
        assert torch.equal(read[name].down_RI, pair.down_RI)
        assert torch.equal(read[name].delta(), pair.delta())


def test_failures_leave_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(b"earlier")
    pair = LoRAFactors(torch.ones(1, 2), torch.full((2, 1), 1e6), 1.0)
    with pytest.raises(ModelFileError, match=r"head\.head.*float16"):
        save_adapter({"head.head": pair}, path, dtype=torch.float16)
    with pytest.raises(ConfigError, match="'comfy'"):
        save_adapter({"head.head": pair}, path, layout="confy")
    with pytest.raises(ModelFileError, match="no module"):
        save_adapter({}, path)

    def lies(tensors, file, metadata):
        from safetensors.torch import save_file

        save_file({name: value * 2 for name, value in tensors.items()}, file, metadata=metadata)

    monkeypatch.setattr("trainer.io.atomic_save.save_file", lies)
    with pytest.raises(DiskError, match="reading it back"):
        save_adapter({"head.head": pair}, path)
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_loses_the_scale_is_caught_before_the_rename(tmp_path, monkeypatch):
    factors = make_factors(make_transformer(), alpha=3.0)
    path = tmp_path / "lora.safetensors"
    unscaled = writer._WRITERS["comfy"][1]
    for lossy, words in (
        (unscaled, "blocks.0.self_attn.q differs"),
        (lambda stored, kinds: unscaled(dict(list(stored.items())[1:]), kinds), "same modules"),
    ):
        monkeypatch.setitem(writer._WRITERS, "comfy", (writer._unchanged, lossy))
        with pytest.raises(RuntimeError, match=words):
            save_adapter(factors, path)
    assert not list(tmp_path.iterdir())


def test_header_tells_the_truth_about_the_tensors(tmp_path):
    model = make_transformer()
    given_metadata = {"ss_network_dim": "99", "modelspec.title": "fox", "menma.variant": "x"}
    for layout, alpha in (("kohya", "2"), ("peft", "2"), ("comfy", "4")):
        path = tmp_path / layout
        save_adapter(make_factors(model), path, layout=layout, metadata=given_metadata)
        metadata = load_adapter(path).metadata
        assert metadata["ss_network_dim"] == "4"
        assert metadata["ss_network_alpha"] == alpha
        assert metadata["modelspec.title"] == "fox"
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        assert metadata["sshs_model_hash"] == hashlib.sha256(content[8 + length :]).hexdigest()
    mixed = make_factors(model) | make_factors(model, rank=2, names=["head.head"])
    save_adapter(mixed, tmp_path / "mixed")
    assert load_adapter(tmp_path / "mixed").metadata["ss_network_dim"] == "Dynamic"


def test_delta_helpers_agree_with_each_other():
    pair = next(iter(make_factors(make_transformer(), alpha=3.0).values()))
    torch.testing.assert_close(pair.folded().delta(), pair.delta())
    assert pair.norm() == pytest.approx(pair.delta().norm().item(), rel=1e-5)
    assert json.dumps(pair.folded().alpha) == "4.0"
