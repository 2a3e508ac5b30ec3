"""What the options of a training run do, measured on what the run writes."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.e2e.variant_project import (
    HEADS,
    Done,
    VariantProject,
    base_config,
    draw_frames,
    write_clips,
    write_frame_folder,
    write_models,
)
from trainer.adapters import load_adapter
from trainer.adapters.base import AdapterFile
from trainer.contract import events as events_page
from trainer.models import load_transformer, load_vae
from trainer.models.wan.transformer import FLOAT32_MODULES

pytestmark = pytest.mark.slow

PAIR = [{"video_directory": "pair", "target_frames": [5]}]
"""Two clips: every step of two items sees both."""
FULL = {"adapter": {"kind": "none"}, "optimizer__learning_rate": 1e-3, "training__max_steps": 4}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> VariantProject:
    folder = tmp_path_factory.mktemp("options")
    model = write_models(folder, "wan2.1-t2v-1.3b", "comfy")
    write_clips(folder / "clips", 3, 5, 32, 32)
    write_clips(folder / "pair", 2, 5, 32, 32)
    sources = [{"video_directory": "clips", "target_frames": [5]}]
    config = base_config(model, {"general": {"resolution": [32, 32]}, "sources": sources})
    project = VariantProject(folder, config)
    project.config["training"]["max_steps"] = 4
    project.cache()
    project.cache(dataset__sources=PAIR)
    return project


@pytest.fixture(scope="module")
def plain(project: VariantProject) -> Done:
    """A run without any option."""
    return project.train("plain")


def losses(done: Done) -> list[float]:
    found = [event["loss"] for event in done.of("step")]
    assert np.isfinite(found).all()
    return found


def trained(project: VariantProject, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a run's output; all must be finite."""
    tensors = load_file(project.output(name))
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    return tensors


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], **close: float):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        if close:
            torch.testing.assert_close(tensor, other[name], **close)
        else:
            assert torch.equal(tensor, other[name]), name


def stop_after_one_step(project: VariantProject, name: str, **changes: Any) -> None:
    """Start a run that was asked to stop."""
    project.run(name).request("stop")
    done = project.train(name, may_fail=True, **changes)
    assert done.code == 130
    assert len(done.of("step")) == 1


@pytest.mark.parametrize("engine", ["deepspeed", "local"])
def test_a_lora_on_bf16_weights_learns_as_on_fp32(project, plain, engine):
    name = f"bf16-{engine}"
    done = project.train(name, memory__weight_format="bf16", distributed__engine=engine)
    np.testing.assert_allclose(losses(done), losses(plain), rtol=0.02)
    assert losses(done) != losses(plain)
    ours, exact = (load_adapter(project.output(n)) for n in (name, "plain"))
    for module, pair in exact.items():
        wanted, found = pair.up_OR @ pair.down_RI, ours[module].up_OR @ ours[module].down_RI
        assert torch.cosine_similarity(wanted.flatten(), found.flatten(), dim=0) > 0.8, module


def test_bf16_output_is_the_checkpoint_rounded_once(project):
    project.train("rounded", output__dtype="bf16", adapter__alpha=4.0)
    factors = project.checkpoint("rounded", 4)
    for name, pair in load_adapter(project.output("rounded")).items():
        assert pair.up_OR.dtype == torch.bfloat16
        up = factors[f"{name}.up"].view(pair.up_OR.shape)
        assert torch.equal(pair.up_OR, up.bfloat16())


