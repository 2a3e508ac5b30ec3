"""What a sheet knows its samples by: every setting that changes their bits, and no other."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_sample_matrix import config, make, models, samples, write_lora, write_transformer
from test_sheet_files import picture, plain, warnings

from trainer.contract.config import MemorySection, ModelSection, Prompt
from trainer.contract.config_io import load_config
from trainer.contract.variants import get_variant
from trainer.contract.vary import parse_vary
from trainer.jobs import sample_matrix, sample_metadata, sample_studio
from trainer.jobs.components import settle_variant
from trainer.jobs.sample_run import transformer_files
from trainer.jobs.sample_sheet_folder import SheetFacts, SheetFolder
from trainer.jobs.step_cache_values import known_values
from trainer.sampling.matrix import build_sheet
from trainer.sampling.results import read_sample_metadata

__all__ = ["config", "models"]

OTHER_BITS = {
    "memory.weight_format": "bf16",
    "memory.attention": "flex",
    "memory.feed_forward_chunks": 2,
    "memory.attention_chunks": 2,
    "memory.compile_blocks": True,
    "memory.vae_dtype": "bf16",
    "memory.vae_tile": 256,
    "memory.text_encoder_dtype": "fp32",
    "model.tokenizer": "tokenizer.json",
    "model.transformer": "other.safetensors",
    "model.vae": "vae.safetensors",
    "model.text_encoder": "text.safetensors",
    "model.shape": {"num_heads": 4},
}
SAME_BITS = {
    "memory.blocks_to_swap": 1,
    "memory.gradient_checkpointing": False,
    "memory.keep_attention": True,
    "memory.offload_checkpoints": True,
    "memory.cache_dtype": "fp32",
}
TOLD_ELSEWHERE = {
    "memory.fp8_format",  # below: where weights are in fp8
    "memory.fp8_matmul",
    "memory.text_encoder_device",  # below: here all is on the CPU
    "model.transformer_high_noise",  # files of the model, as the transformer
    "model.expert_boundary",  # below: of two experts
    "model.image_encoder",  # of what starts from an image
    "model.variant",  # from the weights
    "model.expert",  # of a training
}


def identity(config: Path, *settings: str, prompt: Prompt | None = None) -> str:
    """Return the identity of the one sample of a sheet."""
    loaded = load_config(config, settings)
    return identity_of(loaded, prompt or Prompt(prompt="a cat", seed=1))


def identity_of(loaded: Any, prompt: Prompt, variant: Any = None) -> str:
    variant = variant or settle_variant(loaded)
    sheet = build_sheet(
        [prompt], [], [], variant, loaded.sampling, is_transformer=lambda _path: False
    )
    files = transformer_files(loaded, variant)
    facts = SheetFacts.of(loaded, variant, files, {(): "what is known"})
    folder = SheetFolder(Path("sheet"), sheet, facts)
    return folder.identity(sheet.cells[0])


@pytest.fixture
def scene(config: Path, models: Path, tmp_path: Path) -> Path:
    """Return the config; other files of the same names and kinds are beside it."""
    write_transformer(tmp_path / "other.safetensors", 1)
    for name in ("vae", "text"):
        shutil.copy(models / f"{name}.safetensors", tmp_path)
        with (tmp_path / f"{name}.safetensors").open("ab") as file:
            file.write(b" ")
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    return config


def setting(scene: Path, key: str, value: Any) -> str:
    if isinstance(value, dict):
        return f"{key}={{num_heads = 4}}"
    if isinstance(value, str) and key.startswith("model."):
        value = str(scene.parent / value)
    return f"{key}={str(value).lower() if isinstance(value, bool) else value}"


@pytest.mark.parametrize("key", OTHER_BITS)
def test_what_changes_bits_makes_another_sample(scene: Path, key: str) -> None:
    before = identity(scene)
    assert identity(scene) == before
    after = load_config(scene, [setting(scene, key, OTHER_BITS[key])])
    variant = settle_variant(load_config(scene))  # a shape may be none of these weights
    assert identity_of(after, Prompt(prompt="a cat", seed=1), variant) != before


@pytest.mark.parametrize("key", SAME_BITS)
def test_what_changes_no_bits_makes_none(scene: Path, key: str) -> None:
    assert identity(scene, setting(scene, key, SAME_BITS[key])) == identity(scene)


def test_no_option_is_forgotten() -> None:
    sections = {"memory": MemorySection, "model": ModelSection}
    keys = {f"{name}.{field}" for name, of in sections.items() for field in of.model_fields}
    assert keys == OTHER_BITS.keys() | SAME_BITS.keys() | TOLD_ELSEWHERE


def test_options_that_count_in_some_models_only(scene: Path, tmp_path: Path) -> None:
    fp8 = "memory.weight_format=fp8_scaled"
    kinds = [(fp8,), (fp8, "memory.fp8_format=e5m2"), (fp8, "memory.fp8_matmul=true")]
    assert len({identity(scene, *kind) for kind in kinds}) == 3
    loaded = load_config(scene)
    pair = loaded.model.model_copy(
        update={"transformer_high_noise": tmp_path / "other.safetensors"}
    )
    loaded = loaded.model_copy(update={"model": pair})
    prompt = Prompt(prompt="a cat", seed=1)
    a14b = get_variant("wan2.2-t2v-a14b")
    other = replace(a14b, expert_boundary=0.5)
    assert identity_of(loaded, prompt, a14b) != identity_of(loaded, prompt, other)


def test_frozen_adapters_count_by_content_and_strength(scene: Path, tmp_path: Path) -> None:
    text = scene.read_text(encoding="utf-8")

    def frozen(strength: float) -> str:
        entry = f'[[adapter.frozen]]\npath = "{tmp_path}/look.safetensors"\nstrength = {strength}\n'
        scene.write_text(f"{text}{entry}", encoding="utf-8")
        return identity(scene)

    found = {identity(scene)}
    write_lora(tmp_path / "look.safetensors", 0.1)
    found |= {frozen(1), frozen(0.5)}
    write_lora(tmp_path / "look.safetensors", 0.2)
    found |= {frozen(1)}
    assert len(found) == 4
    (told,) = samples(plain(scene, prompts=(Prompt(prompt="a cat"),), output=tmp_path / "own"))
    settings = read_sample_metadata(told)["settings"]
    assert settings["adapter.frozen"] == [{"path": "look.safetensors", "strength": 1.0}]
    assert settings["distributed.device"] == "cpu"
    scene.write_text(text, encoding="utf-8")
    (warning,) = warnings(plain(scene, like=told, output=tmp_path / "own"))
    assert "adapter.frozen is another: none, and it was made with [{" in warning


def test_a_calibration_counts_where_there_is_a_step_cache(scene: Path, tmp_path: Path) -> None:
    file = tmp_path / "measured.json"
    settings = (f"sampling.step_cache_file={file}", "sampling.num_steps=6")
    cached = (*settings, "sampling.step_cache=teacache")
    prompts = (Prompt(prompt="a cat", seed=1),)

    def calibrate(steps: int) -> None:
        plain(scene, prompts=prompts, set=(*settings, f"sampling.num_steps={steps}"),
              calibrate=True, output=tmp_path / "own")  # fmt: skip

    calibrate(6)
    axes = (parse_vary("step_cache=none,teacache"),)
    first = samples(make(scene, *axes, prompts=prompts, set=settings))
    assert len(first) == 2
    told = [read_sample_metadata(path) for path in first]
    assert ["step_cache_values" in one for one in told] == [False, True]
    assert samples(make(scene, *axes, prompts=prompts, set=settings)) == []
    calibrate(7)
    (again,) = samples(make(scene, *axes, prompts=prompts, set=settings))
    assert read_sample_metadata(again)["step_cache_values"] != told[1]["step_cache_values"]
    notes = warnings(plain(scene, like=first[1], output=tmp_path / "own", set=cached))
    assert any("what the step cache knows of the model is another" in note for note in notes)
    loaded = load_config(scene, cached)
    assert known_values(
        loaded, settle_variant(loaded), transformer_files(loaded, settle_variant(loaded))
    ).measured


def test_drawn_latents_are_decoded_with_other_settings_of_the_vae(
    scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What did not fit is decoded in tiles by the next start, and nothing is drawn again."""

    def stopped(*_args: Any, **_rest: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sample_matrix._Making, "decode", stopped)
        patch.setattr(sample_metadata, "menma_version", lambda: "as it was drawn")
        with pytest.raises(KeyboardInterrupt):
            make(scene, parse_vary("seed=1,2"))
    with monkeypatch.context() as patch:
        patch.setattr(sample_studio, "generate", stopped)
        tiled = ("memory.vae_tile=128", 'sampling.format="webp"')
        cells = samples(make(scene, parse_vary("seed=1,2"), set=tiled))
    assert len(cells) == 2
    told = [read_sample_metadata(cell) for cell in cells]
    assert {one["settings"]["memory.vae_tile"] for one in told} == {128}
    assert {one["menma"] for one in told} == {"as it was drawn"}
    # What starts from an image is encoded by the VAE: there its precision shapes the latents.
    clip = picture(tmp_path / "clip.png", (250, 10, 90))
    wanted = Prompt(prompt="a cat", video=clip, strength=0.5, num_frames=1, seed=3)
    with monkeypatch.context() as patch:
        patch.setattr(sample_matrix._Making, "decode", stopped)
        with pytest.raises(KeyboardInterrupt):
            make(scene, parse_vary("steps=2"), prompts=(wanted,))
        patch.setattr(sample_studio, "generate", stopped)
        with pytest.raises(KeyboardInterrupt):
            make(scene, parse_vary("steps=2"), prompts=(wanted,), set=("memory.vae_dtype=bf16",))
