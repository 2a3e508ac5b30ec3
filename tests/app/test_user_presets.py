"""Presets of the user's own: saved from a config, listed, compared, removed; bad files."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Answer

from app.domain.presets import all_presets, read_preset
from app.domain.user_presets import is_personal, save_preset, settings_of
from trainer.contract.config_io import load_config
from trainer.contract.memory_model import estimate
from trainer.contract.preset_folders import PRESETS_DIR

Menma = Callable[..., Answer]

CONFIG = """\
name = "fish"

[model]
variant = "wan2.2-t2v-a14b"
expert = "low_noise"
transformer = "/home/me/low.safetensors"
vae = "vae.safetensors"

[dataset.general]
resolution = [640, 368]

[[dataset.sources]]
video_directory = "/home/me/secret"
cache_directory = "/home/me/cache"
target_frames = [33]
num_repeats = 2

[[dataset.sources]]
image_directory = "/home/me/more"

[adapter]
rank = 8
include = ['blocks\\.0\\..*']

[adapter.rank_pattern]
'blocks\\.1\\.ffn\\..*' = 4

[objective]
flow_shift = 5.0
timestep_sampler = "shift"

[low_noise]
learning_rate = 5e-5

[lr_schedule]
kind = "cosine"
min_lr_ratio = 0.1

[training]
max_steps = 900
seed = 42

[sampling]
every_steps = 100
num_steps = 20

[[sampling.prompts]]
prompt = "my secret"

[validation]
every_steps = 50

[[validation.sources]]
video_directory = "/home/me/held"

[output]
runs_dir = "/home/me/runs"
author = "me"
dtype = "fp16"

