from __future__ import annotations

import errno
import os
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from data_clips import numbered_frame, write_caption, write_images, write_video
from data_fakes import T2V, FakeTextEncoder, Models, dataset_of
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from trainer.contract import files
from trainer.contract.dataset_config import parse_dataset
from trainer.contract.errors import (
    BusyError,
    ConfigError,
    DataError,
    DiskError,
    OutOfMemoryError,
)
from trainer.contract.variants import VARIANTS
from trainer.data import entries
from trainer.data.cache_index import locked, read_index
from trainer.data.items import load_cached_dataset
from trainer.data.media import index_clip, read_window, to_video
from trainer.jobs import cache
from trainer.jobs.cache import CacheOptions, run_cache
from trainer.jobs.window_encoder import LazyModel
from trainer.models.wan.conditioning import frame_mask


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Waiting for the disk is most of these tests' time; test_cache_kill.py does wait."""
    monkeypatch.setattr(files, "fsync", lambda path: None)


@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    for number, name in enumerate(("a.mp4", "b.mp4", "c.mkv")):
        write_video(folder / name, 12, first_number=20 * number)
        write_caption(folder / name, f"clip {name[0]}")
    return folder


@pytest.fixture
def models():
    return Models()


def cache_files(folder):
    return {path.name: path.read_bytes() for path in (folder / "menma_cache").glob("*.safetensors")}


def summary(report):
    return (
        report.encoded,
        report.reused,
        report.captions_encoded,
        report.captions_reused,
        report.removed.count,
    )


def test_entries_hold_what_the_encoders_made_of_the_right_frames(clips, models):
    report = models.cache(dataset_of(clips))
    assert summary(report) == (3, 0, 4, 0, 0)  # the empty caption is the fourth
    assert {str(bucket): count for bucket, count in report.buckets.items()} == {"64x32x5": 3}
    assert report.problems == ()
    cached = load_cached_dataset(dataset_of(clips), models.settings())
    for item, name in zip(cached.items, ("a.mp4", "b.mp4", "c.mkv"), strict=True):
        clip = index_clip(clips / name, "video", target_fps=16)
        video = to_video(read_window(clip, range(5), (64, 32)))[None]
        with safe_open(item.latents, "pt") as entry:
            assert entry.metadata()["clip"] == name
            assert torch.equal(entry.get_tensor("latents"), models.vae.encode(video)[0])
        with safe_open(item.context, "pt") as entry:
            expected = FakeTextEncoder.context(f"clip {name[0]}")
            assert torch.equal(entry.get_tensor("context"), expected)
    with safe_open(cached.texts[""][0], "pt") as entry:
        assert torch.equal(entry.get_tensor("context"), FakeTextEncoder.context(""))


def test_a_second_run_does_nothing_and_loads_nothing(clips, models):
    models.cache(dataset_of(clips))
    before = cache_files(clips)
    models.loaded.clear()
    assert summary(models.cache(dataset_of(clips))) == (0, 3, 0, 4, 0)
    assert models.loaded == []
    assert cache_files(clips) == before


def test_touch_recaches_nothing(clips, models):
    models.cache(dataset_of(clips))
    for path in clips.glob("*.*"):
        os.utime(path, (1, 1))
    assert summary(models.cache(dataset_of(clips))) == (0, 3, 0, 4, 0)


def test_an_edited_caption_recaches_that_text_only(clips, models):
    models.cache(dataset_of(clips))
    write_caption(clips / "b.mp4", "something else")
    models.text.captions.clear()
    assert summary(models.cache(dataset_of(clips))) == (0, 3, 1, 3, 1)
    assert models.text.captions == ["something else"]


def test_a_replaced_clip_recaches_that_clip_only(clips, models):
    models.cache(dataset_of(clips))
    write_video(clips / "b.mp4", 12, first_number=99)
    models.vae.encoded.clear()
    assert summary(models.cache(dataset_of(clips))) == (1, 2, 0, 4, 1)
    assert len(models.vae.encoded) == 1
    load_cached_dataset(dataset_of(clips), models.settings())


