"""Every variant goes the whole way: cache, train, sample, convert, merge, from a config alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.e2e.project import Project
from tests.e2e.variant_project import (
    CAPTIONS,
    HEADS,
    Done,
    VariantProject,
    base_config,
    draw_frames,
    write_clips,
    write_frame_folder,
    write_mixed_dataset,
    write_models,
)
from trainer.adapters import load_adapter
from trainer.adapters.apply import attach
from trainer.contract.variants import VARIANTS, Variant
from trainer.core.types import Batch, NoisyInput
from trainer.models import load_image_encoder, load_transformer, load_vae
from trainer.models.wan.transformer import WanTransformer
from trainer.sampling.video_io import read_video

pytestmark = pytest.mark.slow

STEPS = 8
CONTROL = 30
"""Seed of the first clip's control video."""


@dataclass(frozen=True)
class Recipe:
    """One trainable model, and the layout its transformer is stored in."""

    variant: str
    layout: str
    expert: str | None = None

    @property
    def known(self) -> Variant:
        """The entry of `VARIANTS`."""
        return VARIANTS[self.variant]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the clips."""
        return (64, 32) if self.known.vae == "2.2" else (32, 32)

    @property
    def trained(self) -> str:
        """The key of the file that is trained."""
        return "transformer_high_noise" if self.expert == "high_noise" else "transformer"

    def __str__(self) -> str:
        return "-".join(filter(None, (self.variant, self.expert)))


RECIPES = (
    Recipe("wan2.1-t2v-1.3b", "official"),
    Recipe("wan2.1-i2v-14b", "comfy"),
    Recipe("wan2.1-flf2v-14b", "diffusers"),
    Recipe("wan2.1-fun-inp-1.3b", "official"),
    Recipe("wan2.1-fun-control-1.3b", "official"),
    Recipe("wan2.2-t2v-a14b", "comfy", "high_noise"),
    Recipe("wan2.2-t2v-a14b", "diffusers", "low_noise"),
    Recipe("wan2.2-i2v-a14b", "official", "high_noise"),
    Recipe("wan2.2-i2v-a14b", "pth", "low_noise"),
    Recipe("wan2.2-ti2v-5b", "official"),
)


@dataclass
class Walk:
    """A recipe's project after everything was run, and what was seen on the way."""

    recipe: Recipe
    project: VariantProject
    cached: Done
    trained: Done
    """By DeepSpeed, with samples before the first and after the last step."""
    local: Done
    """By the local engine, without samples."""
    plain: Done
    """Samples without the LoRA, ..."""
    attached: Done
    """... of the run, ..."""
    merged: Done
    """... and with its LoRA merged into the transformer it was trained on."""

    def load(self, path: str | Path | None = None) -> WanTransformer:
        """Load the transformer that was trained, or another file."""
        path = path or self.project.config["model"][self.recipe.trained]
        return load_transformer(
            self.project.folder / path, self.recipe.variant, config={"num_heads": HEADS}
        )

    def adapted(self) -> WanTransformer:
        """Return the trained transformer with the factors of the checkpoint in its weights."""
        model = self.load()
        factors = self.project.checkpoint("deepspeed", STEPS)
        with torch.no_grad():
            for name in {key.rpartition(".")[0] for key in factors}:
                weight = model.get_submodule(name).weight
                down = factors[f"{name}.down"].view(4, -1).double()
                up = factors[f"{name}.up"].view(-1, 4).double()
                weight.copy_(weight.double() + 8 / 4 * up @ down)
        return model


def prompts(recipe: Recipe, folder: Path) -> list[dict]:
    """Return what is sampled; images have the clips' size."""
    for name, seed in (("first", 5), ("last", 6)):
        Image.fromarray(draw_frames(seed, 1, *recipe.size)[0]).save(folder / f"{name}.png")
    first = {"prompt": CAPTIONS[1], "image": "first.png"}
    match recipe.known.conditioning:
        case "first_frame":
            return [first]
        case "first_last_frame":
            return [first | {"last_image": "last.png"}]
        case "control":
            write_frame_folder(folder / "asked", draw_frames(9, 5, *recipe.size))
            control = {"prompt": CAPTIONS[1], "control": "asked"}
            return [control, control | {"image": "first.png"}]
        case _:
            text = {"prompt": CAPTIONS[1]}
            return [text, first] if recipe.known.per_token_timestep else [text]


