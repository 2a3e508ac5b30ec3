"""umT5 from every layout against transformers used directly."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.contract.errors import ModelFileError
from trainer.models.wan.text_encoder import (
    TextEncoderConfig,
    build_umt5,
    load_text_encoder,
    to_original,
)
from trainer.models.wan.tiny import tiny_tokenizer, write_tiny_text_encoder

SENTENCES = ("a red ball rolls to the left", "a blue square moves up", "the triangle falls")
PROMPTS = ["a red ball", "a blue 龍 square moves up and up", ""]
LAYOUTS = {
    "comfy": "umt5.safetensors",
    "official": "models_t5_umt5-xxl-enc-bf16.pth",
    "diffusers": "text_encoder",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("umt5")
    for layout, name in LAYOUTS.items():
        write_tiny_text_encoder(home / layout / name, SENTENCES, layout=layout)
    return home


@pytest.fixture(scope="module")
def expected(folder):
    """What transformers gives, padded and masked as in the official code, cut afterwards."""
    from transformers import UMT5EncoderModel

    model = UMT5EncoderModel.from_pretrained(folder / "diffusers/text_encoder").eval()
    tokenizer = load_text_encoder(folder / "diffusers/text_encoder").tokenizer
    ids = torch.zeros(len(PROMPTS), 512, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(PROMPTS):
        tokens = tokenizer.encode(prompt)
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return [state[:length] for state, length in zip(states, mask.sum(dim=1), strict=True)]


def assert_close(actual, expected, limit=2e-5):
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.shape == theirs.shape
        assert theirs.abs().max() > 0.5
        assert (ours - theirs).abs().max() < limit


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_transformers(folder, expected, layout):
    encoder = load_text_encoder(folder / layout / LAYOUTS[layout])
    assert encoder.dtype == torch.float32
    assert_close(encoder(PROMPTS), expected)
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())


def test_every_prompt_is_independent_of_the_others(folder):
    encoder = load_text_encoder(folder / "comfy" / LAYOUTS["comfy"])
    together = encoder(PROMPTS)
    assert all(torch.equal(encoder([p])[0], t) for p, t in zip(PROMPTS, together, strict=True))


def test_full_size_names_and_counts():
    with torch.device("meta"):
        model = build_umt5(TextEncoderConfig())
    parameters = dict(model.named_parameters())
    assert sum(p.numel() for p in parameters.values()) == 5_680_910_336
    names = {to_original(name): tuple(p.shape) for name, p in parameters.items()}
    assert len(names) == len(parameters) == 242
    assert names["token_embedding.weight"] == (256384, 4096)
    assert names["blocks.23.pos_embedding.embedding.weight"] == (32, 64)
    assert names["blocks.0.ffn.gate.0.weight"] == names["blocks.0.ffn.fc1.weight"] == (10240, 4096)
    assert names["blocks.7.attn.o.weight"] == (4096, 4096)
    assert names["norm.weight"] == (4096,)


def test_gate_is_the_activated_half(folder, expected, tmp_path):
    # ffn.gate.0 is wi_0, ffn.fc1 is wi_1: swapped, the shapes fit and the result is wrong.
    state = torch.load(folder / "official" / LAYOUTS["official"], weights_only=True)
    gate, up = "blocks.0.ffn.gate.0.weight", "blocks.0.ffn.fc1.weight"
    state[gate], state[up] = state[up], state[gate]
    torch.save(state, tmp_path / "swapped.pth")
    encoder = load_text_encoder(tmp_path / "swapped.pth", folder / "official/google/umt5-xxl")
    assert (encoder(PROMPTS)[1] - expected[1]).abs().max() > 1e-2


@pytest.mark.parametrize("kept", ["shared", "encoder.embed_tokens", "both"])
def test_either_name_of_the_tied_table(folder, expected, tmp_path, kept):
    state = load_file(folder / "comfy" / LAYOUTS["comfy"])
    table = state.pop("shared.weight")
    names = ("shared", "encoder.embed_tokens") if kept == "both" else (kept,)
    save_file(
        state | {f"{name}.weight": table.clone() for name in names}, tmp_path / "x.safetensors"
    )
    encoder = load_text_encoder(tmp_path / "x.safetensors")
    assert encoder.model.shared.weight is encoder.model.encoder.embed_tokens.weight
    assert_close(encoder(PROMPTS), expected)


def test_two_different_tables_are_refused(folder, tmp_path):
    state = load_file(folder / "comfy" / LAYOUTS["comfy"])
    state["encoder.embed_tokens.weight"] = torch.zeros_like(state["shared.weight"])
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ModelFileError, match="two different embedding tables"):
        load_text_encoder(tmp_path / "x.safetensors")


def test_moving_keeps_the_tables_tied(folder):
    encoder = load_text_encoder(folder / "comfy" / LAYOUTS["comfy"]).to("cpu")
    assert encoder.model.shared.weight is encoder.model.encoder.embed_tokens.weight


def to_scaled_fp8(state, per_row=False):
    """ComfyUI's scaled fp8 file and the float32 file that holds the same numbers."""
    stored, exact = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, {}
    for name, tensor in state.items():
        if tensor.ndim != 2 or "SelfAttention.relative" in name or name == "shared.weight":
            stored[name] = exact[name] = tensor
            continue
        peak = tensor.abs().amax(dim=1) if per_row else tensor.abs().max()
        scale = peak / 448
        shaped = scale[:, None] if per_row else scale
        stored[name] = (tensor / shaped).to(torch.float8_e4m3fn)
        stored[name.replace(".weight", ".scale_weight")] = scale
        exact[name] = stored[name].float() * shaped
    return stored, exact


