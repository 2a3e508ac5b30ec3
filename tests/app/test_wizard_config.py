"""Answers become a config that is right; `menma new --goal` writes the same one."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from weight_headers import VAE_SHAPES, write_header, write_parts, write_transformer

from app.domain import new_config, weight_search
from app.domain.cards import Card
from app.domain.config_check import check_text
from app.domain.data_folder import look_into
from app.domain.demo_model import demo_files, demo_preset
from app.domain.goals import GOALS
from app.domain.preset_offers import all_offers, fitting_offers
from app.domain.presets import Preset, all_presets, flatten, read_preset
from app.domain.weight_search import ModelFiles, search
from app.domain.wizard import (
    Answers,
    config_path,
    config_text,
    model_problems,
    name_problem,
    new_command,
    set_lines,
    suggested_name,
    suggested_steps,
    with_variant,
)
from trainer.contract.config_io import load_config, load_config_with_sources
from trainer.contract.config_rules import check_files
from trainer.contract.errors import UserError
from trainer.contract.memory_model import gpu_of_memory
from trainer.contract.variants import VARIANTS
from trainer.demo.configs import DemoPlan, write_config
from trainer.nano.files import ASSETS, FILES

PRESETS = all_presets()


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Path:
    """Return a folder with clips, pictures, and every released model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(new_config, "choose_card", lambda name, size: None)
    monkeypatch.setattr(new_config, "usual_places", lambda runs: [tmp_path / "models"])
    for folder, ending in (("clips", "mp4"), ("pictures", "png")):
        (tmp_path / folder).mkdir()
        for name in "ab":
            (tmp_path / folder / f"{name}.{ending}").write_bytes(b"")
            (tmp_path / folder / f"{name}.txt").write_text(f"{name} fish")
    models = tmp_path / "models"
    for name, variant in VARIANTS.items():
        for part in ("-high-noise", "-low-noise") if variant.experts else ("",):
            write_transformer(models / f"{name}{part}.safetensors", name)
    write_parts(models, image_encoder=True)
    write_header(models / "wan2.2_vae.safetensors", VAE_SHAPES["2.2"])
    return tmp_path


def model(variant: str) -> ModelFiles:
    return next(m for m in search([Path("models")]).models() if m.variant == variant)


def answers(variant: str, goal: str, preset: Preset | None, **others: Any) -> Answers:
    folder = "pictures" if goal == "images" else "clips"
    return Answers(
        model=model(variant), goal=GOALS[goal], data=look_into(Path(folder)), preset=preset,
        name="fish", **others,
    )  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_model_goal_and_preset_makes_a_config_without_problems(place, variant):
    assert model_problems(model(variant)) == {}
    num_presets = 0
    for name, goal in GOALS.items():
        kind = "image" if name == "images" else "video"
        offers = fitting_offers(model(variant), goal, kind, None, PRESETS)
        num_presets += len(offers)
        for preset in (*(offer.preset for offer in offers), None):
            made = answers(variant, name, preset, max_steps=300)
            text = config_text(made)
            loaded = load_config_with_sources(Path("x.toml"), text=text, environ={})
            for job in ("cache", "train"):
                assert check_files(loaded.config, job) == [], (name, preset)
            config = loaded.config
            assert config.name == "fish"
            assert config.training.max_steps == 300
            assert config.lr_schedule.warmup_steps <= 150
            assert (config.adapter.kind == "none") is (name == "full")
            assert len(config.dataset.load().sources) == 1
            for key, value in flatten(preset.values if preset else {}).items():
                if key not in ("training.max_steps", "lr_schedule.warmup_steps"):
                    section, _, option = key.partition(".")
                    assert option.split(".")[0] in tomllib.loads(text)[section], (key, value)
    of_variant = [preset for preset in PRESETS if preset.variant == variant]
    assert num_presets or not of_variant


