from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trainer.adapters import load_adapter
from trainer.adapters.apply import attach
from trainer.adapters.formats.writer import save_adapter
from trainer.contract.errors import ConfigError, ModelFileError
from trainer.contract.events import encode
from trainer.contract.jobs import ConvertRequest, InspectRequest, MergeRequest
from trainer.contract.lora_use import LoRAUse
from trainer.contract.variants import VARIANTS
from trainer.jobs.inspect_lora import fitting_variants, inspect_lora
from trainer.jobs.lora_tools import run_convert, run_inspect, run_merge
from trainer.models.wan.loading import load_transformer, save_transformer

from .tiny_models import (
    expected_weights,
    make_factors,
    make_transformer,
    make_twin,
    model_inputs,
    run,
)


class Events(list):
    def __call__(self, kind, /, **fields):
        encode(kind, **fields)
        self.append((kind, fields))


@pytest.fixture
def model():
    return make_transformer()


@pytest.fixture
def lora(model, tmp_path):
    path = tmp_path / "style.safetensors"
    metadata = {"ss_seed": "7"}
    factors = make_factors(model, alpha=6.0)
    save_adapter(factors, path, layout="kohya", dtype=torch.float32, metadata=metadata)
    return path


@pytest.fixture
def base(model, tmp_path):
    path = tmp_path / "base.safetensors"
    save_transformer(model, path, metadata={"made_by": "us"})
    return path


def merge(base, output, *loras, **options) -> Events:
    events = Events()
    uses = [use if isinstance(use, LoRAUse) else LoRAUse(path=use) for use in loras]
    run_merge(MergeRequest(base=base, loras=tuple(uses), output=output, **options), events)
    return events


@torch.no_grad()
def test_merged_file_equals_the_model_with_the_loras_attached(model, base, lora, tmp_path):
    other = tmp_path / "other.safetensors"
    save_adapter(make_factors(model, rank=2, seed=5), other, dtype=torch.float32)
    output = tmp_path / "merged.safetensors"
    uses = (LoRAUse(path=lora, strength=0.8), LoRAUse(path=other, strength=-0.5))
    events = merge(base, output, *uses)
    assert events[-1][0] == "output"
    assert events[-1][1]["num_changed"] == 30
    for use in uses:
        attach(model, load_adapter(use.path), use.strength)
    inputs = model_inputs(model)
    merged = load_transformer(output)
    torch.testing.assert_close(run(merged, inputs), run(model, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_names_dtypes_and_metadata_of_the_base_are_kept(model, lora, tmp_path, prefix, dtype):
    tensors = {f"{prefix}{name}": value.to(dtype) for name, value in model.state_dict().items()}
    tensors[f"{prefix}head.modulation"] = tensors[f"{prefix}head.modulation"].float()
    base, output = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, base, metadata={"config": "x", "format": "pt"})
    merge(base, output, lora)
    written = load_file(output)
    assert {n: (t.dtype, t.shape) for n, t in written.items()} == {
        n: (t.dtype, t.shape) for n, t in tensors.items()
    }
    rounded = {n.removeprefix(prefix): t for n, t in tensors.items()}
    by_hand = make_transformer()
    by_hand.load_state_dict({n: t.float() for n, t in rounded.items()})
    wanted = expected_weights(by_hand, load_adapter(lora))
    for name, value in written.items():
        exact = wanted[name.removeprefix(prefix)].to(value.dtype)
        step = torch.finfo(value.dtype).eps * exact.abs().max()
        assert (value.double() - exact.double()).abs().max() <= step
        if "norm" in name or "modulation" in name:
            assert torch.equal(value, tensors[name])
    with safe_open(output, "pt") as file:
        metadata = file.metadata()
    assert metadata["config"] == "x"
    assert json.loads(metadata["menma.merged"]) == [{"file": lora.name, "strength": 1.0}]
    assert metadata["modelspec.merged_from"] == f"{base.name}, {lora.name}"


@torch.no_grad()
def test_a_diffusers_folder_becomes_one_file_of_original_names(model, lora, tmp_path):
    folder = tmp_path / "transformer"
    make_twin(model).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    output = tmp_path / "merged.safetensors"
    merge(folder, output, lora)
    assert set(load_file(output)) == set(model.state_dict())
    attach(model, load_adapter(lora))
    inputs = model_inputs(model)
    torch.testing.assert_close(
        run(load_transformer(output), inputs), run(model, inputs), rtol=1e-5, atol=1e-5
    )


def test_fp8_can_be_written_more_precisely(model, lora, tmp_path):
    tensors = dict(model.state_dict())
    weight = tensors["blocks.0.ffn.0.weight"]
    scale = weight.abs().max() / 448
    tensors["blocks.0.ffn.0.weight"] = (weight / scale).to(torch.float8_e4m3fn)
    tensors["blocks.0.ffn.0.scale_weight"] = scale
    tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    base, output = tmp_path / "fp8.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, base)
    merge(base, output, lora, dtype="fp32")
    written = load_file(output)
    assert set(written) == set(model.state_dict())
    stored = tensors["blocks.0.ffn.0.weight"].float() * scale
    exact = stored + load_adapter(lora)["blocks.0.ffn.0"].delta()
    torch.testing.assert_close(written["blocks.0.ffn.0.weight"], exact)


def test_nothing_is_overwritten_by_accident(base, lora, tmp_path):
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"mine")
    with pytest.raises(ConfigError, match="there already"):
        merge(base, output, lora)
    for target in (base, lora):
        with pytest.raises(ConfigError, match="input"):
            merge(base, target, lora, force=True)
    with pytest.raises(ConfigError, match="safetensors"):
        merge(base, tmp_path / "out.ckpt", lora)
    assert output.read_bytes() == b"mine"
    merge(base, output, lora, force=True)
    assert len(load_file(output)) > 10