@pytest.fixture(scope="module", params=RECIPES, ids=str)
def walk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Walk:
    recipe: Recipe = request.param
    folder = tmp_path_factory.mktemp("variant")
    model = write_models(folder, recipe.variant, recipe.layout)
    if recipe.expert:
        model["expert"] = recipe.expert
    width, height = recipe.size
    if recipe == RECIPES[0]:
        dataset = write_mixed_dataset(folder)
    else:
        write_clips(folder / "clips", 2, 5, width, height)
        source = {"video_directory": "clips", "target_frames": [5]}
        if recipe.known.conditioning == "control":
            source["control_directory"] = "control"
            for clip in range(2):
                frames = draw_frames(CONTROL + clip, 5, width, height)
                write_frame_folder(folder / f"control/{clip}", frames)
        dataset = {"general": {"resolution": [width, height]}, "sources": [source]}
    project = VariantProject(folder, base_config(model, dataset))
    project.config["sampling"] |= {
        "width": width, "height": height, "prompts": prompts(recipe, folder)
    }  # fmt: skip
    project.config["training"]["max_steps"] = STEPS
    cached = project.cache()
    trained = project.train("deepspeed", sampling__at_start=True, sampling__every_steps=STEPS)
    local = project.train("local", distributed__engine="local")
    project.write()
    plain = project.sample()
    attached = project.sample(run_dir="runs/deepspeed")
    project.job(
        "merge",
        base=model[recipe.trained],
        loras=[{"path": "runs/deepspeed/output/deepspeed.safetensors"}],
        output="merged.safetensors",
    )
    config = project.write("merged.toml", **{f"model__{recipe.trained}": "merged.safetensors"})
    merged = project.sample(config=config)
    return Walk(recipe, project, cached, trained, local, plain, attached, merged)


def test_caching_counts_what_there_is(walk: Walk):
    (end,) = walk.cached.of("end")
    width, height = walk.recipe.size
    clips = {f"{width}x{height}x5": 2}
    if walk.recipe == RECIPES[0]:
        clips["32x32x1"] = 2
    assert end["buckets"] == clips
    assert end["num_problems"] == 0
    assert end["captions_encoded"] == 3, "two captions and the empty one"


