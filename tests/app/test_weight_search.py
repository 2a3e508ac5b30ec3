"""Weight files are known by their headers and put together to models."""

from __future__ import annotations

import pytest
from weight_headers import (
    IMAGE_SHAPES,
    TEXT_SHAPES,
    VAE_SHAPES,
    write_header,
    write_parts,
    write_transformer,
)

from app.domain.demo_model import ASSETS
from app.domain.weight_files import has_tokenizer, recognise
from app.domain.weight_search import ModelFiles, search, usual_places
from trainer.contract.variants import VARIANTS
from trainer.models.wan.tokenizer import find_tokenizer
from trainer.nano.files import FILES


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_every_released_transformer_is_known(tmp_path, variant, prefix):
    file = write_transformer(tmp_path / f"{variant.replace('.', '_')}.safetensors", variant, prefix)
    found = recognise(file)
    assert found is not None
    assert found.kind == "transformer"
    assert found.variant == variant
    assert all(
        VARIANTS[other].transformer == VARIANTS[variant].transformer for other in found.variants
    )


@pytest.mark.parametrize(
    ("name", "variant", "expert"),
    [
        ("wan2.1_t2v_14B_bf16.safetensors", "wan2.1-t2v-14b", None),
        ("wan2.2_t2v_high_noise_14B_fp16.safetensors", "wan2.2-t2v-a14b", "high_noise"),
        ("Wan2_2-T2V-A14B-LOW_fp8.safetensors", "wan2.2-t2v-a14b", "low_noise"),
        ("Wan2.2-T2V-A14B/high_noise_model/model.safetensors", "wan2.2-t2v-a14b", "high_noise"),
        ("highlights.safetensors", "wan2.1-t2v-14b", None),
    ],
)
def test_what_shapes_do_not_tell_the_name_does(tmp_path, name, variant, expert):
    found = recognise(write_transformer(tmp_path / name, "wan2.1-t2v-14b"))
    assert (found.variant, found.expert) == (variant, expert)


def test_the_other_parts_are_known(tmp_path):
    kinds = {}
    for name, shapes in [
        ("vae21", VAE_SHAPES["2.1"]), ("vae22", VAE_SHAPES["2.2"]), ("umt5", TEXT_SHAPES),
        ("clip", IMAGE_SHAPES),
    ]:  # fmt: skip
        found = recognise(write_header(tmp_path / f"{name}.safetensors", shapes))
        kinds[name] = (found.kind, found.vae)
    assert kinds == {
        "vae21": ("vae", "2.1"), "vae22": ("vae", "2.2"), "umt5": ("text_encoder", ""),
        "clip": ("image_encoder", ""),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Wan2.1_VAE.pth", "vae"),
        ("Wan2.2_VAE.pth", "vae"),
        ("models_t5_umt5-xxl-enc-bf16.pth", "text_encoder"),
        ("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth", "image_encoder"),
        ("other.pth", None),
    ],
)
def test_torch_files_are_known_by_their_published_name_alone(tmp_path, name, kind):
    (tmp_path / name).write_bytes(b"not looked at")
    found = recognise(tmp_path / name)
    assert (found.kind if found else None) == kind


def test_what_is_no_part_of_wan_is_passed_over(tmp_path):
    t5 = {name: shape for name, shape in TEXT_SHAPES.items() if ".block.0." in name}
    write_header(tmp_path / "t5_xxl.safetensors", t5)
    write_header(tmp_path / "lora.safetensors", {"diffusion_model.blocks.0.q.lora_A.weight": [1]})
    vace = {"vace_patch_embedding.weight": [5120, 96, 1, 2, 2], "blocks.0.q.weight": [1]}
    write_header(tmp_path / "vace.safetensors", {**vace, "a.vace_blocks.0.x": [1]})
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 20)
    (tmp_path / "empty.safetensors").write_bytes(b"")
    assert search([tmp_path]).files == ()
    assert recognise(tmp_path / "none.safetensors") is None


def test_the_shipped_files_are_what_they_are():
    found = {file.path.name: file for file in search([ASSETS]).files}
    wanted = {
        "t2v": "transformer", "low_noise": "transformer", "high_noise": "transformer",
        "i2v": "transformer", "vae": "vae", "text_encoder": "text_encoder",
        "image_encoder": "image_encoder",
    }  # fmt: skip
    assert {key: found[name].kind for key, name in FILES.items()} == wanted
    assert found[FILES["high_noise"]].expert == "high_noise"