def test_a_merge_that_fails_leaves_no_trace(base, lora, tmp_path):
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"mine")
    before = sorted(tmp_path.iterdir())
    wrong = tmp_path / "wrong.safetensors"
    save_adapter(make_factors(make_transformer(dim=48)), wrong)
    with pytest.raises(ModelFileError, match="another model"):
        merge(base, output, lora, wrong, force=True)
    with pytest.raises(ModelFileError, match="cannot hold"):
        merge(base, output, LoRAUse(path=lora, strength=1e8), force=True, dtype="fp16")
    wrong.unlink()
    assert output.read_bytes() == b"mine"
    assert sorted(tmp_path.iterdir()) == before


def test_a_precision_that_cannot_hold_the_base_is_refused(model, lora, tmp_path):
    base, output = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    model.head.head.weight.data[0, 0] = 1e5  # of a layer that the LoRA leaves alone
    save_transformer(model, base)
    with pytest.raises(ModelFileError, match=r"head\.head\.weight has values that torch\.float16"):
        merge(base, output, lora, dtype="fp16")
    assert not output.exists()
    merge(base, output, lora, dtype="bf16")


def test_loras_are_not_merged_into_the_other_expert(model, tmp_path):
    base, lora = tmp_path / "high.safetensors", tmp_path / "low.safetensors"
    save_transformer(model, base, metadata={"menma.expert": "high_noise"})
    save_adapter(make_factors(model), lora, metadata={"menma.expert": "low_noise"})
    with pytest.raises(ModelFileError, match="low_noise expert"):
        merge(base, tmp_path / "out.safetensors", lora)


@pytest.mark.parametrize("layout", ["comfy", "kohya", "peft"])
@pytest.mark.parametrize("source_layout", ["comfy", "kohya", "peft"])
def test_convert_keeps_update_and_metadata(model, tmp_path, layout, source_layout):
    source, output = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    metadata = {"ss_seed": "7", "modelspec.title": "fox"}
    factors = make_factors(model, rank=3, alpha=2.0)
    save_adapter(factors, source, layout=source_layout, dtype=torch.float32, metadata=metadata)
    events = Events()
    run_convert(ConvertRequest(input=source, output=output, layout=layout), events)
    assert events[-1][1]["source_layout"] == source_layout
    assert events[-1][1]["dtype"] == "float32"
    read = load_adapter(output)
    assert read.layout == layout
    assert ("lora_adapter_metadata" in read.metadata) == (layout == "peft")
    assert metadata.items() <= read.metadata.items()
    for name, pair in factors.items():
        torch.testing.assert_close(read[name].delta(), pair.delta())


def test_convert_keeps_or_changes_the_precision(model, tmp_path):
    source = tmp_path / "a.safetensors"
    save_adapter(make_factors(model), source, dtype=torch.float16)
    for asked, expected in ((None, torch.float16), ("bf16", torch.bfloat16)):
        output = tmp_path / f"{asked}.safetensors"
        run_convert(ConvertRequest(input=source, output=output, dtype=asked), Events())
        assert {t.dtype for t in load_file(output).values()} == {expected}