def test_an_edit_that_keeps_size_and_modification_time_is_noticed(tmp_path, models):
    folder = tmp_path / "images"
    folder.mkdir()
    path = folder / "a.bmp"
    Image.fromarray(numbered_frame(1, 64, 32)).save(path)
    write_caption(path, "text")
    old = time.time() - 100
    os.utime(path, (old, old))
    source = {"image_directory": str(folder), "resolution": [64, 32]}
    dataset = parse_dataset({"datasets": [source]})
    models.cache(dataset)
    before = path.stat()
    Image.fromarray(numbered_frame(2, 64, 32)).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert summary(models.cache(dataset)) == (1, 0, 0, 2, 1)


def test_renaming_and_moving_recache_nothing(clips, models, tmp_path):
    models.cache(dataset_of(clips))
    (clips / "a.mp4").rename(clips / "z.mp4")
    (clips / "a.txt").rename(clips / "z.txt")
    assert summary(models.cache(dataset_of(clips))) == (0, 3, 0, 4, 0)
    moved = tmp_path / "elsewhere"
    clips.rename(moved)
    assert len(load_cached_dataset(dataset_of(moved), models.settings()).items) == 3
    assert summary(models.cache(dataset_of(moved))) == (0, 3, 0, 4, 0)


def test_a_removed_clip_loses_its_entries_but_foreign_files_stay(clips, models):
    models.cache(dataset_of(clips))
    cache = clips / "menma_cache"
    foreign = cache / "mine.latents.safetensors"
    save_file({"latents": torch.zeros(1)}, foreign)
    (cache / "broken.text.safetensors").write_bytes(b"not one of ours")
    (cache / "notes.txt").write_text("keep me")
    (cache / ".64x32x5_0.latents.safetensors.k3.partial").write_bytes(b"half")
    (clips / "c.mkv").unlink()
    (clips / "c.txt").unlink()
    assert summary(models.cache(dataset_of(clips))) == (0, 2, 0, 3, 2)
    left = {path.name for path in cache.iterdir()}
    assert {"mine.latents.safetensors", "broken.text.safetensors", "notes.txt"} <= left
    assert not any(name.endswith(".partial") for name in left)
    assert len([name for name in left if name.endswith(".safetensors")]) == 2 + 3 + 2


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"resolution": [32, 32]}, (3, 0, 0, 4, 3)),
        ({"target_frames": [5, 9]}, (3, 3, 0, 4, 0)),
        ({"target_frames": [9]}, (3, 0, 0, 4, 3)),
        ({"source_fps": 24.0}, (3, 0, 0, 4, 3)),
        ({"num_repeats": 7, "batch_size": 2}, (0, 3, 0, 4, 0)),
    ],
)
def test_changed_keys_recache_what_depends_on_them(clips, models, change, expected):
    models.cache(dataset_of(clips))
    assert summary(models.cache(dataset_of(clips, **change))) == expected
    load_cached_dataset(dataset_of(clips, **change), models.settings())


def test_another_vae_recaches_latents_and_another_text_encoder_captions(clips, models):
    models.cache(dataset_of(clips))
    models.vae_identity = "vae-2"
    assert summary(models.cache(dataset_of(clips))) == (3, 0, 0, 4, 3)
    models.text_identity = "text-2"
    assert summary(models.cache(dataset_of(clips))) == (0, 3, 4, 0, 4)
    bf16 = CacheOptions(dtype="bf16", prune=True)
    assert summary(models.cache(dataset_of(clips), options=bf16)) == (3, 0, 4, 0, 7)


def test_models_are_loaded_one_after_the_other(clips, models):
    models.cache(dataset_of(clips))
    assert models.loaded == ["text", "vae"]


def test_same_stems_do_not_clash(tmp_path, models):
    folder = tmp_path / "clips"
    write_video(folder / "a.mp4", 8, first_number=1)
    write_video(folder / "a.mkv", 8, first_number=101)
    write_caption(folder / "a.mp4", "text")
    write_images(folder / "a", 8)
    (folder / "a.txt").write_text("text")
    write_video(tmp_path / "one" / "s.mp4", 8, first_number=40)
    write_video(tmp_path / "two" / "s.mp4", 8, first_number=80)
    lines = [f'{{"video_path": "{part}/s.mp4", "caption": "{part}"}}' for part in ("one", "two")]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    shared = {"resolution": [64, 32], "target_frames": [5], "cache_directory": str(tmp_path / "k")}
    dataset = parse_dataset(
        {
            "datasets": [
                {"video_directory": str(folder), **shared},
                {"video_jsonl_file": str(tmp_path / "list.jsonl"), **shared},
            ]
        }
    )
    assert models.cache(dataset).encoded == 5
    cached = load_cached_dataset(dataset, models.settings())
    assert len({item.latents for item in cached.items}) == 5
    assert len({item.key for item in cached.items}) == 5


