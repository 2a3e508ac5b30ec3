"""Control videos and masks: found by name, cut as the clip, cached, and given to the batch."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from data_clips import numbered_frame, write_caption, write_images, write_video
from data_fakes import FakeVAE, Models, dataset_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from trainer.contract.dataset_config import parse_dataset
from trainer.contract.errors import ConfigError, DataError
from trainer.contract.variants import VARIANTS
from trainer.data.checks import check_dataset
from trainer.data.items import load_cached_dataset
from trainer.data.loader import load_batch
from trainer.data.masks import latent_mask
from trainer.data.media import to_video
from trainer.data.order import BatchOrder
from trainer.data.resize import resize_cover
from trainer.jobs.cache import CacheOptions

CONTROL = VARIANTS["wan2.1-fun-control-1.3b"]
T2V = VARIANTS["wan2.1-t2v-1.3b"]


def batch_of(dataset, models, variant=T2V):
    models.cache(dataset, variant=variant)
    cached = load_cached_dataset(dataset, models.settings(variant))
    order = BatchOrder(cached.items, 0)
    (batch,) = (load_batch(order.batch(n)) for n in range(order.batches_per_epoch))
    return batch


def write_clip(folder, name="a", frames=6, **keys):
    write_images(folder / name, frames, **keys)
    write_caption(folder / name, "text")


def numbered(first, count, size=(64, 32)):
    """Frames of `write_video(first_number=first)` at another size, as video in [-1, 1]."""
    frames = [resize_cover(numbered_frame(first + n), *size) for n in range(count)]
    return to_video(torch.from_numpy(np.stack(frames)))[None]


# Control ----------------------------------------------------------------------------------------


@pytest.fixture
def controlled(tmp_path):
    write_clip(tmp_path / "clips")
    write_images(tmp_path / "control" / "a", 6)
    for number in range(6):  # other numbers than the clip shows
        image = numbered_frame(40 + number)
        Image.fromarray(image).save(tmp_path / "control" / "a" / f"frame_{number}.png")
    return tmp_path


@pytest.mark.parametrize("first", [False, True])
def test_control_videos_become_channels(controlled, first):
    models = Models()
    dataset = dataset_of(
        controlled / "clips",
        control_directory=str(controlled / "control"),
        control_first_frame=first,
    )
    batch = batch_of(dataset, models, CONTROL)
    vae = FakeVAE()
    assert torch.allclose(batch.latents_BCFHW, vae.encode(numbered(0, 5)), atol=0.02)
    control, image = batch.extra_channels_BCFHW.split(16, dim=1)
    assert torch.allclose(control, vae.encode(numbered(40, 5)), atol=0.02)
    if first:
        assert torch.allclose(image[:, :, :1], vae.encode(numbered(0, 1)), atol=0.02)
        assert not image[:, :, 1:].any()
        assert batch.image_context_BTD.any()
    else:
        assert not image.any()
        assert not batch.image_context_BTD.any()


def test_windows_of_clip_and_control_are_the_same_frames(controlled):
    dataset = dataset_of(
        controlled / "clips",
        control_directory=str(controlled / "control"),
        frame_extraction="slide",
        batch_size=2,
    )
    batch = batch_of(dataset, Models(), CONTROL)
    vae = FakeVAE()
    for latents, extra, name in zip(
        batch.latents_BCFHW, batch.extra_channels_BCFHW, batch.names, strict=True
    ):
        start = int(name.rpartition("[")[2].partition(":")[0])
        assert torch.allclose(latents, vae.encode(numbered(start, 5))[0], atol=0.02)
        assert torch.allclose(extra[:16], vae.encode(numbered(40 + start, 5))[0], atol=0.02)


def problems(dataset, variant=CONTROL):
    """What check and caching say is wrong; they must agree."""
    checked = [problem.message for problem in check_dataset(dataset, variant).problems]
    with pytest.raises(DataError) as caught:
        Models().cache(dataset, variant=variant)
    assert all(message in str(caught.value) for message in checked)
    return "\n".join(checked)


def test_what_does_not_fit_a_clip_is_told_by_check_and_cache(controlled):
    clips, control = controlled / "clips", controlled / "control"
    assert "has no control video, which this model" in problems(dataset_of(clips))
    given = {"control_directory": str(control)}
    assert "this model is not conditioned" in problems(dataset_of(clips, **given), T2V)
    shutil.copytree(control / "a", control / "b")
    (control / "a").rename(control / "c")
    assert "there is no a.*" in problems(dataset_of(clips, **given))
    write_images(control / "a", 6, size=(64, 64))
    assert "another aspect ratio: 64x64" in problems(dataset_of(clips, **given))
    shutil.rmtree(control / "a")
    (control / "a.mp4").write_bytes(b"nothing")
    assert "its control video a.mp4 is damaged" in problems(dataset_of(clips, **given))
    write_video(control / "a.mp4", 3)
    assert "is too short: it has 3 frames" in problems(dataset_of(clips, **given))
    write_images(control / "a", 6)
    assert "has 2 control videos: a and a.mp4" in problems(dataset_of(clips, **given))
    gone = {"control_directory": str(controlled / "none")}
    assert "the folder of control videos cannot be read" in problems(dataset_of(clips, **gone))


def test_a_changed_control_video_is_noticed_and_encoded_again(controlled):
    dataset = dataset_of(
        controlled / "clips", control_directory=str(controlled / "control"), frame_stride=1
    )
    models = Models()
    assert models.cache(dataset, variant=CONTROL).encoded == 1
    assert models.cache(dataset, variant=CONTROL).reused == 1
    Image.fromarray(numbered_frame(99)).save(controlled / "control" / "a" / "frame_0.png")
    with pytest.raises(DataError, match="the control video of a: has changed"):
        load_cached_dataset(dataset, models.settings(CONTROL))
    report = models.cache(dataset, variant=CONTROL)
    assert (report.encoded, report.removed.count) == (1, 1)
    load_cached_dataset(dataset, models.settings(CONTROL))


def test_lists_name_control_videos_and_masks_in_their_lines(controlled):
    Image.new("L", (128, 64), 255).save(controlled / "white.png")
    line = {"video_path": "clips/a", "caption": "x", "control_path": "control/a"}
    file = controlled / "list.jsonl"
    file.write_text(json.dumps(line | {"mask_path": "white.png"}))
    source = {
        "video_jsonl_file": str(file),
        "cache_directory": str(controlled / "cache"),
        "resolution": [64, 32],
        "target_frames": [5],
    }
    batch = batch_of(parse_dataset({"datasets": [source]}), Models(), CONTROL)
    assert batch.extra_channels_BCFHW.shape == (1, 32, 2, 4, 8)
    assert torch.equal(batch.mask_B1FHW, torch.ones(1, 1, 2, 4, 8))
    alpha = parse_dataset({"datasets": [source | {"alpha_mask": True}]})
    assert "alpha_mask takes its transparency instead" in problems(alpha)
    file.write_text(json.dumps(line | {"mask_path": 3}))
    assert "3 is no path" in problems(parse_dataset({"datasets": [source]}))
    with pytest.raises(ConfigError, match="a list has control_path in its lines"):
        parse_dataset({"datasets": [source | {"control_directory": "x"}]})


# Masks ------------------------------------------------------------------------------------------


@given(st.integers(0, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**31))
def test_the_mask_of_a_latent_is_the_mean_of_what_it_stands_for(n, rows, columns, seed):
    frames = 4 * n + 1
    random = np.random.default_rng(seed)
    mask = random.random((frames, 8 * rows, 8 * columns)).astype(np.float32)
    result = latent_mask(torch.from_numpy(mask), (4, 8, 8)).numpy()
    assert result.shape == (1, n + 1, rows, columns)
    for f in range(n + 1):
        of = slice(0, 1) if f == 0 else slice(4 * f - 3, 4 * f + 1)
        for r in range(rows):
            for c in range(columns):
                cells = mask[of, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8]
                assert abs(result[0, f, r, c] - cells.astype(np.float64).mean()) < 1e-6


def test_masks_of_a_video_move_with_it_and_a_still_one_holds_for_all(tmp_path):
    write_clip(tmp_path / "clips", frames=9)
    (tmp_path / "masks" / "a").mkdir(parents=True)
    for number in range(9):  # a white left half in the first five frames, then all black
        mask = np.zeros((64, 128), np.uint8)
        mask[:, :64] = 255 if number < 5 else 0
        Image.fromarray(mask).save(tmp_path / "masks" / "a" / f"{number}.png")
    dataset = dataset_of(
        tmp_path / "clips", target_frames=[9], mask_directory=str(tmp_path / "masks")
    )
    mask = batch_of(dataset, Models()).mask_B1FHW
    expected = torch.zeros(1, 1, 3, 4, 8)
    expected[:, :, :2, :, :4] = 1
    assert torch.allclose(mask, expected, atol=1e-6)
    shutil.rmtree(tmp_path / "masks" / "a")
    still = np.zeros((64, 128), np.uint8)
    still[32:] = 255
    Image.fromarray(still).save(tmp_path / "masks" / "a.png")
    expected = torch.zeros(1, 1, 3, 4, 8)
    expected[:, :, :, 2:] = 1
    assert torch.allclose(batch_of(dataset, Models()).mask_B1FHW, expected, atol=1e-6)


def test_masks_are_cropped_as_their_images(tmp_path):
    """A square crop of a wide image: only the white middle is left."""
    (tmp_path / "masks").mkdir()
    mask = np.zeros((64, 128), np.uint8)
    mask[:, 32:96] = 255
    Image.fromarray(mask).save(tmp_path / "masks" / "a.png")
    Image.fromarray(numbered_frame(5)).save(tmp_path / "a.png")
    write_caption(tmp_path / "a.png", "text")
    source = {
        "image_directory": str(tmp_path),
        "resolution": [32, 32],
        "mask_directory": str(tmp_path / "masks"),
    }
    batch = batch_of(parse_dataset({"datasets": [source]}), Models())
    assert torch.allclose(batch.mask_B1FHW, torch.ones(1, 1, 1, 4, 4))


def test_transparency_is_a_mask_when_asked_for(tmp_path):
    rgba = np.dstack([numbered_frame(3), np.zeros((64, 128), np.uint8)])
    rgba[:, 64:, 3] = 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    Image.fromarray(numbered_frame(3)).save(tmp_path / "b.png")  # opaque
    for name in "ab":
        write_caption(tmp_path / f"{name}.png", "text")
    source = {"image_directory": str(tmp_path), "resolution": [64, 32], "batch_size": 2}
    batch = batch_of(parse_dataset({"datasets": [source]}), Models())
    assert batch.mask_B1FHW is None
    dataset = parse_dataset({"datasets": [source | {"alpha_mask": True}]})
    batch = batch_of(dataset, Models())
    half = torch.zeros(1, 1, 4, 8)
    half[..., 4:] = 1
    masks = dict(zip((name[-5] for name in batch.names), batch.mask_B1FHW, strict=True))
    assert torch.allclose(masks["a"], half)
    assert torch.equal(masks["b"], torch.ones(1, 1, 4, 8))
    assert all(item.has_mask for item in load_cached_dataset(dataset, Models().settings()).items)


def test_alpha_masks_are_for_images(tmp_path):
    write_video(tmp_path / "a.mp4", 6)
    write_caption(tmp_path / "a.mp4", "text")
    dataset = dataset_of(tmp_path, alpha_mask=True)
    assert "alpha_mask is for images" in problems(dataset, T2V)
    with pytest.raises(ConfigError, match="exclude each other"):
        dataset_of(tmp_path, alpha_mask=True, mask_directory="masks")


def test_new_and_changed_masks_are_noticed(tmp_path):
    write_clip(tmp_path / "clips")
    (tmp_path / "masks").mkdir()
    Image.new("L", (128, 64), 255).save(tmp_path / "masks" / "a.png")
    plain = dataset_of(tmp_path / "clips")
    masked = dataset_of(tmp_path / "clips", mask_directory=str(tmp_path / "masks"))
    models, both = Models(), CacheOptions(dtype="fp32")
    models.cache(plain)
    with pytest.raises(DataError, match="masks was None and is files"):
        load_cached_dataset(masked, models.settings())
    models.cache(masked, options=both)
    assert load_cached_dataset(masked, models.settings()).items[0].has_mask
    assert not load_cached_dataset(plain, models.settings()).items[0].has_mask
    Image.new("L", (128, 64), 0).save(tmp_path / "masks" / "a.png")
    with pytest.raises(DataError, match="the mask of a: has changed"):
        load_cached_dataset(masked, models.settings())


def test_paths_of_masks_and_control_videos_are_looked_up_like_the_media(tmp_path):
    values = {"datasets": [{"video_directory": "clips", "mask_directory": "masks"}]}
    (tmp_path / "clips").mkdir()
    source = parse_dataset(values, folder=tmp_path).sources[0]
    assert source.mask_directory == tmp_path / "masks"


# Weights ----------------------------------------------------------------------------------------


def test_the_weight_of_a_source_reaches_its_batches(tmp_path):
    write_clip(tmp_path / "clips")
    assert batch_of(dataset_of(tmp_path / "clips"), Models()).loss_weight_B is None
    batch = batch_of(dataset_of(tmp_path / "clips", loss_weight=0.25), Models())
    assert batch.loss_weight_B.tolist() == [0.25]
    with pytest.raises(ConfigError, match="loss_weight"):
        dataset_of(tmp_path / "clips", loss_weight=0)