@pytest.mark.parametrize("per_row", [False, True])
def test_scaled_fp8_is_multiplied_by_its_scales(folder, tmp_path, per_row):
    state = load_file(folder / "comfy" / LAYOUTS["comfy"])
    stored, exact = to_scaled_fp8(state, per_row)
    save_file(stored, tmp_path / "fp8.safetensors")
    save_file(exact, tmp_path / "exact.safetensors")
    actual = load_text_encoder(tmp_path / "fp8.safetensors", dtype=torch.float32)(PROMPTS)
    assert_close(actual, load_text_encoder(tmp_path / "exact.safetensors")(PROMPTS))


def test_scaled_fp8_without_a_scale_is_refused(folder, tmp_path):
    stored, _ = to_scaled_fp8(load_file(folder / "comfy" / LAYOUTS["comfy"]))
    del stored["encoder.block.1.layer.0.SelfAttention.q.scale_weight"]
    save_file(stored, tmp_path / "fp8.safetensors")
    with pytest.raises(
        ModelFileError, match=r"no scale for encoder\.block\.1\.layer\.0\.SelfAttention\.q"
    ):
        load_text_encoder(tmp_path / "fp8.safetensors")


def test_scaled_fp8_without_any_scale_is_refused(folder, tmp_path):
    # The marker alone announces scales; without them the numbers are off by orders of magnitude.
    stored, _ = to_scaled_fp8(load_file(folder / "comfy" / LAYOUTS["comfy"]))
    bare = {name: t for name, t in stored.items() if not name.endswith("scale_weight")}
    save_file(bare, tmp_path / "fp8.safetensors")
    with pytest.raises(ModelFileError, match="no scale"):
        load_text_encoder(tmp_path / "fp8.safetensors")


def test_plain_fp8_under_official_names(folder, tmp_path):
    state = torch.load(folder / "official" / LAYOUTS["official"], weights_only=True)
    cast = {n: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for n, t in state.items()}
    save_file(cast, tmp_path / "fp8.safetensors")
    save_file({n: t.float() for n, t in cast.items()}, tmp_path / "exact.safetensors")
    tokenizer = folder / "official/google/umt5-xxl/spiece.model"
    encoder = load_text_encoder(tmp_path / "fp8.safetensors", tokenizer)
    assert encoder.dtype == torch.bfloat16
    actual = load_text_encoder(tmp_path / "fp8.safetensors", tokenizer, dtype=torch.float32)
    exact = load_text_encoder(tmp_path / "exact.safetensors", tokenizer)
    assert_close(actual(PROMPTS), exact(PROMPTS))


