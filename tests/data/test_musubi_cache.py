"""Caches of musubi-tuner: taken where they fit, refused with a reason, and written.

The files that are read here are written by `write_theirs` and `write_their_text`, from the
description of the format alone: names, keys, types and metadata as musubi-tuner has them.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest
import torch
from data_clips import numbered_frame, write_caption, write_video
from data_fakes import T2V, FakeTextEncoder, Models, dataset_of
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from trainer.contract import files
from trainer.contract.dataset_config import load_dataset_file, parse_dataset
from trainer.contract.errors import DataError
from trainer.contract.variants import VARIANTS
from trainer.data.buckets import Bucket
from trainer.data.items import load_cached_dataset
from trainer.data.media import index_clip, read_window, to_video
from trainer.data.musubi_cache import read_latents
from trainer.jobs.cache import CacheOptions

I2V = VARIANTS["wan2.2-i2v-a14b"]
I2V_21 = VARIANTS["wan2.1-i2v-14b"]
CONTROL = VARIANTS["wan2.1-fun-control-1.3b"]


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    monkeypatch.setattr(files, "fsync", lambda path: None)


@pytest.fixture
def models():
    return Models()


@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    for number, name in enumerate(("a", "b")):
        write_video(folder / f"{name}.mp4", 12, first_number=20 * number)
        write_caption(folder / f"{name}.mp4", f"clip {name}")
    return folder


def adopting(**more):
    return CacheOptions(dtype="fp32", num_threads=2, from_musubi=True, **more)


def latents_of(models, clip: Path, frames: range = range(5)):
    """Return what the VAE makes of frames at 64 x 32."""
    indexed = index_clip(clip, "video", target_fps=16)
    return models.vae.encode(to_video(read_window(indexed, frames, (64, 32)))[None])[0]


def write_theirs(folder: Path, stem: str, latents, *, start=0, size=(128, 64), **more):
    """Write a window's file as musubi-tuner names and fills it."""
    _, frames, height, width = latents.shape
    word = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[latents.dtype]
    pixel_frames = (frames - 1) * 4 + 1
    tensors = {f"latents_{frames}x{height}x{width}_{word}": latents.contiguous()}
    for name, tensor in more.pop("tensors", {}).items():
        tensors[name.format(size=f"{frames}x{height}x{width}", word=word)] = tensor.contiguous()
    metadata = {
        "architecture": "wan",
        "width": str(size[0]),
        "height": str(size[1]),
        "frame_count": str(pixel_frames),
        "format_version": "1.0.1",
        **more.pop("metadata", {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{stem}_{start:05d}-{pixel_frames:03d}_{size[0]:04d}x{size[1]:04d}_wan.safetensors"
    save_file(tensors, folder / name, metadata=metadata)
    return folder / name


def write_their_text(folder: Path, stem: str, caption: str, context=None):
    """Write a caption's file as musubi-tuner names and fills it."""
    context = FakeTextEncoder.context(caption) if context is None else context
    metadata = {"architecture": "wan", "caption1": caption, "format_version": "1.0.1"}
    path = folder / f"{stem}_wan_te.safetensors"
    save_file({"varlen_t5_float32": context}, path, metadata=metadata)
    return path


def nearly(latents):
    """Return what another resizing filter would make of it: 5 % off."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    return latents + 0.05 * latents.norm() / noise.norm() * noise


def reason_of(models, dataset, name, **more):
    """Cache, and return why a file was not taken; nothing was."""
    report = models.cache(dataset, options=adopting(), **more)
    assert report.adopted == 0
    (note,) = [note for note in report.notes if name in note]
    return note


def test_what_fits_is_taken_instead_of_encoded(clips, models):
    mine = {name: nearly(latents_of(models, clips / f"{name}.mp4")) for name in "ab"}
    for name, latents in mine.items():
        write_theirs(clips, name, latents)
        write_their_text(clips, name, f"clip {name}")
    models.vae.encoded.clear()
    report = models.cache(dataset_of(clips), options=adopting())
    assert (report.adopted, report.encoded, report.reused) == (2, 0, 0)
    assert (report.captions_adopted, report.captions_encoded) == (2, 1)  # the empty one
    assert len(models.vae.encoded) == 1, "one window of the source is compared"
    cached = load_cached_dataset(dataset_of(clips), models.settings())
    for item, name in zip(cached.items, "ab", strict=True):
        with safe_open(item.latents, "pt") as entry:
            assert torch.equal(entry.get_tensor("latents"), mine[name])
        with safe_open(item.context, "pt") as entry:
            assert torch.equal(entry.get_tensor("context"), FakeTextEncoder.context(f"clip {name}"))
    again = models.cache(dataset_of(clips), options=adopting())
    assert (again.adopted, again.encoded, again.reused) == (0, 0, 2)


def test_a_cache_folder_of_its_own_is_looked_into(clips, models, tmp_path):
    theirs = tmp_path / "theirs"
    write_theirs(theirs, "a", latents_of(models, clips / "a.mp4"))
    dataset = dataset_of(clips, cache_directory=str(theirs))
    report = models.cache(dataset, options=adopting())
    assert (report.adopted, report.encoded) == (1, 1)
    assert "1 windows have no latents of musubi-tuner" in report.notes


def test_every_window_has_a_file_of_its_own(clips, models):
    write_theirs(clips, "a", latents_of(models, clips / "a.mp4", range(5, 10)), start=5)
    dataset = dataset_of(clips, frame_extraction="chunk")
    report = models.cache(dataset, options=adopting())
    assert (report.adopted, report.encoded) == (1, 3)


def test_without_being_asked_nothing_is_taken_but_told(clips, models):
    write_theirs(clips, "a", latents_of(models, clips / "a.mp4"))
    report = models.cache(dataset_of(clips))
    assert (report.adopted, report.encoded) == (0, 2)
    assert [note for note in report.notes if "--from-musubi" in note]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda z: z[:, :, :, :-1], "have the shape 16x2x4x7, and 16x2x4x8 is needed"),
        (lambda z: z[:8], "have the shape 8x2x4x8"),
        (lambda z: z.to(torch.bfloat16), "asks for fp32"),
        (lambda z: z.to(torch.int32), "of type int32"),
        (lambda z: torch.full_like(z, torch.nan), "NaN or infinite"),
        (lambda z: z * (torch.rand_like(z) > 0.5), "many zeros"),
    ],
)
def test_latents_of_another_kind_do_not_fit(tmp_path, change, words):
    latents = torch.randn(16, 2, 4, 8, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "a_wan.safetensors"
    save_file({"latents_2x4x8_x": change(latents).contiguous()}, path, {"architecture": "wan"})
    with pytest.raises(DataError, match=words):
        read_latents(path, Bucket(64, 32, 5), T2V, "fp32")


@pytest.mark.parametrize("change", [lambda z: z * 2.5 + 4, lambda z: z.flip(0)])
def test_latents_that_another_model_made_are_encoded_and_told(clips, models, change):
    """Those that are not normalised are far off, too."""
    path = write_theirs(clips, "a", change(latents_of(models, clips / "a.mp4")))
    assert "another model made it" in reason_of(models, dataset_of(clips), path.name)


def test_files_of_other_kinds_are_refused(clips, models):
    latents = latents_of(models, clips / "a.mp4")
    path = write_theirs(clips, "a", latents, metadata={"architecture": "hunyuan_video"})
    assert "not of Wan" in reason_of(models, dataset_of(clips), path.name)
    write_theirs(clips, "a", latents, tensors={"f_indices_int32": torch.tensor([0, 1])})
    (clips / "menma_cache").rename(clips.parent / "old")
    assert "one-frame" in reason_of(models, dataset_of(clips), path.name)
    path.write_bytes(b"no safetensors")
    (clips / "menma_cache").rename(clips.parent / "older")
    assert "cannot be read" in reason_of(models, dataset_of(clips), path.name)


def test_a_clip_that_is_newer_than_its_cache_is_encoded(clips, models):
    path = write_theirs(clips, "a", latents_of(models, clips / "a.mp4"))
    stamp = (clips / "a.mp4").stat().st_mtime - 100
    os.utime(path, (stamp, stamp))
    assert "has changed since" in reason_of(models, dataset_of(clips), path.name)


def test_a_clip_of_another_size_has_no_file(clips, models):
    write_theirs(clips, "a", latents_of(models, clips / "a.mp4"), size=(640, 480))
    report = models.cache(dataset_of(clips), options=adopting())
    assert (report.adopted, report.encoded) == (0, 2)


def test_captions_are_compared_word_by_word_and_by_the_encoder(clips, models):
    old = write_their_text(clips, "a", "clip of old")
    odd = write_their_text(clips, "b", "clip b", FakeTextEncoder.context("clip b") * -3)
    report = models.cache(dataset_of(clips), options=adopting())
    assert (report.captions_adopted, report.captions_encoded) == (0, 3)
    reasons = {name: note for note in report.notes for name in (old.name, odd.name) if name in note}
    assert "another caption" in reasons[old.name]
    assert "another model made it" in reasons[odd.name]


def conditioned(models, clip, variant):
    """Return latents and 20 channels of mask and image, as musubi-tuner stores them."""
    latents = latents_of(models, clip)
    indexed = index_clip(clip, "video", target_fps=16)
    video = to_video(read_window(indexed, range(5), (64, 32)))[None]
    video[:, :, 1:] = 0
    mask = torch.zeros(4, *latents.shape[1:])
    mask[:, 0] = 1
    return latents, torch.cat([mask, models.vae.encode(video)[0]])


def test_mask_and_image_of_image_to_video_are_taken(clips, models):
    latents, image = conditioned(models, clips / "a.mp4", I2V)
    write_theirs(clips, "a", latents, tensors={"latents_image_{size}_{word}": image})
    report = models.cache(dataset_of(clips), variant=I2V, options=adopting())
    assert (report.adopted, report.encoded) == (1, 1)
    cached = load_cached_dataset(dataset_of(clips), models.settings(I2V))
    with safe_open(cached.items[0].latents, "pt") as entry:
        assert torch.equal(entry.get_tensor("extra_channels"), image)


def test_image_to_video_needs_its_conditions(clips, models):
    latents, image = conditioned(models, clips / "a.mp4", I2V)
    path = write_theirs(clips, "a", latents)
    assert "0 tensors" in reason_of(models, dataset_of(clips), path.name, variant=I2V)
    image[0, 1] = 1
    write_theirs(clips, "a", latents, tensors={"latents_image_{size}_{word}": image})
    (clips / "menma_cache").rename(clips.parent / "old")
    assert "other frames" in reason_of(models, dataset_of(clips), path.name, variant=I2V)
    flf = VARIANTS["wan2.1-flf2v-14b"]
    assert "first frame only" in reason_of(models, dataset_of(clips), path.name, variant=flf)


def test_image_features_are_of_the_right_size(clips, models):
    latents, image = conditioned(models, clips / "a.mp4", I2V_21)
    more = {
        "latents_image_{size}_{word}": image,
        "clip_{word}": torch.ones(257, 1280, dtype=torch.float16),  # fp16 whatever the key says
    }
    write_theirs(clips, "a", latents, tensors=more)
    report = models.cache(dataset_of(clips), variant=I2V_21, options=adopting())
    assert report.adopted == 1
    more["clip_{word}"] = torch.ones(257, 1024)
    path = write_theirs(clips, "a", latents, tensors=more)
    (clips / "menma_cache").rename(clips.parent / "old")
    note = reason_of(models, dataset_of(clips), path.name, variant=I2V_21)
    assert "257x1280 is needed" in note


def test_what_is_written_for_musubi_has_its_names_keys_and_metadata(clips, models, tmp_path):
    out = tmp_path / "out"
    report = models.cache(dataset_of(clips), options=CacheOptions(write_musubi=out))
    assert report.exported == 4
    folder = out / "01-clips"
    assert sorted(path.name for path in folder.iterdir()) == [
        "a_00000-005_0128x0064_wan.safetensors",
        "a_wan_te.safetensors",
        "b_00000-005_0128x0064_wan.safetensors",
        "b_wan_te.safetensors",
    ]
    with safe_open(folder / "a_00000-005_0128x0064_wan.safetensors", "pt") as file:
        assert list(file.offset_keys()) == ["latents_2x4x8_bfloat16"]
        wanted = latents_of(models, clips / "a.mp4").to(torch.bfloat16)
        assert torch.equal(file.get_tensor("latents_2x4x8_bfloat16"), wanted)
        metadata = file.metadata()
    assert metadata["architecture"] == "wan"
    assert (metadata["width"], metadata["height"], metadata["frame_count"]) == ("128", "64", "5")
    assert metadata["format_version"] == "1.0.1"
    with safe_open(folder / "b_wan_te.safetensors", "pt") as file:
        assert list(file.offset_keys()) == ["varlen_t5_bfloat16"]
        assert file.metadata()["caption1"] == "clip b"
    written = tomllib.loads((out / "dataset.toml").read_text("utf-8"))["datasets"]
    assert written[0]["cache_directory"] == str(folder)
    assert written[0]["target_frames"] == [5]
    assert load_dataset_file(out / "dataset.toml").sources[0].video_directory == clips


def test_what_is_written_is_taken_again(clips, models, tmp_path):
    out = tmp_path / "out"
    models.cache(dataset_of(clips), options=CacheOptions(dtype="fp32", write_musubi=out))
    dataset = load_dataset_file(out / "dataset.toml")
    report = models.cache(dataset, options=adopting())
    assert (report.adopted, report.captions_adopted, report.encoded) == (2, 2, 0)


def test_conditions_of_image_to_video_are_written(clips, models, tmp_path):
    options = CacheOptions(dtype="fp32", write_musubi=tmp_path / "out")
    models.cache(dataset_of(clips), variant=I2V, options=options)
    path = tmp_path / "out/01-clips/a_00000-005_0128x0064_wan.safetensors"
    with safe_open(path, "pt") as file:
        image = file.get_tensor("latents_image_2x4x8_float32")
    assert torch.equal(image, conditioned(models, clips / "a.mp4", I2V)[1])


def test_images_have_no_window_in_their_name(tmp_path, models):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(numbered_frame(3, 96, 48)).save(folder / "a.png")
    write_caption(folder / "a.png", "an image")
    source = {"image_directory": str(folder), "resolution": [64, 32]}
    dataset = parse_dataset({"datasets": [source]})
    out = tmp_path / "out"
    models.cache(dataset, options=CacheOptions(dtype="fp32", write_musubi=out))
    assert (out / "01-images/a_0096x0048_wan.safetensors").exists()
    report = models.cache(load_dataset_file(out / "dataset.toml"), options=adopting())
    assert report.adopted == 1


def test_nothing_that_is_not_ours_is_overwritten(clips, models, tmp_path):
    out = tmp_path / "out"
    options = CacheOptions(dtype="fp32", write_musubi=out)
    models.cache(dataset_of(clips), options=options)
    models.cache(dataset_of(clips), options=options)  # its own files may be written again
    theirs = write_theirs(out / "01-clips", "a", torch.ones(16, 2, 4, 8))
    with pytest.raises(DataError, match="not written by Menma"):
        models.cache(dataset_of(clips), options=options)
    with safe_open(theirs, "pt") as file:
        assert file.get_tensor("latents_2x4x8_float32").eq(1).all()


def test_two_clips_of_one_name_cannot_be_written(clips, models, tmp_path):
    write_video(clips / "a.mkv", 12)
    with pytest.raises(DataError, match="one cache file"):
        models.cache(dataset_of(clips), options=CacheOptions(write_musubi=tmp_path / "out"))


@pytest.fixture
def controlled(clips):
    """The clips, each with a control video of other numbers."""
    for number, name in enumerate(("a", "b")):
        write_video(clips.parent / "control" / f"{name}.mp4", 12, first_number=60 + 20 * number)
    return {"control_directory": str(clips.parent / "control")}


@pytest.mark.parametrize("first", [False, True])
def test_control_latents_are_taken_as_musubi_trains_on_them(clips, models, controlled, first):
    """Control, then the image latents' first frame without their mask, or zeros."""
    control = nearly(latents_of(models, clips.parent / "control" / "a.mp4"))
    latents, image = conditioned(models, clips / "a.mp4", I2V)
    features = torch.full((257, 1280), 0.5)
    tensors = {"latents_control_{size}_{word}": control}
    if first:
        tensors |= {"latents_image_{size}_{word}": image, "clip_{word}": features}
    write_theirs(clips, "a", latents, tensors=tensors)
    dataset = dataset_of(clips, **controlled, control_first_frame=first)
    report = models.cache(dataset, variant=CONTROL, options=adopting())
    assert (report.adopted, report.encoded) == (1, 1)
    cached = load_cached_dataset(dataset, models.settings(CONTROL))
    with safe_open(cached.items[0].latents, "pt") as entry:
        channels = entry.get_tensor("extra_channels")
        assert torch.equal(channels[:16], control)
        if first:
            assert torch.equal(channels[16:, :1], image[4:, :1])
            assert torch.equal(entry.get_tensor("image_context"), features)
        else:
            assert not entry.get_tensor("image_context").any()
        assert not channels[16:, 1 if first else 0 :].any()


def test_control_latents_of_something_else_are_not_taken(clips, models, controlled):
    latents = latents_of(models, clips / "a.mp4")
    other = {"latents_control_{size}_{word}": latents_of(models, clips / "b.mp4") * 2}
    dataset = dataset_of(clips, **controlled)
    path = write_theirs(clips, "a", latents, tensors=other)
    assert "another model" in reason_of(models, dataset, path.name, variant=CONTROL)
    (clips / "menma_cache").rename(clips.parent / "old")
    write_theirs(clips, "a", latents)
    assert "0 tensors" in reason_of(models, dataset, path.name, variant=CONTROL)
    (clips / "menma_cache").rename(clips.parent / "older")
    control = {"latents_control_{size}_{word}": latents_of(models, clips.parent / "control/a.mp4")}
    write_theirs(clips, "a", latents, tensors=control)
    os.utime(path, (1, 1))
    os.utime(clips / "a.mp4", (1, 1))
    assert "a.mp4 has changed" in reason_of(models, dataset, path.name, variant=CONTROL)


@pytest.mark.parametrize("first", [False, True])
def test_control_latents_are_written_and_taken_again(clips, models, controlled, tmp_path, first):
    out = tmp_path / "out"
    given = dataset_of(clips, **controlled, control_first_frame=first)
    models.cache(given, variant=CONTROL, options=CacheOptions(dtype="fp32", write_musubi=out))
    with safe_open(out / "01-clips/a_00000-005_0128x0064_wan.safetensors", "pt") as file:
        names = {"latents_2x4x8_float32", "latents_control_2x4x8_float32"}
        if first:
            names |= {"latents_image_2x4x8_float32", "clip_float32"}
            mask = file.get_tensor("latents_image_2x4x8_float32")[:4]
            assert mask[:, 0].eq(1).all()
            assert not mask[:, 1:].any()
        assert set(file.offset_keys()) == names
        control = file.get_tensor("latents_control_2x4x8_float32")
    assert torch.equal(control, latents_of(models, clips.parent / "control" / "a.mp4"))
    written = load_dataset_file(out / "dataset.toml")
    assert written.sources[0].control_directory == clips.parent / "control"
    if not first:  # the fake's image features are of no width that is taken
        assert models.cache(written, variant=CONTROL, options=adopting()).adopted == 2


@pytest.mark.parametrize("kind", ["file", "alpha"])
def test_masks_are_read_where_the_latents_are_taken(tmp_path, models, kind):
    """Musubi-tuner has none; Menma's stand beside the latents in its entry."""
    folder = tmp_path / "images"
    folder.mkdir()
    picture = Image.fromarray(numbered_frame(3))
    half = Image.new("L", picture.size)
    half.paste(255, (0, 0, picture.width // 2, picture.height))
    if kind == "alpha":
        picture.putalpha(half)
        keys = {"alpha_mask": True}
    else:
        (tmp_path / "masks").mkdir()
        half.save(tmp_path / "masks" / "a.png")
        keys = {"mask_directory": str(tmp_path / "masks")}
    picture.save(folder / "a.png")
    write_caption(folder / "a.png", "a picture")
    source = {"image_directory": str(folder), "resolution": [64, 32], **keys}
    dataset = parse_dataset({"datasets": [source]})
    encoded = models.cache(dataset, options=CacheOptions(dtype="fp32"))
    assert encoded.encoded == 1
    (item,) = load_cached_dataset(dataset, models.settings()).items
    with safe_open(item.latents, "pt") as entry:
        latents, mask = entry.get_tensor("latents"), entry.get_tensor("mask")
    assert 0 < mask.mean() < 1
    (folder / "menma_cache").rename(tmp_path / "old")
    mine = nearly(latents)
    theirs = write_theirs(folder, "a", mine, size=picture.size)
    theirs.rename(folder / f"a_{picture.width:04d}x{picture.height:04d}_wan.safetensors")
    report = models.cache(dataset, options=adopting())
    assert (report.adopted, report.encoded) == (1, 0)
    (item,) = load_cached_dataset(dataset, models.settings()).items
    with safe_open(item.latents, "pt") as entry:
        assert torch.equal(entry.get_tensor("latents"), mine)
        assert torch.equal(entry.get_tensor("mask"), mask)


def test_models_that_musubi_has_not_are_refused(clips, models, tmp_path):
    for name in ("wan2.2-ti2v-5b", "wan2.1-flf2v-14b"):
        with pytest.raises(DataError, match="musubi-tuner has no caches"):
            models.cache(
                dataset_of(clips),
                variant=VARIANTS[name],
                options=CacheOptions(write_musubi=tmp_path / "out"),
            )
    assert T2V.vae == "2.1"
