"""Files of LoHa, LoKr, DoRA and VeRA: what we write others load, what others write we read."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from trainer.adapters import load_adapter
from trainer.adapters.apply import attach, merge_into
from trainer.adapters.formats.writer import save_adapter
from trainer.contract.errors import ConfigError, ModelFileError
from trainer.contract.stored_kinds import STORED_KINDS
from trainer.jobs.convert import convert_lora
from trainer.jobs.inspect_lora import inspect_lora

from .kinds import KINDS, changed, make_update, make_updates
from .test_writer import written_in_diffusers
from .tiny_models import make_transformer, make_twin, model_inputs, run, run_twin

NEW = tuple(kind for kind in KINDS if kind != "lora")


def merged_model(model, updates, strength=1.0):
    """A copy of the model with the formula's weights."""
    copy = make_transformer(image=model.config.image_dim is not None)
    copy.load_state_dict(model.state_dict())
    for name, update in updates.items():
        weight = copy.get_parameter(f"{name}.weight")
        weight.data.copy_(changed(update, weight.data, strength))
    return copy


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [1.0, 0.4])
@torch.no_grad()
def test_a_file_attached_equals_merged_equals_the_formula(transformer, tmp_path, kind, strength):
    updates = make_updates(transformer, kind)
    save_adapter(updates, tmp_path / "a.safetensors", layout="kohya", dtype=torch.float32)
    adapter = load_adapter(tmp_path / "a.safetensors")
    inputs = model_inputs(transformer)
    plain, wanted = (
        run(transformer, inputs),
        run(merged_model(transformer, updates, strength), inputs),
    )
    merged = make_transformer()
    merge_into(merged, adapter, strength)
    attached = attach(transformer, adapter, strength)
    assert (wanted - plain).abs().max() > 0.01
    torch.testing.assert_close(run(merged, inputs), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run(transformer, inputs), wanted, rtol=1e-4, atol=1e-4)
    attached.set_strength(0.0)
    assert torch.equal(run(transformer, inputs), plain)
    attached.detach()
    assert torch.equal(run(transformer, inputs), plain)


def comfy_weight(weight, tensors, stem, strength):
    """What ComfyUI makes of a weight (comfy/weight_adapter, 0.3.77), from its behaviour.

    Its one difference for DoRA is kept: it divides by the norm of the weight as it was.
    """
    own = {k.removeprefix(f"{stem}."): v.double() for k, v in tensors.items() if k.startswith(stem)}
    alpha = own.pop("alpha", None)
    dora_scale = own.pop("dora_scale", None)
    if "hada_w1_a" in own:
        added = (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])
        rank = own["hada_w1_b"].shape[0]
    elif any(key.startswith("lokr") for key in own):
        rank, parts = None, []
        for name in ("lokr_w1", "lokr_w2"):
            if name not in own:
                rank = own[f"{name}_b"].shape[0]
                own[name] = own[f"{name}_a"] @ own[f"{name}_b"]
            parts.append(own[name])
        added = torch.kron(*parts)
    else:
        up = own.get("lora_up.weight", own.get("lora_B.weight"))
        down = own.get("lora_down.weight", own.get("lora_A.weight"))
        added, rank = up @ down, len(down)
    added = added * (alpha / rank if alpha is not None and rank is not None else 1.0)
    if dora_scale is None:
        return weight + strength * added
    assert dora_scale.shape == (len(weight), 1)
    lengths = weight.norm(dim=1, keepdim=True) + torch.finfo(torch.float32).eps
    return weight + strength * ((weight + added) * dora_scale / lengths - weight)


