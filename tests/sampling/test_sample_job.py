"""The sample job on tiny real models: files, metadata, LoRAs, and that models are let go."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from trainer.contract.config import Prompt
from trainer.contract.errors import ConfigError, ModelFileError, NonFiniteError
from trainer.contract.lora_use import LoRAUse
from trainer.contract.variants import TransformerConfig, get_variant
from trainer.core.seams import BlockState
from trainer.jobs.sample import SampleLoaders, SampleOptions, run_sample
from trainer.models import load_image_encoder, load_text_encoder, load_vae
from trainer.models.wan.tiny import (
    write_tiny_image_encoder,
    write_tiny_text_encoder,
    write_tiny_vae,
)
from trainer.models.wan.transformer import WanTransformer
from trainer.sampling.pipeline import Expert
from trainer.sampling.requests import SampleRequest
from trainer.sampling.results import FileOptions, describe_file
from trainer.sampling.video_io import read_metadata, read_video

T2V = get_variant("wan2.1-t2v-1.3b")
DIM = 24


def tiny_transformer(seed: int = 0, **changes: Any) -> WanTransformer:
    config = TransformerConfig(
        dim=DIM, ffn_dim=48, num_heads=2, num_layers=2, text_dim=32, freq_dim=16, **changes
    )
    transformer = WanTransformer(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    torch.nn.init.normal_(transformer.head.head.weight, std=0.2, generator=generator)
    return transformer


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_vae(folder / "vae.safetensors")
    sentences = ["a cat on a mat", "a dog in the fog", "two birds without words"]
    write_tiny_text_encoder(folder / "text.safetensors", sentences, text_dim=32)
    write_tiny_image_encoder(folder / "clip.safetensors", image_dim=80)
    return folder


def write_lora(path: Path, seed: int, **metadata: str) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in ("self_attn.q", "self_attn.v", "ffn.0"):
        width = 48 if module == "ffn.0" else DIM
        name = f"diffusion_model.blocks.0.{module}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, DIM, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(width, 4, generator=generator) * 0.5
    save_file(tensors, path, metadata=metadata)
    return path


class Recorder:
    """Loaders that count what is alive when something is loaded."""

    def __init__(self, files: Path, make: Callable[[Expert], WanTransformer] | None = None) -> None:
        self.alive: dict[str, weakref.ref[Any]] = {}
        self.loaded: list[tuple[str, list[str]]] = []
        make = make or (lambda _expert: tiny_transformer())
        self.loaders = SampleLoaders(
            text_encoder=lambda: self.note("text", load_text_encoder(files / "text.safetensors")),
            transformer=lambda expert: self.note(expert, make(expert)),
            vae=lambda: self.note("vae", load_vae(files / "vae.safetensors")),
            image_encoder=lambda: self.note("clip", load_image_encoder(files / "clip.safetensors")),
        )

    def note(self, name: str, model: Any) -> Any:
        alive = [key for key, reference in self.alive.items() if reference() is not None]
        self.loaded.append((name, alive))
        self.alive[name] = weakref.ref(model)
        return model


def request(**changes: Any) -> SampleRequest:
    fields = {"prompt": "a cat", "width": 32, "height": 32, "num_frames": 5, "num_steps": 2}
    return SampleRequest.of(Prompt.model_validate(fields | changes), T2V)


def test_prompts_to_files(files: Path, tmp_path: Path) -> None:
    recorder = Recorder(files)
    seen: list[tuple[str, int, int]] = []
    requests = [request(seed=7), request(prompt="a dog", num_frames=1, seed=8)]
    options = SampleOptions(name="my run", progress=lambda *what: seen.append(what))
    samples = run_sample(requests, T2V, recorder.loaders, tmp_path / "out", options)
    assert [s.path.name for s in samples] == ["my_run_00_7.mp4", "my_run_01_8.png"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "my_run_00_7.mp4",
        "my_run_01_8.png",
    ]
    video = read_video(samples[0].path)
    assert video.frames.shape == (5, 32, 32, 3)
    assert video.fps == T2V.fps
    with Image.open(samples[1].path) as image:
        assert image.size == (32, 32)
    metadata = read_metadata(samples[1].path)
    assert metadata["prompt"] == "a dog"
    assert metadata["seed"] == 8
    assert metadata["variant"] == T2V.name
    assert metadata["guidance_scale"] == [5.0, 5.0]
    steps = [step for step in seen if step[0] == "steps"]
    assert steps == [("steps", done, 4) for done in (1, 2, 3, 4)]
    assert seen[-1] == ("decode", 2, 2)


def test_progress_counts_evaluations(files: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    Image.new("RGB", (32, 32)).save(tmp_path / "p.png")
    half = {"video": tmp_path / "p.png", "strength": 0.5}
    options = SampleOptions(progress=lambda *what: seen.append(what))
    requests = [request(solver="heun", num_steps=2), request(**half)]
    run_sample(requests, T2V, Recorder(files).loaders, tmp_path / "out", options)
    steps = [step for step in seen if step[0] == "steps"]
    assert steps == [("steps", done, 4) for done in (1, 2, 3, 4)]


def test_one_model_at_a_time(files: Path, tmp_path: Path) -> None:
    recorder = Recorder(files)
    run_sample([request()], T2V, recorder.loaders, tmp_path)
    assert recorder.loaded == [("text", []), ("low_noise", []), ("vae", [])]


def test_image_to_video_lets_the_encoders_go(files: Path, tmp_path: Path) -> None:
    variant = get_variant("wan2.1-i2v-14b")
    picture = tmp_path / "p.png"
    Image.fromarray(np.full((32, 32, 3), 90, dtype=np.uint8)).save(picture)
    recorder = Recorder(files, lambda _: tiny_transformer(in_channels=36, image_dim=80))
    wanted = replace(request(), image=picture)
    (sample,) = run_sample([wanted], variant, recorder.loaders, tmp_path / "out")
    assert read_metadata(sample.path)["image"] == describe_file(picture)  # no path: it is private
    names = [name for name, _ in recorder.loaded]
    assert names == ["text", "vae", "clip", "low_noise", "vae"]
    assert dict(recorder.loaded[3:4]) == {"low_noise": []}


def frames_of(files: Path, folder: Path, *loras: LoRAUse) -> np.ndarray:
    options = SampleOptions(files=FileOptions(format="png"), loras=loras)
    (sample,) = run_sample([request()], T2V, Recorder(files).loaders, folder, options)
    pictures = [Image.open(path) for path in sorted(sample.path.iterdir())]
    assert len(pictures) == 5
    return np.stack([np.asarray(picture) for picture in pictures])


def test_seeds_repeat_and_loras_act_by_their_strength(files: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora.safetensors", 1)
    plain = frames_of(files, tmp_path)
    assert (frames_of(files, tmp_path) == plain).all()
    assert (frames_of(files, tmp_path, LoRAUse(path=lora, strength=0.0)) == plain).all()
    strong = frames_of(files, tmp_path, LoRAUse(path=lora))
    assert (strong != plain).mean() > 0.2
    # Attached half and half is attached once.
    half = LoRAUse(path=lora, strength=0.5)
    twice = frames_of(files, tmp_path, half, half).astype(int)
    assert np.abs(twice - strong).max() <= 1
    assert len(list(tmp_path.iterdir())) == 6  # the LoRA, and five folders: none overwritten


def test_loras_go_to_their_expert(files: Path, tmp_path: Path) -> None:
    variant = get_variant("wan2.2-t2v-a14b")
    named_high = write_lora(tmp_path / "cat_high_noise.safetensors", 1)
    told_low = write_lora(tmp_path / "told.safetensors", 2, **{"menma.expert": "low_noise"})
    both = write_lora(tmp_path / "highway.safetensors", 3)
    forced = write_lora(tmp_path / "other_low.safetensors", 4)
    experts: dict[str, WanTransformer] = {}

    def make(expert: Expert) -> WanTransformer:
        experts[expert] = tiny_transformer()
        return experts[expert]

    loras = (
        LoRAUse(path=named_high),
        LoRAUse(path=told_low),
        LoRAUse(path=both),
        LoRAUse(path=forced, expert="high_noise"),
    )
    wanted = replace(request(), num_steps=8, flow_shift=12.0)
    options = SampleOptions(loras=loras)
    run_sample([wanted], variant, Recorder(files, make).loaders, tmp_path / "out", options)

    def ups(expert: str) -> set[float]:
        layer: Any = experts[expert].get_submodule("blocks.0.self_attn.q")
        found = set()
        while hasattr(layer, "base"):
            found.add(float(layer.up[0, 0]))
            layer = layer.base
        return found

    def first(path: Path) -> float:
        return float(load_file(path)["diffusion_model.blocks.0.self_attn.q.lora_B.weight"][0, 0])

    assert ups("high_noise") == {first(named_high), first(both), first(forced)}
    assert ups("low_noise") == {first(told_low), first(both)}


def test_hooks_of_techniques_do_not_act_on_samples(files: Path, tmp_path: Path) -> None:
    transformer = tiny_transformer()
    calls: list[int] = []

    class Counting:
        def before_block(self, index: int, state: BlockState) -> BlockState:
            calls.append(index)
            return replace(state, tokens_BLD=state.tokens_BLD + 1)

        def after_block(self, index: int, state: BlockState) -> BlockState:
            return state

    def sampled(folder: Path) -> np.ndarray:
        loaders = Recorder(files, lambda _: transformer).loaders
        (sample,) = run_sample([request()], T2V, loaders, folder)
        return read_video(sample.path).frames

    plain = sampled(tmp_path / "plain")
    transformer.blocks.add_hooks([Counting()])
    assert (sampled(tmp_path / "hooked") == plain).all()
    assert calls == []
    transformer(torch.zeros(1, 16, 1, 2, 2), torch.zeros(1), torch.zeros(1, 1, 32))
    assert calls == [0, 1]


def test_mistakes_are_found_before_anything_is_loaded(files: Path, tmp_path: Path) -> None:
    recorder = Recorder(files)
    with pytest.raises(ConfigError, match="num_frames"):
        run_sample([request(), request(num_frames=6)], T2V, recorder.loaders, tmp_path / "out")
    assert recorder.loaded == []
    assert not (tmp_path / "out").exists()


def test_a_lora_for_another_model_is_refused(files: Path, tmp_path: Path) -> None:
    lora = tmp_path / "wide.safetensors"
    name = "diffusion_model.blocks.0.self_attn.q"
    save_file(
        {f"{name}.lora_A.weight": torch.ones(4, 32), f"{name}.lora_B.weight": torch.ones(32, 4)},
        lora,
    )
    options = SampleOptions(loras=(LoRAUse(path=lora),))
    with pytest.raises(ModelFileError, match="another model"):
        run_sample([request()], T2V, Recorder(files).loaders, tmp_path / "out", options)


def test_a_sample_that_is_not_finite_is_an_error(files: Path, tmp_path: Path) -> None:
    def broken(_expert: Expert) -> WanTransformer:
        transformer = tiny_transformer()
        torch.nn.init.constant_(transformer.head.head.bias, float("nan"))
        return transformer

    with pytest.raises(NonFiniteError, match="a cat"):
        run_sample([request()], T2V, Recorder(files, broken).loaders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tiles_have_the_same_shape(files: Path, tmp_path: Path) -> None:
    wanted = request(width=64, height=64)
    options = SampleOptions(tile=(32, 32))
    (sample,) = run_sample([wanted], T2V, Recorder(files).loaders, tmp_path, options)
    assert read_video(sample.path).frames.shape == (5, 64, 64, 3)
