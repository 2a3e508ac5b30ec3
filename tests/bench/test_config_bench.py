"""`bench_config`: the training step of any config, on random weights, beside the estimate."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trainer.bench import config_job, stopwatch
from trainer.contract.config_io import load_config
from trainer.contract.errors import ConfigError, ModelFileError
from trainer.contract.jobs import BenchConfigRequest
from trainer.contract.memory_model import estimate, find_gpu, resolve_memory
from trainer.contract.memory_model.flops import step_flops
from trainer.contract.memory_model.workload import workload_of
from trainer.contract.variants import VARIANTS
from trainer.engine.process_group import World
from trainer.models.wan.loading import save_transformer
from trainer.models.wan.transformer import WanTransformer
from trainer.training.step import TrainStep

CONFIG = """\
name = "tiny"
[model]
variant = "wan2.1-t2v-1.3b"
transformer = "no/such/file.safetensors"
[model.shape]
dim = 64
ffn_dim = 128
num_heads = 2
num_layers = 3
text_dim = 32
freq_dim = 16
[[dataset.sources]]
video_directory = "no/such/folder"
resolution = [64, 64]
target_frames = [1, 9]
"""
FIELDS = {
    "name", "variant", "clip", "batch", "tokens", "text_tokens", "settings", "device", "torch",
    "engine", "world_size", "step_s", "warmup_s", "loss", "memory_gib", "tflop", "tflop_per_s",
    "mfu", "estimate", "error_percent",
}  # fmt: skip
LOCAL = 'distributed.engine="local"'
NVME = ["distributed.zero_stage=3", "distributed.offload_optimizer=nvme"]
NVME += ["distributed.nvme_path=not/there", "adapter.kind=none", "memory.weight_format=fp32"]
KINDS = {
    "LoRA in bf16": [LOCAL],
    "LoRA in fp32": [LOCAL, "memory.weight_format=fp32"],
    "fp8": [LOCAL, "memory.weight_format=fp8"],
    "fp8_scaled": [LOCAL, "memory.weight_format=fp8_scaled"],
    "fp8_scaled e5m2": [LOCAL, "memory.weight_format=fp8_scaled", "memory.fp8_format=e5m2"],
    "swap": [LOCAL, "memory.blocks_to_swap=3"],
    "auto": [LOCAL, "memory.blocks_to_swap=auto", "memory.gradient_checkpointing=auto"],
    "fp8 swap": [LOCAL, "memory.blocks_to_swap=2", "memory.weight_format=fp8_scaled"],
    "full fine-tune": [LOCAL, "adapter.kind=none", "memory.weight_format=fp32"],
    "image to video": [LOCAL, "model.variant=wan2.1-i2v-14b"],
    "first and last frame": [LOCAL, "model.variant=wan2.1-flf2v-14b"],
    "control": [LOCAL, "model.variant=wan2.1-fun-control-1.3b"],
    "text and image 5B": [LOCAL, "model.variant=wan2.2-ti2v-5b"],
    "expert": [LOCAL, "model.variant=wan2.2-i2v-a14b", "model.expert=high_noise"],
    "kept and parked": [LOCAL, "memory.keep_attention=true", "memory.offload_checkpoints=true"],
    "chunks": [LOCAL, "memory.feed_forward_chunks=3"],
    "no checkpointing": [LOCAL, "memory.gradient_checkpointing=false"],
    "microbatches": [LOCAL, "training.gradient_accumulation_steps=2"],
    "objective": [LOCAL, "objective.timestep_sampler=uniform", "objective.min_timestep=500"],
    "batch and technique": [
        LOCAL,
        "dataset.general.batch_size=2",
        'techniques=[{name="contrastive_flow"}]',
    ],
    "kept outputs and a slider": [
        LOCAL,
        'techniques=[{name="output_preservation", trigger="sks", class_word="a", class_share=0.99},'
        ' {name="concept_slider", positive="a", negative="b"}]',
    ],
    "deepspeed": ["distributed.engine=deepspeed"],
    "ZeRO-2": ["distributed.zero_stage=2"],
    "full fine-tune in bf16": ["adapter.kind=none", "distributed.zero_stage=2"],
}


class Events:
    """Takes events."""

    def __init__(self):
        self.all = []

    def __call__(self, kind, /, **fields):
        self.all.append({"type": kind, **fields})


@pytest.fixture
def config(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.toml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


def measure(config, *overrides, steps=2, warmup_steps=1):
    """Return the fields of the job's result."""
    events = Events()
    request = BenchConfigRequest(
        config=config, set=overrides, steps=steps, warmup_steps=warmup_steps
    )
    config_job.run(request, events)
    *phases, end = events.all
    says = {"log"} if any("auto" in override for override in overrides) else set()
    assert {event["type"] for event in phases} == {"phase"} | says
    assert end.pop("type") == "end"
    assert end.pop("reason") == "done"
    return end