def test_sources_may_share_media_and_cache(clips, models):
    source = {"video_directory": str(clips), "resolution": [64, 32], "target_frames": [5]}
    dataset = parse_dataset({"datasets": [source, source | {"resolution": [32, 32]}]})
    assert summary(models.cache(dataset)) == (6, 0, 4, 0, 0)
    assert len(load_cached_dataset(dataset, models.settings()).items) == 6
    one = parse_dataset({"datasets": [source]})
    assert summary(models.cache(one)) == (0, 3, 0, 4, 3)


def test_one_cache_folder_may_be_spelled_in_two_ways(clips, models, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "cache", target_is_directory=True)
    source = {"video_directory": str(clips), "resolution": [64, 32], "target_frames": [5]}
    sources = [
        source | {"cache_directory": str(tmp_path / "cache")},
        source | {"cache_directory": str(tmp_path / "link"), "resolution": [32, 32]},
    ]
    dataset = parse_dataset({"datasets": sources})
    for expected in (6, 0):
        assert models.cache(dataset).encoded == expected
    assert len(load_cached_dataset(dataset, models.settings()).items) == 6


def test_equal_clips_share_one_entry(clips, models):
    shutil.copy(clips / "a.mp4", clips / "copy.mp4")
    write_caption(clips / "copy.mp4", "another caption")
    report = models.cache(dataset_of(clips))
    assert report.encoded == 3
    assert sum(report.buckets.values()) == 4
    assert len(load_cached_dataset(dataset_of(clips), models.settings()).items) == 4


# What cannot be used ---------------------------------------------------------------------------


def spoil(clips):
    (clips / "broken.mp4").write_bytes(b"no video at all")
    write_caption(clips / "broken.mp4", "text")
    write_video(clips / "short.mp4", 3)
    write_caption(clips / "short.mp4", "text")
    write_video(clips / "mute.mp4", 12)


def test_bad_clips_are_named_and_the_rest_is_cached(clips, models):
    spoil(clips)
    report = models.cache(dataset_of(clips))
    assert report.encoded == 3
    reasons = {problem.file.name: problem.message for problem in report.problems}
    assert set(reasons) == {"broken.mp4", "short.mp4", "mute.mp4"}
    assert "3 frames" in reasons["short.mp4"]
    cached = load_cached_dataset(dataset_of(clips), models.settings())
    assert len(cached.items) == 3
    assert {problem.file.name for problem in cached.problems} == set(reasons)
    again = models.cache(dataset_of(clips))
    assert {problem.file.name for problem in again.problems} == set(reasons)


def test_strict_stops_before_anything_is_encoded(clips, models):
    spoil(clips)
    with pytest.raises(DataError) as caught:
        models.cache(dataset_of(clips, strict=True))
    for name in ("broken.mp4", "short.mp4", "mute.mp4"):
        assert name in str(caught.value)
    assert models.loaded == []
    assert cache_files(clips) == {}


def test_nothing_usable_is_an_error(tmp_path, models):
    (tmp_path / "clips").mkdir()
    spoil(tmp_path / "clips")
    with pytest.raises(DataError, match="no clip"):
        models.cache(dataset_of(tmp_path / "clips"))


def test_damage_in_the_middle_costs_the_windows_it_hits(tmp_path, models, monkeypatch):
    folder = tmp_path / "clips"
    write_video(folder / "a.mp4", 15)
    write_caption(folder / "a.mp4", "text")

    def fail_on_second(clip, frames, size):
        if frames.start == 5:
            raise DataError("frame 7 is missing or damaged")
        return read_window(clip, frames, size)

    monkeypatch.setattr(cache, "read_window", fail_on_second)
    dataset = dataset_of(folder, frame_extraction="chunk")
    report = models.cache(dataset)
    assert report.encoded == 2
    assert sum(report.buckets.values()) == 2
    assert "frame 7" in report.problems[0].message
    assert len(load_cached_dataset(dataset, models.settings()).items) == 2
    # The failed window is tried again, the others are not.
    assert "frame 7" in models.cache(dataset).problems[0].message
    monkeypatch.undo()
    assert summary(models.cache(dataset)) == (1, 2, 0, 2, 0)
    assert len(load_cached_dataset(dataset, models.settings()).items) == 3


