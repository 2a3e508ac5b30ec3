"""Shipped presets and examples load; a template says the truth about defaults."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from app.domain.presets import all_presets, differences, flatten, read_preset
from app.domain.template import render_config
from app.domain.toml_text import toml_value
from trainer.contract.config import RunConfig
from trainer.contract.config_io import load_config
from trainer.contract.dataset_config import load_dataset_file
from trainer.contract.errors import ConfigError
from trainer.contract.preset_folders import PRESETS_DIR
from trainer.contract.variants import VARIANTS

ROOT = Path(__file__).parents[2]
PRESETS = sorted(path.stem for path in PRESETS_DIR.glob("*.toml"))
EXAMPLES = sorted((ROOT / "configs" / "examples").glob("*.toml"))


def test_there_are_presets_for_every_kind_of_model():
    families = {read_preset(name).variant for name in PRESETS}
    assert families >= {
        "wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "wan2.1-i2v-14b", "wan2.2-t2v-a14b",
        "wan2.2-i2v-a14b", "wan2.2-ti2v-5b",
    }  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_makes_a_config_that_is_right(name, tmp_path):
    preset = read_preset(name)
    assert preset.variant in VARIANTS
    assert preset.variant == preset.values["model"]["variant"]
    assert preset.peak_vram_gib is not None  # test_shipped_presets compares it
    (tmp_path / "c.toml").write_text(f'preset = "{name}"\n')
    config = load_config(tmp_path / "c.toml", environ={})
    for key, value in flatten(preset.values).items():
        section, *path = key.split(".")
        found = getattr(config, section)
        for part in path:
            found = found[part] if isinstance(found, dict) else getattr(found, part)
        assert found == value


@pytest.mark.parametrize("name", [None, *PRESETS])
def test_a_new_config_is_the_preset_and_nothing_else(name, tmp_path):
    preset = read_preset(name) if name else None
    path = tmp_path / "new.toml"
    path.write_text(render_config("fish", preset), encoding="utf-8")
    config = load_config(path, environ={})
    (tmp_path / "plain.toml").write_text(f'preset = "{name}"\n' if name else "")
    plain = load_config(tmp_path / "plain.toml", environ={})
    changed = differences(plain.model_dump(mode="json"), config.model_dump(mode="json"))
    filled_in = {key for key in changed if not key.startswith(("model.", "dataset."))}
    assert filled_in <= {"name", "preset"}
    if preset:
        assert {key.removeprefix("model.") for key in changed if key.startswith("model.")} == set(
            preset.files
        )


def test_every_commented_line_of_a_new_config_is_the_default(tmp_path):
    text = render_config("fish", None)
    path = tmp_path / "new.toml"
    path.write_text(text)
    before = load_config(path, environ={})
    head, _, rest = text.partition("# Optional behaviour of the training step")
    assert rest
    uncommented, count = re.subn(r"(?m)^# (\w+ = .+)$", r"\1", head)
    uncommented = uncommented.replace('\nprompt = "a cat walks through wet grass"', "")
    assert count > 50
    path.write_text(uncommented)
    after = load_config(path, environ={})
    assert after.dataset.load() == before.dataset.load()
    dataset = before.dataset
    assert after.model_copy(update={"dataset": dataset}) == before


def test_a_new_config_explains_every_option():
    text = render_config("fish", None)
    for section, field in RunConfig.model_fields.items():
        if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
            assert f"\n[{section}]\n" in text
            for key in field.annotation.model_fields:
                assert re.search(rf"(?m)^(# )?(\[\[)?({section}\.)?{key}\b", text) or (
                    key in {"general", "sources", "prompts"}
                ), f"{section}.{key}"
    assert max(map(len, text.splitlines())) <= 100


def test_experts_get_their_own_file():
    text = render_config("fish", read_preset("wan2.2-t2v-high-lora"))
    model = tomllib.loads(text)["model"]
    assert "transformer_high_noise" in model
    assert "transformer" not in model
    assert model["expert"] == "high_noise"


@pytest.mark.parametrize("expert", ["both", "shared"])
def test_both_experts_get_both_files(expert: str):
    preset = read_preset("wan2.2-t2v-high-lora")
    values = {**preset.values, "model": {**preset.values["model"], "expert": expert}}
    model = tomllib.loads(render_config("fish", replace(preset, values=values)))["model"]
    assert {"transformer", "transformer_high_noise"} <= model.keys()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_load(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    if path.stem == "dataset":
        assert load_dataset_file(path).sources
        return
    config = load_config(path, environ={})
    assert config.dataset.load().sources
    assert config.name != "lora"


def test_a_preset_of_your_own_hides_a_shipped_one(tmp_path, monkeypatch):
    folder = tmp_path / "menma" / "presets"
    folder.mkdir(parents=True)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    mine = folder / f"{PRESETS[0]}.toml"
    mine.write_text('[preset]\ntitle = "mine"\n[training]\nmax_steps = 3\n')
    found = {preset.name: preset for preset in all_presets()}
    assert found[PRESETS[0]].title == "mine"
    assert not found[PRESETS[0]].is_shipped
    assert found[PRESETS[1]].is_shipped


def test_a_file_without_a_head_is_not_a_preset(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text("[training]\nmax_steps = 3\n")
    with pytest.raises(ConfigError, match="not a preset"):
        read_preset(str(path))


def test_preset_commands(tmp_path, menma):
    import json

    listed = json.loads(menma("presets", "list", "--json").out)
    assert [preset["name"] for preset in listed] == PRESETS
    shown = menma("presets", "show", "wan2.1-t2v-1.3b-lora")
    assert 'model.variant = "wan2.1-t2v-1.3b"' in shown.out
    assert "smallest" in shown.err
    changed = json.loads(menma("presets", "diff", "wan2.1-t2v-1.3b-lora", "--json").out)
    assert changed["adapter.rank"] == {"old": 16, "new": 32}
    same = menma("presets", "diff", "wan2.1-t2v-1.3b-lora", "wan2.1-t2v-1.3b-lora")
    assert (same.code, same.out) == (0, "")


def test_new_writes_a_config_and_says_what_is_next(menma, tmp_path):
    answer = menma("new", "--preset", "wan2.1-t2v-1.3b-lora")
    path = Path("configs/wan2.1-t2v-1.3b-lora.toml")
    assert (answer.code, answer.out) == (0, f"{path}\n")
    assert f"menma check {path}" in answer.err
    assert load_config(path, environ={}).name == "wan2.1-t2v-1.3b-lora"
    path.write_text("mine")
    assert menma("new", "--preset", "wan2.1-t2v-1.3b-lora").code == 2
    assert path.read_text() == "mine"
    assert menma("new", "--preset", "wan2.1-t2v-1.3b-lora", "--force").code == 0
    assert menma("new", "-o", "-").out.startswith("# Menma config")


@pytest.mark.parametrize(
    "value",
    [True, 7, 1e-4, 'say "no" \\ 魚', "two\nlines", [], [1, 2.5], {"a": 1, "b c": [True]}, {}],
    ids=repr,
)
def test_toml_values_read_back(value):
    assert tomllib.loads(f"x = {toml_value(value)}") == {"x": value}