@pytest.mark.parametrize("overrides", KINDS.values(), ids=KINDS)
def test_every_kind_of_config_is_measured_without_any_file(config, overrides):
    if LOCAL not in overrides:
        pytest.importorskip("deepspeed")
    found = measure(config, *overrides)
    assert set(found) == FIELDS
    json.dumps(found, allow_nan=False)
    work = workload_of(resolve_memory(load_config(config, overrides), None).config)
    assert found["clip"] == str(work.clip) == "64x64x9"
    assert (found["tokens"], found["batch"]) == (work.tokens, work.clip.batch)
    assert 0 < found["step_s"]["min"] <= found["step_s"]["median"] <= found["step_s"]["max"]
    assert found["step_s"]["steps"] == 2
    assert len(found["warmup_s"]) == 1
    assert 0 < found["loss"] < 100
    assert found["tflop"]["needed"] == pytest.approx(step_flops(work).needed / 1e12)
    assert found["engine"] == ("local" if LOCAL in overrides else "deepspeed")
    assert list(config.parent.iterdir()) == [config]


def test_on_a_cpu_time_and_ram_are_measured_and_vram_is_not(config):
    found = measure(config, LOCAL, steps=3, warmup_steps=0)
    assert found["device"] == "cpu"
    assert found["memory_gib"]["peak_host"] > 0.1
    assert found["memory_gib"]["peak_reserved"] is None
    assert found["memory_gib"]["peak_allocated"] is None
    assert found["mfu"] is None
    assert found["estimate"]["gpu"] is None
    assert found["estimate"]["step_s"] is None
    assert found["estimate"]["peak_gib"] > 0
    assert found["error_percent"] == {"step_s": None, "peak": None}
    assert found["warmup_s"] == []


def test_on_a_gpu_the_figures_stand_beside_the_estimate(config, monkeypatch):
    """The arithmetic alone: what was measured is given."""
    card = find_gpu("RTX 4090")
    monkeypatch.setattr(config_job, "card_of", lambda device: card)
    checked = load_config(config, ["distributed.num_processes=1"])
    work = workload_of(checked)
    guess = estimate(checked, card)
    training = guess.phase("training")
    peak = (training.peak_bytes - training.parts["CUDA context"]) / 2**30
    measured = stopwatch.Measured(
        warmup_s=(9.0,),
        steps_s=(2 * guess.step_seconds, 3.0, guess.step_seconds / 2),
        loss=1.0,
        peak_reserved_gib=peak / 1.1,
        peak_allocated_gib=peak / 1.2,
        peak_host_gib=3.0,
    )
    found = config_job.figures(checked, work, World.alone(), measured)
    median = 2 * guess.step_seconds
    assert found["step_s"]["median"] == pytest.approx(median, abs=1e-4)
    assert found["error_percent"] == {"step_s": -50.0, "peak": 10.0}
    rate = step_flops(work).needed / 1e12 / median
    assert found["tflop_per_s"] == pytest.approx(rate)
    assert found["mfu"] == pytest.approx(rate / 165, abs=1e-4)
    assert found["estimate"]["gpu"] == "RTX 4090"
    assert found["estimate"]["peak_gib"] == pytest.approx(peak, abs=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_random_batch_is_what_the_caches_give(config, variant):
    """The sizes that each release's own pipeline makes, for two clips of one token."""
    known = VARIANTS[variant]
    side = known.pixel_multiple
    source = f'{{video_directory="c", resolution=[{side}, {side}], batch_size=2}}'
    config.write_text(f'model.variant="{variant}"\ndataset.sources=[{source}]', encoding="utf-8")
    expert = ["model.expert=low_noise"] if known.experts else []
    batch = stopwatch.random_batch(workload_of(load_config(config, expert)), seed=1)
    assert batch.latents_BCFHW.shape == (2, known.latent_channels, 1, 2, 2)
    assert [tuple(text.shape) for text in batch.context] == [(512, 4096)] * 2
    extra = {"first_frame": 4 + 16, "first_last_frame": 4 + 16, "control": 16 + 16}
    if known.conditioning == "none":
        assert batch.extra_channels_BCFHW is None
    else:
        assert batch.extra_channels_BCFHW.shape == (2, extra[known.conditioning], 1, 2, 2)
    if known.transformer.image_dim is None:
        assert batch.image_context_BTD is None
    else:
        images = 514 if known.conditioning == "first_last_frame" else 257
        assert batch.image_context_BTD.shape == (2, images, 1280)
    assert len(set(batch.item_seeds)) == 2
    assert batch.mask_B1FHW is None


def test_a_random_batch_has_masks_where_they_are_used(config):
    text = 'model.variant="wan2.1-t2v-1.3b"\ntechniques=[{name="masked_loss"}]'
    config.write_text(text, encoding="utf-8")
    batch = stopwatch.random_batch(workload_of(load_config(config)), seed=1)
    assert batch.mask_B1FHW.shape == (1, 1, *batch.latents_BCFHW.shape[2:])
    assert 0 < batch.mask_B1FHW.min() < batch.mask_B1FHW.max() < 1


def test_every_step_and_microbatch_draws_noise_of_its_own(config, monkeypatch):
    seen = []
    make_noisy = TrainStep.make_noisy

    def noting(self, batch):
        seen.append(batch.item_seeds)
        return make_noisy(self, batch)

    monkeypatch.setattr(TrainStep, "make_noisy", noting)
    measure(config, LOCAL, "training.gradient_accumulation_steps=2", steps=2, warmup_steps=1)
    assert len(seen) == len(set(seen)) == 6


def test_the_slowest_rank_and_the_largest_peak_count(config, monkeypatch):
    def gather(self, values):
        return torch.stack([values, values + torch.arange(len(values))])

    monkeypatch.setattr(World, "gather", gather)
    found = measure(config, LOCAL, steps=2, warmup_steps=1)
    assert found["warmup_s"][0] < 1
    assert 1 < found["step_s"]["min"] < 2
    assert 2 < found["step_s"]["max"] < 3
    assert found["memory_gib"]["peak_host"] > 3


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["memory.nonsense=1"], "memory.nonsense"),
        (["model.variant=auto"], "model.variant is auto"),
        (["memory.blocks_to_swap=4"], "4 blocks to swap, but the model has 3"),
        (["distributed.device=cuda"], "cuda"),
        (["distributed.hostfile=hosts"], "one machine"),
        (NVME, "distributed.nvme_path"),
        (['dataset={file="none.toml"}'], "none.toml"),
        (["distributed.engine=local", "distributed.zero_stage=2"], "zero_stage"),
        (['techniques=[{name="contrastive_flow"}]'], "batch"),
        (["model.shape.num_heads=5"], "64 cannot be cut into 5 heads"),
        (['memory.attention="flash3"'], "memory.attention"),
    ],
)
def test_what_cannot_be_measured_is_refused_as_in_training(config, overrides, said):
    if torch.cuda.is_available():
        pytest.skip("a machine with a GPU can do some of these")
    with pytest.raises(ConfigError, match=said):
        measure(config, *overrides)