@pytest.mark.parametrize("strict", [False, True])
def test_nan_latents_name_the_clip(clips, models, strict):
    models.vae.nan_at = {1}
    dataset = dataset_of(clips, strict=strict)
    if strict:
        with pytest.raises(DataError, match=r"b\.mp4.*NaN"):
            models.cache(dataset)
        return
    report = models.cache(dataset)
    (problem,) = report.problems
    assert problem.file == clips / "b.mp4"
    assert "NaN" in problem.message
    assert len(load_cached_dataset(dataset, models.settings()).items) == 2


def test_nan_context_names_the_clip(clips, models):
    original = models.text.__class__.context
    bad = torch.full((2, 4), float("nan"))
    models.text.context = lambda text: bad if text == "clip b" else original(text)
    report = models.cache(dataset_of(clips))
    assert [problem.file for problem in report.problems] == [clips / "b.mp4"]
    assert len(load_cached_dataset(dataset_of(clips), models.settings()).items) == 2


def test_a_caption_longer_than_the_model_reads_is_noted(clips, models):
    (clips / "a.txt").write_text("word " * 512)
    report = models.cache(dataset_of(clips))
    assert [note for note in report.notes if "a.mp4" in note and "512 tokens" in note]
    assert not [note for note in report.notes if "b.mp4" in note]


def test_out_of_memory_says_what_to_change(clips, models):
    def encode(video, tile=None):
        raise torch.OutOfMemoryError("CUDA out of memory")

    models.vae.encode = encode
    with pytest.raises(OutOfMemoryError, match="5 frames of 64x32") as caught:
        models.cache(dataset_of(clips))
    assert "vae_tile" in caught.value.hint


def test_progress_and_bounded_decoding(clips, models):
    told = []
    options = CacheOptions(dtype="fp32", num_threads=3, max_decoded=1)
    models.cache(dataset_of(clips), options=options, report=lambda *a: told.append(a))
    assert [(phase, done, total) for phase, done, total, _ in told] == [
        *(("clips", n, 3) for n in (1, 2, 3)),
        *(("captions", n, 4) for n in (1, 2, 3, 4)),
        *(("latents", n, 3) for n in (1, 2, 3)),
    ]
    assert [name for phase, *_, name in told if phase == "latents"] == ["a.mp4", "b.mp4", "c.mkv"]


def test_no_more_windows_are_decoded_than_allowed(tmp_path, models, monkeypatch):
    folder = tmp_path / "clips"
    write_video(folder / "a.mp4", 60)
    write_caption(folder / "a.mp4", "text")
    held, most, lock = 0, 0, threading.Lock()

    def counting(clip, frames, size):
        nonlocal held, most
        with lock:
            held += 1
            most = max(most, held)
        return read_window(clip, frames, size)

    encode = models.vae.encode

    def slow(video, tile=None):
        nonlocal held
        time.sleep(0.02)
        result = encode(video)
        with lock:
            held -= 1
        return result

    monkeypatch.setattr(cache, "read_window", counting)
    models.vae.encode = slow
    options = CacheOptions(dtype="fp32", num_threads=4, max_decoded=3)
    report = models.cache(dataset_of(folder, frame_extraction="chunk"), options=options)
    assert report.encoded == 12
    assert 2 <= most <= 3


