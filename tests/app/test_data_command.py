"""`menma data`, with the trainer's jobs called in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_fakes import Models
from data_project import write_project

from app.cli import jobs
from app.cli.jobs import JobResult
from trainer.contract.config_io import load_config
from trainer.contract.jobs import JOBS, REQUESTS
from trainer.jobs.base import run_guarded


@pytest.fixture
def data(menma, tmp_path, monkeypatch):
    """Return `menma data` in a project, its jobs not in a process of their own."""
    write_project(tmp_path)

    def run(job: str, request, *, quiet: bool = False) -> JobResult:
        result = JobResult()

        def emit(kind, /, **fields):
            result.events.append({"type": kind, **fields})

        asked = REQUESTS[job].model_validate(json.loads(json.dumps(dict(request))))
        result.exit_code = run_guarded(lambda: JOBS.load(job)(asked, emit), emit)
        return result

    monkeypatch.setattr(jobs, "run", run)
    return lambda *arguments: menma("data", *arguments)


def test_check_lists_buckets_and_what_is_left_out_and_why(data):
    answer = data("check", "tiny.toml")
    assert answer.code == 0
    lines = [line.split() for line in answer.out.splitlines()]
    assert lines[0] == ["BUCKET", "ITEMS", "EPOCH", "SHARE", "BATCHES", "SMALLER", "TOKENS"]
    assert lines[1] == ["128x64x25", "2", "4", "33.3%", "1", "0", "224"]
    assert "clips/none.mp4   has no caption: there is no none.txt" in answer.out
    assert "clips/varying.mp4  its frame rate varies" in answer.out
    assert "4 clips, 6 items, 3 batches an epoch, 3 left out, 3 with warnings." in answer.err
    assert "source_fps" in answer.err


def test_check_says_by_its_code_whether_caching_would_go_on(data):
    answer = data("check", "tiny.toml", "--json", "--set", "dataset.general.strict=true")
    assert answer.code == 2
    report = json.loads(answer.out)
    assert (report["ok"], report["counts"]["left_out"]) == (False, 3)
    assert {clip["name"] for clip in report["clips"] if not clip["used"]} == {
        "bad.mp4", "none.mp4", "short.mp4",
    }  # fmt: skip
    plain = data("check", "tiny.toml", "--set", "dataset.general.strict=true", "--decode")
    assert plain.code == 2
    assert "caching would stop: the dataset is strict" in plain.err
    assert data("check", "nowhere.toml").code == 2
    assert data("check", "tiny.toml", "--set", "training.max_steps=0").code == 2


def test_stats_are_figures_and_stable_json(data):
    answer = data("stats", "tiny.toml")
    assert answer.code == 0
    assert "SOURCE  CLIPS  UNUSED" in answer.out
    assert "128x64 (4)" in answer.out
    assert "not cached" in answer.out
    assert "(model: 16)" in answer.out
    report = json.loads(data("stats", "tiny.toml", "--json").out)
    assert set(report) == {
        "config", "ok", "strict", "variant", "model_fps", "caption_limit", "counts", "sources",
        "buckets", "notes", "stats",
    }  # fmt: skip
    assert set(report["stats"]) == {
        "num_frames", "duration_s", "resolutions", "fps", "varying_rate", "enlarged", "copies",
        "captions", "tokens", "cache_bytes",
    }  # fmt: skip


def test_preview_writes_a_sheet(data):
    answer = data("preview", "tiny.toml", "-o", "sheets/one.png", "--items", "2", "--frames", "2")
    assert answer.code == 0
    assert "2 of 6 items" in answer.err
    assert Path("sheets/one.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(data("preview", "tiny.toml", "--match", "walk", "--json").out)
    assert found["output"] == "preview.png"
    assert [item["bucket"] for item in found["items"]] == ["128x64x5"]
    assert data("preview", "tiny.toml", "--match", "zebra").code == 2


def test_latents_fail_where_something_is_damaged(data):
    assert data("latents", "tiny.toml").code == 2
    Models().cache(load_config("tiny.toml").dataset.load())
    answer = data("latents", "tiny.toml", "--z-limit", "1000")
    assert answer.code == 0
    assert "4 items: mean" in answer.err
    next(Path("clips/menma_cache").glob("*.latents.safetensors")).write_bytes(b"")
    answer = data("latents", "tiny.toml", "--json")
    assert answer.code == 1
    assert len(json.loads(answer.out)["damaged"]) == 1
