"""What is wrong with a user's input is said, with file, key and line; nothing of theirs is lost.

The jobs run in this process (that is what `menma` starts), a few as whole commands.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.project import Project, content, tiny_transformer
from trainer.contract.files import write_json
from trainer.jobs.base import main
from trainer.models.wan.loading import save_transformer

pytestmark = pytest.mark.slow


@dataclass
class Case:
    """One mistake: how it is made, which job meets it, and what the message must say."""

    name: str
    make: Callable[[Project], None]
    job: str
    words: tuple[str, ...]
    request: dict[str, Any] | None = None
    code: int = 2


def run_job(project: Project, job: str, request: dict[str, Any], monkeypatch, capfd):
    """Run a job as the app does, but here; return exit code and words."""
    monkeypatch.chdir(project.folder)
    write_json(project.folder / "request.json", request)
    code = main([job, "request.json"])
    (project.folder / "request.json").unlink()
    return code, capfd.readouterr().err


def replace_line(key: str, value: str) -> Callable[[Project], None]:
    return lambda project: project.set(**{key: value})


def sample(name: str, *words: str, **prompt: Any) -> Case:
    request = {"config": "tiny.toml", "prompts": [{"prompt": "a", **prompt}], "output": "out"}
    return Case(name, lambda project: None, "sample", words, request)


def append(text: str) -> Callable[[Project], None]:
    def make(project: Project) -> None:
        project.config.write_text(project.config.read_text() + text)

    return make


def misspell(right: str, wrong: str) -> Callable[[Project], None]:
    def make(project: Project) -> None:
        project.config.write_text(project.config.read_text().replace(f"{right} =", f"{wrong} ="))

    return make


def truncate(name: str) -> Callable[[Project], None]:
    def make(project: Project) -> None:
        path = project.folder / "models" / name
        path.write_bytes(path.read_bytes()[:-1000])

    return make


def hostile_header(project: Project) -> None:
    path = project.folder / "models/transformer.safetensors"
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + b"\0" * 64)


class Code:
    """Unpickled, it would make a file."""

    def __reduce__(self):
        return (open, (os.environ["MENMA_TEST_PWNED"], "w"))


def pickled_code(project: Project) -> None:
    (project.folder / "models/transformer.safetensors").unlink()
    path = project.folder / "models/transformer.pth"
    with path.open("wb") as file:
        pickle.dump({"patch_embedding.weight": Code()}, file)
    project.set(transformer='"models/transformer.pth"')


def other_variant(project: Project) -> None:
    project.set(variant='"wan2.2-ti2v-5b"')


def image_model(project: Project) -> None:
    model = tiny_transformer(in_channels=36)
    model.variant_name = ""
    save_transformer(model, project.folder / "models/transformer.safetensors")


def lora_file(project: Project, module: str, width: int) -> None:
    name = f"diffusion_model.{module}"
    tensors = {
        f"{name}.lora_A.weight": torch.ones(4, width),
        f"{name}.lora_B.weight": torch.ones(width, 4),
    }
    save_file(tensors, project.folder / "foreign.safetensors")


def empty_dataset(project: Project) -> None:
    shutil.rmtree(project.folder / "clips")
    (project.folder / "clips").mkdir()


def no_captions(project: Project) -> None:
    for caption in (project.folder / "clips").glob("*.txt"):
        caption.unlink()
    append("\n[dataset.general]\nstrict = true\n")
    text = project.config.read_text().replace(
        "[dataset.general]\n", "[dataset.general]\nstrict = true\n", 1
    )
    project.config.write_text(text)


def changed_caption(project: Project) -> None:
    (project.folder / "clips/1.txt").write_text("another caption")


CASES = [
    Case("model file missing", replace_line("transformer", '"models/gone.safetensors"'), "train",
         ("tiny.toml:5", "model.transformer", "gone.safetensors")),
    Case("unknown key", misspell("learning_rate", "learning_rat"), "train",
         ("tiny.toml:22", "optimizer.learning_rat", "learning_rate")),
    Case("unknown section", append("\n[adaptor]\nrank = 3\n"), "train", ("adaptor", "adapter")),
    Case("unknown plug-in", append('\n[[techniques]]\nname = "contrastive_flw"\n'), "train",
         ("techniques", "contrastive_flow")),
    Case("wrong type", replace_line("max_steps", '"many"'), "train",
         ("tiny.toml:25", "training.max_steps")),
    Case("not TOML", append("\n[training\n"), "train", ("tiny.toml", "TOML")),
    Case("truncated weights", truncate("transformer.safetensors"), "train",
         ("tiny.toml:5", "model.transformer", "transformer.safetensors")),
    Case("truncated VAE", truncate("vae.safetensors"), "cache", ("vae.safetensors",)),
    Case("VAE as text encoder", lambda project: None, "cache",
         ("vae.safetensors", "is not a umT5 encoder"),
         {"config": "tiny.toml", "set": ["model.text_encoder=models/vae.safetensors"]}),
    sample("frames that are not 4n + 1", "num_frames is 6", "nearest: 5", num_frames=6),
    sample("width that the VAE cannot tile", "width is 40", "nearest: 32", width=40),
    sample("image that is not there", "prompts[0].video", "gone.png does not exist",
           video="gone.png"),
    sample("clip that is too short", "prompts[0].video", "clips/0.mp4 has 5 frames",
           "set num_frames to 5", num_frames=9, video="clips/0.mp4"),
    sample("image for a text model", "prompts[0].image", "cannot use a first frame",
           image="clips/0.mp4"),
    sample("strength without a video", "prompts[0].strength", "set video", strength=0.5),
    sample("less than one step", "prompts[0].strength", "0.5 or more", video="clips/0.mp4",
           strength=0.2),
    sample("solver and schedule apart", "prompts[0].schedule", "sigma 1", "dpm++",
           schedule="full_range"),
    Case("hostile header", hostile_header, "train", ("transformer.safetensors",)),
    Case("weights of another variant", other_variant, "train",
         ("tiny.toml:5", "model.transformer", "wan2.2-ti2v-5b")),
    Case("weights of another kind of model", image_model, "train", ("transformer.safetensors",)),
    Case("pickle with code", pickled_code, "train",
         ("tiny.toml:5", "model.transformer", "transformer.pth")),
    Case("empty dataset", empty_dataset, "cache", ("clips",)),
    Case("captions missing", no_captions, "cache", ("0.mp4", "1.mp4", "2.mp4", "caption")),
    Case("stale cache", changed_caption, "train", ("1.mp4", "caption", "menma cache")),
    Case("too few clips for a step",
         replace_line("max_steps", "3\ngradient_accumulation_steps = 9"), "train",
         ("gradient_accumulation_steps",)),
    Case("too few clips for a step, checked",
         replace_line("max_steps", "3\ngradient_accumulation_steps = 9"), "check",
         ("training.gradient_accumulation_steps", "fewer than one step", "num_repeats = 3")),
    Case("technique for larger batches",
         append('\n[[techniques]]\nname = "contrastive_flow"\n'), "check",
         ("techniques[0]", "batch_size = 2")),
    Case("other models as encoders", lambda project: None, "check",
         ("model.text_encoder: models/vae.safetensors is not a umT5", "model.image_encoder",
          "not a CLIP vision tower"),
         {"config": "tiny.toml", "set": ["model.text_encoder=models/vae.safetensors",
                                         "model.image_encoder=models/vae.safetensors"]}),
    Case("other file as tokenizer", lambda project: None, "check",
         ("model.tokenizer: models/vae.safetensors",),
         {"config": "tiny.toml", "set": ["model.tokenizer=models/vae.safetensors"]}),
    Case("LoRA for another model", lambda p: lora_file(p, "blocks.0.self_attn.q", 5120), "merge",
         ("foreign.safetensors",),
         {"base": "models/transformer.safetensors", "loras": [{"path": "foreign.safetensors"}],
          "output": "merged.safetensors"}),
    Case("LoRA of no known layout", lambda p: lora_file(p, "unknown_part.x", 24), "inspect",
         ("foreign.safetensors",), {"path": "foreign.safetensors"}),
    Case("merge onto an existing file", lambda p: lora_file(p, "blocks.0.self_attn.q", 24), "merge",
         ("vae.safetensors",),
         {"base": "models/transformer.safetensors", "loras": [{"path": "foreign.safetensors"}],
          "output": "models/vae.safetensors"}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_a_mistake_is_explained(project: Project, case, monkeypatch, capfd, tmp_path):
    pwned = tmp_path / "pwned"
    monkeypatch.setenv("MENMA_TEST_PWNED", str(pwned))
    case.make(project)
    before = content(project.folder)
    request = case.request or {"config": "tiny.toml"}
    code, words = run_job(project, case.job, request, monkeypatch, capfd)
    assert code == case.code, words
    missing = [word for word in case.words if word not in words]
    assert not missing, f"{missing} not in:\n{words}"
    assert "Traceback" not in words
    assert not pwned.exists(), "the pickle's code was run"
    after = content(project.folder)
    lost = [path for path in before if after.get(path) != before[path]]
    assert lost == [], "files were changed"


def test_every_mistake_is_listed_at_once_by_the_command(project: Project):
    project.set(max_steps='"many"', rank="0", transformer='"models/gone.safetensors"')
    outcome = project.menma("check", project.config)
    assert outcome.code == 2
    for word in ("training.max_steps", "adapter.rank", "model.transformer", "gone.safetensors"):
        assert word in outcome.words


def test_a_damaged_clip_is_named_and_the_rest_is_cached(project: Project):
    (project.folder / "clips/bad.mp4").write_bytes(b"not a video")
    (project.folder / "clips/bad.txt").write_text("a caption")
    outcome = project.done("cache", project.config)
    assert "bad.mp4" in outcome.words
    project.done("train", project.config)


def test_a_damaged_checkpoint_is_passed_over(project: Project):
    run = ["train", project.config, "--set", "checkpoint.every_steps=2"]
    project.done(*run, "--set", "training.max_steps=4")
    reference = project.checkpoints()
    newest = project.run.checkpoints / f"step-{reference[-1]:08d}"
    weights = next(newest.glob("rank-*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    outcome = project.done(*run, "--set", "training.max_steps=6")
    starts = [event["step"] for event in project.events("phase") if event["name"] == "train"]
    assert starts == [0, 2], outcome
    assert newest.name in outcome.words or newest.name in project.run.events.read_text()


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of 1 MiB, where that is allowed."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_the_run_and_keeps_what_was_there(project: Project, small_disk: Path):
    run = [
        *("train", project.config, "--set", f"output.runs_dir={small_disk}"),
        *("--set", "adapter.rank=24", "--set", "checkpoint.every_steps=1"),
        *("--set", "checkpoint.keep_last=1000", "--set", "training.max_steps=1000"),
    ]
    before = content(project.folder / "models")
    outcome = project.menma(*run)
    assert outcome.code == 1, outcome
    assert "no space left" in outcome.words.lower()
    checkpoints = sorted((small_disk / "tiny/checkpoints").glob("step-*"))
    assert checkpoints, "no checkpoint was written before the disk was full"
    for folder in checkpoints:
        load_file(folder / "rank-00000.safetensors")
    assert content(project.folder / "models") == before
