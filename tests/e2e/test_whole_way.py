"""From `menma new` to a merged model, with the commands of the README."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.project import Project, write_project
from trainer.adapters import load_adapter
from trainer.adapters.apply import attach
from trainer.models.wan.loading import load_transformer
from trainer.sampling.video_io import read_video

pytestmark = pytest.mark.slow


def test_new_check_cache_train_sample_convert_merge(tmp_path):
    project = replace(write_project(tmp_path), fresh=True)
    project.done("new", "--preset", "wan2.1-t2v-1.3b-lora", "-o", "mine.toml")
    own = [
        *("--set", "model.transformer=models/transformer.safetensors"),
        *("--set", "model.vae=models/vae.safetensors"),
        *("--set", "model.text_encoder=models/text_encoder.safetensors"),
        *("--set", "dataset.general.resolution=[32, 32]"),
        *("--set", 'dataset.sources=[{video_directory="clips", target_frames=[5]}]'),
        *("--set", "adapter.rank=4"),
        *("--set", "training.max_steps=3"),
        *("--set", "memory.weight_format=fp32"),
        *("--set", "output.dtype=fp32"),
        *("--set", "lr_schedule.warmup_steps=0"),
        *("--set", "optimizer.learning_rate=1e-2"),
    ]
    project.done("check", "mine.toml", *own)
    project.done("cache", "mine.toml", *own)
    project.done("train", "mine.toml", *own)

    lora = project.folder / "runs/mine/output/mine.safetensors"
    listed = json.loads(project.done("runs", "list", "--json").out)
    assert [run["name"] for run in listed] == ["mine"]
    steps = project.folder / "runs/mine/events.jsonl"
    assert '"step": 3' in steps.read_text()

    sampled = project.done(
        *("sample", "runs/mine", "--prompt", "a red field", "--width", "32", "--height", "32"),
        *("--frames", "5", "--steps", "2", "--seed", "1"),
    )
    (video,) = sampled.out.split()
    assert read_video(project.folder / video).frames.shape == (5, 32, 32, 3)

    project.done("lora", "convert", lora, "kohya.safetensors", "--layout", "kohya")
    project.done("merge", *("--base", "models/transformer.safetensors"), "--lora", lora,
                 *("-o", "merged.safetensors"))  # fmt: skip
    kohya = load_adapter(project.folder / "kohya.safetensors")
    original = load_adapter(lora)
    assert set(kohya) == set(original)

    base = load_transformer(project.folder / "models/transformer.safetensors")
    merged = load_transformer(project.folder / "merged.safetensors")
    noisy = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    given = (noisy, torch.tensor([500.0]), torch.ones(1, 4, 32))
    with torch.no_grad():
        plain = base(*given)
        attach(base, kohya)
        attached, baked = base(*given), merged(*given)
    assert (attached - plain).abs().max() > 1e-4, "the LoRA changes nothing"
    torch.testing.assert_close(attached, baked, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("engine", "processes", "stage"),
    [("local", 1, 0), ("deepspeed", 1, 0), ("deepspeed", 2, 2)],
)
def test_every_engine_trains_the_same_lora(project: Project, engine, processes, stage):
    # Two processes see two clips in each step, so one process accumulates two to do the same.
    accumulation = 2 // processes
    project.done(
        "train",
        project.config,
        *("--set", f"distributed.engine={engine}"),
        *("--set", f"distributed.num_processes={processes}"),
        *("--set", f"distributed.zero_stage={stage}"),
        *("--set", f"training.gradient_accumulation_steps={accumulation}"),
        *("--set", "adapter.dropout=0"),
    )
    losses = [event["loss"] for event in project.events("step")]
    assert len(losses) == 3
    assert np.isfinite(losses).all()
    REFERENCE.setdefault("losses", losses)
    np.testing.assert_allclose(losses, REFERENCE["losses"], rtol=1e-5)
    output = load_file(project.output)
    reference = REFERENCE.setdefault("output", output)
    for name, tensor in output.items():
        torch.testing.assert_close(tensor, reference[name], atol=2e-4, rtol=2e-3)


REFERENCE: dict = {}
"""What the first engine gave; the others are compared with it."""


def test_a_full_fine_tune_writes_a_whole_model(project: Project):
    project.config.write_text(
        project.config.read_text().replace(
            'kind = "lora"\nrank = 4\ndropout = 0.1', 'kind = "none"'
        )
    )
    project.done("train", project.config)
    before = load_file(project.folder / "models/transformer.safetensors")
    after = load_file(project.output)
    assert set(after) == set(before)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    load_transformer(project.output)