def test_batches_carry_what_the_model_is_conditioned_on(walk: Walk):
    """Build the conditioning from the clip's own pixels, as diffusers' pipelines do."""
    known, folder = walk.recipe.known, walk.project.folder
    if known.conditioning == "none":
        assert all(batch.conditioning == {} for _, batch in walk.trained.steps)
    if walk.recipe == RECIPES[0]:
        return  # its clips are not lossless
    vae = load_vae(folder / "models/vae.safetensors")
    stride = vae.stride[1]
    for _, batch in walk.trained.steps:
        clip = int(Path(batch.names[0].split(" [")[0]).name)
        pixels = torch.from_numpy(draw_frames(clip, 5, *walk.recipe.size))
        video = (pixels.permute(3, 0, 1, 2)[None].double() / 127.5 - 1).float()
        with torch.no_grad():
            torch.testing.assert_close(batch.latents_BCFHW, vae.encode(video), atol=1e-5, rtol=1e-5)
        if known.conditioning == "none":
            continue
        if known.conditioning == "control":
            drawn = torch.from_numpy(draw_frames(CONTROL + clip, 5, *walk.recipe.size))
            control = drawn.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
            with torch.no_grad():
                latents = vae.encode(control)
            expected = torch.cat([latents, torch.zeros_like(latents)], dim=1)
            torch.testing.assert_close(batch.extra_channels_BCFHW, expected, atol=1e-5, rtol=1e-5)
            assert torch.equal(batch.image_context_BTD, torch.zeros(1, 257, 80))
            continue
        both = known.conditioning == "first_last_frame"
        given = torch.zeros_like(video)
        given[:, :, 0] = video[:, :, 0]
        mask = torch.ones(1, 1, 5, video.shape[3] // stride, video.shape[4] // stride)
        mask[:, :, list(range(1, 4 if both else 5))] = 0
        if both:
            given[:, :, 4] = video[:, :, 4]
        first = torch.repeat_interleave(mask[:, :, 0:1], dim=2, repeats=4)
        mask = torch.cat([first, mask[:, :, 1:]], dim=2)
        mask = mask.view(1, -1, 4, *mask.shape[3:]).transpose(1, 2)
        with torch.no_grad():
            expected = torch.cat([mask, vae.encode(given)], dim=1)
        torch.testing.assert_close(batch.extra_channels_BCFHW, expected, atol=1e-5, rtol=1e-5)
        if known.transformer.image_dim is None:
            assert batch.image_context_BTD is None
            continue
        encoder = load_image_encoder(folder / "models/clip.pth")
        pictures = [video[:, :, 0], video[:, :, 4]] if both else [video[:, :, 0]]
        with torch.no_grad():
            tokens = torch.cat([encoder(picture) for picture in pictures], dim=1)
        torch.testing.assert_close(batch.image_context_BTD, tokens, atol=1e-5, rtol=1e-5)


def test_trained_timesteps_are_those_of_the_expert(walk: Walk):
    sigmas = torch.cat([noisy.sigma_B for noisy, _ in walk.trained.steps])
    boundary = walk.recipe.known.expert_boundary
    low, high = {"high_noise": (boundary, 1.0), "low_noise": (0.0, boundary)}.get(
        walk.recipe.expert or "", (0.0, 1.0)
    )
    assert len(sigmas) == STEPS
    assert low <= float(sigmas.min()) < float(sigmas.max()) <= high


def test_the_loss_is_finite_and_falls(walk: Walk):
    losses = [event["loss"] for event in walk.trained.of("step")]
    assert len(losses) == STEPS
    assert np.isfinite(losses).all()
    base, adapted = walk.load(), walk.adapted()
    inputs = walk.trained.steps
    before = [loss_of(base, *given) for given in inputs]
    assert losses[0] == pytest.approx(before[0], rel=1e-4), "the event is not the model's loss"
    after = [loss_of(adapted, *given) for given in inputs]
    assert np.mean(after) < 0.9 * np.mean(before)


def loss_of(model: WanTransformer, noisy: NoisyInput, batch: Batch) -> float:
    """Return the mean squared error of the velocity, in float64."""
    velocity = velocity_of(model, noisy, batch).double()
    target = noisy.noise_BCFHW.double() - batch.latents_BCFHW.double()
    return float((velocity - target).square().mean())


def velocity_of(model: WanTransformer, noisy: NoisyInput, batch: Batch) -> Tensor:
    """Return what the model predicts of a recorded input."""
    sigma = noisy.sigma_B.view(-1, 1, 1, 1, 1)
    mixed = (1 - sigma) * batch.latents_BCFHW + sigma * noisy.noise_BCFHW
    with torch.no_grad():
        return model(mixed, 1000 * noisy.sigma_B, batch.context, **batch.conditioning)


def test_the_file_is_the_lora_that_was_trained(walk: Walk):
    """Attached, it moves the velocity as the checkpoint's factors in the weights do."""
    noisy, batch = walk.trained.steps[0]
    base = walk.load()
    plain = velocity_of(base, noisy, batch)
    wanted = velocity_of(walk.adapted(), noisy, batch)
    attach(base, load_adapter(walk.project.output("deepspeed")))
    attached = velocity_of(base, noisy, batch)
    merged = velocity_of(walk.load("merged.safetensors"), noisy, batch)
    assert float((wanted - plain).abs().max()) > 0.05, "the LoRA changes nothing"
    torch.testing.assert_close(attached, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merged, wanted, atol=1e-5, rtol=1e-5)


def test_both_engines_train_the_same(walk: Walk):
    losses = [[e["loss"] for e in done.of("step")] for done in (walk.trained, walk.local)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    ours, theirs = (load_adapter(walk.project.output(name)) for name in ("deepspeed", "local"))
    assert set(ours) == set(theirs)
    for name, pair in ours.items():
        torch.testing.assert_close(pair.up_OR, theirs[name].up_OR, atol=1e-5, rtol=1e-4)


def test_samples_show_the_lora_on_its_own_transformer_only(walk: Walk):
    """Equal to what the merged file gives, in the training run as well as afterwards."""
    count = len(walk.project.config["sampling"]["prompts"])
    assert len(walk.trained.latents) == 2 * count
    for index in range(count):
        plain, merged = walk.plain.latents[index], walk.merged.latents[index]
        assert float((plain - merged).abs().max()) > 0.02, "the LoRA changes nothing"
        assert torch.equal(walk.trained.latents[index], plain), "the sample before the first step"
        for other in (walk.attached.latents[index], walk.trained.latents[count + index]):
            torch.testing.assert_close(other, merged, atol=1e-4, rtol=1e-4)


def test_samples_are_videos_of_the_asked_size(walk: Walk):
    events = walk.trained.of("sample")
    paths = [walk.project.folder / event["path"] for event in events + walk.attached.of("sample")]
    width, height = walk.recipe.size
    assert len(paths) == 3 * len(walk.project.config["sampling"]["prompts"])
    for path in paths:
        video = read_video(path)
        assert video.frames.shape == (5, height, width, 3)
        assert video.fps == walk.recipe.known.fps


@pytest.mark.parametrize("walk", RECIPES[-1:], indirect=True, ids=str)
def test_a_given_first_frame_stays(walk: Walk):
    vae = load_vae(walk.project.folder / "models/vae.safetensors")
    pixels = torch.from_numpy(draw_frames(5, 1, *walk.recipe.size))
    image = pixels.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        first = vae.encode(image)
    text, with_image = walk.attached.latents
    torch.testing.assert_close(with_image[:, :, :1], first, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(text[:, :, :1], first, atol=1e-2)


def test_the_metadata_tell_model_and_expert(walk: Walk):
    recipe = walk.recipe
    (event,) = walk.project.job("inspect", path=str(walk.project.output("deepspeed"))).of("output")
    lora = event["lora"]
    assert lora["expert"] == recipe.expert
    assert lora["metadata"]["menma.variant"] == recipe.variant
    boundary = 1000 * recipe.known.expert_boundary
    told = {"high_noise": f"{boundary:g},1000", "low_noise": f"0,{boundary:g}"}
    assert lora["metadata"]["modelspec.timestep_range"] == told.get(recipe.expert or "", "0,1000")
    assert lora["ranks"] == {"4": lora["num_modules"]}
    assert lora["zero_modules"] == 0


def test_other_layouts_hold_the_same_update(walk: Walk):
    project = walk.project
    previous = "runs/deepspeed/output/deepspeed.safetensors"
    original = load_adapter(project.folder / previous)
    for layout in ("kohya", "peft", "comfy"):
        target = f"{layout}.safetensors"
        project.job("convert", input=previous, output=target, layout=layout)
        converted = load_adapter(project.folder / target)
        assert set(converted) == set(original)
        assert converted.metadata.get("menma.expert") == walk.recipe.expert
        for name, pair in converted.items():
            theirs = original[name]
            delta = pair.scale * pair.up_OR @ pair.down_RI
            wanted = theirs.scale * theirs.up_OR @ theirs.down_RI
            torch.testing.assert_close(delta, wanted)
        previous = target


def test_the_commands_go_the_whole_way_with_two_experts(tmp_path: Path):
    """In processes of their own: an image-to-video expert, from its clips to a merged model."""
    model = write_models(tmp_path, "wan2.2-i2v-a14b", "official") | {"expert": "high_noise"}
    write_clips(tmp_path / "clips", 2, 5, 32, 32)
    Image.fromarray(draw_frames(5, 1, 32, 32)[0]).save(tmp_path / "first.png")
    sources = [{"video_directory": "clips", "target_frames": [5]}]
    config = base_config(model, {"general": {"resolution": [32, 32]}, "sources": sources})
    prompts = [{"prompt": CAPTIONS[0], "image": "first.png"}]
    config["sampling"] |= {"prompts": prompts, "every_steps": 3}
    VariantProject(tmp_path, config).write("fish.toml", name="fish", training__max_steps=3)
    project = Project(tmp_path)

    project.done("check", "fish.toml")
    project.done("cache", "fish.toml")
    project.done("train", "fish.toml")
    run = tmp_path / "runs/fish"
    (sampled,) = (run / "samples").iterdir()
    assert read_video(sampled).frames.shape == (5, 32, 32, 3)

    asked = project.done("sample", "fish", "--prompt", "a fish", "--image", "first.png")
    assert read_video(tmp_path / asked.out.strip()).frames.shape == (5, 32, 32, 3)
    project.done("merge", "fish.toml", "-o", "merged.safetensors")
    base = load_transformer(tmp_path / model["transformer_high_noise"], "wan2.2-i2v-a14b")
    merged = load_transformer(tmp_path / "merged.safetensors", "wan2.2-i2v-a14b")
    lora = load_adapter(run / "output/fish.safetensors")
    assert lora.metadata["menma.expert"] == "high_noise"
    random = torch.Generator().manual_seed(0)
    given = (
        torch.randn(1, 16, 2, 4, 4, generator=random),
        torch.tensor([950.0]),
        [torch.ones(3, 32)],
    )
    extra = torch.randn(1, 20, 2, 4, 4, generator=random)
    with torch.no_grad():
        plain = base(*given, extra_channels=extra)
        attach(base, lora)
        attached = base(*given, extra_channels=extra)
        baked = merged(*given, extra_channels=extra)
    assert float((attached - plain).abs().max()) > 0.01
    torch.testing.assert_close(attached, baked, atol=1e-5, rtol=1e-5)