def test_convert_never_writes_over_its_input(lora):
    before = lora.read_bytes()
    with pytest.raises(ConfigError, match="input"):
        run_convert(ConvertRequest(input=lora, output=lora, force=True), Events())
    assert lora.read_bytes() == before


def test_inspect_says_what_is_in_the_file(model, tmp_path):
    path = tmp_path / "lora.safetensors"
    factors = make_factors(model, rank=4, alpha=2.0) | make_factors(
        model, rank=2, alpha=2.0, names=["head.head"]
    )
    factors["blocks.1.ffn.0"].up_OR.zero_()
    save_adapter(factors, path, layout="kohya", dtype=torch.float16, metadata={"a": "x" * 5000})
    found = inspect_lora(path)
    assert found["layout"] == "kohya"
    assert found["num_modules"] == 31
    assert found["ranks"] == {"2": 1, "4": 30}
    assert found["scales"] == {"0.5": 30, "1": 1}
    assert found["dtypes"] == {"float16": 31}
    assert found["blocks"] == [0, 1, 2]
    assert found["modules"]["self_attn.q"] == 3
    assert found["modules"]["head.head"] == 1
    assert found["zero_modules"] == 1
    assert found["num_parameters"] == sum(
        f.down_RI.numel() + f.up_OR.numel() for f in factors.values()
    )
    norms = [f.delta().norm().item() for f in load_adapter(path).values()]
    assert found["norm"] == pytest.approx(sum(n * n for n in norms) ** 0.5, rel=1e-4)
    assert max(found["largest"].values()) == pytest.approx(max(norms), rel=1e-4)
    assert "width 24" in found["model"]
    assert found["variants"] == []
    json.dumps(found)
    events = Events()
    run_inspect(InspectRequest(path=path), events)
    assert len(events[-1][1]["lora"]["metadata"]["a"]) < 300


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("wan2.1-t2v-1.3b", {"wan2.1-t2v-1.3b", "wan2.1-fun-inp-1.3b", "wan2.1-fun-control-1.3b"}),
        ("wan2.2-ti2v-5b", {"wan2.2-ti2v-5b"}),
        ("wan2.1-i2v-14b", {"wan2.1-i2v-14b", "wan2.1-flf2v-14b", "wan2.1-fun-control-14b"}),
    ],
)
def test_inspect_names_the_models_a_lora_fits(tmp_path, variant, expected):
    config = VARIANTS[variant].transformer
    layers = {
        "self_attn.q": (config.dim, config.dim),
        "ffn.0": (config.ffn_dim, config.dim),
        "ffn.2": (config.dim, config.ffn_dim),
    }
    if config.image_dim:
        layers["cross_attn.v_img"] = (config.dim, config.dim)
    tensors = {}
    for name, (outputs, inputs) in layers.items():
        stem = f"diffusion_model.blocks.{config.num_layers - 1}.{name}"
        tensors[f"{stem}.lora_A.weight"] = torch.zeros(1, inputs)
        tensors[f"{stem}.lora_B.weight"] = torch.zeros(outputs, 1)
    save_file(tensors, tmp_path / "lora.safetensors")
    assert set(fitting_variants(load_adapter(tmp_path / "lora.safetensors"))) == expected


@pytest.mark.parametrize(
    "metadata",
    [
        {f"key{number:03}": "x" * 1900 for number in range(190)},
        {"short": "v", "k" * 70_000: "v"},
        {f"key{number:03}": "\x01" * 1500 for number in range(40)},
    ],
)
def test_a_header_of_any_size_can_be_inspected(model, tmp_path, metadata):
    path = tmp_path / "lora.safetensors"
    save_adapter(make_factors(model), path, metadata=metadata)
    events = Events()
    run_inspect(InspectRequest(path=path), events)
    (_, said), written = events[-1], load_adapter(path).metadata
    shown = said["lora"]["metadata"]
    assert shown.pop("…") == f"and {len(written) - len(shown)} more keys"
    assert all(written[key] == value for key, value in shown.items())
    assert shown


def test_merging_reads_one_tensor_at_a_time(base, lora, tmp_path, monkeypatch):
    import trainer.jobs.merge_weights as module

    alive, most = set(), 0
    original = module.read_tensor

    def counted(files, stored, dtype, device):
        nonlocal most
        import weakref

        tensor = original(files, stored, dtype, device)
        alive.add(stored.name)
        weakref.finalize(tensor, alive.discard, stored.name)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(module, "read_tensor", counted)
    merge(base, tmp_path / "out.safetensors", lora)
    assert 1 <= most <= 2
    assert (tmp_path / "out.safetensors").stat().st_size > 100_000
