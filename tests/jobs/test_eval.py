"""The job `eval`: its figures against other ways to the same figures."""

from __future__ import annotations

import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from tests.e2e.variant_project import HEADS, VariantProject, base_config, write_clips, write_models
from trainer.adapters import load_adapter
from trainer.adapters.apply import merge_into
from trainer.contract import plugin_options
from trainer.contract.catalog import PROBES
from trainer.contract.config import load_config
from trainer.contract.options import Options
from trainer.contract.registry import Entry
from trainer.contract.variants import get_variant
from trainer.core.seams import ProbeShot
from trainer.engine.process_group import World
from trainer.jobs import eval_run
from trainer.jobs.eval import ValidationSet
from trainer.jobs.run_items import load_run_items, load_validation_items, validation_settings
from trainer.models import load_transformer, load_vae
from trainer.sampling.pipeline import decode_frames
from trainer.sampling.video_io import read_video
from trainer.training.validation import Validator

SHOTS = (ProbeShot(prompt="a red field", seed=7), ProbeShot(prompt="waves of blue", seed=3))


class Watching:
    """A probe that keeps what it is shown."""

    seen: ClassVar[list[np.ndarray]] = []

    class Config(Options):
        """None."""

    def __init__(self, config: Config, build: Any) -> None:
        self.build = build

    def shots(self) -> tuple[ProbeShot, ...]:
        return SHOTS

    def judge(self, videos: list[np.ndarray]) -> dict[str, float]:
        Watching.seen = list(videos)
        return {"brightness": float(np.mean([video.mean() for video in videos]) / 255)}


@pytest.fixture(autouse=True)
def _watching_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("watching_probe")
    module.Watching = Watching  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "watching_probe", module)
    entry = Entry("watching", "watching_probe:Watching", "keeps what it sees")
    monkeypatch.setitem(PROBES._entries, "watching", entry)
    schemas = plugin_options.plugin_schemas()
    monkeypatch.setitem(schemas["probe"], "watching", {"properties": {}})
    monkeypatch.setattr(Watching, "seen", [])


def make_project(folder: Path, variant: str, **model: Any) -> VariantProject:
    section = write_models(folder, variant, "comfy") | model
    write_clips(folder / "clips", 3, 5, 32, 32)
    sources = [{"video_directory": "clips", "target_frames": [5]}]
    config = base_config(section, {"general": {"resolution": [32, 32]}, "sources": sources})
    config["distributed"] = {"engine": "local", "device": "cpu"}
    config["training"]["max_steps"] = 2
    config["sampling"]["num_steps"] = 2
    config["validation"] = {"split": 0.4, "timesteps": [200.0, 950.0], "noises_per_timestep": 2}
    project = VariantProject(folder, config)
    project.cache()
    return project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> VariantProject:
    project = make_project(tmp_path_factory.mktemp("eval"), "wan2.1-t2v-1.3b")
    project.train("lora")
    return project


def evaluate(project: VariantProject, config: str, **request: Any) -> dict[str, Any]:
    (end,) = project.job("eval", config=config, **request).of("end")
    return end