# Conditioning ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "image_tokens"),
    [("wan2.1-i2v-14b", 257), ("wan2.1-flf2v-14b", 514), ("wan2.2-i2v-a14b", None)],
)
def test_image_to_video_entries_hold_mask_and_given_frames(clips, models, name, image_tokens):
    variant = VARIANTS[name]
    models.cache(dataset_of(clips), variant=variant)
    item = load_cached_dataset(dataset_of(clips), models.settings(variant)).items[0]
    with safe_open(item.latents, "pt") as entry:
        tensors = {key: entry.get_tensor(key) for key in entry.offset_keys()}
    extra = tensors["extra_channels"]
    assert extra.shape == (20, 2, 4, 8)
    last = variant.conditioning == "first_last_frame"
    mask = torch.tensor([[1, 0.0], [1, 0], [1, 0], [1, 1 if last else 0]])
    assert torch.equal(frame_mask(5, last=last), mask)
    assert torch.equal(extra[:4], mask.view(4, 2, 1, 1).expand(4, 2, 4, 8))
    clip = index_clip(clips / "a.mp4", "video", target_fps=16)
    video = to_video(read_window(clip, range(5), (64, 32)))[None]
    given = torch.zeros_like(video)
    given[:, :, 0] = video[:, :, 0]
    if last:
        given[:, :, -1] = video[:, :, -1]
    assert torch.equal(extra[4:], models.vae.encode(given)[0])
    assert torch.equal(tensors["latents"], models.vae.encode(video)[0])
    if image_tokens is None:
        assert "image_context" not in tensors
        assert "image" not in models.loaded
    else:
        assert tensors["image_context"].shape == (image_tokens, 4)
        assert torch.allclose(tensors["image_context"][0, 0], video[:, :, 0].mean())
        assert torch.allclose(
            tensors["image_context"][-1, 0], video[:, :, -1 if last else 0].mean()
        )


def test_conditioning_is_part_of_the_identity(clips, models):
    models.cache(dataset_of(clips))
    report = models.cache(dataset_of(clips), variant=VARIANTS["wan2.2-i2v-a14b"])
    assert (report.encoded, report.removed.count) == (3, 3)


def test_an_image_in_a_first_last_frame_dataset(tmp_path, models):
    Image.fromarray(numbered_frame(3, 64, 32)).save(tmp_path / "a.png")
    write_caption(tmp_path / "a.png", "text")
    dataset = parse_dataset(
        {"datasets": [{"image_directory": str(tmp_path), "resolution": [64, 32]}]}
    )
    variant = VARIANTS["wan2.1-flf2v-14b"]
    models.cache(dataset, variant=variant)
    item = load_cached_dataset(dataset, models.settings(variant)).items[0]
    with safe_open(item.latents, "pt") as entry:
        extra = entry.get_tensor("extra_channels")
        assert torch.equal(extra[4:], entry.get_tensor("latents"))
        assert extra[:4].min() == 1
        assert entry.get_tensor("image_context").shape == (514, 4)


def test_variants_that_cannot_be_cached_are_refused(clips, models):
    with pytest.raises(DataError, match="control"):
        models.cache(dataset_of(clips), variant=VARIANTS["wan2.1-fun-control-1.3b"])
    with pytest.raises(ConfigError, match="CLIP"):
        run_cache(
            dataset_of(clips),
            variant=VARIANTS["wan2.1-i2v-14b"],
            vae=LazyModel("v", lambda: models.vae),
            text_encoder=LazyModel("t", lambda: models.text),
        )


def test_ti2v_5b_gets_plain_latents_in_steps_of_32(tmp_path, models):
    variant = VARIANTS["wan2.2-ti2v-5b"]
    write_video(tmp_path / "a.mp4", 8, images=[numbered_frame(n, 208, 112) for n in range(8)])
    write_caption(tmp_path / "a.mp4", "text")
    dataset = dataset_of(tmp_path, enable_bucket=True, bucket_no_upscale=True, resolution=512)
    report = models.cache(dataset, variant=variant)
    assert [str(bucket) for bucket in report.buckets] == ["192x96x5"]
    item = load_cached_dataset(dataset, models.settings(variant)).items[0]
    with safe_open(item.latents, "pt") as entry:
        assert list(entry.offset_keys()) == ["latents"]


# Two jobs, failing disks -----------------------------------------------------------------------


def test_a_second_job_is_told_who_caches(clips, models):
    (clips / "menma_cache").mkdir()
    busy = pytest.raises(BusyError, match=f"process {os.getpid()}")
    with locked(clips / "menma_cache"), busy:
        models.cache(dataset_of(clips))
    models.cache(dataset_of(clips))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_a_disk_error(clips, models):
    clips.chmod(0o500)
    try:
        with pytest.raises(DiskError):
            models.cache(dataset_of(clips))
    finally:
        clips.chmod(0o700)


