"""Whole differences in LoRA files: attached, merged and in diffusers, they are added to W."""

from __future__ import annotations

import pytest
import torch

from trainer.adapters import load_adapter
from trainer.adapters.apply import attach, merge_into
from trainer.adapters.lora import LoRA
from trainer.contract.errors import ModelFileError
from trainer.memory.block_swap import BlockSwap
from trainer.memory.streams import HostStreams
from trainer.quant.fp8 import Fp8Spec, quantise
from trainer.quant.linear import Fp8Linear

from .difference_files import by_formula, distilled, draw, exact_model, key_of, write
from .tiny_models import make_factors, make_transformer, make_twin, model_inputs, run, run_twin

IMAGE = {
    "extra_channels": torch.randn(1, 20, 2, 4, 4, generator=torch.Generator().manual_seed(7)),
    "image_context": torch.randn(1, 257, 1280, generator=torch.Generator().manual_seed(8)),
}


def answer(model, *, image=False):
    given = model_inputs(model)
    extra = IMAGE if image else {}
    with torch.no_grad():
        return model(given["latents"], given["timestep"], given["context"], **extra)


def adapter_of(tmp_path, tensors, name="distilled"):
    return load_adapter(write(tmp_path / f"{name}.safetensors", tensors), differences=True)


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("strength", [0.7, -1.0])
def test_attached_equals_merged_equals_the_formula(tmp_path, image, strength):
    model, merged = make_transformer(image=image), make_transformer(image=image)
    # Every parameter of the model has a whole difference, the weights of linear layers too.
    tensors = {key_of(name): t for name, t in draw(model, model.state_dict()).items()}
    adapter = adapter_of(tmp_path, tensors)
    wanted = answer(exact_model(model, by_formula(model, tensors, strength)), image=image)
    plain, state = answer(model, image=image), model.state_dict()
    merge_into(merged, adapter, strength)
    attached = attach(model, adapter, strength)
    assert (wanted - plain).abs().max() > 0.1
    torch.testing.assert_close(answer(model, image=image), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(answer(merged, image=image), wanted, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == list(state)
    attached.set_strength(0.0)
    assert torch.equal(answer(model, image=image), plain)
    attached.set_strength(strength)
    attached.detach()
    assert torch.equal(answer(model, image=image), plain)


def test_each_parameter_counts_by_itself(tmp_path):
    model = make_transformer()
    plain = answer(model)
    for name in ("blocks.1.norm3.bias", "blocks.0.self_attn.norm_k.weight", "blocks.2.modulation",
                 "blocks.1.ffn.0.bias", "patch_embedding.weight", "head.modulation",
                 "blocks.2.cross_attn.norm_q.weight", "time_projection.1.bias"):  # fmt: skip
        tensors = {key_of(name): t for name, t in draw(model, [name]).items()}
        attached = attach(model, adapter_of(tmp_path, tensors, name), 2.0)
        found = answer(model)
        attached.detach()
        wanted = answer(exact_model(model, by_formula(model, tensors, 2.0)))
        assert (wanted - plain).abs().max() > 1e-4, name
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, msg=name)


def test_several_come_off_in_any_order_and_may_fail_in_between(tmp_path, monkeypatch):
    model = make_transformer()
    plain = answer(model)
    one, two = distilled(model, seed=3), distilled(model, seed=4)
    first = attach(model, adapter_of(tmp_path, one, "one"), 0.5)
    second = attach(model, adapter_of(tmp_path, two, "two"), -0.3)
    state = by_formula(model, one, 0.5)
    both = {
        name: state[name] + value - model.state_dict()[name].double()
        for name, value in by_formula(model, two, -0.3).items()
    }
    wanted = answer(exact_model(model, both))
    torch.testing.assert_close(answer(model), wanted, rtol=1e-5, atol=1e-5)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "addcmul", lambda *_args, **_kw: 1 / 0)  # in the midst of a block
        with pytest.raises(ZeroDivisionError):
            answer(model)
    torch.testing.assert_close(answer(model), wanted, rtol=1e-5, atol=1e-5)
    interrupted(model, monkeypatch)
    torch.testing.assert_close(answer(model), wanted, rtol=1e-5, atol=1e-5)
    interrupted(model, monkeypatch)
    first.detach()
    alone = answer(exact_model(model, by_formula(model, two, -0.3)))
    torch.testing.assert_close(answer(model), alone, rtol=1e-5, atol=1e-5)
    second.detach()
    assert torch.equal(answer(model), plain)


def interrupted(model, monkeypatch):
    """Let a signal come in the midst of a block: torch calls no hook after that."""

    def stop(*_args, **_named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "addcmul", stop)
        with pytest.raises(KeyboardInterrupt):
            answer(model)


def make_streamed():
    model = make_transformer().requires_grad_(False).eval()
    model.blocks.swap = BlockSwap(list(model.blocks), 2, HostStreams())
    return model


