"""Loading and saving transformers: every layout, every refusal."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from wan_files import (
    COMFY,
    LAYOUTS,
    fp8_scaled,
    official_config,
    official_folder,
    single,
    state_of,
)
from wan_pairs import build, largest_difference, make_inputs, run_ours, tiny_config

from trainer.contract.errors import ConfigError, ModelFileError
from trainer.contract.variants import VARIANTS, TransformerConfig
from trainer.io.mapped_load import TensorInfo, WeightFiles
from trainer.models.wan.detect import recognise, transformer_metadata
from trainer.models.wan.loading import load_transformer, save_transformer
from trainer.models.wan.transformer import WanTransformer

T2V, I2V, TI2V = "wan2.1-t2v-1.3b", "wan2.1-i2v-14b", "wan2.2-ti2v-5b"
HEADS = {"num_heads": 2}


@pytest.fixture
def model() -> WanTransformer:
    return build(tiny_config(T2V))


def edit(path: Path, change: Any, metadata: dict[str, str] | None = None) -> Path:
    """Rewrite a safetensors file after `change` has edited its tensors."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_weights(
    layout: str, model: WanTransformer, tmp_path: Path
) -> None:
    path, expected = LAYOUTS[layout](model, tmp_path)
    told = layout.startswith(("official", "diffusers"))
    loaded = load_transformer(path, config=None if told else HEADS)
    assert loaded.config == model.config
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], value.float(), rtol=1e-6, atol=0)
    model.load_state_dict(expected)
    inputs = make_inputs(model.config)
    assert largest_difference(run_ours(loaded, inputs), run_ours(model, inputs)) < 2e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_comes_back_from_its_own_file(variant: str, tmp_path: Path) -> None:
    config = tiny_config(variant)
    if variant == "wan2.1-fun-control-14b":
        config = replace(config, reference_conv=True)
    model = build(config)
    model.variant_name = variant
    save_transformer(model, tmp_path / "m.safetensors", metadata={"title": "x"})
    loaded = load_transformer(tmp_path / "m.safetensors")
    assert (loaded.variant_name, loaded.config) == (variant, config)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        assert {"title": "x", "format": "pt"}.items() <= file.metadata().items()


def test_saving_takes_a_state_and_a_dtype(model: WanTransformer, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    state = {name: value + 1 for name, value in model.state_dict().items()}
    save_transformer(model, path, state=state, dtype=torch.bfloat16)
    found = load_file(path)
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert torch.equal(found["head.head.bias"], state["head.head.bias"].bfloat16())
    before = path.read_bytes()
    for value in (None, torch.zeros(3)):
        wrong = {n: v for n, v in state.items() if n != "head.head.bias"}
        wrong |= {} if value is None else {"head.head.bias": value}
        with pytest.raises(ValueError, match=r"head\.head\.bias"):
            save_transformer(model, path, state=wrong)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("bare-fp32", torch.float32),
        ("module-fp64", torch.float32),
        ("comfy-fp16", torch.float16),
        ("comfy-bf16", torch.bfloat16),
        ("fp8-e4m3", torch.bfloat16),
        ("fp8-scaled", torch.bfloat16),
    ],
)
def test_own_dtype(
    layout: str, expected: torch.dtype, model: WanTransformer, tmp_path: Path
) -> None:
    path, _ = LAYOUTS[layout](model, tmp_path)
    loaded = load_transformer(path, dtype=None, config=HEADS)
    others = {v.dtype for n, v in loaded.named_parameters() if not n.startswith("time_embedding")}
    assert others == {expected}
    assert loaded.time_embedding[0].weight.dtype == torch.float32


def test_loaded_weights_do_not_hang_on_the_file(model: WanTransformer, tmp_path: Path) -> None:
    save_transformer(model, tmp_path / "m.safetensors")
    loaded = load_transformer(tmp_path / "m.safetensors")
    size = (tmp_path / "m.safetensors").stat().st_size
    (tmp_path / "m.safetensors").write_bytes(bytes(size))
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])