def test_weights_stay_mapped_when_they_are_taken_as_they_are(folder):
    # 11 GB would otherwise be in memory twice while loading.
    path = folder / "comfy" / LAYOUTS["comfy"]
    weights = [
        load_text_encoder(path, dtype=dtype).model.encoder.block[0].layer[0].SelfAttention.q.weight
        for dtype in (None, torch.bfloat16)
    ]
    # torch cannot resize memory that is not its own.
    assert [weight.untyped_storage().resizable() for weight in weights] == [False, True]


def test_float16_keeps_the_overflowing_layer_wide(folder, expected):
    encoder = load_text_encoder(folder / "comfy" / LAYOUTS["comfy"], dtype=torch.float16)
    block = encoder.model.encoder.block[0]
    assert block.layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    assert block.layer[0].SelfAttention.q.weight.dtype == torch.float16
    states = encoder(PROMPTS)
    assert states[0].dtype == torch.float16
    assert (states[1] - expected[1]).abs().max() < 0.05


def test_t5_is_refused(folder, tmp_path):
    state = load_file(folder / "comfy" / LAYOUTS["comfy"])
    del state["encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"]
    save_file(state, tmp_path / "t5.safetensors")
    with pytest.raises(ModelFileError, match="T5 encoder, Wan needs umT5"):
        load_text_encoder(tmp_path / "t5.safetensors")


def test_other_files_are_refused(folder, tmp_path):
    save_file({"blocks.0.self_attn.q.weight": torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelFileError, match="not a umT5 encoder"):
        load_text_encoder(tmp_path / "x.safetensors")
    state = load_file(folder / "comfy" / LAYOUTS["comfy"])
    save_file(state | {"lm_head.weight": torch.zeros(2)}, tmp_path / "y.safetensors")
    with pytest.raises(ModelFileError, match="lm_head"):
        load_text_encoder(tmp_path / "y.safetensors")


def test_no_tokenizer_names_the_places(folder, tmp_path):
    state = torch.load(folder / "official" / LAYOUTS["official"], weights_only=True)
    torch.save(state, tmp_path / "alone.pth")
    with pytest.raises(ModelFileError, match="no tokenizer found") as caught:
        load_text_encoder(tmp_path / "alone.pth")
    assert "google/umt5-xxl/spiece.model" in str(caught.value)
    assert "tokenizer.json" in str(caught.value)


def test_a_tokenizer_with_too_many_pieces_is_refused(folder, tmp_path):
    words = [" ".join(f"w{i}ord{i * 7}" for i in range(n, n + 40)) for n in range(0, 400, 40)]
    (tmp_path / "spiece.model").write_bytes(tiny_tokenizer(words))
    with pytest.raises(ModelFileError, match="different models"):
        load_text_encoder(folder / "comfy" / LAYOUTS["comfy"], tmp_path)


def test_long_prompts_are_cut_and_counted(folder):
    encoder = load_text_encoder(folder / "comfy" / LAYOUTS["comfy"])
    prompt = "a red ball rolls " * 300
    counts = encoder.token_counts(["a red ball", prompt])
    assert counts[0] == encoder(["a red ball"])[0].shape[0]
    assert counts[1] > encoder.max_tokens
    assert encoder([prompt])[0].shape[0] == encoder.max_tokens == 512


def test_max_distance_of_the_config_counts(folder, tmp_path):
    source = folder / "diffusers/text_encoder"
    target = tmp_path / "text_encoder"
    target.mkdir()
    (target / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"relative_attention_max_distance": 4}))
    tokenizer = folder / "diffusers/tokenizer"
    near, far = load_text_encoder(target, tokenizer), load_text_encoder(source)
    assert near.config.max_distance == 4
    prompt = "a red ball rolls to the left, a blue square moves up"
    assert (near([prompt])[0] - far([prompt])[0]).abs().max() > 1e-3


def test_importing_the_loaders_does_not_import_transformers():
    code = (
        "import sys, trainer.models\n"
        "heavy = {'transformers', 'sentencepiece', 'tokenizers', 'ftfy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