@pytest.mark.parametrize("layout", ["comfy", "kohya"])
@pytest.mark.parametrize("kind", NEW)
def test_comfyui_makes_the_same_of_every_module(tmp_path, kind, layout):
    model = make_transformer()
    updates = make_updates(model, kind, alpha=5.0) | make_updates(
        model, kind, names=["head.head", "time_projection.1"]
    )
    save_adapter(updates, tmp_path / "lora", layout=layout, dtype=torch.float32)
    tensors = load_file(tmp_path / "lora")
    for name, update in updates.items():
        stem = (
            f"diffusion_model.{name}"
            if layout == "comfy"
            else f"lora_unet_{name.replace('.', '_')}"
        )
        weight = model.get_parameter(f"{name}.weight").detach().double()
        wanted = changed(update, weight, 0.7)
        if kind == "dora":
            added = update.scale * update.up_OR.double() @ update.down_RI.double()
            stretch = (weight + added).norm(dim=1, keepdim=True) / weight.norm(dim=1, keepdim=True)
            wanted = weight + (changed(update, weight) * stretch - weight) * 0.7
        found = comfy_weight(weight, tensors, stem, 0.7)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    known = {f"diffusion_model.{n}" for n in updates}
    known |= {f"lora_unet_{n.replace('.', '_')}" for n in updates}
    assert all(any(key.startswith(f"{stem}.") for stem in known) for key in tensors)


@pytest.mark.parametrize("names", [None, ["blocks.1.ffn.0", "head.head"]])
def test_diffusers_loads_a_dora_with_the_right_effect(tmp_path, names):
    model = make_transformer()
    updates = make_updates(model, "dora", names=names, alpha=5.0)
    path = tmp_path / "dora.safetensors"
    save_adapter(updates, path, layout="peft", dtype=torch.float32)
    with torch.no_grad():
        found = written_in_diffusers(model, path, 1.0)
        wanted = run_twin(make_twin(merged_model(model, updates)), model_inputs(model))
        plain = run_twin(make_twin(model), model_inputs(model))
    assert (wanted - plain).abs().max() > 1e-2
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_dora_that_diffusers_wrote_has_the_effect_it_has_there(tmp_path):
    model = make_transformer()
    twin = make_twin(model)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_dora=True, init_lora_weights=False,
        target_modules=["to_q", "to_out.0", "ffn.net.0.proj", "proj_out"],
    )  # fmt: skip
    torch.manual_seed(0)
    twin.add_adapter(config, adapter_name="style")
    for name, parameter in twin.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1.3)
    twin.save_lora_adapter(tmp_path, adapter_name="style")
    adapter = load_adapter(tmp_path)
    assert {update.kind for update in adapter.values()} == {"dora"}
    with torch.no_grad():
        wanted = run_twin(twin, model_inputs(model))
        merge_into(model, adapter)
        found = run_twin(make_twin(model), model_inputs(model))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


class Net(nn.Module):
    """Linear layers under names of Wan, so that PEFT can wrap and save them."""

    def __init__(self, shapes: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        for name, (outputs, inputs) in shapes.items():
            holder = self
            *parents, child = name.split(".")
            for parent in parents:
                if parent not in holder._modules:
                    holder.add_module(parent, nn.Module())
                holder = holder.get_submodule(parent)
            holder.add_module(child, nn.Linear(inputs, outputs))


SHAPES = {
    "blocks.0.self_attn.q": (24, 24),
    "blocks.0.cross_attn.o": (24, 24),
    "blocks.1.ffn.0": (48, 24),
    "blocks.1.ffn.2": (24, 48),
}


def peft_folder(tmp_path, config, shapes):
    model = peft.get_peft_model(Net(shapes), config)
    for index, parameter in enumerate(model.parameters()):
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(index)
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    model.save_pretrained(tmp_path)
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}