def test_streamed_blocks_and_remembered_results(tmp_path):
    tensors = distilled(make_transformer())
    adapter = adapter_of(tmp_path, tensors)
    model = make_transformer().requires_grad_(False).eval()
    plain = answer(model)
    wanted = {}
    with model.remembering(passes_alike=True):
        for strength in (0.7, 0.2, 0.7):
            attached = attach(model, adapter, strength)
            first, again = answer(model), answer(model)
            assert torch.equal(first, again)
            assert torch.equal(wanted.setdefault(strength, first), first)
            attached.detach()
        assert torch.equal(answer(model), plain)
    formula = answer(exact_model(model, by_formula(model, tensors, 0.7)))
    torch.testing.assert_close(wanted[0.7], formula, rtol=1e-5, atol=1e-5)

    streamed = make_streamed()
    attached = attach(streamed, adapter, 0.7)
    assert torch.equal(answer(streamed), wanted[0.7])
    attached.set_strength(0.2)
    assert torch.equal(answer(streamed), wanted[0.2])
    with pytest.raises(ModelFileError, match="another model"):
        attach(streamed, adapter_of(tmp_path, distilled(make_transformer(dim=48)), "wide"))
    attached.detach()
    assert torch.equal(answer(streamed), plain)
    merged = make_streamed()
    merge_into(merged, adapter, 0.7)
    torch.testing.assert_close(answer(merged), formula, rtol=1e-5, atol=1e-5)


def test_on_an_fp8_base_it_is_the_base_and_the_differences(tmp_path):
    model = make_transformer()
    for block in model.blocks:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, torch.nn.Linear):
                parent, _, child = name.rpartition(".")
                held = quantise(layer.weight.detach(), Fp8Spec(scaled=True, matmul=False))
                setattr(block.get_submodule(parent), child, Fp8Linear(held, layer.bias))
    base = make_transformer()
    state = base.state_dict()
    for name, layer in model.named_modules():
        if isinstance(layer, Fp8Linear):
            state[f"{name}.weight"] = layer.dequantised()
    base.load_state_dict(state)
    tensors = distilled(base)
    tensors |= {key_of(n): t for n, t in draw(base, ["time_embedding.2.weight"]).items()}
    adapter = adapter_of(tmp_path, tensors)
    plain = answer(model)
    wanted = answer(exact_model(base, by_formula(base, tensors, 0.8)))
    attached = attach(model, adapter, 0.8)
    found = answer(model)
    # Factors and matrices are bf16 beside fp8.
    assert (found - wanted).norm() < 0.02 * (wanted - plain).norm()
    attached.detach()
    assert torch.equal(answer(model), plain)
    with pytest.raises(ModelFileError, match="quantised"):
        merge_into(model, adapter)
    assert torch.equal(answer(model), plain)


def test_an_adapter_is_trained_on_top(tmp_path, build):
    model = make_transformer().requires_grad_(False)
    tensors = distilled(model)
    exact = exact_model(model, by_formula(model, tensors)).requires_grad_(False)
    attach(model, adapter_of(tmp_path, tensors))
    gradients = []
    for one in (model, exact):
        lora = LoRA(LoRA.Config(rank=2), build)
        lora.inject(one, seed=0)
        torch.manual_seed(0)
        trained = [p for p in one.parameters() if p.requires_grad]
        for parameter in trained:
            torch.nn.init.normal_(parameter, std=0.1)
        run(one, model_inputs(one)).square().mean().backward()
        gradients.append([parameter.grad for parameter in trained])
    assert len(gradients[0]) == len(gradients[1]) > 10
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dora_first", [False, True])
def test_a_dora_measures_what_is_under_it(tmp_path, dora_first):
    """Over whole differences of weight and bias it is the DoRA of the changed layer."""
    name = "blocks.1.self_attn.q"
    model = make_transformer()
    tensors = {key_of(n): t for n, t in draw(model, [f"{name}.weight", f"{name}.bias"]).items()}
    pair = make_factors(model, names=[name], alpha=4.0)[name]
    weight, bias = (model.get_submodule(name).get_parameter(n).double() for n in ("weight", "bias"))
    dora = {
        f"diffusion_model.{name}.lora_A.weight": pair.down_RI,
        f"diffusion_model.{name}.lora_B.weight": pair.up_OR,
        f"diffusion_model.{name}.dora_scale": torch.linspace(0.5, 2, 24).unsqueeze(1),
    }
    under = weight if dora_first else weight + tensors[f"diffusion_model.{name}.diff"].double()
    total = under + pair.up_OR.double() @ pair.down_RI.double()
    total *= torch.linspace(0.5, 2, 24).double().unsqueeze(1) / total.norm(dim=1, keepdim=True)
    if dora_first:
        total += tensors[f"diffusion_model.{name}.diff"].double()
    state = {n: t.double() for n, t in model.state_dict().items()}
    state[f"{name}.weight"] = total
    state[f"{name}.bias"] = bias + tensors[f"diffusion_model.{name}.diff_b"].double()
    files = [adapter_of(tmp_path, tensors, "whole"), adapter_of(tmp_path, dora, "dora")]
    for adapter in reversed(files) if dora_first else files:
        attach(model, adapter)
    wanted = answer(exact_model(model, state))
    torch.testing.assert_close(answer(model), wanted, rtol=1e-4, atol=1e-5)