@pytest.mark.parametrize(
    ("engine", "stage"), [("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 3)]
)
def test_a_full_fine_tune_in_fp32_is_the_same_on_every_engine(project, engine, stage):
    if not project.output("full").is_file():
        project.train("full", distributed__engine="local", **FULL)
    name = f"full-{engine}-{stage}"
    where = {"distributed__engine": engine, "distributed__zero_stage": stage}
    project.train(name, **where, **FULL)
    assert_same(trained(project, name), trained(project, "full"), atol=2e-5, rtol=1e-4)
    before = load_transformer(
        project.folder / project.config["model"]["transformer"], config={"num_heads": HEADS}
    ).state_dict()
    after = load_transformer(project.output(name)).state_dict()
    moved = {name: float((after[name] - before[name]).abs().max()) for name in before}
    assert all(change > 0 for change in moved.values()), "every weight is trained"


@pytest.mark.parametrize(("stage", "accumulation"), [(2, 1), (2, 2), (3, 1), (3, 2)])
def test_a_full_fine_tune_in_bf16_keeps_what_bf16_cannot_hold(project, stage, accumulation):
    """fp32 masters: steps of 1e-5 are lost in bf16 weights, and are in the output."""
    options = {
        **FULL,
        "memory__weight_format": "bf16",
        "optimizer__learning_rate": 1e-5,
        "training__gradient_accumulation_steps": accumulation,
    }
    names = (f"zero{stage}-{accumulation}", f"local{stage}-{accumulation}")
    first = project.train(names[0], distributed__zero_stage=stage, **options)
    second = project.train(names[1], distributed__engine="local", **options)
    np.testing.assert_allclose(losses(first), losses(second), rtol=0.01)
    ours, theirs = (trained(project, name) for name in names)
    base = load_transformer(
        project.folder / project.config["model"]["transformer"], config={"num_heads": HEADS}
    ).state_dict()
    for name, tensor in ours.items():
        rounded = base[name].bfloat16().float()
        # Loaded in fp32, which the local engine leaves it; DeepSpeed trains bf16 models as a whole.
        kept = base[name] if name.startswith(FLOAT32_MODULES) else rounded
        change, other = tensor - rounded, theirs[name] - kept
        assert 0 < float(change.abs().max()) <= 4.1e-5, "4 steps of Adam"
        alike = torch.cosine_similarity(change.flatten(), other.flatten(), dim=0)
        assert alike > 0.9, f"{name}: {alike}"


@pytest.mark.parametrize("stage", [2, 3])
def test_a_full_fine_tune_in_bf16_resumes_bit_for_bit(project, stage):
    options = {**FULL, "memory__weight_format": "bf16", "distributed__zero_stage": stage}
    project.train(f"whole-{stage}", **options)
    stop_after_one_step(project, f"parts-{stage}", **options)
    project.train(f"parts-{stage}", **options)
    assert_same(trained(project, f"parts-{stage}"), trained(project, f"whole-{stage}"))


def test_sampling_a_full_fine_tune_uses_the_trained_expert(tmp_path):
    section = write_models(tmp_path, "wan2.2-t2v-a14b", "official") | {"expert": "high_noise"}
    write_clips(tmp_path / "clips", 1, 5, 32, 32)
    sources = [{"video_directory": "clips", "target_frames": [5]}]
    dataset = {"general": {"resolution": [32, 32]}, "sources": sources}
    project = VariantProject(tmp_path, base_config(section, dataset))
    prompts = [{"prompt": "a red field"}]
    project.config["sampling"] |= {"prompts": prompts}
    project.cache()
    done = project.train("full", sampling__every_steps=4, **FULL)
    project.write()
    (base,) = project.sample().latents
    (sampled,) = project.sample(run_dir="runs/full", config="full.toml").latents
    replaced = project.write(
        "replaced.toml", model__transformer_high_noise=str(project.output("full"))
    )
    (wanted,) = project.sample(config=replaced).latents
    assert torch.equal(sampled, wanted)
    assert torch.equal(done.latents[0], wanted), "the sample during training"
    assert not torch.allclose(sampled, base, atol=1e-3)


def test_accumulated_microbatches_are_one_batch(project):
    source = PAIR[0]
    batches = project.train("batches", dataset__sources=[source | {"batch_size": 2}])
    accumulated = project.train(
        "accumulated", dataset__sources=PAIR, training__gradient_accumulation_steps=2
    )
    assert [len(batch.names) for _, batch in batches.steps] == [2] * 4
    assert [len(batch.names) for _, batch in accumulated.steps] == [1] * 8
    np.testing.assert_allclose(losses(accumulated), losses(batches), rtol=1e-5)
    close = {"atol": 1e-4, "rtol": 1e-2}  # sums in another order, through four steps of Adam
    assert_same(trained(project, "accumulated"), trained(project, "batches"), **close)


def test_epochs_decide_the_number_of_steps(project):
    done = project.train(
        "epochs", training__epochs=3, training__gradient_accumulation_steps=2,
        dataset__sources=PAIR,
    )  # fmt: skip
    assert len(done.of("step")) == 3
    assert done.of("step")[-1]["epoch"] == 3


@pytest.mark.parametrize("engine", ["deepspeed", "local"])
def test_8_bit_adamw_resumes_bit_for_bit(project, plain, engine):
    options = {
        "optimizer__kind": "adamw8bit",
        "optimizer__min_8bit_size": 16,
        "distributed__engine": engine,
    }
    whole = project.train(f"8bit-{engine}", **options)
    stop_after_one_step(project, f"8bit-parts-{engine}", **options)
    project.train(f"8bit-parts-{engine}", **options)
    assert_same(trained(project, f"8bit-parts-{engine}"), trained(project, f"8bit-{engine}"))
    np.testing.assert_allclose(losses(whole), losses(plain), rtol=0.1)
    folder = project.run(f"8bit-{engine}").checkpoints / "step-00000004"
    state = load_file(folder / "rank-00000.safetensors")
    assert any(tensor.dtype == torch.uint8 for tensor in state.values()), "no 8-bit state"


def test_dropout_resumes_bit_for_bit_and_samples_disturb_nothing(project, plain):
    project.train("dropout", adapter__dropout=0.5)
    prompts = [{"prompt": "a red field"}]
    sampled = {"sampling__prompts": prompts, "sampling__every_steps": 1, "sampling__at_start": True}
    stop_after_one_step(project, "dropout-parts", adapter__dropout=0.5, **sampled)
    done = project.train("dropout-parts", adapter__dropout=0.5, **sampled)
    assert len(done.of("sample")) == 5, "at the start once, then after each step"
    whole = trained(project, "dropout")
    assert_same(trained(project, "dropout-parts"), whole)
    assert any(not torch.equal(t, whole[n]) for n, t in trained(project, "plain").items())


@pytest.mark.parametrize("watch", ["training", "validation"])
def test_a_rate_that_goes_by_the_losses_resumes_bit_for_bit(project, watch):
    """No loss falls by half at once, so the rate is halved at each measurement but the first."""
    options = {
        "lr_schedule": {"kind": "plateau", "watch": watch, "patience": 0, "threshold": 0.5},
        "training__max_steps": 6,
        "distributed__engine": "local",
    }
    if watch == "training":
        options["lr_schedule"]["window_steps"] = 2
        expected = [1, 1, 1, 1, 0.5, 0.5]
    else:
        options |= {"validation__every_steps": 1, "validation__split": 0.4}
        expected = [0.5**n for n in range(6)]
    whole = project.train(f"plateau-{watch}", **options)
    rates = [event["lr"] for event in whole.of("step")]
    assert rates == [0.02 * factor for factor in expected]
    stop_after_one_step(project, f"plateau-parts-{watch}", **options)
    done = project.train(f"plateau-parts-{watch}", **options)
    assert [event["lr"] for event in done.of("step")][-5:] == rates[1:]
    assert_same(trained(project, f"plateau-parts-{watch}"), trained(project, f"plateau-{watch}"))


def test_epochs_are_intervals(project):
    prompts = [{"prompt": "a red field"}]
    options = {
        "training__max_steps": 6, "sampling__prompts": prompts, "sampling__every_epochs": 2,
        "output__every_epochs": 1, "output__keep_last": 2, "checkpoint__every_steps": 0,
        "checkpoint__every_epochs": 1, "validation__split": 0.4, "validation__every_epochs": 2,
    }  # fmt: skip
    done = project.train("every-epochs", **options)
    (epochs,) = {round(event["step"] / event["epoch"]) for event in done.of("step")[2:]}

    def steps(kind):
        return [event["step"] for event in done.of(kind)]

    ends = list(range(epochs, 7, epochs))
    assert steps("checkpoint") == sorted({*ends, 6})
    assert steps("output") == [*(end for end in ends if end < 6), 6]
    assert steps("sample") == ends[1::2]
    assert steps("validation") == sorted({0, *ends[1::2], 6})


def test_checkpoints_follow_the_clock(project):
    options = {"checkpoint__every_steps": 0, "distributed__engine": "local"}
    done = project.train("clock", **options, checkpoint__every_minutes=1e-6)
    assert [event["step"] for event in done.of("checkpoint")] == [1, 2, 3, 4]
    done = project.train("no-clock", **options, checkpoint__every_minutes=1e6)
    assert [event["step"] for event in done.of("checkpoint")] == [4]


def test_zero_3_trains_and_samples_like_stage_0(project, plain):
    prompts = [{"prompt": "a red field"}]
    wanted = {"sampling__prompts": prompts, "sampling__at_start": True, "sampling__every_steps": 2}
    done = project.train("zero3", distributed__zero_stage=3, **wanted)
    other = project.train("zero0", **wanted)
    np.testing.assert_allclose(losses(done), losses(plain), rtol=1e-5)
    assert_same(trained(project, "zero3"), trained(project, "plain"), atol=1e-5, rtol=1e-3)
    assert len(done.latents) == 3
    for ours, theirs in zip(done.latents, other.latents, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_contrastive_flow_is_the_papers_term(project):
    technique = {"name": "contrastive_flow", "weight": 0.1}
    sources = [PAIR[0] | {"batch_size": 2}]
    done = project.train("contrastive", techniques=[technique], dataset__sources=sources)
    (noisy, batch), first = done.steps[0], done.of("step")[0]
    model = load_transformer(
        project.folder / project.config["model"]["transformer"], config={"num_heads": HEADS}
    )
    with torch.no_grad():
        velocity = model(noisy.noisy_latents_BCFHW, 1000 * noisy.sigma_B, batch.context)
    target = noisy.noise_BCFHW - batch.latents_BCFHW
    own = (velocity - target).double().square().mean()
    other = (velocity - target.flip(0)).double().square().mean()
    assert first["terms"]["loss"] == pytest.approx(float(own), rel=1e-5)
    assert first["terms"]["contrastive_flow"] == pytest.approx(float(-0.1 * other), rel=1e-5)
    assert first["loss"] == pytest.approx(float(own - 0.1 * other), rel=1e-5)


def test_contrastive_flow_without_pairs_is_refused(project):
    technique = {"name": "contrastive_flow"}
    done = project.train("alone", may_fail=True, techniques=[technique])
    assert done.code == 2
    assert "batch_size" in done.words


def test_tensorboard_shows_the_figures_of_the_events(project):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = project.train("board", logging__tensorboard=True)
    board = EventAccumulator(str(project.run("board").tensorboard)).Reload()
    for figure in ("loss", "lr", "grad_norm", "terms/loss"):
        shown = [(point.step, point.value) for point in board.Scalars(f"train/{figure}")]
        name = figure.removeprefix("terms/")
        events = done.of("step")
        wanted = [(event["step"], event[name]) for event in events]
        assert [step for step, _ in shown] == [1, 2, 3, 4]
        np.testing.assert_allclose(shown, wanted, rtol=1e-6)


def test_losses_by_source_and_timestep_and_norms_are_told_when_asked(project):
    every = {"logging__details_every_steps": 2, "logging__weight_norms_every_steps": 4}
    done = project.train("details", **every)
    first, second, third, fourth = done.of("step")
    assert "by_source" not in first
    assert "by_source" not in third
    assert "weight_norm" not in second
    ((_, mean),) = second["by_source"].items()
    assert mean == pytest.approx((first["loss"] + second["loss"]) / 2, rel=1e-4)
    assert all(0 < loss < 100 for loss in fourth["by_timestep"].values())
    assert fourth["weight_norm"]["total"] > fourth["weight_norm"]["largest"] > 0


def test_the_page_of_events_knows_all_fields_of_a_step(project):
    done = project.train(
        "fields", logging__details_every_steps=1, logging__weight_norms_every_steps=1
    )
    described = events_page.__doc__ or ""
    step = described[described.index("    step ") : described.index("    sample ")]
    for key in done.of("step")[0].keys() - {"v", "time", "type"}:
        assert re.search(rf"\b{key}\b", step), key


def test_files_on_the_way_are_those_of_their_steps(project):
    project.train(
        "often", output__every_steps=1, checkpoint__every_steps=1, checkpoint__keep_last=9
    )
    files = {path.name for path in project.run("often").output.iterdir()}
    on_the_way = {f"often-step{step:08d}.safetensors" for step in (1, 2, 3)}
    assert files == on_the_way | {"often.safetensors"}
    for step in (1, 2, 3, 4):
        name = "often" if step == 4 else f"often-step{step:08d}"
        adapter = load_adapter(project.run("often").output / f"{name}.safetensors")
        assert_is_checkpoint(adapter, project.checkpoint("often", step))
        assert adapter.metadata["ss_steps"] == str(step)


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_a_run_writes_the_layout_that_is_asked_for(project, plain, layout):
    project.train(layout, output__layout=layout)
    adapter = load_adapter(project.output(layout))
    assert adapter.layout == layout
    assert_is_checkpoint(adapter, project.checkpoint("plain", 4))


def assert_is_checkpoint(adapter: AdapterFile, factors: dict[str, torch.Tensor]) -> None:
    """Compare the updates, not the factors: a layout may have its own scale."""
    assert {key.rpartition(".")[0] for key in factors} == set(adapter)
    for name, pair in adapter.items():
        down = factors[f"{name}.down"].view(pair.down_RI.shape)
        up = factors[f"{name}.up"].view(pair.up_OR.shape)
        update = pair.scale * pair.up_OR @ pair.down_RI
        torch.testing.assert_close(update, 8 / 4 * up @ down, atol=1e-7, rtol=1e-5)


def test_kept_attention_changes_no_number(project, plain):
    done = project.train("kept", memory__keep_attention=True)
    other = project.train("all-kept", memory__gradient_checkpointing=False)
    assert losses(done) == losses(plain) == losses(other)
    assert_same(trained(project, "kept"), trained(project, "plain"))
    assert_same(trained(project, "all-kept"), trained(project, "plain"))


def test_a_strict_dataset_takes_all_clips_or_none(project, tmp_path):
    folder = tmp_path / "clips"
    write_clips(folder, 2, 5, 32, 32)
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "broken.txt").write_text("a caption")
    Path(folder / "1.txt").unlink()
    source = {"video_directory": str(folder), "target_frames": [5]}
    general = {"resolution": [32, 32], "strict": True}
    changes: dict[str, Any] = {"dataset": {"general": general, "sources": [source]}}
    strict = project.job("cache", may_fail=True, config=project.write(**changes))
    assert strict.code == 2
    assert "broken.mp4" in strict.words
    assert str(folder / "1") in strict.words
    assert not list(folder.glob("menma_cache/*.safetensors")), "something was encoded"
    refused = project.train("strict", may_fail=True, **changes)
    assert refused.code == 2

    lenient = copy.deepcopy(changes)
    lenient["dataset"]["general"]["strict"] = False
    (end,) = project.cache(**lenient).of("end")
    assert end["num_problems"] == 2
    done = project.train("lenient", **lenient)
    assert {batch.names for _, batch in done.steps} == {(f"{folder / '0'} [0:5]",)}
    assert len([e for e in done.of("warning") if "broken.mp4" in e["message"]]) == 1


def test_tiles_are_used_for_caching_and_sampling(project, tmp_path):
    pixels = draw_frames(3, 5, 160, 128)
    write_frame_folder(tmp_path / "0", pixels)
    (tmp_path / "0.txt").write_text("a red field")
    source = {"video_directory": str(tmp_path), "target_frames": [5]}
    changes: dict[str, Any] = {
        "dataset": {"general": {"resolution": [160, 128]}, "sources": [source]},
        "memory__vae_tile": 128,
    }
    project.cache(**changes)
    (entry,) = (tmp_path / "menma_cache").glob("*.latents.safetensors")
    cached = load_file(entry)["latents"]
    vae = load_vae(project.folder / "models/vae.safetensors")
    video = torch.from_numpy(pixels).permute(3, 0, 1, 2)[None].double() / 127.5 - 1
    with torch.no_grad():
        tiled = vae.encode(video.float(), tile=(128, 128))[0]
        whole = vae.encode(video.float())[0]
    torch.testing.assert_close(cached, tiled, atol=1e-5, rtol=1e-5)
    assert not torch.equal(cached, whole)

    prompt = {"prompt": "a red field", "width": 160, "height": 128, "num_frames": 1}
    config = project.write(**changes)
    done = project.sample(config=config, prompts=[prompt], output=str(tmp_path / "out"))
    with torch.no_grad():
        wanted = vae.decode(done.latents[0], tile=(128, 128))[0, :, 0]
    expected = ((wanted + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0)
    shown = np.asarray(Image.open(done.of("sample")[0]["path"]))
    np.testing.assert_array_equal(shown, expected.numpy())
