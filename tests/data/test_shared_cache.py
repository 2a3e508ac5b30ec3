"""One cache folder, several configs: neither spoils what the other has."""

from __future__ import annotations

import json

import pytest
from data_clips import write_caption, write_video
from data_fakes import Models, dataset_of

from trainer.contract import files
from trainer.contract.dataset_config import parse_dataset
from trainer.contract.errors import DataError, ModelFileError
from trainer.data.cache_index import is_cached, read_index
from trainer.data.items import load_cached_dataset
from trainer.jobs.cache import CacheOptions

KEEP = CacheOptions(dtype="fp32", num_threads=1)


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    monkeypatch.setattr(files, "fsync", lambda path: None)


@pytest.fixture
def folders(tmp_path):
    for number, name in enumerate(("one", "two")):
        write_video(tmp_path / name / "a.mp4", 5, first_number=20 * number)
        write_caption(tmp_path / name / "a.mp4", f"clip {name}")
    return tmp_path


def sources_of(folder, *names, **keys):
    shared = {"resolution": [64, 32], "target_frames": [5], **keys}
    return parse_dataset(
        {"datasets": [{"video_directory": str(folder / name), **shared} for name in names]}
    )


def num_items(dataset, models):
    return len(load_cached_dataset(dataset, models.settings()).items)


def test_order_and_number_of_sources_do_not_count(folders):
    models = Models()
    models.cache(sources_of(folders, "one", "two"), options=KEEP)
    assert num_items(sources_of(folders, "two", "one"), models) == 2
    assert num_items(sources_of(folders, "two"), models) == 1
    assert models.cache(sources_of(folders, "two"), options=KEEP).encoded == 0
    assert num_items(sources_of(folders, "one", "two"), models) == 2


def test_check_and_train_agree_on_what_is_cached(folders):
    models = Models()
    models.cache(sources_of(folders, "one", "two"), options=KEEP)
    for dataset, cached in (
        (sources_of(folders, "two", "one"), True),
        (sources_of(folders, "two", resolution=[32, 32]), False),
    ):
        for source in dataset.sources:
            assert is_cached(source, models.settings()) is cached
        if cached:
            assert num_items(dataset, models) == 2
        else:
            with pytest.raises(DataError, match="resolution was"):
                num_items(dataset, models)


def test_two_sizes_live_beside_each_other(folders):
    models = Models()
    large, small = (dataset_of(folders / "one", resolution=size) for size in ([64, 32], [32, 32]))
    models.cache(large, options=KEEP)
    report = models.cache(small, options=KEEP)
    assert (report.encoded, report.removed.count, report.unneeded.count) == (1, 0, 1)
    assert num_items(large, models) == num_items(small, models) == 1
    assert models.cache(large, options=KEEP).encoded == 0


def test_prune_removes_what_this_config_does_not_need(folders):
    models = Models()
    large, small = (dataset_of(folders / "one", resolution=size) for size in ([64, 32], [32, 32]))
    models.cache(large, options=KEEP)
    (entry,) = (folders / "one/menma_cache").glob("*.latents.safetensors")
    num_bytes = entry.stat().st_size
    report = models.cache(small)  # prunes
    assert (report.removed.count, report.removed.num_bytes) == (1, num_bytes)
    assert report.unneeded.count == 0
    assert not entry.exists()
    assert num_items(small, models) == 1
    with pytest.raises(DataError, match="resolution was"):
        num_items(large, models)


def test_another_caption_extension_is_another_section(folders):
    models = Models()
    (folders / "one/a.long").write_text("a long caption")
    plain = dataset_of(folders / "one")
    long = dataset_of(folders / "one", caption_extension=".long")
    models.cache(plain, options=KEEP)
    assert models.cache(long, options=KEEP).captions_encoded == 1
    assert num_items(plain, models) == num_items(long, models) == 1


def test_an_encoder_that_cannot_be_loaded_leaves_the_index_as_it_is(folders):
    models = Models()
    dataset = dataset_of(folders / "one")
    models.cache(dataset)
    index = folders / "one/menma_cache/cache_index.json"
    before = index.read_bytes()

    def refuse(name, model):
        raise ModelFileError(f"not a {name} encoder")

    models._load = refuse
    models.text_identity = "text-2"
    with pytest.raises(ModelFileError):
        models.cache(dataset, options=KEEP)
    models.text_identity = "text-1"
    models.vae_identity = "vae-2"
    with pytest.raises(ModelFileError):
        models.cache(dataset, options=KEEP)
    models.vae_identity = "vae-1"
    write_video(folders / "one/new.mp4", 5, first_number=70)
    write_caption(folders / "one/new.mp4", "clip one")
    with pytest.raises(ModelFileError):
        models.cache(dataset, options=KEEP)
    assert index.read_bytes() == before


def test_an_index_of_the_old_kind_is_written_anew_without_encoding(folders):
    models = Models()
    dataset = dataset_of(folders / "one")
    models.cache(dataset)
    index = folders / "one/menma_cache/cache_index.json"
    content = json.loads(index.read_text())
    (section,) = content["sections"].values()
    index.write_text(json.dumps({"format": "1", "sections": {"video .. #0": section}}))
    with pytest.raises(DataError, match="not cached yet"):
        num_items(dataset, models)
    models.loaded.clear()
    assert models.cache(dataset, options=KEEP).encoded == 0
    assert models.loaded == []
    assert num_items(dataset, models) == 1
    assert all(section.finished for section in read_index(index.parent).values())


def test_validation_clips_do_not_stand_in_for_training_clips(folders):
    (folders / "empty").mkdir()
    models = Models()
    for names, of in ((("empty", "one"), "the dataset"), (("one", "empty"), "validation.sources")):
        with pytest.raises(DataError, match=f"no clip of {of} can be used"):
            models.cache(sources_of(folders, *names), num_training=1)
    assert models.loaded == []