TARGETS = {"target_modules": ["q", "o", "ffn.0", "ffn.2"], "init_weights": False}
PEFT_CONFIGS = {
    "loha": (peft.LoHaConfig, {"r": 3, "alpha": 5, "alpha_pattern": {"ffn.0": 2}}),
    "lokr": (peft.LoKrConfig, {"r": 1, "alpha": 5, "decompose_both": True}),
    "lokr, whole": (
        peft.LoKrConfig,
        {
            "r": 64,
            "alpha": 16,
            "rank_pattern": {"ffn.2": 32},
            "alpha_pattern": {"self_attn.q": 8},
        },
    ),
    "lokr, factor": (peft.LoKrConfig, {"r": 2, "alpha": 1, "decompose_factor": 4}),
    "vera": (peft.VeraConfig, {"r": 4, "save_projection": True}),
    "vera, drawn": (
        peft.VeraConfig,
        {"r": 4, "save_projection": False, "projection_prng_key": 7, "d_initial": 0.3},
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", PEFT_CONFIGS)
def test_peft_checkpoints_are_read(tmp_path, case):
    config, options = PEFT_CONFIGS[case]
    wanted = peft_folder(tmp_path, config(**options, **TARGETS), SHAPES)
    assert set(wanted) == set(SHAPES)
    adapter = load_adapter(tmp_path)
    told = {"vera": "stored in the file", "vera, drawn": "drawn from projection_prng_key"}
    assert len(adapter.notes) == (case in told)
    assert all(told[case] in note for note in adapter.notes)
    assert {u.kind for u in adapter.values()} == {case[:4] if "vera" not in case else "lora"}
    for name, delta in wanted.items():
        torch.testing.assert_close(adapter[name].delta(), delta, rtol=1e-5, atol=1e-6)
    output = tmp_path / "own.safetensors"
    convert_lora(tmp_path, output, layout="kohya")
    for name, delta in wanted.items():
        torch.testing.assert_close(load_adapter(output)[name].delta(), delta, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "names", [["blocks.1.ffn.0"], ["blocks.1.ffn.2"], ["blocks.0.self_attn.q"]]
)
@pytest.mark.parametrize("stored", [True, False])
def test_vera_widths_are_told_from_what_there_is(tmp_path, names, stored):
    shapes = {name: SHAPES[name] for name in names}
    config = peft.VeraConfig(
        r=3, save_projection=stored, target_modules=["q", "ffn.0", "ffn.2"], init_weights=False
    )
    wanted = peft_folder(tmp_path, config, shapes)
    if not stored and "ffn" in names[0]:
        with pytest.raises(ModelFileError, match="width"):
            load_adapter(tmp_path)
        return
    for name, delta in wanted.items():
        torch.testing.assert_close(load_adapter(tmp_path)[name].delta(), delta)


@pytest.mark.filterwarnings("ignore")
def test_vera_without_matrices_or_seed_is_refused(tmp_path):
    config = peft.VeraConfig(r=3, save_projection=False, **TARGETS)
    peft_folder(tmp_path, config, SHAPES)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ModelFileError, match="projection_prng_key"):
        load_adapter(tmp_path)


Q = "diffusion_model.blocks.0.self_attn.q"
LOHA = {
    f"{Q}.hada_w1_a": torch.ones(6, 2), f"{Q}.hada_w1_b": torch.ones(2, 4),
    f"{Q}.hada_w2_a": torch.ones(6, 2), f"{Q}.hada_w2_b": torch.ones(2, 4),
}  # fmt: skip
LOKR = {f"{Q}.lokr_w1": torch.ones(2, 2), f"{Q}.lokr_w2": torch.ones(3, 2)}
DORA = {
    f"{Q}.lora_A.weight": torch.ones(2, 4), f"{Q}.lora_B.weight": torch.ones(6, 2),
    f"{Q}.dora_scale": torch.ones(6, 1),
}  # fmt: skip


def write(tmp_path, tensors, metadata=None):
    path = tmp_path / "lora.safetensors"
    save_file({k: v.clone() for k, v in tensors.items()}, path, metadata=metadata)
    return path


@pytest.mark.parametrize(
    ("good", "without", "extra", "words"),
    [
        (LOHA, ["hada_w2_b"], {}, ["lacks its hada_w2_b", "LoHa of blocks.0.self_attn.q"]),
        (LOHA, [], {"hada_w2_b": torch.ones(3, 4)}, ["do not fit", "hada_w2_b is (3, 4)"]),
        (LOHA, [], {"hada_w1_a": torch.ones(6, 2, 1, 1)}, ["convolution"]),
        (LOHA, [], {"hada_w1_b": torch.full((2, 4), torch.nan)}, ["hada_w1_b", "NaN"]),
        (LOHA, [], {k.rpartition(".")[2]: v[:, :0] if k.endswith("a") else v[:0]
                    for k, v in LOHA.items()}, ["do not fit", "(6, 0)"]),
        (LOHA, [], {"dora_scale": torch.ones(6, 1)}, ["mixes", "DoRA", "LoHa"]),
        (LOHA, [], {"lokr_w1": torch.ones(6, 1)}, ["mixes", "LoKr", "LoHa"]),
        (LOKR, ["lokr_w2"], {}, ["lacks its lokr_w2"]),
        (LOKR, ["lokr_w2"], {"lokr_w2_a": torch.ones(3, 1)}, ["lacks its lokr_w2_b"]),
        (LOKR, [], {"lokr_w1_a": torch.ones(3, 1)}, ["lokr_w1", "one too many"]),
        (LOKR, ["lokr_w2"], {"lokr_w2_a": torch.ones(3, 2), "lokr_w2_b": torch.ones(3, 2)},
         ["ranks differ", "lokr_w2_b is (3, 2)"]),
        (LOKR, ["lokr_w2"], {"lokr_w2_a": torch.ones(3, 0), "lokr_w2_b": torch.ones(0, 2)},
         ["lokr_w2", "rank is 0"]),
        (DORA, ["lora_B.weight"], {}, ["lacks its up"]),
        (DORA, [], {"dora_scale": torch.ones(1, 4)}, ["input column"]),
        (DORA, [], {"dora_scale": torch.ones(5, 1)}, ["5 magnitudes for 6 outputs"]),
    ],
)  # fmt: skip
def test_wrong_files_are_named_by_file_and_key(tmp_path, good, without, extra, words):
    kept = {k: v for k, v in good.items() if not k.endswith(tuple(f".{w}" for w in without))}
    path = write(tmp_path, {**kept, **{f"{Q}.{k}": v for k, v in extra.items()}})
    with pytest.raises(ModelFileError) as caught:
        load_adapter(path)
    for word in (str(path), *words):
        assert word in str(caught.value)


def test_wrong_vera_files(tmp_path):
    stem = "base_model.model.blocks.0.self_attn.q"
    own = {f"{stem}.vera_lambda_b": torch.ones(6), f"{stem}.vera_lambda_d": torch.ones(2)}
    shared = {"base_model.vera_A": torch.ones(2, 6), "base_model.vera_B": torch.ones(6, 2)}
    assert load_adapter(write(tmp_path, own | shared)).layout == "bare"
    for extra, words in (
        ({"base_model.vera_A": torch.ones(2, 6)}, "partner"),
        (shared | {"base_model.vera_A": torch.ones(2, 5)}, "do not fit"),
        (shared | {f"{stem}.vera_lambda_d": torch.ones(3)}, "ranks differ"),
    ):
        with pytest.raises(ModelFileError, match=words):
            load_adapter(write(tmp_path, own | extra))
    with pytest.raises(ModelFileError, match="belongs to no module"):
        load_adapter(write(tmp_path, LOHA | shared))
    outside = {k.replace("blocks.0.self_attn.q", "head.head"): v for k, v in own.items()}
    with pytest.raises(ModelFileError, match=r"head\.head.*width"):
        load_adapter(write(tmp_path, outside | shared))


def test_a_lokr_that_does_not_fit_the_model_is_refused(transformer, tmp_path):
    adapter = load_adapter(write(tmp_path, LOKR))
    assert "6 " not in str(adapter.layout)
    for use in (attach, merge_into):
        with pytest.raises(ModelFileError, match=r"self_attn\.q is \(6, 4\)"):
            use(transformer, adapter)


def test_alpha_is_noted_where_it_is_missing_and_unused_where_lycoris_does_not_use_it(tmp_path):
    assert "no alpha" in load_adapter(write(tmp_path, LOHA)).notes[0]
    for alpha in (1.0, 7.0):
        tensors = {**LOKR, f"{Q}.alpha": torch.tensor(alpha)}
        adapter = load_adapter(write(tmp_path, tensors))
        assert adapter.notes == ()
        assert adapter["blocks.0.self_attn.q"].scale == 1.0


def test_settings_that_say_dora_need_magnitudes(tmp_path):
    path = write(tmp_path, {k: v for k, v in DORA.items() if "dora" not in k},
                 {"lora_adapter_metadata": json.dumps({"transformer.use_dora": True})})  # fmt: skip
    with pytest.raises(ModelFileError, match="lack the magnitude"):
        load_adapter(path)


def test_kinds_may_be_mixed_by_module(transformer, tmp_path):
    names = ["blocks.0.self_attn.q", "blocks.1.ffn.0", "blocks.2.ffn.2", "head.head"]
    updates = {}
    for name, kind in zip(names, ("lora", "loha", "lokr", "dora"), strict=True):
        updates |= make_updates(transformer, kind, names=[name])
    path = tmp_path / "mixed.safetensors"
    save_adapter(updates, path, dtype=torch.float32, metadata={"menma.kind": "lora"})
    summary = inspect_lora(path)
    assert summary["kind"] == "dora+loha+lokr+lora"
    assert summary["metadata"]["menma.kind"] == "dora+loha+lokr+lora"
    inputs = model_inputs(transformer)
    with torch.no_grad():
        wanted = run(merged_model(transformer, updates), inputs)
        attach(transformer, load_adapter(path))
        torch.testing.assert_close(run(transformer, inputs), wanted, rtol=1e-4, atol=1e-4)
    del updates["blocks.1.ffn.0"], updates["blocks.2.ffn.2"]
    with pytest.raises(ConfigError, match=r"head\.head is one and blocks\.0\.self_attn\.q is not"):
        save_adapter(updates, path, layout="peft")


def test_layouts_that_diffusers_cannot_load_are_refused(transformer, tmp_path):
    for kind in ("loha", "lokr"):
        path = tmp_path / kind
        save_adapter(make_updates(transformer, kind), path)
        with pytest.raises(ConfigError, match=STORED_KINDS[kind].title) as caught:
            convert_lora(path, tmp_path / "out.safetensors", layout="peft")
        assert "comfy" in str(caught.value)
        assert not (tmp_path / "out.safetensors").exists()


def test_header_names_the_module_that_reads_it(transformer, tmp_path):
    expected = {"lora": "networks.lora_wan", "loha": "networks.loha", "dora": "lycoris.kohya"}
    for kind, module in {**expected, "lokr": "networks.lokr"}.items():
        save_adapter(make_updates(transformer, kind), tmp_path / kind, layout="kohya")
        assert load_adapter(tmp_path / kind).metadata["ss_network_module"] == module


def test_bf16_files_keep_magnitudes_in_float32_and_stay_bf16_when_converted(transformer, tmp_path):
    path, again = tmp_path / "dora.safetensors", tmp_path / "again.safetensors"
    save_adapter(make_updates(transformer, "dora"), path)
    convert_lora(path, again, layout="kohya")
    for file in (path, again):
        dtypes = {key.rpartition(".")[2]: t.dtype for key, t in load_file(file).items()}
        assert dtypes["dora_scale"] == torch.float32
        assert dtypes["weight"] == torch.bfloat16


CASES = st.tuples(
    st.sampled_from(KINDS), st.integers(1, 4), st.integers(1, 12), st.integers(1, 12),
    st.floats(0.05, 50), st.integers(0, 99),
)  # fmt: skip
NAMES = st.sampled_from(["blocks.0.self_attn.q", "blocks.39.ffn.0", "head.head", "img_emb.proj.3"])


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.dictionaries(NAMES, CASES, min_size=1, max_size=4),
    st.lists(st.sampled_from(("comfy", "kohya", "peft")), min_size=1, max_size=4),
)
def test_any_chain_of_layouts_keeps_every_update(tmp_path, modules, layouts):
    updates = {
        name: make_update(kind, outputs, inputs, rank=rank, alpha=alpha, seed=seed)
        for name, (kind, rank, outputs, inputs, alpha, seed) in modules.items()
    }
    kinds = {update.kind for update in updates.values()}
    possible = set.intersection(*(set(STORED_KINDS[kind].written) for kind in kinds))
    possible -= {"peft"} if {"lora", "dora"} <= kinds else set()
    path, current = tmp_path / "lora.safetensors", updates
    for layout in layouts:
        if layout not in possible:
            with pytest.raises(ConfigError):
                save_adapter(current, path, layout=layout, dtype=torch.float32)
            continue
        save_adapter(current, path, layout=layout, dtype=torch.float32)
        current = load_adapter(path)
        assert current.layout == layout
    assert set(current) == set(updates)
    for name, update in updates.items():
        weight = torch.randn(update.shape, generator=torch.Generator().manual_seed(1))
        wanted, found = changed(update, weight), current[name].added_to(weight)
        assert current[name].kind == update.kind
        error = (found - wanted).abs().max()
        assert error <= 1e-5 * (1 + (wanted - weight).abs().max())