CHILD = """
import re, sys, torch
from pathlib import Path
from trainer.models.wan.loading import load_transformer
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
model = load_transformer(sys.argv[1], dtype=torch.bfloat16)
print((peak() - before) * 1024 / Path(sys.argv[1]).stat().st_size)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_loading_needs_the_memory_of_one_model(tmp_path: Path) -> None:
    config = replace(tiny_config(T2V), dim=1024, ffn_dim=4096, num_layers=8)
    large = WanTransformer(config, seed=None).bfloat16()
    save_transformer(large, tmp_path / "m.safetensors")
    command = [sys.executable, "-c", CHILD, str(tmp_path / "m.safetensors")]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 1.15


def test_unknown_dtype_is_refused(model: WanTransformer, tmp_path: Path) -> None:
    save_transformer(model, tmp_path / "m.safetensors")
    with pytest.raises(ConfigError, match="int8"):
        load_transformer(tmp_path / "m.safetensors", dtype=torch.int8)


# What the file is


class Shapes:
    """A file of which only names and shapes exist."""

    path = Path("full-size.safetensors")

    def __init__(self, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str]) -> None:
        self.shapes, self.metadata = shapes, metadata

    def names(self) -> Iterator[str]:
        return iter(self.shapes)

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(self.shapes[name], torch.bfloat16, 0)

    def read(self, name: str) -> Tensor:
        raise AssertionError("recognising a file must not read it")

    def release(self, name: str) -> None: ...


def full_size(config: TransformerConfig, metadata: dict[str, str] | None = None) -> WeightFiles:
    """Return the names and shapes of a model of any size, as a file."""
    with torch.device("meta"):
        state = WanTransformer(config, seed=None).state_dict()
    shapes = {f"diffusion_model.{name}": tuple(value.shape) for name, value in state.items()}
    return WeightFiles(Shapes.path, [Shapes(shapes, metadata or {})])


@pytest.mark.parametrize("variant", VARIANTS)
def test_released_models_are_recognised(variant: str) -> None:
    entry = VARIANTS[variant]
    weights = full_size(entry.transformer)
    found = recognise(weights)
    assert found.config == entry.transformer
    # A 14B text-to-video file may be Wan 2.1 or either expert of 2.2: the plain answer is 2.1.
    assert found.variant_name == {"wan2.2-t2v-a14b": "wan2.1-t2v-14b"}.get(variant, variant)
    assert recognise(weights, variant).variant_name == variant
    told = full_size(entry.transformer, {"menma.variant": variant})
    assert recognise(told).variant_name == variant


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_wrong_variant_is_refused_with_the_right_one(variant: str) -> None:
    weights = full_size(VARIANTS[variant].transformer)
    for other in VARIANTS:
        if VARIANTS[other].transformer == VARIANTS[variant].transformer:
            continue
        with pytest.raises(ModelFileError, match=rf"is {variant}|or {variant}"):
            recognise(weights, other)


def test_unknown_variant_names_the_nearest(model: WanTransformer) -> None:
    with pytest.raises(ConfigError, match=r"wan2\.1-t2v-14b"):
        recognise(full_size(VARIANTS[T2V].transformer), "wan2.1-t2v-14")


def test_metadata_that_contradicts_the_weights_is_refused() -> None:
    with pytest.raises(ModelFileError, match="metadata say"):
        recognise(full_size(VARIANTS[T2V].transformer, {"menma.variant": TI2V}))


def test_first_version_and_later_fun_control_are_told_apart() -> None:
    config = VARIANTS["wan2.1-fun-control-14b"].transformer
    later = recognise(full_size(replace(config, reference_conv=True)))
    assert later.variant_name == "wan2.1-fun-control-14b"
    assert later.config.reference_conv
    assert not recognise(full_size(config)).config.reference_conv


def test_models_of_no_released_size_take_the_plain_variant_of_their_kind() -> None:
    for variant, expected in (
        (T2V, T2V),
        ("wan2.2-t2v-a14b", T2V),
        ("wan2.1-fun-inp-1.3b", I2V),
        ("wan2.2-i2v-a14b", "wan2.2-i2v-a14b"),
        (TI2V, TI2V),
    ):
        weights = full_size(tiny_config(variant))
        assert recognise(weights, overrides=HEADS).variant_name == expected
        assert recognise(weights, variant, HEADS).variant_name == variant


def test_heads_that_nothing_tells_are_asked_for() -> None:
    with pytest.raises(ModelFileError, match="number of attention heads"):
        recognise(full_size(tiny_config(T2V)))
    assert recognise(full_size(replace(tiny_config(T2V), dim=384))).config.num_heads == 3


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"num_head": 2}, ConfigError, "num_heads"),
        ({"dim": 48}, ModelFileError, "dim is 24 in the weights, not 48"),
        ({"num_layers": 3}, ModelFileError, "num_layers"),
    ],
)
def test_overrides_that_contradict_are_refused(
    overrides: dict[str, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        recognise(full_size(tiny_config(T2V)), overrides=HEADS | overrides)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "3",
        '{"nonsense": 1}',
        '{"num_heads": "2"}',
        '{"num_heads": true}',
        '{"dim": 48}',
        '{"num_heads": 5}',
        '{"num_heads": 0}',
        '{"num_heads": -2}',
        '{"patch_size": [1, 2]}',
        '{"eps": null}',
        "[" * 100_000,
    ],
)
def test_hostile_metadata_is_refused(content: str, model: WanTransformer, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    metadata = transformer_metadata(model.config, T2V) | {"menma.config": content}
    save_file(state_of(model), path, metadata=metadata)
    with pytest.raises((ModelFileError, ConfigError)) as caught:
        load_transformer(path)
    assert caught.value.exit_code == 2


def test_config_json_of_another_model(model: WanTransformer, tmp_path: Path) -> None:
    other = official_config(replace(model.config, num_layers=9))
    folder, _ = official_folder(model, tmp_path)
    (folder / "config.json").write_text(json.dumps(other))
    with pytest.raises(ModelFileError, match="another model"):
        load_transformer(folder)
    path, _ = single("", torch.float32)(model, tmp_path)
    assert load_transformer(path, config=HEADS).config == model.config


@pytest.mark.parametrize(
    ("marker", "kind"),
    [
        ("casual_audio_encoder.encoder.final_linear.weight", "S2V"),
        ("face_adapter.fuser_blocks.0.k_norm.weight", "Animate"),
        ("vace_patch_embedding.weight", "VACE"),
        ("control_adapter.conv.weight", "Camera"),
    ],
)
def test_models_that_cannot_be_trained_are_named(
    marker: str, kind: str, model: WanTransformer, tmp_path: Path
) -> None:
    path, _ = single(COMFY, torch.float32)(model, tmp_path)
    edit(path, lambda tensors: tensors.update({COMFY + marker: torch.zeros(1)}))
    with pytest.raises(ModelFileError, match=kind):
        load_transformer(path, config=HEADS)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("decoder.middle.0.residual.0.gamma", "a Wan VAE"),
        ("shared.weight", "an umT5 text encoder"),
        ("visual.cls_embedding", "a CLIP image encoder"),
        ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "a LoRA"),
        ("something", "an unknown file"),
    ],
)
def test_other_files_are_named(name: str, kind: str, tmp_path: Path) -> None:
    save_file({name: torch.zeros(2)}, tmp_path / "m.safetensors")
    with pytest.raises(ModelFileError, match=f"is {kind}, not a Wan transformer"):
        load_transformer(tmp_path / "m.safetensors")


def test_two_experts_are_not_chosen_between(tmp_path: Path) -> None:
    for folder in ("transformer", "transformer_2"):
        (tmp_path / folder).mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ModelFileError, match="two transformers"):
        load_transformer(tmp_path)
    (tmp_path / "model_index.json").unlink()
    with pytest.raises(ModelFileError, match="transformer, transformer_2"):
        load_transformer(tmp_path)


# What the file lacks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.1.norm3.bias"), r"lacks 1 tensors: blocks\.1\.norm3\.bias"),
        (lambda t: t.update({"blocks.0.extra": torch.zeros(1)}), r"unknown 1.*blocks\.0\.extra"),
        (lambda t: t.update({"head.head.bias": torch.zeros(3)}), r"head\.head\.bias \(3,\)"),
        (lambda t: t.pop("head.head.weight"), "lacks the tensor 'head.head.weight'"),
        (lambda t: t.update({"head.head.weight": torch.zeros(3)}), "axes are needed"),
        (lambda t: t.update({"head.head.weight": torch.zeros(0, 2)}), "is empty"),
        (lambda t: t.update({"blocks.99999999.x": torch.zeros(1)}), "lacks block 2"),
        (lambda t: t.update({"img_emb.proj.0.weight": torch.zeros(8)}), "no known variant"),
    ],
)
def test_missing_and_superfluous_tensors_are_named(
    change: Any, message: str, model: WanTransformer, tmp_path: Path
) -> None:
    path, _ = single("", torch.float32)(model, tmp_path)
    with pytest.raises(ModelFileError, match=message):
        load_transformer(edit(path, change), config=HEADS)


def test_foreign_tensors_beside_the_prefix_are_refused(
    model: WanTransformer, tmp_path: Path
) -> None:
    path, _ = single(COMFY, torch.float32)(model, tmp_path)
    edit(path, lambda tensors: tensors.update({"first_stage_model.x": torch.zeros(1)}))
    with pytest.raises(ModelFileError, match=r"first_stage_model\.x"):
        load_transformer(path, config=HEADS)


# Precisions

Q = "blocks.0.self_attn.q"


def _table(format_: str) -> Tensor:
    return torch.tensor(list(json.dumps({"format": format_}).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("scale_name", "change", "message"),
    [
        ("scale_weight", lambda t: t.pop(f"{Q}.scale_weight"), f"no scale for {Q}"),
        ("weight_scale", lambda t: t.pop(f"{Q}.weight_scale"), f"no scale for {Q}"),
        ("weight_scale", lambda t: t.update({f"{Q}.comfy_quant": _table("nvfp4")}), "nvfp4"),
        ("weight_scale", lambda t: t.update({f"{Q}.comfy_quant": _table("mxfp8")}), "mxfp8"),
        (
            "weight_scale",
            lambda t: t.update({f"{Q}.comfy_quant": torch.zeros(3, dtype=torch.uint8)}),
            "comfy_quant is not valid JSON",
        ),
        (
            "weight_scale",
            lambda t: t.update({f"{Q}.weight": torch.zeros(24, 24, dtype=torch.int8)}),
            "stored as int8",
        ),
        (
            "weight_scale",
            lambda t: t.update({f"{Q}.weight_scale": torch.ones(24, 2)}),
            r"shape \(24, 2\)",
        ),
        (
            "weight_scale",
            lambda t: t.update({f"{Q}.weight_scale": torch.ones(24, dtype=torch.uint8)}),
            "uint8",
        ),
        ("scale_weight", lambda t: t.pop(f"{Q}.weight"), "scales without weights"),
    ],
)
def test_precisions_that_cannot_be_undone_are_refused(
    scale_name: str, change: Any, message: str, model: WanTransformer, tmp_path: Path
) -> None:
    path, _ = fp8_scaled(scale_name)(model, tmp_path)
    with pytest.raises(ModelFileError, match=message):
        load_transformer(edit(path, change), config=HEADS)


def test_formats_in_the_header_are_refused_too(model: WanTransformer, tmp_path: Path) -> None:
    path, _ = single("", torch.float32)(model, tmp_path)
    layers = {"layers": {Q: {"format": "int8_tensorwise"}}}
    edit(path, lambda _: None, {"_quantization_metadata": json.dumps(layers)})
    with pytest.raises(ModelFileError, match="int8_tensorwise"):
        load_transformer(path, config=HEADS)


def test_scales_matter(model: WanTransformer, tmp_path: Path) -> None:
    """Without its scales the same file gives another model: what the refusal protects from."""
    path, _ = fp8_scaled("scale_weight")(model, tmp_path)
    inputs = make_inputs(model.config)
    expected = run_ours(load_transformer(path, config=HEADS), inputs)

    def forget(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if "scale" in n]:
            del tensors[name]

    unscaled = load_transformer(edit(path, forget), config=HEADS)
    error = float(((run_ours(unscaled, inputs) - expected).norm() / expected.norm()).detach())
    assert error > 0.5


def test_a_marker_without_any_scale_is_refused(model: WanTransformer, tmp_path: Path) -> None:
    path, _ = fp8_scaled("scale_weight")(model, tmp_path)

    def forget(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.endswith("scale_weight")]:
            del tensors[name]

    with pytest.raises(ModelFileError, match="no scale"):
        load_transformer(edit(path, forget), config=HEADS)