[[techniques]]
name = "contrastive_flow"
weight = 0.1
"""
KEPT = {
    "model": {"variant": "wan2.2-t2v-a14b", "expert": "low_noise"},
    "adapter": {
        "rank": 8,
        "include": ["blocks\\.0\\..*"],
        "rank_pattern": {"blocks\\.1\\.ffn\\..*": 4},
    },
    "objective": {"flow_shift": 5.0},
    "low_noise": {"learning_rate": 5e-5},
    "lr_schedule": {"kind": "cosine", "min_lr_ratio": 0.1},
    "training": {"max_steps": 900},
    "sampling": {"num_steps": 20},
    "output": {"dtype": "fp16"},
    "techniques": [{"name": "contrastive_flow", "weight": 0.1}],
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the user's presets, and go to a folder with `fish.toml`."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fish.toml").write_text(CONFIG, encoding="utf-8")
    return tmp_path / "xdg" / "menma" / "presets"


def test_only_settings_that_differ_are_kept(own):
    config = load_config("fish.toml", environ={})
    assert settings_of(config) == KEPT
    saved = save_preset(config, "mine", title='The "fish"', description="For\nsmall ones.")
    path = own / "mine.toml"
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    head = content.pop("preset")
    assert content == KEPT
    assert head == {
        "title": 'The "fish"',
        "description": "For\nsmall ones.",
        "variant": "wan2.2-t2v-a14b",
        "peak_vram_gib": round(estimate(config).peak_bytes / 2**30, 1),
        "source": {"video_directory": "clips", "resolution": [640, 368], "target_frames": [33],
                   "num_repeats": 2, "enable_bucket": False},
    }  # fmt: skip
    assert "/home/me" not in path.read_text(encoding="utf-8")
    assert "secret" not in path.read_text(encoding="utf-8")
    assert set(saved.left_out) == {
        "model.transformer", "model.vae", "output.runs_dir", "output.author",
        "sampling.every_steps", "sampling.prompts", "validation.every_steps",
        "validation.sources",
    }  # fmt: skip


def test_a_config_of_the_preset_is_the_config_but_for_what_is_personal(own, menma: Menma):
    save_preset(load_config("fish.toml", environ={}), "mine")
    assert menma("new", "--preset", "mine", "-o", "new.toml").code == 0
    new = load_config("new.toml", environ={})
    assert settings_of(new) == KEPT
    assert new.dataset.load().sources[0].num_repeats == 2
    Path("layered.toml").write_text('preset = "mine"\n', encoding="utf-8")
    assert settings_of(load_config("layered.toml", environ={})) == KEPT


@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b-full-24gb", "wan2.2-t2v-style-48gb"])
def test_a_shipped_preset_comes_back_from_its_config(own, menma: Menma, name):
    menma("new", "--preset", name, "-o", "new.toml")
    saved = save_preset(load_config("new.toml", environ={}), "again").preset
    shipped = read_preset(name)
    assert saved.values == shipped.values
    assert saved.peak_vram_gib == shipped.peak_vram_gib
    assert {**saved.source, "enable_bucket": True} == {**shipped.source, "enable_bucket": True}


def test_a_rank_of_a_file_is_left_out_with_the_file(own):
    Path("on.toml").write_text(
        '[adapter]\nrank = "from_weights"\ninit_from = "old.safetensors"\n', encoding="utf-8"
    )
    assert settings_of(load_config("on.toml", environ={})) == {}


def test_settings_that_need_what_is_left_out_are_not_saved(own, menma: Menma):
    Path("nvme.toml").write_text(
        '[adapter]\nkind = "none"\n[distributed]\nzero_stage = 3\n'
        'offload_optimizer = "nvme"\nnvme_path = "/ssd"\n',
        encoding="utf-8",
    )
    answer = menma("presets", "save", "nvme.toml", "--name", "nvme")
    assert answer.code == 2
    assert "distributed.nvme_path" in answer.err
    assert "not saved" in answer.err
    assert not own.exists()


def test_auto_and_unknown_models_have_no_peak(own):
    config = load_config("fish.toml", ["memory.blocks_to_swap=auto"], environ={})
    assert save_preset(config, "auto").preset.peak_vram_gib is None
    Path("bare.toml").write_text("", encoding="utf-8")
    bare = save_preset(load_config("bare.toml", environ={}), "bare").preset
    assert (bare.variant, bare.peak_vram_gib, bare.source, bare.values) == ("", None, {}, {})


@pytest.mark.parametrize(
    ("key", "personal"),
    [
        ("model.vae", True), ("model.variant", False), ("distributed.nvme_path", True),
        ("sampling.prompts[3].image", True), ("validation.sources[0].resolution", True),
        ("name", True), ("adapter.frozen[0].strength", True), ("adapter.init_from", True),
        ("techniques[0].name", False), ("dataset.general.resolution", True),
    ],
)  # fmt: skip
def test_paths_names_and_data_are_personal(key, personal):
    assert is_personal(key) is personal


def test_the_commands_save_list_show_compare_and_remove(own, menma: Menma):
    saved = menma("presets", "save", "fish.toml", "--name", "mine", "--title", "Fish of mine")
    assert (saved.code, saved.out.strip()) == (0, str(own / "mine.toml"))
    assert "Left out: model.transformer" in saved.err
    assert "only the first source" in saved.err
    assert "yours: Fish of mine" in menma("presets", "list").out
    assert "adapter.rank = 8" in menma("presets", "show", "mine").out
    assert "model.variant" in json.loads(menma("presets", "diff", "mine", "--json").out)
    changed = menma("presets", "diff", "mine", "fish.toml", "--json")
    assert json.loads(changed.out) == {
        "sampling.every_steps": {"old": 0, "new": 100},
        "validation.every_steps": {"old": 0, "new": 50},
    }
    again = menma("presets", "save", "fish.toml", "--name", "mine")
    assert again.code == 2
    assert "--force" in again.err
    assert "Fish of mine" in (own / "mine.toml").read_text(encoding="utf-8")
    forced = menma("presets", "save", "fish.toml", "--name", "mine", "--force", "--json",
                   "--set", "adapter.rank=4")  # fmt: skip
    assert json.loads(forced.out)["values"]["adapter"]["rank"] == 4
    assert menma("presets", "remove", "mine").code == 0
    assert list(own.iterdir()) == []


@pytest.mark.parametrize("name", ["", "../x", "a/b", "x.toml", "-x", "a" * 32, "fish & chips"])
def test_a_name_has_to_be_a_file_s(own, menma: Menma, name):
    answer = menma("presets", "save", "fish.toml", f"--name={name}")
    assert answer.code == 2
    assert "cannot be the name of a preset" in answer.err
    assert not own.exists()


def test_shipped_presets_stay(own, menma: Menma):
    answer = menma("presets", "remove", "wan2.2-t2v-lora")
    assert answer.code == 2
    assert "comes with Menma" in answer.err
    assert menma("presets", "remove", "../../fish").code == 2
    assert Path("fish.toml").exists()
    assert (PRESETS_DIR / "wan2.2-t2v-lora.toml").exists()


def test_a_folder_that_cannot_be_written_is_said(own, menma: Menma):
    own.parent.mkdir(parents=True)
    own.write_text("a file in the way")
    answer = menma("presets", "save", "fish.toml", "--name", "mine")
    assert answer.code == 1
    assert "cannot write" in answer.err
    assert "Traceback" not in answer.err


BAD = {
    "unknown-key": ('[preset]\ntitle = "x"\n[training]\nmax_step = 3\n', 4, "training.max_step"),
    "unknown-option": ('[preset]\ntitle = "x"\n[adapter]\nrang = 3\n', 4, "adapter.rang"),
    "wrong-value": ('[preset]\ntitle = "x"\n[training]\nmax_steps = 0\n', 4, "training.max_steps"),
    "head-key": ('[preset]\ntitle = "x"\ncard = 3\n', 3, "preset.card"),
    "head-value": ('[preset]\ntitle = "x"\nnum_gpus = 0\n', 3, "preset.num_gpus"),
    "head-number": ("[preset]\ntitle = 3\n", 2, "preset.title"),
    "source-key": ('[preset]\ntitle = "x"\n[preset.source]\nfps = 3\n', 4, "preset.source.fps"),
    "syntax": ('[preset]\ntitle = "x"\n[training\n', 3, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_reported_with_its_place_and_breaks_nothing(own, menma: Menma, name):
    text, line, key = BAD[name]
    own.mkdir(parents=True)
    path = own / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    answer = menma("presets", "list")
    assert answer.code == 0
    assert "wan2.2-t2v-lora" in answer.out
    assert f"{path}:{line}: {key}" in answer.err
    listed = {
        preset["name"]: preset for preset in json.loads(menma("presets", "list", "--json").out)
    }
    assert [(p["file"], p["line"], p["key"]) for p in listed[name]["problems"]] == [
        (str(path), line, key)
    ]
    assert set(listed[name]) == set(listed["wan2.2-t2v-lora"])
    used = menma("new", "--preset", name, "-o", "new.toml")
    assert used.code == 2
    assert f"{path}:{line}: {key}" in used.err
    assert not Path("new.toml").exists()


def test_files_that_are_no_presets_or_not_readable(own, menma: Menma):
    own.mkdir(parents=True)
    (own / "a.toml").write_text("[training]\nmax_steps = 3\n")
    (own / "b.toml").write_bytes(b"\xff\xfe")
    (own / "c.toml").mkdir()
    wrong = [preset for preset in all_presets() if preset.problems]
    assert [preset.name for preset in wrong] == ["a", "b", "c"]
    assert menma("presets", "list").code == 0


def test_filters(own, menma: Menma):
    listed = json.loads(
        menma("presets", "list", "--gpu", "16", "--variant", "wan2.2-i2v", "--json").out
    )
    assert {preset["card_gb"] for preset in listed} == {16}
    assert {preset["variant"] for preset in listed} == {"wan2.2-i2v-a14b"}
    answer = menma("presets", "list", "--variant", "wan3")
    assert answer.code == 2
    assert "wan2.2-t2v-a14b" in answer.err
    assert menma("presets", "list", "--variant", "wan2.1-flf2v").code == 0


def test_the_list_fits_80_columns_with_a_gpu_s_verdict(own, menma: Menma, monkeypatch):
    from app.domain import cards

    gpu = {"name": "NVIDIA GeForce RTX 4090", "vram_gib": 23.6}
    monkeypatch.setattr(cards, "gpus", lambda: [gpu, gpu])
    save_preset(load_config("fish.toml", environ={}), "a" * 31, title="x")
    lines = menma("presets", "list").out.splitlines()
    assert max(map(len, lines)) <= 80
    here = {line.split()[0]: line for line in lines}
    assert " fits " in here["wan2.1-t2v-14b-character-24gb"]
    assert " fits " in here["wan2.1-t2v-14b-character-2x24gb"]
    assert " no " in here["wan2.1-i2v-14b-motion-4x24gb"]
    assert " no " in here["wan2.1-t2v-14b-lora"]
    shown = json.loads(menma("presets", "show", "wan2.1-t2v-14b-motion-32gb", "--json").out)
    assert shown["here"] == "does not fit"
    assert (
        "(2 x NVIDIA GeForce RTX 4090, 23.6 GiB): fits"
        in menma("presets", "show", "wan2.1-t2v-1.3b-lora").err
    )