def test_a_full_disk_leaves_earlier_entries_intact(clips, models, monkeypatch):
    models.cache(dataset_of(clips))
    before = cache_files(clips)
    write_video(clips / "b.mp4", 12, first_number=99)

    def full(path, content):
        raise DiskError(f"cannot write {path}: {os.strerror(errno.ENOSPC)}")

    monkeypatch.setattr(entries, "write_bytes", full)
    with pytest.raises(DiskError):
        models.cache(dataset_of(clips))
    assert cache_files(clips) == before
    monkeypatch.undo()
    with pytest.raises(DataError, match="interrupted"):
        load_cached_dataset(dataset_of(clips), models.settings())
    assert summary(models.cache(dataset_of(clips))) == (1, 2, 0, 4, 1)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "1"}', '{"format": "0"}'])
def test_a_damaged_index_costs_no_entry(clips, models, content):
    models.cache(dataset_of(clips))
    (clips / "menma_cache" / "cache_index.json").write_text(content)
    assert read_index(clips / "menma_cache") == {}
    assert summary(models.cache(dataset_of(clips))) == (0, 3, 0, 4, 0)


def test_a_damaged_entry_is_made_again(clips, models):
    models.cache(dataset_of(clips))
    first, second, _ = sorted((clips / "menma_cache").glob("*.latents.safetensors"))
    first.write_bytes(first.read_bytes()[:-1])
    second.write_bytes(b"")
    assert summary(models.cache(dataset_of(clips)))[:2] == (2, 1)


def test_an_interrupt_leaves_whole_entries_and_the_rest_follows(clips, models):
    def interrupt(phase, done, total, name=""):
        if (phase, done) == ("latents", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        models.cache(dataset_of(clips), report=interrupt)
    assert summary(models.cache(dataset_of(clips))) == (1, 2, 0, 4, 0)


def test_random_edits_recache_exactly_what_changed(tmp_path):
    folder = tmp_path / "clips"
    generator = np.random.default_rng(0)
    state: dict[str, tuple[int, str]] = {}
    models = Models()
    for _ in range(12):
        previous = dict(state)
        for name in generator.choice(["a.mp4", "b.mp4", "c.mp4", "d.mp4"], 2, replace=False):
            action = generator.integers(4)
            if name not in state or action == 0:
                state[name] = (int(generator.integers(200)), f"caption {generator.integers(9)}")
                write_video(folder / name, 6, first_number=state[name][0])
            elif action == 1:
                state[name] = (state[name][0], f"caption {generator.integers(9)}")
            elif action == 2 and len(state) > 1:
                del state[name]
                (folder / name).unlink()
                (folder / name).with_suffix(".txt").unlink()
            else:
                os.utime(folder / name)
            if name in state:
                write_caption(folder / name, state[name][1])
        report = models.cache(dataset_of(folder))
        clips_before = {clip for clip, _ in previous.values()}
        captions_before = {caption for _, caption in previous.values()} | (
            {""} if previous else set()
        )
        captions_now = {caption for _, caption in state.values()} | {""}
        clips_now = {clip for clip, _ in state.values()}
        assert summary(report) == (
            len(clips_now - clips_before),
            len(clips_now & clips_before),
            len(captions_now - captions_before),
            len(captions_now & captions_before),
            len(clips_before - clips_now) + len(captions_before - captions_now),
        )
        cached = load_cached_dataset(dataset_of(folder), models.settings(T2V))
        assert len(cached.items) == len(state)


def test_clips_of_varying_rate_are_named_unless_their_time_stamps_count(tmp_path):
    times = [n * 40 for n in range(5)] + [200 + n * 100 for n in range(20)]
    write_video(tmp_path / "vary.mkv", 25, times_ms=times)
    write_video(tmp_path / "even.mp4", 10)
    for name in ("vary.mkv", "even.mp4"):
        write_caption(tmp_path / name, "x")
    (note,) = Models().cache(dataset_of(tmp_path)).notes
    assert "the frame rate of 1 clips varies (vary.mkv)" in note
    assert 'source_fps = "auto"' in note
    assert Models().cache(dataset_of(tmp_path, source_fps="auto")).notes == ()
