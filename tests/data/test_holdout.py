"""Who is held out: by content, stable, and never nobody."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from trainer.contract.dataset_config import parse_dataset
from trainer.contract.variants import VARIANTS
from trainer.data.buckets import Bucket
from trainer.data.checks import DatasetCheck, check_dataset
from trainer.data.holdout import Holdout
from trainer.data.items import TrainingItem

CLIPS = [f"{number:032x}" for number in range(2000)]
contents = st.sets(st.text("0123456789abcdef", min_size=1, max_size=8), min_size=1)
shares = st.floats(0.01, 0.99)


def item(clip: str, source: int = 0, start: int = 0) -> TrainingItem:
    return TrainingItem(
        key=f"{source}/{clip}:{start}",
        name=clip,
        source=source,
        clip=clip,
        start=start,
        bucket=Bucket(32, 32, 5),
        latents=Path("x"),
        latents_key="k",
        context=Path("y"),
        context_key="c",
        num_repeats=1,
        batch_size=1,
    )


def held(clips: Iterable[str], share: float, seed: int = 42) -> frozenset[str]:
    return Holdout(first_source=1, share=share, seed=seed).clips(clips)


@given(contents, contents, shares)
def test_clips_that_come_or_go_move_no_other(clips: set[str], more: set[str], share: float) -> None:
    before, after = held(clips, share), held(clips | more, share)
    assert before
    joined = (after & clips) - before
    assert len(joined) <= (len(before) == len(clips) - 1), "it was left because all would be taken"
    if len(before) > 1:  # else the one may be there because none would be otherwise
        assert before <= after


@given(contents, shares, shares)
def test_a_larger_share_holds_out_more_of_the_same(clips: set[str], one: float, two: float) -> None:
    low, high = sorted((one, two))
    assert held(clips, low) <= held(clips, high)


def test_the_share_is_met_on_average_and_the_seed_chooses() -> None:
    assert 150 < len(held(CLIPS, 0.1)) < 250
    assert held(CLIPS, 0.1) != held(CLIPS, 0.1, seed=7)
    assert held(CLIPS, 0.0) == frozenset()
    assert len(held(CLIPS[:3], 1e-9)) == 1
    assert len(held(CLIPS[:3], 0.999)) == 2, "something is left to train on"
    assert held([], 0.5) == frozenset()


def test_all_windows_and_copies_of_a_clip_are_on_one_side() -> None:
    items = [
        item(clip, source, start) for clip in CLIPS[:20] for source in (0, 1) for start in (0, 4)
    ]
    training, validation = Holdout(first_source=2, share=0.3).split(items)
    assert not {i.clip for i in training} & {i.clip for i in validation}
    assert len(training) + len(validation) == len(items)
    assert len(validation) == 4 * len({i.clip for i in validation}) > 0


def test_sources_for_validation_are_so_as_a_whole_and_decide_nothing_for_the_others() -> None:
    own = [item(clip, source=1) for clip in CLIPS[:5]]
    dataset = [item(clip) for clip in CLIPS[5:9]]
    assert Holdout(first_source=1).split([*dataset, *own]) == (tuple(dataset), tuple(own))


def write_images(folder: Path, *colours: int) -> None:
    folder.mkdir()
    for colour in colours:
        Image.new("RGB", (32, 32), (colour, 0, 0)).save(folder / f"{colour}.png")
        (folder / f"{colour}.txt").write_text("red")


def checked(holdout: Holdout | None, *folders: Path) -> DatasetCheck:
    sources = [{"image_directory": folder, "batch_size": 2} for folder in folders]
    dataset = parse_dataset({"general": {"resolution": 32}, "sources": sources})
    return check_dataset(dataset, VARIANTS["wan2.1-t2v-1.3b"], holdout=holdout)


def test_a_check_counts_both_sides_and_clips_that_are_on_both(tmp_path: Path) -> None:
    write_images(tmp_path / "own", 1, 2, 3, 4, 5)
    write_images(tmp_path / "more", 5, 6)  # 5 is a copy
    folders = (tmp_path / "own", tmp_path / "more")

    all_of_it = checked(None, *folders)
    assert (all_of_it.clips, all_of_it.validation_clips, all_of_it.shared_clips) == (7, 0, 0)

    apart = checked(Holdout(first_source=1), *folders)
    assert (apart.clips, apart.validation_clips, apart.validation_items) == (5, 2, 2)
    assert apart.shared_clips == 1
    assert apart.batches_per_epoch == 3
    assert sum(row.items for row in apart.buckets) == 5

    split = checked(Holdout(first_source=2, share=0.5), *folders)
    assert split.clips + split.validation_clips == 7
    assert split.validation_clips > 0
    assert split.shared_clips == 0, "copies go together"
    assert sum(row.items for row in split.buckets) == split.clips
