from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.contract.dataset_config import SharedOptions, SourceOptions
from trainer.contract.errors import DataError
from trainer.contract.variants import VARIANTS
from trainer.data.buckets import Bucket, bucket_sizes, choose_size, num_tokens
from trainer.data.windows import Window, choose_windows, round_down_frames, shortest_window

sides = st.integers(64, 2048)
steps = st.sampled_from([16, 32])


def options(width, height, **more):
    return SharedOptions(resolution=(width, height), enable_bucket=True, **more)


@given(sides, sides, steps)
def test_buckets_keep_the_area_and_come_in_pairs(width, height, step):
    sizes = bucket_sizes((width, height), step)
    root = math.isqrt(width * height)
    assert list(sizes) == sorted(set(sizes))
    for size in sizes:
        assert size[0] % step == size[1] % step == 0
        assert min(size) >= step
        assert size[::-1] in sizes
        # One side is rounded down to the step, the other lies on it.
        assert (min(size) + step) * (max(size) + step) > width * height
        assert min(size) * max(size) <= width * height
        assert min(size) >= min((root // 2) // step * step or step, root // step * step)


def test_the_table_of_a_known_resolution():
    # Counted by hand from the rule: 512 x 512, sides from 256 to 512 in steps of 16.
    sizes = bucket_sizes((512, 512), 16)
    upright = [(side, 512 * 512 // side // 16 * 16) for side in range(256, 513, 16)]
    assert set(sizes) == set(upright) | {size[::-1] for size in upright}
    assert len(sizes) == 2 * 17 - 1


@given(sides, sides, st.integers(16, 8000), st.integers(16, 8000), steps)
def test_an_item_goes_to_the_nearest_aspect_ratio(width, height, item_width, item_height, step):
    size = choose_size(item_width, item_height, options(width, height), step)
    ratio = item_width / item_height
    best = min(abs(w / h - ratio) for w, h in bucket_sizes((width, height), step))
    assert abs(size[0] / size[1] - ratio) == best


@given(sides, sides, st.integers(32, 4000), st.integers(32, 4000), steps)
def test_without_upscale_small_items_keep_their_size(width, height, item_width, item_height, step):
    given_options = options(width, height, bucket_no_upscale=True)
    size = choose_size(item_width, item_height, given_options, step)
    if item_width * item_height <= width * height:
        assert size == (item_width // step * step, item_height // step * step)
    else:
        assert size == choose_size(item_width, item_height, options(width, height), step)


def test_without_buckets_there_is_one_size():
    plain = SharedOptions(resolution=(854, 480))
    assert choose_size(100, 900, plain, 16) == (848, 480)
    assert choose_size(900, 100, plain, 32) == (832, 480)


def test_what_is_too_small_is_refused():
    with pytest.raises(DataError, match="20x10"):
        choose_size(20, 10, options(64, 64, bucket_no_upscale=True), 16)
    with pytest.raises(DataError, match="too small"):
        choose_size(640, 480, SharedOptions(resolution=(16, 64)), 32)
    with pytest.raises(DataError, match="too small"):
        bucket_sizes((16, 16), 32)


def test_tokens_of_the_known_sizes():
    wan21, wan22 = VARIANTS["wan2.1-t2v-14b"], VARIANTS["wan2.2-ti2v-5b"]

    def tokens(variant, *bucket):
        return num_tokens(Bucket(*bucket), variant.vae_stride, variant.transformer.patch_size)

    assert tokens(wan21, 832, 480, 81) == 32_760
    assert tokens(wan21, 1280, 720, 81) == 75_600
    assert tokens(wan21, 832, 480, 1) == 1_560
    assert tokens(wan22, 1280, 704, 121) == 31 * 22 * 40


# Windows ---------------------------------------------------------------------------------------


def video(**keys):
    return SourceOptions(video_directory="x", **keys)


sources = st.builds(
    video,
    frame_extraction=st.sampled_from(
        ["head", "middle", "chunk", "slide", "overlapping", "uniform", "random", "adaptive", "full"]
    ),
    target_frames=st.lists(st.integers(5, 90), min_size=1, max_size=4),
    frame_stride=st.integers(1, 12),
    frame_sample=st.integers(2, 12),
    frame_overlap=st.integers(0, 4),
    max_frames=st.integers(1, 150),
)


@given(st.integers(0, 300), sources)
def test_windows_are_whole_unique_and_inside_the_clip(clip_frames, source):
    windows = choose_windows(clip_frames, source)
    assert len(windows) == len(set(windows))
    for start, num_frames in windows:
        assert num_frames % 4 == 1
        assert start >= 0
        assert start + num_frames <= clip_frames
        if source.frame_extraction == "adaptive":
            assert num_frames <= max(source.target_frames)
        elif source.frame_extraction != "full":
            assert any(0 <= target - num_frames < 4 for target in source.target_frames)
    assert bool(windows) == (clip_frames >= shortest_window(source))


@given(st.integers(1, 300), sources)
def test_every_target_that_fits_is_used(clip_frames, source):
    if source.frame_extraction == "full":
        expected = [round_down_frames(min(clip_frames, source.max_frames))]
    elif source.frame_extraction == "adaptive":
        fits = clip_frames >= shortest_window(source)
        longest = round_down_frames(max(source.target_frames))
        expected = [min(round_down_frames(clip_frames), longest)] if fits else []
    else:
        rounded = {(target - 1) // 4 * 4 + 1 for target in source.target_frames}
        expected = sorted(length for length in rounded if length <= clip_frames)
    assert sorted({window.num_frames for window in choose_windows(clip_frames, source)}) == expected


@pytest.mark.parametrize(
    ("keys", "clip_frames", "expected"),
    [
        ({"target_frames": [17]}, 40, [(0, 17)]),
        ({"target_frames": [20]}, 40, [(0, 17)]),
        ({"target_frames": [1, 25, 45]}, 40, [(0, 1), (0, 25)]),
        ({"target_frames": [17], "frame_extraction": "chunk"}, 51, [(0, 17), (17, 17), (34, 17)]),
        ({"target_frames": [17], "frame_extraction": "chunk"}, 50, [(0, 17), (17, 17)]),
        (
            {"target_frames": [17], "frame_extraction": "slide", "frame_stride": 10},
            38,
            [(0, 17), (10, 17), (20, 17)],
        ),
        (
            {"target_frames": [17], "frame_extraction": "uniform", "frame_sample": 3},
            60,
            [(0, 17), (21, 17), (43, 17)],
        ),
        ({"target_frames": [17], "frame_extraction": "uniform"}, 60, [(0, 17)]),
        (
            {"target_frames": [17], "frame_extraction": "uniform", "frame_sample": 9},
            19,
            [(0, 17), (1, 17), (2, 17)],
        ),
        ({"frame_extraction": "full"}, 60, [(0, 57)]),
        ({"frame_extraction": "full"}, 500, [(0, 129)]),
        ({"frame_extraction": "full", "max_frames": 20}, 500, [(0, 17)]),
        ({"frame_extraction": "full"}, 3, [(0, 1)]),
        ({"target_frames": [17]}, 16, []),
        ({"target_frames": [17], "frame_extraction": "middle"}, 40, [(11, 17)]),
        ({"target_frames": [5, 17], "frame_extraction": "adaptive"}, 16, [(1, 13)]),
        ({"target_frames": [5, 17], "frame_extraction": "adaptive"}, 40, [(11, 17)]),
        ({"target_frames": [5, 17], "frame_extraction": "adaptive"}, 4, []),
        (
            {"target_frames": [17], "frame_extraction": "overlapping", "frame_overlap": 5},
            40,
            [(0, 17), (11, 17), (23, 17)],
        ),
        ({"target_frames": [17], "frame_extraction": "overlapping"}, 17, [(0, 17)]),
        (
            {"target_frames": [17], "frame_extraction": "random", "frame_sample": 3},
            60,
            [(0, 17), (21, 17), (43, 17)],
        ),
    ],
)
def test_windows_of_known_clips(keys, clip_frames, expected):
    assert choose_windows(clip_frames, video(**keys)) == [Window(*window) for window in expected]


@given(st.integers(17, 400), st.integers(2, 20))
def test_uniform_windows_reach_from_the_first_to_the_last_frame(clip_frames, samples):
    source = video(target_frames=[17], frame_extraction="uniform", frame_sample=samples)
    starts = [window.start for window in choose_windows(clip_frames, source)]
    assert starts[0] == 0
    assert starts[-1] == clip_frames - 17
    gaps = [after - before for before, after in itertools.pairwise(starts)]
    assert len(starts) == min(samples, clip_frames - 16)
    assert not gaps or max(gaps) - min(gaps) <= 1


@given(st.integers(5, 200), st.sampled_from([5, 17, 33]), st.integers(0, 32))
def test_overlapping_windows_hold_every_frame_and_are_as_few_as_can_be(clip_frames, target, shared):
    shared = min(shared, target - 1)
    keys = {"frame_extraction": "overlapping", "frame_overlap": shared}
    windows = choose_windows(clip_frames, video(target_frames=[target], **keys))
    if clip_frames < target:
        assert not windows
        return
    assert {frame for window in windows for frame in window.frames} == set(range(clip_frames))
    for before, after in itertools.pairwise(windows):
        assert before.start + target - after.start >= shared
    fewer = len(windows) - 1
    assert fewer * target - (fewer - 1) * shared < clip_frames


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"frame_extraction": "overlapping", "target_frames": [5], "frame_overlap": 5}, "overlap"),
        ({"frame_extraction": "random", "target_frames": [5]}, "frame_sample"),
    ],
)
def test_policies_refuse_what_they_cannot_do(keys, word):
    with pytest.raises(ValueError, match=word):
        video(**keys)
