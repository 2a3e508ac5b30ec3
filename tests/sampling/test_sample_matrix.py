"""The job `sample_matrix`: every combination once, kept on the disk, on a page and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from trainer.contract.config import Prompt
from trainer.contract.errors import ConfigError, NonFiniteError, RunError
from trainer.contract.jobs import SampleMatrixRequest
from trainer.contract.lora_use import SampleLoRA
from trainer.contract.variants import TransformerConfig
from trainer.contract.vary import Axis, parse_vary
from trainer.jobs import sample_matrix, sample_studio
from trainer.jobs.cache_run import progress_events
from trainer.jobs.sample_run import run as run_plain
from trainer.models.wan.loading import save_transformer
from trainer.models.wan.tiny import write_tiny_text_encoder, write_tiny_vae
from trainer.models.wan.transformer import WanTransformer
from trainer.sampling.video_io import read_metadata, read_video

CONFIG = """
name = "cats"
[model]
transformer = "{folder}/transformer.safetensors"
vae = "{folder}/vae.safetensors"
text_encoder = "{folder}/text.safetensors"
[distributed]
device = "cpu"
[memory]
weight_format = "fp32"
vae_dtype = "fp32"
[sampling]
width = 32
height = 32
num_frames = 1
num_steps = 2
"""


def write_transformer(path: Path, seed: int) -> None:
    shape = TransformerConfig(
        dim=24, ffn_dim=48, num_heads=2, num_layers=2, text_dim=32, freq_dim=16
    )
    transformer = WanTransformer(shape, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    torch.nn.init.normal_(transformer.head.head.weight, std=0.2, generator=generator)
    transformer.variant_name = "wan2.1-t2v-1.3b"
    save_transformer(transformer, path)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_vae(folder / "vae.safetensors")
    write_tiny_text_encoder(folder / "text.safetensors", ["a cat", "a dog on a mat"], text_dim=32)
    write_transformer(folder / "transformer.safetensors", 0)
    return folder


@pytest.fixture
def config(models: Path, tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG.format(folder=models), encoding="utf-8")
    return path


def write_lora(path: Path, value: float) -> Path:
    name = "diffusion_model.blocks.0.self_attn.q"
    path.parent.mkdir(parents=True, exist_ok=True)
    down, up = torch.full((4, 24), value), torch.full((24, 4), value)
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, path)
    return path


def make(config: Path, *axes: Axis, **fields: Any) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    fields = {"prompts": (Prompt(prompt="a cat"),), "output": config.parent / "sheet"} | fields
    request = SampleMatrixRequest(config=config, axes=axes, **fields)
    try:
        sample_matrix.run(request, lambda kind, /, **said: events.append({"type": kind, **said}))
    except RunError as error:
        events.append({"type": "failed", "error": error})
    return events


def samples(events: list[dict[str, Any]]) -> list[Path]:
    return [Path(event["path"]) for event in events if event["type"] == "sample"]


class Loads:
    """Counts transformers that are loaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: list[Path] = []
        from trainer.jobs import build

        real = build.load_base

        def load_base(config: Any, path: Path, **rest: Any) -> Any:
            self.paths.append(path)
            return real(config, path, **rest)

        monkeypatch.setattr("trainer.jobs.sample_run.load_base", load_base)
        monkeypatch.setattr("trainer.jobs.sample_matrix.load_base", load_base)