def test_shards_are_one_model_and_experts_a_pair(tmp_path):
    shapes = {"blocks.1.ffn.0.weight": [13824, 5120]}
    for name in ("high_noise_model", "low_noise_model"):
        folder = tmp_path / "Wan2.2-T2V-A14B" / name
        first = folder / "diffusion_pytorch_model-00001-of-00002.safetensors"
        write_transformer(first, "wan2.2-t2v-a14b")
        write_header(folder / "diffusion_pytorch_model-00002-of-00002.safetensors", shapes)
    write_parts(tmp_path)
    (model,) = search([tmp_path]).models()
    folder = tmp_path / "Wan2.2-T2V-A14B"
    assert model == ModelFiles(
        variant="wan2.2-t2v-a14b",
        transformer=folder / "low_noise_model",
        transformer_high_noise=folder / "high_noise_model",
        vae=tmp_path / "wan_2.1_vae.safetensors",
        text_encoder=tmp_path / "umt5_xxl_fp16.safetensors",
    )


def test_diffusers_folders_of_two_experts(tmp_path):
    for name in ("transformer", "transformer_2"):
        file = tmp_path / "Wan2.2-X" / name / "diffusion_pytorch_model.safetensors"
        write_transformer(file, "wan2.2-i2v-a14b")
    (model,) = search([tmp_path]).models()
    assert model.transformer_high_noise is not None
    assert model.transformer is not None
    assert model.transformer_high_noise.parent.name == "transformer"
    assert model.transformer.parent.name == "transformer_2"


def test_each_model_gets_the_vae_that_fits_and_the_nearest_encoder(tmp_path):
    write_transformer(tmp_path / "a" / "wan2.1_t2v_1.3B.safetensors", "wan2.1-t2v-1.3b")
    write_transformer(tmp_path / "b" / "wan2.2_ti2v_5B.safetensors", "wan2.2-ti2v-5b")
    write_transformer(tmp_path / "b" / "wan2.1_i2v.safetensors", "wan2.1-i2v-14b")
    write_parts(tmp_path / "a")
    write_parts(tmp_path / "b", vae="2.2", image_encoder=True)
    write_header(tmp_path / "b" / "umt5_xxl_fp8_e4m3fn.safetensors", TEXT_SHAPES)
    models = {model.variant: model for model in search([tmp_path]).models()}
    assert models["wan2.1-t2v-1.3b"].vae == tmp_path / "a" / "wan_2.1_vae.safetensors"
    small = models["wan2.2-ti2v-5b"]
    assert small.vae == tmp_path / "b" / "wan_2.2_vae.safetensors"
    assert small.text_encoder == tmp_path / "b" / "umt5_xxl_fp16.safetensors"
    assert small.image_encoder is None
    assert models["wan2.1-i2v-14b"].image_encoder is not None


def test_a_tokenizer_is_looked_for_where_the_trainer_does(tmp_path):
    plain = {name: shape for name, shape in TEXT_SHAPES.items() if name != "spiece_model"}
    encoder = write_header(tmp_path / "model" / "text_encoder" / "e.safetensors", plain)
    places = [
        tmp_path / "model" / "text_encoder", tmp_path / "model" / "tokenizer",
        tmp_path / "model" / "google" / "umt5-xxl",
    ]  # fmt: skip
    assert not has_tokenizer(encoder)
    for place in places:
        place.mkdir(exist_ok=True, parents=True)
        file = place / "spiece.model"
        file.write_bytes(b"x")
        assert has_tokenizer(encoder), place
        home = encoder.parent
        with pytest.raises(Exception, match="sentencepiece"):  # it was found, and is none
            find_tokenizer(
                folder / inner
                for folder in (home, home.parent)
                for inner in (".", "tokenizer", "google/umt5-xxl")
            )
        file.unlink()
    elsewhere = tmp_path / "tokens"
    elsewhere.mkdir()
    (elsewhere / "spiece.model").write_bytes(b"x")
    write_transformer(tmp_path / "t.safetensors", "wan2.1-t2v-1.3b")
    (model,) = search([tmp_path]).models()
    assert model.tokenizer == elsewhere


def test_the_usual_places(tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for name in ("HF_HOME", "HF_HUB_CACHE", "COMFYUI_PATH", "COMFYUI_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    snapshot = "models--Wan-AI--Wan2.1-T2V-1.3B/snapshots"
    wanted = [
        here / "models", home / "models", home / "ComfyUI" / "models",
        tmp_path / "comfy" / "models", tmp_path / "named",
        home / ".cache" / "huggingface" / "hub" / snapshot,
    ]  # fmt: skip
    for folder in wanted:
        folder.mkdir(parents=True)
    (home / ".cache" / "huggingface" / "hub" / "models--other" / "snapshots").mkdir(parents=True)
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "comfy"))
    configs = here / "configs"
    configs.mkdir()
    (configs / "a.toml").write_text(f'[model]\nvae = "{tmp_path}/named/vae.safetensors"\n')
    (configs / "b.toml").write_text("[model\n")
    assert usual_places(here / "runs", home) == wanted
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    own = tmp_path / "hub" / snapshot
    own.mkdir(parents=True)
    assert own in usual_places(here / "runs", home)


def test_a_folder_that_points_to_itself_ends(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path)
    write_parts(tmp_path)
    assert len(search([tmp_path, tmp_path / "loop", tmp_path / "none"]).files) == 2