def test_paths_count_from_the_working_folder_or_are_whole(place, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("far")
    for source in Path("clips").iterdir():
        (elsewhere / source.name).write_bytes(source.read_bytes())
    made = replace(
        answers("wan2.1-t2v-1.3b", "motion", None), data=look_into(elsewhere),
        model=replace(model("wan2.1-t2v-1.3b"), vae=place / "models" / "wan_2.1_vae.safetensors"),
    )  # fmt: skip
    content = tomllib.loads(config_text(made))
    assert content["model"]["vae"] == "models/wan_2.1_vae.safetensors"
    assert content["dataset"]["sources"][0]["video_directory"] == elsewhere.as_posix()


def test_a_sample_is_made_where_there_is_a_prompt_and_what_it_needs(place):
    made = answers("wan2.1-t2v-1.3b", "motion", None, prompt='a "fish"')
    assert made.steps == ("cache", "train", "sample")
    content = tomllib.loads(config_text(made))
    assert content["sampling"]["prompts"] == [{"prompt": 'a "fish"'}]
    assert answers("wan2.1-t2v-1.3b", "motion", None).steps == ("cache", "train")
    from_image = answers("wan2.1-i2v-14b", "motion", None, prompt="a fish")
    assert from_image.steps == ("cache", "train")
    assert "prompts" not in tomllib.loads(config_text(from_image))["sampling"]
    pictured = replace(from_image, image=Path("pictures/a.png"))
    (prompt,) = tomllib.loads(config_text(pictured))["sampling"]["prompts"]
    assert prompt == {"prompt": "a fish", "image": "pictures/a.png"}
    assert pictured.steps == made.steps
    assert answers("wan2.1-flf2v-14b", "motion", None, prompt="x").steps == ("cache", "train")


def test_the_best_preset_is_the_largest_that_fits_and_of_the_goal(place):
    goal, files = GOALS["character"], model("wan2.1-t2v-14b")
    for memory, name in ((11.8, "12gb"), (15.6, "16gb"), (23.6, "24gb")):
        card = Card(gpu=gpu_of_memory(memory))
        offers = fitting_offers(files, goal, "image", card, PRESETS)
        assert offers[0].preset.name == f"wan2.1-t2v-14b-character-{name}"
        assert offers[0].verdict == "fits"
        assert [o.verdict for o in offers].index("does not fit") > 0
    eight = Card(gpu=gpu_of_memory(79.6), count=8)
    motion = fitting_offers(files, GOALS["motion"], "video", eight, PRESETS)
    assert motion[0].preset.name == "wan2.1-t2v-14b-motion-8x80gb"


def test_presets_of_an_expert_need_its_file(place):
    both = model("wan2.2-t2v-a14b")
    goal = GOALS["motion"]
    names = {o.preset.name for o in fitting_offers(both, goal, "video", None, PRESETS)}
    high = replace(both, transformer=None)
    alone = {o.preset.name for o in fitting_offers(high, goal, "video", None, PRESETS)}
    assert alone
    assert all("high" in name for name in alone)
    assert alone < names
    text = config_text(replace(answers("wan2.2-t2v-a14b", "motion", None), model=high))
    assert tomllib.loads(text)["model"]["expert"] == "high_noise"


def test_steps_follow_the_data_within_bounds():
    preset = read_preset("wan2.1-t2v-14b-motion-24gb")  # 2,400 for 30 clips
    assert suggested_steps(preset, 30) is None
    assert suggested_steps(preset, 15) == 1200
    assert suggested_steps(preset, 45) == 3600
    assert suggested_steps(preset, 1000) == 4800
    assert suggested_steps(preset, 1) == 600
    assert suggested_steps(None, 5) is None


def test_names_are_checked_and_offered(place):
    runs = Path("runs")
    assert name_problem("fish-2.x", runs) == ""
    for wrong in ("", "-a", "a b", "ä", "x" * 101, "a/b"):
        assert name_problem(wrong, runs), wrong
    Path("configs").mkdir()
    Path("configs/motion.toml").write_text("")
    assert "configs/motion.toml already" in name_problem("motion", runs)
    (runs / "motion-2").mkdir(parents=True)
    assert "a run" in name_problem("motion-2", runs)
    assert suggested_name(GOALS["motion"], Path("clips"), runs) == "motion-3"
    assert suggested_name(GOALS["motion"], Path("My Cat!"), runs) == "my-cat"


def test_what_is_wrong_with_a_model_is_told_by_field(place):
    good = model("wan2.1-i2v-14b")
    wrong = replace(
        good, vae=Path("models/wan2.2_vae.safetensors"), text_encoder=good.vae, image_encoder=None,
        transformer=Path("none.safetensors"),
    )  # fmt: skip
    problems = model_problems(wrong)
    assert list(problems) == ["transformer", "vae", "text_encoder", "image_encoder"]
    assert "no such file" in problems["transformer"]
    assert "VAE of Wan 2.2" in problems["vae"]
    assert "is a Wan VAE; an umT5 text encoder is needed" in problems["text_encoder"]
    assert "none was found" in problems["image_encoder"]
    other = replace(good, transformer=Path("models/wan2.1-t2v-1.3b.safetensors"))
    assert "text to video 1.3B, not Wan 2.1 image" in model_problems(other)["transformer"]
    assert "did you mean" in model_problems(replace(good, variant="wan2.1-i2v-14"))["variant"]
    high = Path("models/wan2.2-t2v-a14b-high-noise.safetensors")
    told = with_variant(ModelFiles(variant="", transformer=high))
    assert (told.variant, told.transformer) == ("wan2.2-t2v-a14b", None)
    assert told.transformer_high_noise == high


def test_the_demo_trains_as_the_demo_does(tmp_path):
    """Its preset holds what `menma demo` writes, but for the amount of data and of looking."""
    assert Path(demo_files().transformer) == ASSETS / FILES["t2v"]
    assert Path(demo_files().vae) == ASSETS / FILES["vae"]
    assert Path(demo_files().text_encoder) == ASSETS / FILES["text_encoder"]
    written = tomllib.loads(write_config(tmp_path, tmp_path / "clips", DemoPlan()).read_text())
    preset = demo_preset()
    for section in ("adapter", "objective", "optimizer", "lr_schedule", "sampling", "memory",
                    "distributed"):  # fmt: skip
        assert preset.values[section] == written[section]
    assert preset.max_steps == written["training"]["max_steps"]
    assert preset.source["resolution"] == written["dataset"]["general"]["resolution"]
    assert preset.source["target_frames"] == written["dataset"]["sources"][0]["target_frames"]
    assert preset.variant == written["model"]["variant"]
    assert "demo" not in {offer.preset.name for offer in all_offers(None)}


@pytest.mark.parametrize("goal", GOALS)
def test_the_demo_learns_anything(place, goal):
    made = replace(answers("wan2.1-t2v-1.3b", goal, None), model=demo_files(), max_steps=2)
    checked = check_text(config_text(made), config_path("fish"), None)
    assert checked.problems == ()
    assert checked.config is not None
    assert checked.config.adapter.kind == ("none" if goal == "full" else "lora")


@pytest.mark.parametrize(
    ("variant", "goal", "preset", "others"),
    [
        ("wan2.1-t2v-1.3b", "motion", "wan2.1-t2v-1.3b-lora", {"prompt": "a 'fish'"}),
        ("wan2.2-t2v-a14b", "images", "wan2.2-t2v-style-48gb", {"max_steps": 123}),
        ("wan2.1-i2v-14b", "motion", None,
         {"prompt": "x", "image": Path("pictures/a.png"), "max_steps": 9}),
        ("demo", "full", None, {"max_steps": 2}),
    ],
)  # fmt: skip
def test_the_command_writes_the_same_config(place, menma, variant, goal, preset, others):
    is_demo = variant == "demo"
    made = answers(
        "wan2.1-t2v-1.3b" if is_demo else variant, goal,
        read_preset(preset) if preset else None, **others,
    )  # fmt: skip
    if is_demo:
        made = replace(made, model=demo_files())
    if made.max_steps is None:
        made = replace(made, max_steps=77)
    answer = menma(*new_command(made, config_path("fish")))
    assert (answer.code, answer.out) == (0, "configs/fish.toml\n"), answer.err
    assert Path("configs/fish.toml").read_text() == config_text(made)
    assert f"queue chain configs/fish.toml --steps {','.join(made.steps)}" in answer.err
    assert menma(*new_command(made, config_path("fish"))).code == 2
    assert menma(*new_command(made, config_path("fish")), "--force").code == 0


def test_the_command_finds_what_is_left_out(place, menma):
    answer = menma("new", "--goal", "motion", "--data", "clips", "--transformer",
                   "models/wan2.1-t2v-14b.safetensors", "--vram", "24")  # fmt: skip
    assert answer.code == 0, answer.err
    config = load_config(Path("configs/motion.toml"), environ={})
    assert config.model.vae == Path("models/wan_2.1_vae.safetensors")
    assert config.model.text_encoder == Path("models/umt5_xxl_fp16.safetensors")
    assert config.training.max_steps == 600  # a quarter of 2,400, for two clips
    assert menma("new", "--goal", "motion", "--data", "clips", "--demo", "-o", "-").out.startswith(
        "# Menma config from preset 'demo'"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "clips"], "--data needs --goal"),
        (["--goal", "motions"], "unknown goal"),
        (["--goal", "motion", "--demo"], "needs --data"),
        (["--goal", "motion", "--data", "none", "--demo"], "no such folder"),
        (["--goal", "motion", "--data", "clips"], "no model is given"),
        (["--goal", "motion", "--data", "pictures", "--demo"], "learned from clips"),
        (["--goal", "motion", "--data", "clips", "--demo", "--vae", "x"], "at once"),
        (["--goal", "motion", "--data", "clips", "--demo", "--name", "a b"], "a name has"),
        (["--goal", "motion", "--data", "clips", "--transformer", "models/none"], "no such file"),
        (["--goal", "motion", "--data", "clips", "--transformer",
          "models/wan2.1-t2v-14b.safetensors", "--preset", "wan2.1-i2v-14b-lora"], "is for wan2.1"),
        (["--goal", "motion", "--data", "clips", "--transformer",
          "models/wan2.1-i2v-14b.safetensors", "--preset", "none", "--prompt", "x"], "--image"),
        (["--goal", "motion", "--data", "clips", "--demo", "--image", "x.png"], "no such picture"),
    ],
)  # fmt: skip
def test_mistakes_of_the_command_are_told(place, menma, options, words):
    answer = menma("new", *options)
    assert answer.code == 2
    assert words in answer.err
    assert not list(Path().glob("configs/*"))


def test_only_what_is_set_is_shown():
    text = '# x\nname = "a"\n\n[model]\n# vae =\n\n[adapter]\nrank = 4\n\n# y\n[[techniques]]\n'
    assert set_lines(text) == ['name = "a"', "", "[adapter]", "rank = 4"]


def test_without_encoders_they_are_asked_for(place, menma, monkeypatch):
    monkeypatch.setattr(new_config, "usual_places", lambda runs: [])
    answer = menma("new", "--goal", "motion", "--data", "clips", "--transformer",
                   "models/wan2.1-i2v-14b.safetensors")  # fmt: skip
    assert answer.code == 2
    for option in ("--vae", "--text-encoder", "--image-encoder"):
        assert option in answer.err
    assert weight_search.search([]).models() == []
    with pytest.raises(UserError):
        new_config.answers_of(new_config.Wanted(goal="style"), None)