def loss_of(project: VariantProject, config_file: str, transformer: torch.nn.Module) -> Any:
    """Measure with the validator alone, as training does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project.folder)
        config = load_config(config_file)
        variant = get_variant(config.model.variant)
        items = load_validation_items(config, variant, config_file)
        settings = validation_settings(config, variant)
        return Validator(transformer, items, settings, World.alone()).measure()


def weights(project: VariantProject, name: str = "transformer", **options: Any) -> torch.nn.Module:
    file = project.folder / project.config["model"][name]
    return load_transformer(file, config={"num_heads": HEADS}, **options)


def assert_loss(fields: dict[str, Any], expected: Any, tolerance: float = 0.0) -> None:
    assert fields["loss"] == pytest.approx(expected.loss, rel=tolerance, abs=0)
    found = {float(key): value for key, value in fields["by_timestep"].items()}
    assert found == pytest.approx(dict(expected.by_timestep), rel=tolerance, abs=0)


def test_losses_are_those_of_the_base_and_of_the_merged_model(project: VariantProject) -> None:
    end = evaluate(project, "lora.toml")
    base, merged = weights(project), weights(project)
    assert_loss(end["validation"]["base"], loss_of(project, "lora.toml", base), 1e-7)
    merge_into(merged, load_adapter(project.output("lora")))
    expected = loss_of(project, "lora.toml", merged)
    assert_loss(end["validation"]["trained"], expected, 1e-5)
    assert abs(expected.loss - end["validation"]["base"]["loss"]) > 1e-3, "the LoRA does nothing"
    assert end["validation"]["items"] == expected.num_items == 1
    assert list(end["validation"]["base"]["by_timestep"]) == ["200", "950"]
    assert end["probe"] is None
    assert end["notes"] == []


def test_what_is_known_of_the_run(project: VariantProject) -> None:
    end = evaluate(project, "runs/lora/config.toml", run_dir="runs/lora")
    assert (end["name"], end["run"], end["variant"]) == ("lora", "runs/lora", "wan2.1-t2v-1.3b")
    assert end["output"] == "runs/lora/output/lora.safetensors"
    assert end["step"] == 2
    adapter = load_adapter(project.output("lora"))
    # Rank 4: (inputs + outputs) x 4 for each layer.
    assert end["adapter"] == {
        "kind": "lora",
        "parameters": sum(4 * sum(factors.shape) for factors in adapter.values()),
        "bytes": project.output("lora").stat().st_size,
    }
    assert 0 < end["training"]["seconds"] < 60
    assert end["training"]["peak_rss_gib"] > 0.1
    assert end["training"]["peak_vram_gib"] is None
    assert end["evaluation"]["seconds"] > 0
    assert end["evaluation"]["peak_rss_gib"] > 0.1


def test_the_fingerprint_follows_items_and_noise_and_nothing_else(project: VariantProject) -> None:
    def fingerprint(**changes: Any) -> str:
        config = project.write("eval.toml", name="lora", **changes)
        return str(evaluate(project, config)["validation"]["fingerprint"])

    plain = fingerprint()
    same = [fingerprint(validation__batch_size=2), fingerprint(training__seed=1)]
    others = [
        fingerprint(validation__seed=1),
        fingerprint(validation__timesteps=[200.0]),
        fingerprint(validation__noises_per_timestep=1),
    ]
    assert set(same) == {plain}
    assert len({plain, *others}) == 4


def test_the_fingerprint_is_that_of_the_items_that_are_measured(project: VariantProject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project.folder)
        config = load_config("lora.toml")
        variant = get_variant(config.model.variant)
        items = load_run_items(config, variant, "lora.toml").training.items
        settings = validation_settings(config, variant)
    assert len(items) == 2
    first, second, both, turned = (
        ValidationSet(items=chosen, settings=settings).fingerprint
        for chosen in (items[:1], items[1:], items, items[::-1])
    )
    assert len({first, second, both}) == 3
    assert turned == both
    one = replace(settings, max_items=1)
    assert ValidationSet(items=items, settings=one).fingerprint in {first, second}


def test_the_probe_sees_what_menma_sample_makes(project: VariantProject, tmp_path: Path) -> None:
    config = project.write("eval.toml", name="lora", probe__kind="watching")
    end = evaluate(project, config, run_dir="runs/lora", save=str(tmp_path / "videos"))
    prompts = [{"prompt": shot.prompt, "seed": shot.seed} for shot in SHOTS]
    sampled = project.sample(
        config=config, run_dir="runs/lora", prompts=prompts, output=str(tmp_path / "out")
    )
    vae = load_vae(project.folder / "models/vae.safetensors")
    expected = [np.stack(list(decode_frames(vae, latents))) for latents in sampled.latents]
    assert len(Watching.seen) == len(expected) == 2
    for seen, frames in zip(Watching.seen, expected, strict=True):
        assert seen.dtype == np.uint8
        assert seen.shape == (5, 32, 32, 3)
        np.testing.assert_array_equal(seen, frames)
    mean = float(np.mean([video.mean() for video in Watching.seen]) / 255)
    assert end["probe"]["figures"] == {"brightness": mean}
    assert (end["probe"]["kind"], end["probe"]["shots"]) == ("watching", 2)
    written = sorted((tmp_path / "videos").iterdir())
    assert [path.name for path in written] == ["000_7.mp4", "001_3.mp4"]
    assert read_video(written[0]).frames.shape == (5, 32, 32, 3)


def test_a_picture_is_the_file_that_sample_writes(project: VariantProject, tmp_path: Path) -> None:
    changes = {"probe__kind": "watching", "sampling__num_frames": 1}
    config = project.write("bare.toml", name="bare", **changes)
    end = evaluate(project, config)
    prompts = [{"prompt": shot.prompt, "seed": shot.seed} for shot in SHOTS]
    done = project.sample(config=config, prompts=prompts, output=str(tmp_path))
    files = [np.asarray(Image.open(event["path"])) for event in done.of("sample")]
    for seen, file in zip(Watching.seen, files, strict=True):
        np.testing.assert_array_equal(seen[0], file)
    # No run of that name: the base alone.
    assert (end["output"], end["adapter"], end["training"]) == (None, None, None)
    assert end["validation"]["trained"] is None
    assert end["validation"]["base"]["loss"] > 0
    assert end["notes"] == [f"the base alone: there is no output of a run in {Path('runs/bare')}"]


def test_one_large_model_at_a_time(
    project: VariantProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text encoder is gone before a transformer is loaded, and that one before the VAE."""
    alive: dict[str, Any] = {}
    order: list[str] = []

    def noting(name: str, load: Any) -> Any:
        def noted(*arguments: Any, **options: Any) -> Any:
            order.append(name)
            assert [other for other, model in alive.items() if model() is not None] == []
            model = load(*arguments, **options)
            alive[name] = weakref.ref(model)
            return model

        return noted

    for name in ("lazy_text_encoder", "lazy_vae"):
        lazy = getattr(eval_run, name)

        def noting_lazy(*arguments: Any, name: str = name, lazy: Any = lazy) -> Any:
            model = lazy(*arguments)
            return type(model)(model.identity, noting(name, model.load))

        monkeypatch.setattr(eval_run, name, noting_lazy)
    monkeypatch.setattr(eval_run, "load_base", noting("transformer", eval_run.load_base))
    config = project.write("eval.toml", name="lora", probe__kind="watching")
    evaluate(project, config)
    assert order == ["lazy_text_encoder", "transformer", "lazy_vae"]


