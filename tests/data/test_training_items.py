from __future__ import annotations

import os
from itertools import islice

import pytest
import torch
from data_clips import write_caption, write_video
from data_fakes import FakeTextEncoder, Models, dataset_of

from trainer.contract import files
from trainer.contract.dataset_config import parse_dataset
from trainer.contract.errors import DataError, ModelFileError
from trainer.contract.variants import VARIANTS
from trainer.core.types import Batch
from trainer.data.cache_settings import CacheSettings
from trainer.data.fingerprint import model_identity
from trainer.data.items import load_cached_dataset
from trainer.data.loader import BatchLoader, TrainingSteps, load_batch, load_text
from trainer.data.order import BatchOrder
from trainer.jobs.cache import CacheOptions


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """A folder of three clips, cached; tests must not change it."""
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder)
    Models().cache(dataset_of(folder))
    return folder


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The same, to be changed."""
    monkeypatch.setattr(files, "fsync", lambda path: None)
    write_clips(tmp_path)
    Models().cache(dataset_of(tmp_path))
    return tmp_path


def write_clips(folder):
    for number, name in enumerate("abc"):
        write_video(folder / f"{name}.mp4", 10, first_number=20 * number)
        write_caption(folder / f"{name}.mp4", f"clip {name * (number + 1)}")


def load(folder, **keys):
    return load_cached_dataset(dataset_of(folder, **keys), Models().settings(), config="my.toml")


def stale(folder, match, **keys):
    with pytest.raises(DataError, match=match) as caught:
        load(folder, **keys)
    assert "menma cache my.toml" in caught.value.hint
    assert caught.value.exit_code == 2


def test_missing_cache_names_the_command(tmp_path):
    write_video(tmp_path / "a.mp4", 10)
    stale(tmp_path, "not cached yet")


def test_a_new_clip_is_noticed(own):
    write_video(own / "new.mp4", 10)
    write_caption(own / "new.mp4", "x")
    stale(own, r"new\.mp4: is new")


def test_a_removed_clip_is_noticed(own):
    (own / "b.mp4").unlink()
    stale(own, r"b\.mp4.*gone")


def test_a_changed_clip_is_noticed_and_a_touched_one_is_none(own):
    os.utime(own / "b.mp4")
    load(own)
    write_video(own / "b.mp4", 10, first_number=99)
    stale(own, r"b\.mp4: has changed")


def test_a_changed_caption_is_noticed(own):
    write_caption(own / "b.mp4", "x")
    stale(own, r"b\.mp4: its caption has changed")


def test_a_repaired_clip_is_noticed(own):
    (own / "d.mp4").write_bytes(b"broken")
    write_caption(own / "d.mp4", "x")
    Models().cache(dataset_of(own))
    assert len(load(own).items) == 3
    write_video(own / "d.mp4", 10)
    stale(own, r"d\.mp4: could not be used, and has changed")


def test_a_lost_entry_is_noticed(own):
    load(own).items[1].context.unlink()
    stale(own, r"b\.mp4.*is gone")


def test_all_that_changed_is_listed_at_once(own):
    for name in "abc":
        write_caption(own / f"{name}.mp4", "x")
    with pytest.raises(DataError) as caught:
        load(own)
    assert all(f"{name}.mp4" in caught.value.message for name in "abc")


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"resolution": [32, 32]}, r"resolution was \[64, 32\] and is \[32, 32\]"),
        ({"target_frames": [9]}, "target_frames"),
        ({"source_fps": 30.0}, "source_fps was None and is 30.0"),
    ],
)
def test_changed_keys_are_named(cached, keys, match):
    stale(cached, match, **keys)


def test_another_model_or_precision_is_named(cached):
    for change, match in (
        ({"vae": "vae-2"}, "vae was vae-1 and is vae-2"),
        ({"text_encoder": "text-2"}, "text_encoder"),
        ({"dtype": "bf16"}, "dtype was fp32 and is bf16"),
    ):
        known = {"vae": "vae-1", "text_encoder": "text-1", "dtype": "fp32"} | change
        settings = CacheSettings.of(VARIANTS["wan2.1-t2v-1.3b"], **known)
        with pytest.raises(DataError, match=match):
            load_cached_dataset(dataset_of(cached), settings)
    i2v = Models().settings(VARIANTS["wan2.2-i2v-a14b"])
    with pytest.raises(DataError, match="conditioning was none and is first_frame"):
        load_cached_dataset(dataset_of(cached), i2v)


def test_models_that_the_run_does_not_name_are_not_compared(cached):
    variant = VARIANTS["wan2.2-t2v-a14b"]  # same shapes, same rate: the same cache serves it
    settings = CacheSettings.of(variant, vae=None, text_encoder=None, dtype="fp32")
    assert len(load_cached_dataset(dataset_of(cached), settings).items) == 3


def test_repeats_and_batch_size_come_from_the_config_not_the_cache(cached):
    items = load(cached, num_repeats=5, batch_size=2).items
    assert {(item.num_repeats, item.batch_size) for item in items} == {(5, 2)}


def test_the_fingerprint_follows_clips_and_captions(own):
    before = load(own).fingerprint
    assert load(own).fingerprint == before
    write_caption(own / "b.mp4", "x")
    Models().cache(dataset_of(own))
    assert load(own).fingerprint != before


def test_identity_of_weights(tmp_path):
    file = tmp_path / "vae.safetensors"
    file.write_bytes(bytes(5 << 20))
    before = model_identity(file)
    assert model_identity(file) == before
    for position in (0, (5 << 20) - 1):
        content = bytearray(5 << 20)
        content[position] = 1
        file.write_bytes(content)
        assert model_identity(file) != before
    folder = tmp_path / "shards"
    folder.mkdir()
    with pytest.raises(ModelFileError):
        model_identity(folder)
    (folder / "1.safetensors").write_bytes(b"1")
    one = model_identity(folder)
    (folder / "2.safetensors").write_bytes(b"2")
    assert model_identity(folder) != one
    with pytest.raises(ModelFileError):
        model_identity(tmp_path / "none")


# Loading ---------------------------------------------------------------------------------------


def same(one: Batch, two: Batch) -> bool:
    return (
        torch.equal(one.latents_BCFHW, two.latents_BCFHW)
        and all(torch.equal(a, b) for a, b in zip(one.context, two.context, strict=True))
        and (one.names, one.item_seeds) == (two.names, two.item_seeds)
    )


def test_a_batch_is_what_the_order_says(cached):
    order = BatchOrder(load(cached, batch_size=2, num_repeats=2).items, seed=1)
    for position in range(order.batches_per_epoch):
        draws = order.batch(position)
        batch = load_batch(draws)
        assert batch.latents_BCFHW.shape == (len(draws), 16, 2, 4, 8)
        assert batch.latents_BCFHW.dtype == torch.float32
        assert batch.names == tuple(draw.item.name for draw in draws)
        assert batch.item_seeds == tuple(draw.seed for draw in draws)
        for context, name in zip(batch.context, batch.names, strict=True):
            letter = name.rpartition("/")[2][0]
            caption = f"clip {letter * ('abc'.index(letter) + 1)}"
            assert torch.equal(context, FakeTextEncoder.context(caption))


def test_bf16_caches_load_as_float32(own):
    Models().cache(dataset_of(own), options=CacheOptions())
    settings = CacheSettings.of(VARIANTS["wan2.1-t2v-1.3b"], vae="vae-1", text_encoder="text-1")
    cached = load_cached_dataset(dataset_of(own), settings)
    batch = load_batch(BatchOrder(cached.items, 0).batch(0))
    assert batch.latents_BCFHW.dtype == batch.context[0].dtype == torch.float32
    assert load_text(cached, "").dtype == torch.float32


def test_image_to_video_batches_carry_their_conditioning(own):
    variant = VARIANTS["wan2.1-i2v-14b"]
    models = Models()
    models.cache(dataset_of(own), variant=variant)
    items = load_cached_dataset(dataset_of(own, batch_size=3), models.settings(variant)).items
    batch = load_batch(BatchOrder(items, 0).batch(0))
    assert batch.extra_channels_BCFHW.shape == (3, 20, 2, 4, 8)
    assert batch.image_context_BTD.shape == (3, 257, 4)


def test_the_empty_caption_is_there(cached):
    assert torch.equal(load_text(load(cached), ""), FakeTextEncoder.context(""))


@pytest.mark.parametrize(("world_size", "start"), [(1, 0), (2, 3), (3, 1)])
def test_the_loader_gives_each_rank_its_part(cached, world_size, start):
    order = BatchOrder(load(cached, num_repeats=2).items, seed=1)
    for rank in range(world_size):
        with BatchLoader(order, rank=rank, world_size=world_size, start=start) as loader:
            for number, batch in enumerate(islice(loader, 8)):
                position = (start + number) * world_size + rank
                assert same(batch, load_batch(order.batch(position)))


def test_errors_while_reading_come_out_in_their_turn(own):
    order = BatchOrder(load(own).items, seed=1)
    third = order.batch(2)[0].item.latents
    third.unlink()
    with BatchLoader(order, prefetch=4) as loader:
        next(loader)
        next(loader)
        with pytest.raises(DataError, match="menma cache"):
            next(loader)
        with pytest.raises(StopIteration):
            next(loader)


def test_an_entry_of_something_else_is_refused(own):
    first, second = BatchOrder(load(own).items, seed=1), load(own).items[1]
    draw = next(d for n in range(3) for d in first.batch(n) if d.item.name != second.name)
    draw.item.latents.write_bytes(second.latents.read_bytes())
    with pytest.raises(DataError, match="something else"):
        load_batch([draw])


def test_closing_ends_the_thread(cached):
    loader = BatchLoader(BatchOrder(load(cached).items, seed=1), prefetch=1)
    next(loader)
    loader.close()
    assert not loader._thread.is_alive()
    with pytest.raises(StopIteration):
        next(loader)


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_steps_resume_into_the_same_microbatches(cached, accumulation):
    order = BatchOrder(load(cached).items, seed=1)

    def steps(world_size, rank, at):
        data = TrainingSteps(
            order,
            rank=rank,
            world_size=world_size,
            gradient_accumulation_steps=accumulation,
        )
        return data.starting_at(at)

    straight = list(islice(steps(1, 0, 0), 5))
    assert all(len(step) == accumulation for step in straight)
    resumed = list(islice(steps(1, 0, 2), 3))
    for one, two in zip(straight[2:], resumed, strict=True):
        assert all(same(a, b) for a, b in zip(one, two, strict=True))
    # Two ranks of half the accumulation make the same step out of the same items.
    if accumulation == 2:
        halves = TrainingSteps(order, rank=1, world_size=2).starting_at(2)
        assert same(next(halves)[0], straight[2][1])


def test_epochs_in_steps(cached):
    order = BatchOrder(load(cached, num_repeats=3).items, seed=1)  # 9 batches
    data = TrainingSteps(order, world_size=2, gradient_accumulation_steps=2)
    assert data.steps_for_epochs(1) == 3
    assert data.steps_for_epochs(4) == 9
    assert data.epoch_after(9) == 4.0


def test_sources_keep_their_own_batch_size(cached):
    source = {"video_directory": str(cached), "resolution": [64, 32], "target_frames": [5]}
    dataset = parse_dataset({"datasets": [source | {"batch_size": 3}]})
    order = BatchOrder(load_cached_dataset(dataset, Models().settings()).items, 0)
    assert order.batches_per_epoch == 1
    assert order.largest_batch == 3
