"""What the jobs on datasets say, on real clips: the report, the preview, cached latents."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from data_clips import read_number, write_caption
from data_fakes import Models
from data_project import write_project
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from app.domain.data_report import parse_report
from trainer.contract.config_io import load_config
from trainer.contract.errors import ConfigError, DataError
from trainer.contract.jobs import DataCheckRequest, DataLatentsRequest, DataPreviewRequest
from trainer.data.latent_report import figures_of, latent_report
from trainer.jobs import data_check, data_latents, data_preview
from trainer.models.wan.tiny import tiny_tokenizer, write_tiny_text_encoder

LIMIT = 512


class Told(list[dict[str, Any]]):
    """The events of a job."""

    def __call__(self, kind: str, /, **fields: Any) -> None:
        self.append({"type": kind, **fields})


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path)
    return Path("tiny.toml")


def check(config: Path, *overrides: str, decode: bool = False) -> dict[str, Any]:
    """Run the job; return its report."""
    file = Path("report.json")
    told = Told()
    request = DataCheckRequest(config=config, set=overrides, output=file, decode=decode)
    data_check.run(request, told)
    report = json.loads(file.read_text())
    assert told[-1] == {"type": "end", "reason": "done", "ok": report["ok"], **report["counts"]}
    assert any(event["type"] == "phase" for event in told) or not report["counts"]["clips"]
    return report


def by_name(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {clip["name"]: clip for clip in report["clips"]}


def test_every_clip_is_used_or_left_out_with_a_reason(config):
    report = check(config)
    clips = by_name(report)
    assert {name for name, clip in clips.items() if clip["used"]} == {
        "long.mp4", "copy.mp4", "varying.mp4", "walk",
    }  # fmt: skip
    assert "has no caption" in clips["none.mp4"]["problem"]
    assert clips["none.mp4"]["caption_file"] == "clips/none.txt"
    assert "is damaged or no video" in clips["bad.mp4"]["problem"]
    assert "is too short" in clips["short.mp4"]["problem"]
    assert clips["short.mp4"]["hint"]
    assert report["counts"]["left_out"] == 3 == len(report["problems"])
    assert report["ok"]
    long, varying = clips["long.mp4"], clips["varying.mp4"]
    assert (long["num_frames"], long["fps"], long["constant_rate"]) == (40, 24, True)
    assert long["duration_s"] == pytest.approx(40 / 24, abs=0.01)
    assert varying["constant_rate"] is False
    assert any("frame rate varies" in words for words in varying["warnings"])
    assert any("target_frames 25" in words for words in varying["warnings"])
    assert clips["walk"]["fps"] is None
    assert long["copy_of"] == "clips/copy.mp4", "the first by name is the original"
    assert report["stats"]["copies"] == 1
    assert report["stats"]["varying_rate"] == 1


def test_buckets_are_told_before_anything_is_cached(config):
    report = check(config)
    rows = {row["bucket"]: row for row in report["buckets"]}
    # 5 frames are 2 latent frames of 8 x 16, in patches of 2 x 2; 25 frames are 7.
    assert {name: row["tokens"] for name, row in rows.items()} == {
        "128x64x25": 7 * 4 * 8, "128x64x5": 2 * 4 * 8,
    }  # fmt: skip
    assert (rows["128x64x5"]["items"], rows["128x64x25"]["items"]) == (4, 2)
    assert (rows["128x64x5"]["items_per_epoch"], rows["128x64x5"]["batches"]) == (8, 2)
    assert (rows["128x64x25"]["batches"], rows["128x64x25"]["smaller_batches"]) == (1, 0)
    assert rows["128x64x5"]["share"] == pytest.approx(8 / 12)
    assert report["counts"]["batches_per_epoch"] == 3
    (source,) = report["sources"]
    assert (source["items"], source["items_per_epoch"], source["share"]) == (6, 12, 1.0)
    assert source["cache"]["state"] == "not cached"
    other = check(config, "dataset.general.batch_size=3")
    assert other["counts"]["batches_per_epoch"] == 3, "the source's own batch size wins"


def test_the_report_is_what_caching_then_makes(config):
    report = check(config)
    dataset = load_config(config).dataset.load()
    cached = Models().cache(dataset)
    planned = Counter({row["bucket"]: row["items"] for row in report["buckets"]})
    assert planned == {str(bucket): count for bucket, count in cached.buckets.items()}
    (source,) = check(config)["sources"]
    assert source["cache"]["state"] == "cached"
    assert source["cache"]["entries"] > 0
    assert source["cache"]["bytes"] == check(config)["stats"]["cache_bytes"] > 0
    write_caption(Path("clips/walk"), "another walk")
    (source,) = check(config)["sources"]
    assert source["cache"]["state"] == "out of date"
    assert "walk: its caption has changed" in source["cache"]["detail"]


def test_captions_are_counted_in_tokens_where_there_is_a_tokenizer(config):
    without = check(config)
    assert by_name(without)["copy.mp4"]["caption_tokens"] is None
    assert any("not counted in tokens" in note for note in without["notes"])
    model = tiny_tokenizer(["a red fish", "a fish", "it varies", "a walk"])
    Path("spiece.model").write_bytes(model)
    report = check(config, "model.tokenizer=spiece.model")
    assert not any("not counted in tokens" in note for note in report["notes"])
    clips = by_name(report)
    assert clips["long.mp4"]["caption_tokens"] > LIMIT
    assert any(f"the model reads {LIMIT}" in words for words in clips["long.mp4"]["warnings"])
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model).encode("a fish")
    assert clips["copy.mp4"]["caption_tokens"] == len(pieces) + 1, "and the end mark"
    write_tiny_text_encoder(Path("encoder.safetensors"), ["a red fish", "it varies", "a walk"])
    own = check(config, "model.text_encoder=encoder.safetensors")
    assert by_name(own)["copy.mp4"]["caption_tokens"] is not None
    assert report["stats"]["captions"]["too_long"] == 1


def test_a_strict_dataset_and_one_without_clips_are_not_ok(config):
    report = check(config, "dataset.general.strict=true")
    assert (report["ok"], report["strict"]) == (False, True)
    empty = check(config, 'dataset.sources=[{video_directory = "nowhere"}]')
    assert not empty["ok"]
    assert empty["counts"]["clips"] == 0
    assert "cannot be read" in empty["clips"][0]["problem"]
    with pytest.raises(ConfigError, match="variant"):
        check(config, "model.variant=auto")


def test_clips_for_validation_are_told_apart(config):
    report = check(config, "validation.split=0.3")
    held = {clip["name"] for clip in report["clips"] if clip["validation"]}
    assert held
    assert report["counts"]["validation_clips"] == len(held)
    assert report["counts"]["clips"] + len(held) == 4


def test_damage_further_on_is_found_by_decoding(config):
    frames = "dataset.sources=[{video_directory = 'clips', target_frames = [5, 9]}]"
    last = Path("clips/walk/frame_8.jpg")  # of a PNG the size alone takes reading it whole
    Image.open(last.with_suffix(".png")).save(last)
    last.with_suffix(".png").unlink()
    last.write_bytes(last.read_bytes()[:-100])
    assert by_name(check(config, frames))["walk"]["buckets"] == ["128x64x5", "128x64x9"]
    walk = by_name(check(config, frames, decode=True))["walk"]
    assert (walk["used"], walk["buckets"]) == (True, ["128x64x5"])
    (words,) = walk["warnings"]
    assert words.startswith("its frames 0 to 8 cannot be read: is no readable image")
    last.rename("clips/walk/frame_2.jpg")
    Path("clips/walk/frame_2.png").unlink()
    walk = by_name(check(config, frames, decode=True))["walk"]
    assert not walk["used"]
    assert "its frames 0 to 4 cannot be read" in walk["problem"]
    assert by_name(check(config, frames, decode=True))["long.mp4"]["warnings"] == [
        "has the same content as clips/copy.mp4"
    ]


def test_lists_have_lines_and_no_caption_files(config):
    lines = [{"video_path": "clips/long.mp4", "caption": "x"}, {"video_path": "clips/no.mp4"}]
    Path("list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report = check(
        config, 'dataset.sources=[{video_jsonl_file = "list.jsonl", cache_directory = "c"}]'
    )
    good, bad = sorted(report["clips"], key=lambda clip: not clip["used"])
    assert good["caption_file"] is bad["caption_file"] is None
    assert (bad["name"], bad["line"]) == ("list.jsonl:2", 2)
    row = parse_report(report).rows[0]
    assert (row.name, row.state) == ("list.jsonl:2", "left out")


def preview(config: Path, **options: Any) -> tuple[Told, list[list[int]]]:
    """Run the job; return its events and the numbers that its pictures show, strip by strip."""
    told = Told()
    request = DataPreviewRequest(
        config=config, output=Path("sheet.png"), pictures=Path("pictures"), **options
    )
    data_preview.run(request, told)
    (output,) = [event for event in told if event["type"] == "output"]
    assert output["path"] == "sheet.png"
    shown = [
        [read_number(np.asarray(Image.open(path))) for path in strip["frames"]]
        for strip in output["strips"]
    ]
    return told, shown


def test_the_preview_shows_items_as_they_are_trained(config):
    told, shown = preview(config, match="long", num_frames=3)
    assert shown == [[0, 2, 4], [0, 12, 24]]
    end = told[-1]
    assert end["num_items"] == 2
    assert [item["bucket"] for item in end["items"]] == ["128x64x5", "128x64x25"]
    assert Image.open("pictures/item_000_00.png").size == (128, 64)
    sheet = Image.open("sheet.png")
    assert sheet.width > 3 * 128
    _, resampled = preview(
        config,
        match="long",
        num_frames=5,
        set=('dataset.sources=[{video_directory="clips", target_frames=[5], source_fps=24}]',),
    )
    assert resampled == [[0, 2, 3, 4, 6]] or resampled == [[0, 1, 3, 4, 6]], "24 -> 16 a second"


def test_a_preview_is_spread_over_the_dataset_and_says_what_it_cannot_show(config):
    told, shown = preview(config, num_items=3, num_frames=1)
    assert len(shown) == 3
    names = [Path(item["clip"]).name for item in told[-1]["items"]]
    assert (names[0], names[-1]) == ("copy.mp4", "walk")
    with pytest.raises(DataError, match="no item with 'zebra'"):
        preview(config, match="zebra")


def latents(config: Path) -> dict[str, Any]:
    told = Told()
    data_latents.run(DataLatentsRequest(config=config, output=Path("latents.json")), told)
    assert told[-1]["type"] == "end"
    return json.loads(Path("latents.json").read_text())


def rewrite(file: Path, change: Any) -> None:
    """Change the latents of an entry, and nothing else of it."""
    with safe_open(file, "pt") as entry:
        tensors = {name: entry.get_tensor(name) for name in entry.offset_keys()}
        metadata = entry.metadata()
    save_file({**tensors, "latents": change(tensors["latents"])}, file, metadata)


def test_cached_latents_are_judged(config):
    with pytest.raises(DataError, match="not cached yet"):
        latents(config)
    Models().cache(load_config(config).dataset.load())
    report = latents(config)
    assert report["num_items"] == len(report["items"]) == 4, "copies share their entries"
    assert len(report["channels"]) == 16
    assert report["not_finite"] == 0
    nan, flat, damaged = sorted(Path("clips/menma_cache").glob("*.latents.safetensors"))[:3]
    rewrite(nan, lambda values: values.index_fill(0, torch.tensor([0]), float("nan")))
    rewrite(flat, torch.zeros_like)
    damaged.write_bytes(damaged.read_bytes()[:200])
    report = latents(config)
    found = " ".join(words for item in report["items"] for words in item["findings"])
    assert "are NaN or infinite" in found
    assert "shows next to nothing" in found
    assert report["not_finite"] > 0
    assert [Path(entry["file"]).name for entry in report["damaged"]] == [damaged.name]
    text = next(Path("clips/menma_cache").glob("*.text.safetensors"))
    assert report["captions_not_finite"] == []
    for text in Path("clips/menma_cache").glob("*.text.safetensors"):
        text.write_bytes(b"")
    assert len(latents(config)["captions_not_finite"]) == 6


@given(st.lists(st.floats(-3, 3), min_size=3, max_size=12), st.integers(0, 2**31))
def test_figures_of_latents_are_numpys(shifts, seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(4, 2, 3, 3, generator=generator) + shift for shift in shifts]
    report = latent_report([figures_of(str(n), one) for n, one in enumerate(drawn)], 3.5)
    values = np.stack([one.numpy().astype(np.float64) for one in drawn])

    def assert_close(found, expected, tolerance=1e-3):
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)

    assert_close([report["mean"], report["std"]], [values.mean(), values.std()])
    channels = [channel["std"] for channel in report["channels"]]
    assert_close(channels, values.std((0, 2, 3, 4)))
    means = values.mean((1, 2, 3, 4))
    distance = means - np.median(means)
    z_means = [item["z_mean"] for item in report["items"]]
    assert_close(z_means, 0.6745 * distance / np.median(np.abs(distance)), 1e-2)


def test_an_item_unlike_the_others_stands_out():
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(16, 3, 8, 8, generator=generator) for _ in range(20)]
    drawn[7] = drawn[7] * 5
    report = latent_report([figures_of(str(n), one) for n, one in enumerate(drawn)], 6.0)
    (outlier,) = [item for item in report["items"] if item["findings"]]
    assert (outlier["name"], report["outliers"]) == ("7", 1)
    assert any("far from the VAE's 1" in words for words in outlier["findings"])
    assert any("stands out" in words for words in outlier["findings"])