def test_a_weight_file_that_is_there_tells_variant_and_shape(config, tmp_path):
    shape = replace(
        VARIANTS["wan2.1-t2v-1.3b"].transformer,
        dim=96,
        ffn_dim=160,
        num_heads=3,
        num_layers=2,
        text_dim=24,
    )
    transformer = WanTransformer(shape)
    transformer.variant_name = "wan2.1-t2v-1.3b"
    save_transformer(transformer, tmp_path / "own.safetensors")
    source = '{video_directory="c", resolution=[64, 64], target_frames=[9]}'
    text = f'model.transformer = "own.safetensors"\ndataset.sources = [{source}]\n'
    config.write_text(text, encoding="utf-8")
    read = config_job.read(BenchConfigRequest(config=config, set=(LOCAL,)))
    assert read.model.variant == "wan2.1-t2v-1.3b"
    assert read.model.transformer is None
    assert workload_of(read).shape == shape
    assert measure(config, LOCAL)["variant"] == "wan2.1-t2v-1.3b"


def test_a_weight_file_that_is_damaged_is_told(config, tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelFileError, match="broken"):
        measure(config, LOCAL, 'model.transformer="broken.safetensors"')


@pytest.mark.usefixtures("warm_processes")
@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_several_processes_are_measured_together(config, stage):
    pytest.importorskip("deepspeed")
    request = config.parent / "request.json"
    overrides = ["distributed.num_processes=2", f"distributed.zero_stage={stage}"]
    request.write_text(json.dumps({"config": str(config), "set": overrides, "steps": 2}))
    command = [sys.executable, "-m", "trainer", "bench_config", str(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    (end,) = [event for event in events if event["type"] == "end"]
    assert end["world_size"] == 2
    assert end["step_s"]["median"] > 0


@pytest.mark.usefixtures("warm_processes")
@pytest.mark.slow
def test_the_command_from_config_to_table(config):
    def menma(*arguments):
        command = [sys.executable, "-m", "app", "bench", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = menma("tiny.toml", "--steps", "2", "--set", LOCAL)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["FIGURE", "MEASURED", "ESTIMATE", "ERROR"]
    assert any(line.startswith("peak VRAM reserved, GiB  ") and " - " in line for line in lines)
    assert "no VRAM to measure" in done.stderr
    found = json.loads(menma("tiny.toml", "--set", LOCAL, "--json").stdout)
    assert set(found) == FIELDS
    assert found["step_s"]["steps"] == 3
    wrong = menma("tiny.toml", "--set", "memory.nonsense=1")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    refused = menma("tiny.toml", "--set", LOCAL, "--set", "memory.blocks_to_swap=9")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "Traceback" not in refused.stderr


def test_names_of_settings_are_told(config):
    found = measure(config, LOCAL, "memory.blocks_to_swap=1")["settings"]
    assert found["memory.blocks_to_swap"] == 1
    assert found["adapter.rank"] == 16
    assert found["distributed.engine"] == "local"
    assert found["techniques"] == []