def test_a_full_fine_tune_is_the_model_itself(project: VariantProject) -> None:
    changes = {"adapter": {"kind": "none"}, "optimizer__learning_rate": 1e-3}
    project.train("full", **changes, probe__kind="watching")
    end = evaluate(project, "full.toml")
    tuned = load_transformer(project.output("full"), config={"num_heads": HEADS})
    assert_loss(end["validation"]["base"], loss_of(project, "full.toml", weights(project)), 1e-7)
    assert_loss(end["validation"]["trained"], loss_of(project, "full.toml", tuned), 1e-7)
    assert end["validation"]["base"]["loss"] != end["validation"]["trained"]["loss"]
    assert (end["step"], end["adapter"]["kind"]) == (2, "none")
    assert end["adapter"]["parameters"] == sum(p.numel() for p in tuned.parameters())
    seen = Watching.seen
    done = project.sample(
        config="full.toml",
        run_dir="runs/full",
        prompts=[{"prompt": SHOTS[0].prompt, "seed": SHOTS[0].seed}],
        output="full-samples",
    )
    vae = load_vae(project.folder / "models/vae.safetensors")
    np.testing.assert_array_equal(seen[0], np.stack(list(decode_frames(vae, done.latents[0]))))


def test_without_validation_and_probe_no_model_is_loaded(
    project: VariantProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("nothing needs a model")

    monkeypatch.setattr(eval_run, "load_base", refuse)
    config = project.write("eval.toml", name="lora", validation={})
    end = evaluate(project, config)
    assert end["validation"] is None
    assert end["step"] == 2
    (note,) = end["notes"]
    assert "no validation loss" in note


def test_clips_that_may_have_been_learned_are_told(project: VariantProject) -> None:
    def notes(**changes: Any) -> list[str]:
        config = project.write("eval.toml", name="lora", **changes)
        return list(evaluate(project, config)["notes"])

    assert notes() == []
    assert notes(validation__split=0.3) == []  # part of what was held out
    for changes in ({"validation__split": 0.5}, {"validation__seed": 1}):
        (note,) = notes(**changes)
        assert "may be among the ones that it has learned" in note

    twice = [{"video_directory": "clips", "cache_directory": "twice", "target_frames": [5]}]
    validation = {"sources": twice, "timesteps": [200.0]}
    config = project.write("eval.toml", name="lora", validation=validation)
    project.job("cache", config=config)
    (note,) = evaluate(project, config)["notes"]
    assert note == "3 clips of validation.sources are also training clips"


def test_an_expert_of_a_pair_is_measured_at_its_own_timesteps(tmp_path: Path) -> None:
    project = make_project(tmp_path, "wan2.2-t2v-a14b", expert="low_noise")
    project.config["sampling"]["num_steps"] = 4  # so that both experts have a part in it
    project.train("low")
    config = project.write("low.toml", name="low", probe__kind="watching")
    end = evaluate(project, config)
    assert list(end["validation"]["base"]["by_timestep"]) == ["200"]
    merged = weights(project, variant="wan2.2-t2v-a14b")
    assert_loss(end["validation"]["base"], loss_of(project, config, merged), 1e-7)
    merge_into(merged, load_adapter(project.output("low")))
    assert_loss(end["validation"]["trained"], loss_of(project, config, merged), 1e-5)
    done = project.sample(
        config=config,
        run_dir="runs/low",
        prompts=[{"prompt": shot.prompt, "seed": shot.seed} for shot in SHOTS],
        output="samples",
    )
    vae = load_vae(project.folder / "models/vae.safetensors")
    for seen, latents in zip(Watching.seen, done.latents, strict=True):
        np.testing.assert_array_equal(seen, np.stack(list(decode_frames(vae, latents))))


@pytest.mark.parametrize("expert", ["both", "shared"])
def test_both_experts_are_measured_and_draw_the_videos_together(
    tmp_path: Path, expert: str
) -> None:
    project = make_project(tmp_path, "wan2.2-t2v-a14b", expert="low_noise")
    project.config["sampling"]["num_steps"] = 4  # so that both experts have a part in it
    project.config["model"]["expert"] = expert
    project.config["experts"] = {"steps_per_turn": 1, "high_noise_share": 0.5}
    project.train("pair")
    config = project.write("pair.toml", name="pair", probe__kind="watching")
    end = evaluate(project, config)
    suffixes = {"high_noise": "_high_noise", "low_noise": "_low_noise"} if expert == "both" else {}
    for field, who, timestep in (("transformer", "low_noise", "200"),
                                 ("transformer_high_noise", "high_noise", "950")):  # fmt: skip
        alone = project.write(f"{who}.toml", name="pair", model__expert=who)
        model = weights(project, field, variant="wan2.2-t2v-a14b")
        base = loss_of(project, alone, model)
        lora = project.run("pair").output / f"pair{suffixes.get(who, '')}.safetensors"
        merge_into(model, load_adapter(lora))
        trained = loss_of(project, alone, model)
        for whose, wanted in (("base", base), ("trained", trained)):
            found = end["validation"][whose]["by_timestep"][timestep]
            assert found == pytest.approx(wanted.loss, rel=1e-5)
    prompts = [{"prompt": shot.prompt, "seed": shot.seed} for shot in SHOTS]
    done = project.sample(config=config, run_dir="runs/pair", prompts=prompts, output="samples")
    vae = load_vae(project.folder / "models/vae.safetensors")
    for seen, latents in zip(Watching.seen, done.latents, strict=True):
        np.testing.assert_array_equal(seen, np.stack(list(decode_frames(vae, latents))))


def test_a_model_that_starts_from_a_picture_has_a_loss_and_no_probe(tmp_path: Path) -> None:
    project = make_project(tmp_path, "wan2.1-fun-inp-1.3b")
    config = project.write("i2v.toml", name="i2v")
    assert evaluate(project, config)["validation"]["base"]["loss"] > 0
    config = project.write("i2v.toml", name="i2v", probe__kind="watching")
    failed = project.job("eval", config=config, may_fail=True)
    assert failed.code == 2
    assert "probe 'watching' gives texts alone" in failed.words
    assert "wan2.1-fun-inp-1.3b" in failed.words
    assert "probe.kind=none" in failed.words


def test_mistakes_are_told_with_what_to_do(project: VariantProject) -> None:
    def fails(config: str, *parts: str, **request: Any) -> None:
        failed = project.job("eval", config=config, may_fail=True, **request)
        assert failed.code == 2, failed.words
        for part in parts:
            assert part in failed.words

    write_clips(project.folder / "more", 1, 5, 32, 32)
    fails("none.toml", "config file not found")
    more = [{"video_directory": "more", "target_frames": [5]}]
    config = project.write("new.toml", validation={"sources": more})
    fails(config, "is not cached yet", "menma cache new.toml")
    config = project.write("new.toml", model__transformer="models/none.safetensors")
    fails(config, "model.transformer", "no such file")
    config = project.write("new.toml", probe__kind="watching", model__vae="models/none.safetensors")
    fails(config, "model.vae", "no such file")
    fails(project.write("new.toml"), "has no output file yet", run_dir="runs/nothing")


def test_a_lora_of_another_model_is_refused(project: VariantProject) -> None:
    from safetensors.torch import save_file

    run = project.folder / "runs/foreign/output"
    run.mkdir(parents=True)
    name = "diffusion_model.blocks.0.self_attn.q"
    pair = {
        f"{name}.lora_A.weight": torch.ones(4, 32),
        f"{name}.lora_B.weight": torch.ones(32, 4),
    }
    save_file(pair, run / "foreign.safetensors")
    failed = project.job("eval", config=project.write("f.toml", name="foreign"), may_fail=True)
    assert failed.code == 2
    assert "is for another model" in failed.words