def test_every_combination_with_one_load(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = write_lora(tmp_path / "cat.safetensors", 0.4)
    loads = Loads(monkeypatch)
    events = make(
        config,
        parse_vary(f"lora:{lora}=0,0.5,1"),
        parse_vary("seed=1,2"),
        prompts=(Prompt(prompt="a cat", num_frames=5), Prompt(prompt="a dog")),
    )
    assert len(loads.paths) == 1
    made = samples(events)
    assert len(made) == 12
    described = [read_metadata(path) for path in made]
    assert {
        (m["prompt"], m["seed"], m.get("loras", [{"strength": 0}])[0]["strength"])
        for m in described
    } == {(p, s, strength) for p in ("a cat", "a dog") for s in (1, 2) for strength in (0, 0.5, 1)}
    assert sum(path.suffix == ".png" for path in made) == 6
    assert events[-1] == {
        "type": "end", "reason": "done", "num_samples": 12,
        "page": str(tmp_path / "sheet/index.html"),
    }  # fmt: skip
    page = (tmp_path / "sheet/index.html").read_text(encoding="utf-8")
    assert page.count("<video ") + page.count("<img ") == 12
    assert page.count("<tr") == 1 + 6  # prompts x strengths, below the seeds
    with Image.open(tmp_path / "sheet/sheet.png") as picture:
        assert picture.height > 6 * 168
    assert not (tmp_path / "sheet/latents").exists()


def test_a_cell_is_the_sample_that_the_plain_command_makes(config: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "cat.safetensors", 0.4)
    events = make(
        config, parse_vary(f"lora:{lora}=0,0.5"), parse_vary("seed=7"), parse_vary("frames=1")
    )  # a PNG: x264 does not give the same bits each time
    request = SampleMatrixRequest(
        config=config,
        prompts=(Prompt(prompt="a cat", seed=7, num_frames=1),),
        loras=(SampleLoRA(path=lora, strength=0.5),),
        output=tmp_path / "plain",
    )
    plain: list[dict[str, Any]] = []
    run_plain(request, lambda kind, /, **said: plain.append({"type": kind, **said}))
    without, half = sorted(samples(events), key=lambda path: "loras" in read_metadata(path))
    (own,) = samples(plain)
    assert (read_video(half).frames != read_video(without).frames).any()
    assert (read_video(half).frames == read_video(own).frames).all()


def test_a_sheet_of_strengths_starts_from_the_video(config: Path, tmp_path: Path) -> None:
    clip = tmp_path / "clip.png"
    Image.new("RGB", (64, 32), (250, 10, 90)).save(clip)
    wanted = Prompt(prompt="a cat", video=clip, num_frames=1, seed=3)
    events = make(config, parse_vary("strength=0.5,1"), prompts=(wanted,))
    notes = [event["message"] for event in events if event["type"] == "log"]
    assert sum("clip.png is 64x32 and is scaled to 32x32" in note for note in notes) == 1
    pictures = [np.asarray(Image.open(path)) for path in samples(events)]
    assert [read_metadata(path)["strength"] for path in samples(events)] == [0.5, 1.0]
    half = wanted.model_copy(update={"strength": 0.5})
    request = SampleMatrixRequest(config=config, prompts=(half,), output=tmp_path / "plain")
    plain: list[dict[str, Any]] = []
    run_plain(request, lambda kind, /, **said: plain.append({"type": kind, **said}))
    assert (np.asarray(Image.open(samples(plain)[0])) == pictures[0]).all()
    assert (pictures[0] != pictures[1]).any()


def test_what_is_there_is_not_made_again(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = Loads(monkeypatch)
    first = make(config, parse_vary("seed=1,2"))
    stamps = {path: path.stat().st_mtime_ns for path in samples(first)}
    assert samples(make(config, parse_vary("seed=1,2"))) == []
    assert len(loads.paths) == 1
    more = samples(make(config, parse_vary("seed=1..3")))
    assert [read_metadata(path)["seed"] for path in more] == [3]
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    other = samples(make(config, parse_vary("seed=1,2"), set=("sampling.num_steps=3",)))
    assert len(other) == 2  # another setting makes another sample
    write_transformer(tmp_path / "other.safetensors", 1)
    path = tmp_path / "other.safetensors"
    assert len(samples(make(config, parse_vary("seed=1"), set=(f"model.transformer={path}",)))) == 1


def test_a_stopped_sheet_goes_on_where_it_was(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    real = sample_studio.generate

    def generate(models: Any, request: Any, **rest: Any) -> Any:
        if request.seed == 3 and 3 not in seeds:
            seeds.append(3)
            raise KeyboardInterrupt
        seeds.append(request.seed)
        return real(models, request, **rest)

    monkeypatch.setattr(sample_studio, "generate", generate)
    with pytest.raises(KeyboardInterrupt):
        make(config, parse_vary("seed=1,2,3,4"))
    page = (tmp_path / "sheet/index.html").read_text(encoding="utf-8")
    assert page.count("not made yet") == 4
    assert len(samples(make(config, parse_vary("seed=1,2,3,4")))) == 4
    assert seeds == [1, 2, 3, 3, 4]  # 1 and 2 waited as latents


def test_latents_that_wait_and_are_damaged_are_drawn_anew(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_args: Any, **_rest: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sample_matrix._Making, "decode", stopped)
        with pytest.raises(KeyboardInterrupt):
            make(config, parse_vary("seed=1,2"))
    waiting = sorted((tmp_path / "sheet/latents").iterdir())
    waiting[0].write_bytes(waiting[0].read_bytes()[:40])
    events = make(config, parse_vary("seed=1,2"))
    assert len(samples(events)) == 1
    assert waiting[0].name in str(events[-1]["error"])
    assert len(samples(make(config, parse_vary("seed=1,2")))) == 1


def test_a_sample_that_fails_is_shown_and_tried_again(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sample_studio.generate

    def generate(models: Any, request: Any, **rest: Any) -> Any:
        if request.seed == 2:
            raise NonFiniteError("it <b>became</b> NaN", hint="lower it")
        return real(models, request, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(sample_studio, "generate", generate)
        events = make(config, parse_vary("seed=1,2,3"))
    assert len(samples(events)) == 2
    assert "1 of 3 samples failed" in str(events[-1]["error"])
    page = (tmp_path / "sheet/index.html").read_text(encoding="utf-8")
    assert "it &lt;b&gt;became&lt;/b&gt; NaN. lower it" in page
    again = make(config, parse_vary("seed=1,2,3"))
    assert [read_metadata(path)["seed"] for path in samples(again)] == [2]
    assert again[-1]["type"] == "end"


def test_checkpoints_loras_and_whole_models(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lora(tmp_path / "out/cat-step00000002.safetensors", 0.2)
    write_lora(tmp_path / "out/cat.safetensors", 0.4)
    tuned = tmp_path / "tuned.safetensors"
    write_transformer(tuned, 1)
    loads = Loads(monkeypatch)
    events = make(
        config, parse_vary(f"checkpoint=none,{tmp_path}/out/*.safetensors,{tuned}"),
        parse_vary("seed=1,2"),
    )  # fmt: skip
    made = samples(events)
    assert len(made) == 8
    assert [path.name for path in loads.paths] == ["transformer.safetensors", "tuned.safetensors"]
    used = {tuple(lora["file"] for lora in read_metadata(p).get("loras", [])) for p in made}
    assert used == {(), ("cat.safetensors",), ("cat-step00000002.safetensors",)}
    pictures = {read_video(path).frames.tobytes() for path in made}
    assert len(pictures) == 8
    page = (tmp_path / "sheet/index.html").read_text(encoding="utf-8")
    assert "cat-step00000002" in page
    assert "tuned" in page


def test_mistakes_are_told_before_anything_is_loaded(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = Loads(monkeypatch)
    lora = write_lora(tmp_path / "cat.safetensors", 0.4)
    both = SampleLoRA(path=lora, strength_high_noise=0.5)
    for words, axes, fields in (
        ("num_frames is 6", [parse_vary("frames=5,6")], {}),
        ("unknown solver", [parse_vary("solver=unipc,none-such")], {}),
        ("seed is varied twice", [parse_vary("seed=1"), parse_vary("seed=2")], {}),
        ("sheet of 10000 samples", [parse_vary("seed=1..5000"), parse_vary("steps=1,2")], {}),
        ("no LoRA to vary", [parse_vary("lora=0,1")], {}),
        ("strength for each expert", [parse_vary("lora=0,1")], {"loras": (both,)}),
        ("nothing varies 'steps'", [parse_vary("seed=1,2")], {"columns": "steps"}),
        ("given and varied", [parse_vary("prompt=a,b")], {}),
        ("merges no LoRAs", [parse_vary("seed=1,2")], {"merge_loras": True}),
    ):
        with pytest.raises(ConfigError, match=words):
            make(config, *axes, **fields)
    assert loads.paths == []
    assert not (tmp_path / "sheet").exists()


def test_progress_says_how_long_the_rest_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    events: list[dict[str, Any]] = []
    monkeypatch.setattr("trainer.jobs.cache_run.time.monotonic", lambda: now)
    report = progress_events(lambda kind, /, **said: events.append(said))
    for done in (1, 2, 5, 9):
        report("steps", done, 9)
        now += 10
    report("steps", 1, 9)
    # One step, then one in 10 s, then four in 20 s; a phase that begins anew knows nothing yet.
    assert [event.get("eta_s") for event in events] == [None, 70.0, 20.0, None, None]