def in_diffusers(model, path):
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    twin = make_twin(model)
    state, metadata = WanLoraLoaderMixin.lora_state_dict(str(path), return_lora_metadata=True)
    WanLoraLoaderMixin.load_lora_into_transformer(
        state, twin, adapter_name="fast", metadata=metadata
    )
    with torch.no_grad():
        return run_twin(twin, model_inputs(model))


def test_diffusers_gives_the_same_for_what_it_reads(tmp_path):
    """It takes biases beside factors; norms are zero in such files, as it says, and left out."""
    model = make_transformer()
    tensors = distilled(model)
    biases = {
        key: tensor
        for key, tensor in tensors.items()
        if "lora_" in key or (key.endswith(".diff_b") and "norm" not in key and "blocks." in key)
    }
    zero = {key: torch.zeros_like(tensor) for key, tensor in tensors.items() if "norm" in key}
    path = write(tmp_path / "fast.safetensors", biases | zero)
    theirs = in_diffusers(model, path)
    plain = run_twin(make_twin(model), model_inputs(model)).detach()
    attach(model, load_adapter(path, differences=True))
    assert (theirs - plain).abs().max() > 0.1
    torch.testing.assert_close(answer(model), theirs, rtol=1e-4, atol=1e-4)


def test_diffusers_leaves_norms_out_and_we_do_not(tmp_path):
    """What makes a merge the way to take such a file there: see inspect."""
    model = make_transformer()
    tensors = distilled(model)
    kept = {k: t for k, t in tensors.items() if "lora_" in k or ("blocks." in k and "norm" in k)}
    path = write(tmp_path / "fast.safetensors", kept)
    theirs = in_diffusers(model, path)
    bare = {key: tensor for key, tensor in kept.items() if "lora_" in key}
    torch.testing.assert_close(
        theirs, answer(exact_model(model, by_formula(model, bare))), rtol=1e-4, atol=1e-4
    )
    attach(model, load_adapter(path, differences=True))
    assert (answer(model) - theirs).abs().max() > 0.01


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"diffusion_model.blocks.0.norm3.diff_m": torch.ones(24)}, ["norm3.diff_m"]),
        ({"diffusion_model.blocks.0.norm9.diff": torch.ones(24)}, ["norm9.diff"]),
        ({"diffusion_model.blocks.0.self_attn.norm_q.diff_b": torch.ones(24)}, ["norm_q.diff_b"]),
        ({"diffusion_model.blocks.0.norm3.set_weight": torch.ones(24)}, ["replace"]),
        ({"lora_unet_blocks_0_modulation.diff": torch.ones(1, 6, 24)}, ["blocks_0_modulation"]),
        ({"blocks.0.norm3.diff": torch.ones(24)}, ["same difference twice"]),
        ({"diffusion_model.blocks.0.modulation.diff": torch.full((1, 6, 24), torch.nan)}, ["NaN"]),
        ({"diffusion_model.blocks.0.ffn.0.diff": torch.ones(48, 24)}, ["mixes", "ffn.0.diff"]),
        ({"diffusion_model.blocks.0.norm3.diff_b": torch.ones(24).int()}, ["norm3.diff_b", "int"]),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, extra, words):
    tensors = distilled(make_transformer()) | extra
    with pytest.raises(ModelFileError) as caught:
        adapter_of(tmp_path, tensors)
    for word in ("distilled.safetensors", *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("blocks.0.norm3.weight", (48,), ["blocks.0.norm3.diff", "(48,)", "(24,)"]),
        ("blocks.7.norm3.weight", (24,), ["blocks.7.norm3.diff", "does not have"]),
        ("blocks.0.cross_attn.norm_k_img.weight", (24,), ["norm_k_img", "does not have"]),
        ("img_emb.emb_pos", (1, 514, 1280), ["img_emb.emb_pos.diff"]),
        ("blocks.1.modulation", (6, 24), ["blocks.1.modulation.diff", "(1, 6, 24)"]),
        ("patch_embedding.weight", (24, 36, 1, 2, 2), ["patch_embedding.diff"]),
        ("head.head.weight", (24, 64), ["head.head"]),
    ],
)
def test_what_does_not_fit_the_model_changes_nothing(tmp_path, name, shape, words):
    model = make_transformer()
    tensors = distilled(model) | {key_of(name): torch.ones(shape)}
    adapter = adapter_of(tmp_path, tensors)
    plain = answer(model)
    for use in (attach, merge_into):
        with pytest.raises(ModelFileError, match="another model") as caught:
            use(model, adapter)
        for word in words:
            assert word in str(caught.value)
        assert torch.equal(answer(model), plain)


def test_a_caller_that_does_not_heed_them_gets_no_file_with_them(tmp_path):
    path = write(tmp_path / "fast.safetensors", distilled(make_transformer()))
    with pytest.raises(ModelFileError, match=r"whole differences of \d+ weights.*diff"):
        load_adapter(path)
