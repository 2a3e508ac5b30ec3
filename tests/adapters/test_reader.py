"""What other programs write is read with the effect it has there, or refused with a reason."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from trainer.adapters import load_adapter
from trainer.adapters.base import LoRAFactors
from trainer.adapters.formats.writer import save_adapter
from trainer.adapters.targets import linear_layers
from trainer.contract.errors import ModelFileError
from trainer.contract.layer_names import (
    block_index,
    canonical_from_flat,
    canonical_name,
    diffusers_name,
)

from .tiny_models import make_transformer, make_twin

Q = "blocks.0.self_attn.q"
DOWN = torch.arange(8.0).reshape(2, 4) / 10
UP = torch.arange(6.0).reshape(3, 2) / 10


def write(tmp_path, tensors, metadata=None, name="lora.safetensors"):
    path = tmp_path / name
    save_file({k: v.clone() for k, v in tensors.items()}, path, metadata=metadata)
    return path


def peft_header(**settings) -> dict[str, str]:
    return {
        "lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in settings.items()})
    }


def only(path, **kw):
    adapter = load_adapter(path, **kw)
    assert list(adapter) == [Q]
    return adapter, adapter[Q].scale * adapter[Q].up_OR @ adapter[Q].down_RI


LAYOUTS = {
    "kohya": ("lora_unet_blocks_0_self_attn_q", "lora_down", "lora_up", "kohya"),
    "comfy": ("diffusion_model.blocks.0.self_attn.q", "lora_A", "lora_B", "comfy"),
    "comfy, down/up": ("diffusion_model.blocks.0.self_attn.q", "lora_down", "lora_up", "comfy"),
    "default infix": (
        "diffusion_model.blocks.0.self_attn.q",
        "lora_A.default",
        "lora_B.default",
        "comfy",
    ),
    "whole file prefix": (
        "model.diffusion_model.blocks.0.self_attn.q",
        "lora_A",
        "lora_B",
        "comfy",
    ),
    "diffusers": ("transformer.blocks.0.attn1.to_q", "lora_A", "lora_B", "peft"),
    "diffusers, old": ("transformer.blocks.0.attn1.to_q", "lora.down", "lora.up", "peft"),
    "peft, diffusers": ("base_model.model.blocks.0.attn1.to_q", "lora_A", "lora_B", "peft"),
    "peft, original": ("base_model.model.blocks.0.self_attn.q", "lora_A", "lora_B", "bare"),
    "peft, nested": (
        "base_model.model.transformer.blocks.0.attn1.to_q",
        "lora_A",
        "lora_B",
        "peft",
    ),
    "bare": ("blocks.0.self_attn.q", "lora_A", "lora_B", "bare"),
    "bare, diffusers": ("blocks.0.attn1.to_q", "lora_A", "lora_B", "peft"),
    "kohya, diffusers": ("lora_transformer_blocks_0_attn1_to_q", "lora_down", "lora_up", "kohya"),
}


@pytest.mark.parametrize("alpha", [None, 1.0, 6.0])
@pytest.mark.parametrize("case", LAYOUTS)
def test_every_layout_with_and_without_alpha(tmp_path, case, alpha):
    module, down, up, layout = LAYOUTS[case]
    tensors = {f"{module}.{down}.weight": DOWN, f"{module}.{up}.weight": UP}
    if alpha is not None:
        tensors[f"{module}.alpha"] = torch.tensor(alpha)
    adapter, update = only(write(tmp_path, tensors))
    torch.testing.assert_close(update, (1.0 if alpha is None else alpha / 2) * UP @ DOWN)
    assert adapter.layout == layout
    assert bool(adapter.notes) == (alpha is None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_stay_as_they_are(tmp_path, dtype):
    tensors = {f"{Q}.lora_A.weight": DOWN.to(dtype), f"{Q}.lora_B.weight": UP.to(dtype)}
    adapter = load_adapter(write(tmp_path, tensors))
    assert adapter[Q].down_RI.dtype == adapter[Q].up_OR.dtype == dtype
    assert torch.equal(adapter[Q].down_RI, DOWN.to(dtype))


def test_each_module_has_its_own_rank_and_alpha(tmp_path):
    tensors = {}
    for block, rank in enumerate((1, 3, 8)):
        stem = f"lora_unet_blocks_{block}_cross_attn_k_img"
        tensors[f"{stem}.lora_down.weight"] = torch.ones(rank, 4)
        tensors[f"{stem}.lora_up.weight"] = torch.ones(5, rank)
        tensors[f"{stem}.alpha"] = torch.tensor(2.0 * block + 1)
    adapter = load_adapter(write(tmp_path, tensors))
    found = {name: (f.rank, f.alpha, f.shape) for name, f in adapter.items()}
    assert found == {
        "blocks.0.cross_attn.k_img": (1, 1.0, (5, 4)),
        "blocks.1.cross_attn.k_img": (3, 3.0, (5, 4)),
        "blocks.2.cross_attn.k_img": (8, 5.0, (5, 4)),
    }


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"r": 2, "lora_alpha": 8}, 4.0),
        ({"r": 2, "lora_alpha": 8, "use_rslora": True}, 8 / 2**0.5),
        ({"r": 2, "lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 3}}, 1.5),
        ({"r": 2, "lora_alpha": 8, "alpha_pattern": {"^blocks.0.attn1.to_q": 3}}, 1.5),
        ({"r": 2, "lora_alpha": 8, "alpha_pattern": {"to_k": 3, "1.attn1.to_q": 3}}, 4.0),
        ({"r": 2, "lora_alpha": 8, "alpha_pattern": {r"blocks\.\d+\.attn1\.to_q": 3}}, 1.5),
        ({"r": 2}, 1.0),
    ],
)
def test_alpha_in_the_header_is_not_lost(tmp_path, settings, scale):
    module = "transformer.blocks.0.attn1.to_q"
    tensors = {f"{module}.lora_A.weight": DOWN, f"{module}.lora_B.weight": UP}
    _, update = only(write(tmp_path, tensors, peft_header(**settings)))
    torch.testing.assert_close(update, scale * UP @ DOWN)


def test_alpha_beside_a_peft_file_is_not_lost(tmp_path):
    module = "base_model.model.blocks.0.attn1.to_q"
    tensors = {f"{module}.lora_A.weight": DOWN, f"{module}.lora_B.weight": UP}
    write(tmp_path, tensors, name="adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 5}')
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        _, update = only(path)
        torch.testing.assert_close(update, 2.5 * UP @ DOWN)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_file_that_diffusers_wrote_has_the_effect_it_has_there(tmp_path, rslora):
    from peft import LoraConfig

    twin = make_twin(make_transformer())
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "to_out.0", "ffn.net.0.proj", "proj_out"],
        rank_pattern={"attn2.to_q": 3, "^proj_out": 2},
        alpha_pattern={"blocks.1.attn1.to_q": 5, "^proj_out": 7},
        use_rslora=rslora,
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    twin.add_adapter(config, adapter_name="style")
    twin.save_lora_adapter(tmp_path, adapter_name="style")
    # Saved alone, the model gives its tensors no prefix and its settings none either.
    adapter = load_adapter(tmp_path)
    layers = {
        canonical_name(name): layer
        for name, layer in twin.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    assert set(adapter) == set(layers)
    assert len({factors.rank for factors in adapter.values()}) == 3
    for name, factors in adapter.items():
        torch.testing.assert_close(factors.delta(), layers[name].get_delta_weight("style"))


def test_one_expert_of_a_file_for_both_is_chosen(tmp_path):
    for first, second in (
        ("diffusion_model.transformer_1.", "diffusion_model.transformer_2."),
        ("transformer.", "transformer_2."),
    ):
        tensors = {}
        for prefix, factor in ((first, 1.0), (second, 3.0)):
            tensors[f"{prefix}{Q}.lora_A.weight"] = DOWN * factor
            tensors[f"{prefix}{Q}.lora_B.weight"] = UP
        path = write(tmp_path, tensors)
        torch.testing.assert_close(only(path, expert="high_noise")[1], UP @ DOWN)
        torch.testing.assert_close(only(path, expert="low_noise")[1], 3 * UP @ DOWN)
        with pytest.raises(ModelFileError, match="both experts"):
            load_adapter(path)


GOOD = {f"diffusion_model.{Q}.lora_A.weight": DOWN, f"diffusion_model.{Q}.lora_B.weight": UP}
STEM = f"diffusion_model.{Q}"


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({f"{STEM}.hada_w1_a": DOWN}, ["LoHa", "hada_w1_a"]),
        ({f"{STEM}.lokr_w1": DOWN}, ["LoKr"]),
        ({f"{STEM}.dora_scale": DOWN}, ["DoRA"]),
        ({f"{STEM}.lora_magnitude_vector": DOWN}, ["DoRA"]),
        ({f"{STEM}.oft_blocks": DOWN}, ["OFT"]),
        ({f"{STEM}.diff_b": UP}, ["differences"]),
        ({"diffusion_model.blocks.0.norm3.diff": UP}, ["differences"]),
        ({f"{STEM}.lora_B.bias": UP}, ["bias"]),
        ({"lora_te1_text_model.q.lora_down.weight": UP}, ["text encoder"]),
        (
            {"lora_unet_double_blocks_0_img_attn.lora_down.weight": UP},
            ["double_blocks_0", "1 of 3"],
        ),
        ({"diffusion_model.blocks.0.self_attn.z.lora_A.weight": UP}, ["self_attn.z"]),
        ({"diffusion_model.blocks.0.self_attn.q.weight": UP}, ["self_attn.q.weight"]),
        ({"diffusion_model.blocks.00.self_attn.q.lora_A.weight": UP}, ["blocks.00"]),
        ({"stray": UP}, ["stray"]),
        ({f"{Q}.lora_A.weight": DOWN}, ["same weight twice"]),
        ({"diffusion_model.blocks.1.ffn.0.lora_A.weight": DOWN}, ["blocks.1.ffn.0", "up"]),
        ({"diffusion_model.blocks.1.ffn.0.alpha": torch.tensor(1.0)}, ["down and up"]),
        ({f"{STEM}.alpha": torch.tensor([1.0, 2.0])}, ["alpha", "one finite number"]),
        ({f"{STEM}.alpha": torch.tensor(float("nan"))}, ["alpha", "nan"]),
        ({f"{STEM}.lora_A.weight": torch.ones(3, 4)}, ["ranks", Q]),
        ({f"{STEM}.lora_A.weight": torch.ones(2, 4, 1, 1)}, ["convolution"]),
        ({f"{STEM}.lora_A.weight": torch.ones(2, 4, dtype=torch.int32)}, ["int32"]),
        ({f"{STEM}.lora_A.weight": DOWN * torch.inf}, ["NaN or inf"]),
    ],
)
def test_no_key_is_dropped_without_a_word(tmp_path, extra, words):
    path = write(tmp_path, {**GOOD, **extra})
    with pytest.raises(ModelFileError) as caught:
        load_adapter(path)
    for word in (str(path), *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("{", "damaged"),
        ("[1]", "damaged"),
        ('{"transformer.lora_alpha": "8"}', "lora_alpha"),
        ('{"transformer.use_dora": true}', "DoRA"),
        ('{"transformer.init_lora_weights": "pissa_niter_4"}', "pissa"),
        ('{"transformer.alpha_pattern": {"(": 1}}', "pattern"),
        ('{"transformer.alpha_pattern": {"(a+)+b": 1}}', "for ever"),
    ],
)
def test_damaged_settings_are_refused(tmp_path, settings, words):
    with pytest.raises(ModelFileError, match=words):
        load_adapter(write(tmp_path, GOOD, {"lora_adapter_metadata": settings}))


def test_files_that_are_no_lora(tmp_path):
    good = write(tmp_path, GOOD).read_bytes()
    cases = {
        "empty": b"",
        "cut": good[:-3],
        "cut in the header": good[:40],
        "text": b"hello, this is no model",
        "bad length": struct.pack("<Q", 2**60) + good[8:],
        "bad dtype": good.replace(b'"F32"', b'"X32"'),
    }
    for name, content in cases.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(ModelFileError, match=name):
            load_adapter(path)
    with pytest.raises(ModelFileError, match="does not exist"):
        load_adapter(tmp_path / "missing.safetensors")
    with pytest.raises(ModelFileError, match="holds no LoRA"):
        load_adapter(tmp_path)
    with pytest.raises(ModelFileError, match="empty"):
        load_adapter(write(tmp_path, {}))


def test_every_name_survives_every_spelling():
    names = list(linear_layers(make_transformer(image=True, num_layers=12)))
    names += [
        "vace_blocks.3.cross_attn.o",
        "vace_blocks.0.before_proj",
        "vace_blocks.14.after_proj",
    ]
    assert len(names) > 100
    for name in names:
        assert canonical_name(name) == name
        assert canonical_name(diffusers_name(name)) == name
        assert canonical_from_flat(name.replace(".", "_")) == name
        assert canonical_from_flat(diffusers_name(name).replace(".", "_")) == name
    assert block_index("blocks.11.ffn.0") == 11
    assert block_index("head.head") is None


def test_names_are_those_of_diffusers():
    from torch import nn

    for image in (False, True):
        model = make_transformer(image=image)
        theirs = {n for n, m in make_twin(model).named_modules() if isinstance(m, nn.Linear)}
        assert {diffusers_name(name) for name in linear_layers(model)} == theirs


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz_.0123456789", max_size=60))
def test_any_name_is_understood_or_refused(name):
    for found in (canonical_name(name), canonical_from_flat(name)):
        assert found is None or canonical_name(found) == found


def test_reading_leaves_the_file_alone(tmp_path):
    path = write(tmp_path, GOOD)
    before = path.read_bytes()
    adapter = load_adapter(path)
    adapter[Q].down_RI.zero_()
    assert path.read_bytes() == before
    assert load_file(path)[f"{STEM}.lora_A.weight"].any()


def test_a_scale_that_was_folded_in_here_is_no_assumption(tmp_path: Path) -> None:
    factors = {"blocks.0.self_attn.q": LoRAFactors(torch.ones(2, 8), torch.ones(8, 2), 1.0)}
    own, foreign = tmp_path / "own.safetensors", tmp_path / "foreign.safetensors"
    save_adapter(factors, own, dtype=torch.float32, metadata={"menma.kind": "lora"})
    save_adapter(factors, foreign, dtype=torch.float32)
    assert load_adapter(own).notes == ()
    assert "no alpha" in load_adapter(foreign).notes[0]
